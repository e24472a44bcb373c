"""Options of the base model, its text encoders and its VAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.flag import ReadAs, flag


@dataclass(frozen=True)
class ModelOptions:
    """The base model and how its text encoders are used."""

    pretrained_model_name_or_path: str | None = flag(
        None,
        "Base model: a .safetensors or .ckpt file in the original layout, a diffusers folder, or the name of a "
        "model in the local Hugging Face cache; nothing is downloaded.",
        may_change_on_resume=True,
        private=True,
    )
    v2: bool = flag(
        False,
        "Expect a Stable Diffusion 2 base model. The version is detected from the file; this only rejects another one.",
        metadata="ss_v2",
        needs="v2",
        may_change_on_resume=True,
    )
    v_parameterization: bool = flag(
        False,
        "Train with v-prediction, which the 768-pixel models of Stable Diffusion 2 need.",
        needs="v_prediction",
        may_change_on_resume=True,
    )
    vae: str | None = flag(
        None,
        "VAE to use instead of the base model's own: a .safetensors, .ckpt, .pt or .bin file, or a diffusers folder.",
        private=True,
    )
    tokenizer_cache_dir: Path | None = flag(
        None,
        "Folder of saved tokenizers. Stable Diffusion needs none: its tokenizer ships with the program.",
        may_change_on_resume=True,
    )
    clip_skip: int | None = flag(
        None,
        "Use the text encoder's n-th layer from the end (1 = the last layer); not set = as the model was trained.",
        at_least=1,
        zero_is_off=True,
        needs="clip_skip",
        metadata="ss_clip_skip",
        neutral=(1, 2),  # front-ends always write it; 2 is right for a model that always uses the penultimate layer
    )
    max_token_length: int | None = flag(
        None,
        "Maximum caption length in tokens, encoded in chunks of 75; not set = 75.",
        choices=(150, 225),
        zero_is_off=True,
        read_as=(
            ReadAs(75, None),
            ReadAs(255, 225, "lora-scripts writes 255 for three chunks of 75"),
        ),
        needs="chunks",
        metadata="ss_max_token_length",
    )
    no_token_padding: bool = flag(
        False,
        "Pad captions to the longest of their batch instead of 75 tokens, as the original DreamBooth did.",
        needs="unpadded",
    )
    text_projection: str = flag(
        "published",
        "Text projection for the pooled vector of Stable Diffusion XL: published = as the model was trained, kohya"
        " = transposed, as sd-scripts reads it from a file (not from a diffusers folder).",
        choices=("published", "kohya"),
        needs="pooled",
    )
    disable_mmap_load_safetensors: bool = flag(
        False,
        "Read the base model's tensors one by one instead of memory-mapping the file: faster on some network "
        "drives and on Windows drives seen from WSL.",
        may_change_on_resume=True,
    )
