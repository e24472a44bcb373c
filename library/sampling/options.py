"""Command-line options of the programs that draw images. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.flag import flag
from library.options.groups.caption import CaptionOptions
from library.options.groups.dataset import DatasetOptions
from library.options.mistakes import Mistakes
from library.runtime.device import DEVICES
from library.sampling.prompts import ImageRequest
from library.sampling.samplers import SAMPLERS, check_sampler

INTERRUPTED = "interrupted: images drawn so far are kept"
LARGEST_SEED = 10**18  # leaves room to count up to torch's limit
_ALWAYS_MERGED = "for sd-scripts compatibility: has no effect, as adapters are always merged"
_SPEED = "remove it: it changes only speed and memory"
_CONTROL_NET = "remove it: ControlNet is not supported"
# flags of sd-scripts' gen_img.py that ours does not have -> what to do instead
REMEDIES: Mapping[str, str] = {
    "network_args": "remove it: the file says all that is needed",
    "network_show_meta": "remove it; tools/show_metadata.py prints the metadata of a file",
    "network_regional_mask_max_color_codes": "remove it: an adapter applies to the whole image",
    "v1": "remove it: the family is detected from the file",
    "n_iter": "use --images_per_prompt",
    "from_module": "write the prompts into a file: --from_file",
    "mask_path": "remove it: inpainting is not supported",
    "negative_scale": "remove it: --scale applies to both prompts",
    **dict.fromkeys(("guide_image_path", "control_net_models", "control_net_lllite_models"), _CONTROL_NET),
    **dict.fromkeys(("xformers", "sdpa", "diffusers_xformers", "opt_channels_last"), _SPEED),
    **dict.fromkeys(("vae_batch_size", "vae_slices"), _SPEED),
}


@dataclass(frozen=True)
class DrawingSettings:
    """How images are drawn, whatever the prompts: options named as in sd-scripts. `required`: flags that must be set,
    each with its remedy."""

    required: ClassVar[Mapping[str, str]] = {"ckpt": "give the model: --ckpt model.safetensors"}

    ckpt: str | None = flag(None, "the model: a .safetensors or .ckpt file, or a diffusers folder")
    negative_prompt: str = flag("", "default negative prompt")
    W: int | None = flag(None, "default width in pixels. Not set: the model's own", at_least=64, at_most=8192)
    H: int | None = flag(None, "default height in pixels. Not set: the model's own", at_least=64, at_most=8192)
    steps: int = flag(50, "default number of sampling steps", at_least=1, at_most=1000)
    scale: float = flag(7.5, "default guidance scale; 1 = no guidance")
    sampler: str = flag("ddim", "default sampler", choices=tuple(SAMPLERS))
    seed: int | None = flag(
        None,
        "seed of the first image, counting up for the others. Not set: random",
        at_least=0,
        at_most=LARGEST_SEED,
        too_low="leave --seed out for a new one each time",
    )
    batch_size: int = flag(1, "images drawn at once, if their settings are the same", at_least=1)
    vae: str | None = flag(None, "VAE (file or folder) to use instead of the model's own")
    v2: bool = flag(False, "the model is Stable Diffusion 2.x; detected from the file, an error if it is not")
    sdxl: bool = flag(False, "the model is Stable Diffusion XL; detected from the file, an error if it is not")
    v_parameterization: bool = flag(False, "the model uses v-prediction; diffusers folders declare it themselves")
    clip_skip: int | None = flag(None, "use the k-th last layer of the text encoder", at_least=1, zero_is_off=True)
    max_embeddings_multiples: int = flag(3, "maximum number of 75-token chunks of a long prompt", at_least=1)
    tokenizer_cache_dir: Path | None = flag(None, "folder for tokenizer files")
    device: str | None = flag(None, "device to compute on. Not set: the best available", choices=DEVICES)
    fp16: bool = flag(False, "compute in fp16 (GPU only)")
    bf16: bool = flag(False, "compute in bf16")
    no_half_vae: bool = flag(False, "decode in fp32 even with --fp16 or --bf16")


@dataclass(frozen=True)
class DrawingOptions(DrawingSettings):
    """Shared options of programs that draw the user's prompts, with adapters."""

    prompt: str | None = flag(None, "the prompt; may contain options such as --n, --w, --h, --s, --l, --d, --ss")
    from_file: Path | None = flag(None, "a file of prompts (.txt, .toml or .json) instead of --prompt")
    network_weights: tuple[Path, ...] = flag((), "adapter files to draw with: LoRA and its relatives, of any kind")
    network_mul: tuple[float, ...] = flag((), "multiplier of each file of --network_weights. Not set: 1")
    network_module: tuple[str, ...] = flag(
        (), "network module of each file of --network_weights; only needed for third-party modules"
    )
    network_dir: Path | None = flag(None, "folder of adapter files that prompts name: <lora:name:0.8>")


