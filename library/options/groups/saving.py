"""What is written, when, and what it says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from library.options.flag import flag

SaveModelAs = Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors", "pt"]


@dataclass(frozen=True)
class SavingOptions:
    """Models and states that are written."""

    may_change_on_resume: ClassVar[bool] = True

    output_dir: Path | None = flag(None, "Folder for everything that the run writes; it is made if it does not exist.")
    output_name: str | None = flag(
        None, "Name of the written files without ending; not set = last.", metadata="ss_output_name"
    )
    save_model_as: SaveModelAs | None = flag(
        None,
        "Format of what is saved; not set = the same kind as the model that was loaded, for an adapter safetensors. An "
        "adapter is saved as ckpt, pt or safetensors, a model not as pt.",
        choices=get_args(SaveModelAs),
    )
    use_safetensors: bool = flag(
        False,
        "Without save_model_as: save as .safetensors also where the loaded model is a .ckpt.",
        script="train_db.py",
        neutral_elsewhere=(True,),
    )
    save_precision: str | None = flag(
        None,
        "Precision of saved weights; not set = float, unless full_fp16 or full_bf16 is on.",
        choices=("float", "fp16", "bf16"),
    )
    save_every_n_epochs: int | None = flag(
        None, "Save a model after every n-th epoch; 0 = off.", at_least=1, zero_is_off=True
    )
    save_every_n_steps: int | None = flag(
        None, "Save a model after every n-th step; 0 = off.", at_least=1, zero_is_off=True
    )
    save_n_epoch_ratio: int | None = flag(
        None,
        "Save about this many models over the whole training, at ends of epochs; 0 = off.",
        at_least=1,
        zero_is_off=True,
    )
    save_last_n_epochs: int | None = flag(
        None,
        "Keep the models of the last n saved epochs and delete older ones; 0 = keep all.",
        at_least=1,
        zero_is_off=True,
    )
    save_last_n_epochs_state: int | None = flag(
        None, "The same for training states; not set = as save_last_n_epochs.", at_least=1, zero_is_off=True
    )
    save_last_n_steps: int | None = flag(
        None,
        "Keep the models of the last n steps (a number of steps, not of files) and delete older ones; 0 = keep all.",
        at_least=1,
        zero_is_off=True,
    )
    save_last_n_steps_state: int | None = flag(
        None, "The same for training states; not set = as save_last_n_steps.", at_least=1, zero_is_off=True
    )
    save_state: bool = flag(
        False, "Save the training state with every saved model and at the end, to go on from there later."
    )
    save_state_on_train_end: bool = flag(False, "Save the training state at the end only.")
    resume: Path | None = flag(None, "Folder of a saved training state: training goes on exactly where it was saved.")
    write_inference_yaml: bool = flag(
        False,
        "Write the .yaml that WebUIs need to load a single file of Stable Diffusion 2 beside it.",
        needs="inference_yaml",
        script="train_db.py",
    )
    training_comment: str | None = flag(
        None, "Comment of your own in the metadata of the written file.", metadata="ss_training_comment"
    )
    metadata_title: str | None = flag(
        None, "Title in the file's metadata; not set = output_name.", metadata="modelspec.title"
    )
    metadata_author: str | None = flag(None, "Author in the file's metadata.", metadata="modelspec.author")
    metadata_description: str | None = flag(
        None, "Description in the file's metadata.", metadata="modelspec.description"
    )
    metadata_license: str | None = flag(None, "Licence in the file's metadata.", metadata="modelspec.license")
    metadata_tags: str | None = flag(
        None, "Tags in the file's metadata, separated by commas.", metadata="modelspec.tags"
    )
    metadata_usage_hint: str | None = flag(
        None, "Hint for users in the file's metadata.", metadata="modelspec.usage_hint"
    )
    metadata_thumbnail: str | None = flag(
        None, "Small image for the file's metadata: an image file or a data: URL.", metadata="modelspec.thumbnail"
    )
    metadata_merged_from: str | None = flag(
        None, "Models this one was merged from, for the file's metadata.", metadata="modelspec.merged_from"
    )
    metadata_trigger_phrase: str | None = flag(
        None, "Words that call up the subject, for the file's metadata.", metadata="modelspec.trigger_phrase"
    )
    metadata_preprocessor: str | None = flag(
        None, "Preprocessor the model expects, for the file's metadata.", metadata="modelspec.preprocessor"
    )
    metadata_is_negative_embedding: str | None = flag(
        None, "Whether the file is a negative embedding, for its metadata.", metadata="modelspec.is_negative_embedding"
    )
