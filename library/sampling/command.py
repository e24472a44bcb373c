"""The options of gen_img.py, made of the same fields as those of the trainers. No torch at module level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from library.options.convert import UNSET, BadValue, convert, shown
from library.options.flag import Flag, flag, flags_of
from library.options.mistakes import Mistakes
from library.options.sources import COMMAND_LINE, read_command_line
from library.sampling.prompts import PictureRequest
from library.sampling.samplers import SAMPLERS, check_sampler


@dataclass(frozen=True)
class GenerateOptions:
    """What gen_img.py is told, in kohya's spelling."""

    ckpt: str | None = flag(None, "the model: a .safetensors or .ckpt file, or a diffusers folder")
    prompt: str | None = flag(None, "what to draw; may carry options such as --n, --w, --h, --s, --l, --d, --ss")
    from_file: Path | None = flag(None, "a file of prompts (.txt, .toml or .json) instead of --prompt")
    outdir: Path = flag(Path("outputs"), "folder for the pictures; made if it is missing")
    W: int = flag(512, "width in pixels, where the prompt does not say", at_least=64, at_most=8192)
    H: int = flag(512, "height in pixels, where the prompt does not say", at_least=64, at_most=8192)
    steps: int = flag(50, "steps of the sampler, where the prompt does not say", at_least=1, at_most=1000)
    scale: float = flag(7.5, "strength of the prompt (guidance), where the prompt does not say; 1 = no guidance")
    seed: int | None = flag(None, "seed of the first picture; each further one counts up. Not set: any", at_least=0)
    sampler: str = flag("ddim", "sampler, where the prompt does not say", choices=tuple(SAMPLERS))
    images_per_prompt: int = flag(1, "pictures for each prompt", at_least=1)
    vae: str | None = flag(None, "a VAE (file or folder) instead of the model's own")
    v2: bool = flag(False, "the model is Stable Diffusion 2.x; the file itself tells, a contradiction is an error")
    v_parameterization: bool = flag(False, "the model predicts v; a diffusers folder tells itself")
    clip_skip: int | None = flag(None, "take the k-th last layer of the text encoder", at_least=1, zero_is_off=True)
    max_embeddings_multiples: int = flag(3, "chunks of 75 tokens that a long prompt may take", at_least=1)
    tokenizer_cache_dir: Path | None = flag(None, "folder for the tokenizer's files")
    device: str | None = flag(None, "not set: the best that is there", choices=("cuda", "mps", "cpu"))
    fp16: bool = flag(False, "compute in fp16 (graphics cards only)")
    bf16: bool = flag(False, "compute in bf16")
    no_half_vae: bool = flag(False, "decode in fp32 all the same")


FLAGS: Mapping[str, Flag] = MappingProxyType({each.name: each for each in flags_of("generate", GenerateOptions)})


def parse(words: Sequence[str]) -> GenerateOptions:
    """The options of a command line. Raises UserError with every mistake of it."""
    mistakes = Mistakes()
    values: dict[str, Any] = {}
    for given in read_command_line(words, lambda name: FLAGS[name].kind if name in FLAGS else None, mistakes):
        if given.name not in FLAGS:
            mistakes.add(f"--{given.name} ({COMMAND_LINE}) is no flag of this program", "--help lists all flags")
            continue
        try:
            value, _ = convert(FLAGS[given.name], given.raw)
        except BadValue as bad:
            mistakes.add(f"--{given.name} = {shown(given.raw)} ({COMMAND_LINE}) {bad.fault}", bad.remedy)
            continue
        if value is not UNSET:
            values[given.name] = value
    options = GenerateOptions(**values)
    _check(options, mistakes)
    mistakes.raise_if_any()
    return options


def _check(options: GenerateOptions, mistakes: Mistakes) -> None:
    if options.ckpt is None:
        mistakes.add("no --ckpt", "give the model: --ckpt model.safetensors")
    if (options.prompt is None) == (options.from_file is None):
        mistakes.add("it needs either --prompt or --from_file", 'give one of them, such as --prompt "a photo of a dog"')
    if options.fp16 and options.bf16:
        mistakes.add("--fp16 and --bf16 exclude each other", "keep one of them")
    if (wrong := check_sampler(options.sampler)) is not None:
        mistakes.extend([wrong])
    for name, side in (("W", options.W), ("H", options.H)):
        if side % 8:
            mistakes.add(f"--{name} {side} is not a multiple of 8", f"use {side - side % 8} or {side - side % 8 + 8}")


def defaults(options: GenerateOptions) -> PictureRequest:
    """What holds for prompts that do not say otherwise."""
    return PictureRequest(
        "", width=options.W, height=options.H, steps=options.steps, scale=options.scale, sampler=options.sampler
    )


def help_text() -> str:
    """What --help prints."""
    lines = ["Draw pictures with a model.", "", 'usage: python gen_img.py --ckpt MODEL --prompt "..." [more flags]', ""]
    for each in FLAGS.values():
        choices = f". One of {', '.join(each.choices)}" if each.choices else ""
        default = choices + ("." if each.default in (None, False) else f". Default: {each.default}.")
        lines.append(
            f"  --{each.name}".ljust(30) + ("" if each.kind == "switch" else f"[{each.kind}] ") + each.help + default
        )
    return "\n".join(lines)
