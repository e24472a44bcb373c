"""Which model is trained and how its text is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.flag import ReadAs, flag


@dataclass(frozen=True)
class ModelOptions:
    """The model to train."""

    pretrained_model_name_or_path: str | None = flag(
        None,
        "Model to start from: a .safetensors or .ckpt file in the original layout, a diffusers folder, or the name of "
        "a model that is in the local Hugging Face cache; nothing is downloaded.",
        may_change_on_resume=True,
        private=True,
    )
    v2: bool = flag(
        False,
        "The model is a Stable Diffusion 2. The file itself tells, so this only refuses another one.",
        metadata="ss_v2",
        needs="v2",
        may_change_on_resume=True,
    )
    v_parameterization: bool = flag(
        False,
        "Train with v-prediction, as the 768-pixel models of Stable Diffusion 2 need it.",
        needs="v_prediction",
        may_change_on_resume=True,
    )
    vae: str | None = flag(
        None,
        "VAE to use in place of the model's own: a .safetensors, .ckpt, .pt or .bin file, or a diffusers folder.",
        private=True,
    )
    tokenizer_cache_dir: Path | None = flag(
        None,
        "Folder with tokenizers saved earlier. The tokenizer of Stable Diffusion ships with the program, so "
        "that none is needed.",
        may_change_on_resume=True,
    )
    clip_skip: int | None = flag(
        None,
        "Take the text encoder's output this many layers before its end (1 = the last layer). Not set: as "
        "the model was trained.",
        at_least=1,
        zero_is_off=True,
        needs="clip_skip",
        metadata="ss_clip_skip",
        neutral=(1, 2),  # front-ends always write it; where only the penultimate layer is taken, 2 says so
    )
    max_token_length: int | None = flag(
        None,
        "Longest caption in tokens; longer captions are read as chunks of 75. Not set = 75.",
        choices=(150, 225),
        zero_is_off=True,
        read_as=(
            ReadAs(75, None),
            ReadAs(255, 225, "255 is what lora-scripts writes for three chunks of 75"),
        ),
        needs="chunks",
        metadata="ss_max_token_length",
    )
    no_token_padding: bool = flag(
        False,
        "Pad captions only to the longest of their batch, as the original DreamBooth did, and not to 75 tokens.",
        needs="unpadded",
    )
    text_projection: str = flag(
        "published",
        "How the pooled vector of Stable Diffusion XL is computed from the matrix in the file: published = as the "
        "model was trained, kohya = with the matrix transposed, as sd-scripts reads it from a file (not from a "
        "diffusers folder).",
        choices=("published", "kohya"),
        needs="pooled",
    )
    disable_mmap_load_safetensors: bool = flag(
        False,
        "Read the model's tensors one after the other instead of mapping its file into memory: faster on some network "
        "drives and on Windows' drives seen from WSL.",
        may_change_on_resume=True,
    )
