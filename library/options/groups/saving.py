"""Options of saved models, training states and their metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from library.options.flag import flag

SaveModelAs = Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors", "pt"]


@dataclass(frozen=True)
class SavingOptions:
    """Format, time and metadata of saved models and training states."""

    may_change_on_resume: ClassVar[bool] = True

    output_dir: Path | None = flag(None, "Folder for everything the run writes; created if it does not exist.")
    output_name: str | None = flag(
        None, "Name of the saved files, without extension; not set = last.", metadata="ss_output_name"
    )
    save_model_as: SaveModelAs | None = flag(
        None,
        "Format of saved files; not set = that of the base model, safetensors for an adapter. Adapters are saved "
        "as ckpt, pt or safetensors, models not as pt.",
        choices=get_args(SaveModelAs),
    )
    use_safetensors: bool = flag(
        False,
        "Without save_model_as: save as .safetensors even if the base model is a .ckpt.",
        script="train_db.py",
        neutral_elsewhere=(True,),
    )
    save_precision: str | None = flag(
        None,
        "Precision of saved weights; not set = float, or that of full_fp16 or full_bf16.",
        choices=("float", "fp16", "bf16"),
    )
    save_every_n_epochs: int | None = flag(
        None, "Save the model every n epochs; 0 = off.", at_least=1, zero_is_off=True
    )
    save_every_n_steps: int | None = flag(None, "Save the model every n steps; 0 = off.", at_least=1, zero_is_off=True)
    save_n_epoch_ratio: int | None = flag(
        None,
        "Save about n models over the whole training, at the end of epochs; 0 = off.",
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
        None, "The same for training states; not set = save_last_n_epochs.", at_least=1, zero_is_off=True
    )
    save_last_n_steps: int | None = flag(
        None,
        "Keep the models of the last n steps (steps, not files) and delete older ones; 0 = keep all.",
        at_least=1,
        zero_is_off=True,
    )
    save_last_n_steps_state: int | None = flag(
        None, "The same for training states; not set = save_last_n_steps.", at_least=1, zero_is_off=True
    )
    save_state: bool = flag(
        False, "Save the training state with every saved model and at the end, to resume from later."
    )
    save_state_on_train_end: bool = flag(False, "Save the training state at the end only.")
    resume: Path | None = flag(
        None,
        "Folder of a saved training state; training continues exactly where it was saved. auto = the newest whole "
        "state of this run in output_dir; the run starts anew if there is none.",
    )
    write_inference_yaml: bool = flag(
        False,
        "Write the .yaml that web UIs need beside a single-file Stable Diffusion 2 model.",
        needs="inference_yaml",
        script="train_db.py",
    )
    training_comment: str | None = flag(None, "Comment in the metadata of saved files.", metadata="ss_training_comment")
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
        None, "Thumbnail in the file's metadata: an image file or a data: URL.", metadata="modelspec.thumbnail"
    )
    metadata_merged_from: str | None = flag(
        None, "Models this one was merged from, in the file's metadata.", metadata="modelspec.merged_from"
    )
    metadata_trigger_phrase: str | None = flag(
        None, "Trigger words of the subject, in the file's metadata.", metadata="modelspec.trigger_phrase"
    )
    metadata_preprocessor: str | None = flag(
        None, "Preprocessor the model expects, in the file's metadata.", metadata="modelspec.preprocessor"
    )
    metadata_is_negative_embedding: str | None = flag(
        None, "Whether the file is a negative embedding, in its metadata.", metadata="modelspec.is_negative_embedding"
    )
