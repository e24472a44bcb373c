"""What the programs that draw are told, made of the same fields as the options of the trainers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.flag import flag
from library.options.groups.caption import CaptionOptions
from library.options.mistakes import Mistakes
from library.sampling.prompts import ImageRequest
from library.sampling.samplers import SAMPLERS, check_sampler

DRAWN_SO_FAR = "interrupted: the images drawn so far stand"
LARGEST_SEED = 10**18  # with room to count up below what torch takes


@dataclass(frozen=True)
class DrawingOptions:
    """What all of them share, in kohya's spelling. `required`: the flags that must be set, with the way out."""

    required: ClassVar[Mapping[str, str]] = {"ckpt": "give the model: --ckpt model.safetensors"}

    ckpt: str | None = flag(None, "the model: a .safetensors or .ckpt file, or a diffusers folder")
    prompt: str | None = flag(None, "what to draw; may carry options such as --n, --w, --h, --s, --l, --d, --ss")
    from_file: Path | None = flag(None, "a file of prompts (.txt, .toml or .json) instead of --prompt")
    negative_prompt: str = flag("", "what not to draw, where the prompt does not say")
    W: int | None = flag(
        None, "width in pixels, where the prompt does not say. Not set: the model's own", at_least=64, at_most=8192
    )
    H: int | None = flag(
        None, "height in pixels, where the prompt does not say. Not set: the model's own", at_least=64, at_most=8192
    )
    steps: int = flag(50, "steps of the sampler, where the prompt does not say", at_least=1, at_most=1000)
    scale: float = flag(7.5, "strength of the prompt (guidance), where the prompt does not say; 1 = no guidance")
    sampler: str = flag("ddim", "sampler, where the prompt does not say", choices=tuple(SAMPLERS))
    seed: int | None = flag(
        None, "seed of the first image; each further one counts up. Not set: any", at_least=0, at_most=LARGEST_SEED
    )
    batch_size: int = flag(1, "images drawn at once; those of equal settings in turn are", at_least=1)
    vae: str | None = flag(None, "a VAE (file or folder) instead of the model's own")
    v2: bool = flag(False, "the model is Stable Diffusion 2.x; the file itself tells, a contradiction is an error")
    sdxl: bool = flag(False, "the model is Stable Diffusion XL; the file itself tells, a contradiction is an error")
    v_parameterization: bool = flag(False, "the model predicts v; a diffusers folder tells itself")
    clip_skip: int | None = flag(None, "take the k-th last layer of the text encoder", at_least=1, zero_is_off=True)
    max_embeddings_multiples: int = flag(3, "chunks of 75 tokens that a long prompt may take", at_least=1)
    tokenizer_cache_dir: Path | None = flag(None, "folder for the tokenizer's files")
    device: str | None = flag(None, "not set: the best that is there", choices=("cuda", "mps", "cpu"))
    fp16: bool = flag(False, "compute in fp16 (graphics cards only)")
    bf16: bool = flag(False, "compute in bf16")
    no_half_vae: bool = flag(False, "decode in fp32 all the same")


@dataclass(frozen=True)
class GenerateOptions(DrawingOptions):
    """What gen_img.py is told."""

    outdir: Path = flag(Path("outputs"), "folder for the images; made if it is missing")
    images_per_prompt: int = flag(1, "images for each prompt", at_least=1)
    zero_terminal_snr: bool = flag(False, "the model predicts v and was trained with --zero_terminal_snr")
    image_path: Path | None = flag(None, "an image to begin with in place of noise; its size is taken if none is given")
    strength: float | None = flag(
        None,
        "with --image_path: the share of the timesteps that it is refined in. Not set: 0.8, of a refiner 0.2",
        above=0,
        at_most=1,
    )


@dataclass(frozen=True)
class ClassImageOptions(DrawingOptions):
    """What tools/make_class_images.py is told."""

    required: ClassVar[Mapping[str, str]] = {
        **DrawingOptions.required,
        "outdir": "give the class folder, <repeats>_<class>: --outdir reg/1_dog",
    }

    outdir: Path | None = flag(None, "the class folder, such as reg/1_dog; made if it is missing")
    count: int = flag(200, "images that the folder is to hold; several prompts are taken in turn", at_least=1)
    write_captions: bool = flag(False, "write the prompt beside each image as its caption")
    caption_extension: str = flag(
        CaptionOptions.caption_extension, "file ending of these captions; the training must be told the same"
    )
    dry_run: bool = flag(False, "say what is missing and stop before the model is loaded")


def check(options: DrawingOptions, mistakes: Mistakes) -> None:
    """Add what is wrong with options as a whole: what is missing, what excludes each other."""
    for name, remedy in options.required.items():
        if getattr(options, name) is None:
            mistakes.add(f"no --{name}", remedy)
    if (options.prompt is None) == (options.from_file is None):
        mistakes.add("it needs either --prompt or --from_file", 'give one of them, such as --prompt "a photo of a dog"')
    if options.fp16 and options.bf16:
        mistakes.add("--fp16 and --bf16 exclude each other", "keep one of them")
    if (wrong := check_sampler(options.sampler)) is not None:
        mistakes.extend([wrong])
    for name, side in (("W", options.W), ("H", options.H)):
        if side is not None and side % 8:
            mistakes.add(f"--{name} {side} is not a multiple of 8", f"use {side - side % 8} or {side - side % 8 + 8}")


def defaults(options: DrawingOptions, size: tuple[int, int]) -> ImageRequest:
    """What holds for prompts that do not say otherwise. `size`: (width, height) of the model's own images."""
    return ImageRequest(
        "",
        negative_prompt=options.negative_prompt,
        width=options.W or size[0],
        height=options.H or size[1],
        steps=options.steps,
        scale=options.scale,
        sampler=options.sampler,
    )