@dataclass(frozen=True)
class GenerateOptions(DrawingOptions):
    """Options of gen_img.py."""

    outdir: Path = flag(Path("outputs"), "folder for the images, created if missing")
    images_per_prompt: int = flag(1, "number of images per prompt", at_least=1)
    network_merge: bool = flag(False, _ALWAYS_MERGED)
    network_merge_n_models: int | None = flag(None, _ALWAYS_MERGED, at_least=0)
    network_pre_calc: bool = flag(False, _ALWAYS_MERGED)
    zero_terminal_snr: bool = flag(False, "the model uses v-prediction and was trained with --zero_terminal_snr")
    image_path: Path | None = flag(None, "image to start from (image-to-image), which sets the default size")
    strength: float | None = flag(
        None,
        "with --image_path: denoising strength, the share of the timesteps that run. Not set: 0.8, refiner 0.2",
        above=0,
        at_most=1,
    )
    max_image_memory: float = flag(
        DatasetOptions.max_image_memory,
        "with --image_path: memory in GiB that the decoded image may need, at 4 bytes per pixel",
        above=0,
    )


@dataclass(frozen=True)
class ClassImageOptions(DrawingOptions):
    """Options of tools/make_class_images.py."""

    required: ClassVar[Mapping[str, str]] = {
        **DrawingOptions.required,
        "outdir": "give the class folder, <repeats>_<class>: --outdir reg/1_dog",
    }

    outdir: Path | None = flag(None, "the class folder, such as reg/1_dog, created if missing")
    count: int = flag(200, "number of images in the folder; prompts are used in turn", at_least=1)
    write_captions: bool = flag(False, "write each prompt as a caption file")
    caption_extension: str = flag(
        CaptionOptions.caption_extension, "extension of the caption files; use the same for training"
    )
    dry_run: bool = flag(False, "list what is missing, without loading the model")


def check(options: DrawingOptions, mistakes: Mistakes) -> None:
    """Add mistakes for missing flags and for flags that exclude each other."""
    check_settings(options, mistakes)
    if (options.prompt is None) == (options.from_file is None):
        mistakes.add("either --prompt or --from_file is required", 'add one, such as --prompt "a photo of a dog"')


def check_settings(options: DrawingSettings, mistakes: Mistakes) -> None:
    """`check`, without the prompts."""
    for name, remedy in options.required.items():
        if getattr(options, name) is None:
            mistakes.add(f"no --{name}", remedy)
    if options.fp16 and options.bf16:
        mistakes.add("--fp16 and --bf16 exclude each other", "keep one of them")
    if (wrong := check_sampler(options.sampler)) is not None:
        mistakes.extend([wrong])
    for name, side in (("W", options.W), ("H", options.H)):
        if side is not None and side % 8:
            mistakes.add(f"--{name} {side} is not a multiple of 8", f"use {side - side % 8} or {side - side % 8 + 8}")


def defaults(options: DrawingSettings, size: tuple[int, int]) -> ImageRequest:
    """Return the default settings of prompts. `size`: (width, height) of the model's own images."""
    return ImageRequest(
        "",
        negative_prompt=options.negative_prompt,
        width=options.W or size[0],
        height=options.H or size[1],
        steps=options.steps,
        scale=options.scale,
        sampler=options.sampler,
    )
