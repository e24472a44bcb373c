"""sd-scripts' command line for tools/convert_checkpoint.py: a checkpoint to a diffusers folder, or back.

python tools/convert_diffusers20_original_sd.py model.safetensors model_folder --use_safetensors
python tools/convert_diffusers20_original_sd.py model_folder model.safetensors --fp16

A target with an extension is a checkpoint, one without is a folder. An existing target is replaced, as in sd-scripts.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, run_tool
from tools.convert_checkpoint import Request, convert_model, read
from tools.lora_files import PRECISIONS


@dataclass(frozen=True)
class ConvertOptions:
    """Command-line options, named as in sd-scripts."""

    model_to_load: str = flag(None, "a checkpoint, a diffusers folder, or a hub name in the local cache")
    model_to_save: Path = flag(None, "a checkpoint (with an extension) or a diffusers folder (without)")
    v1: bool = flag(False, "the model is Stable Diffusion 1.x; detected from the file, an error if it is 2.x")
    v2: bool = flag(False, "the model is Stable Diffusion 2.x; detected from the file, an error if it is not")
    unet_use_linear_projection: bool = flag(False, "no effect: folders of 2.x are always written so")
    fp16: bool = flag(False, "write weights in fp16, in folders too. No precision set: unchanged")
    bf16: bool = flag(False, "write weights in bf16")
    float: bool = flag(False, "write weights in float32")
    save_precision_as: str | None = flag(None, "the same as one flag", choices=("no", *PRECISIONS))
    epoch: int = flag(0, "added to the epoch in a .ckpt")
    global_step: int = flag(0, "added to the step in a .ckpt")
    metadata: str | None = flag(None, """metadata for a .safetensors, as '{"name": "value"}'""")
    variant: str | None = flag(None, "variant of a diffusers folder to read, such as fp16")
    reference_model: str | None = flag(
        None,
        "a local diffusers folder to take scheduler and tokenizers from; without it they are made here",
    )
    use_safetensors: bool = flag(False, "write folders with .safetensors files. Not set: .bin")


def check(options: ConvertOptions, mistakes: Mistakes) -> None:
    """Add mistakes that concern more than one flag."""
    precisions = _precisions(options)
    if len(precisions) > 1:
        mistakes.add(f"more than one precision: {', '.join(precisions)}", "keep one of them")
    if options.v1 and options.v2:
        mistakes.add("--v1 and --v2 exclude each other", "remove both: the file tells what it is")
    if options.metadata is not None and _metadata(options.metadata) is None:
        mistakes.add(f"--metadata {options.metadata} is not a dictionary", """write it as '{"name": "value"}'""")


def work(options: ConvertOptions) -> None:
    """Convert the model. Raises UserError."""
    request = Request(
        source=options.model_to_load,
        target=options.model_to_save,
        safetensors=options.use_safetensors,
        precision=next(iter(_precisions(options)), None),
        source_variant=options.variant or "",
        reference=_local_reference(options.reference_model),
        metadata=_metadata(options.metadata or "{}") or {},
        epoch=options.epoch,
        steps=options.global_step,
        overwrite=True,
    )
    if options.v1 or options.v2:
        _check_version(request, "v2" if options.v2 else "v1")
    convert_model(request)


def _precisions(options: ConvertOptions) -> list[str]:
    """All precisions that are set, sorted."""
    return [name for name in sorted(PRECISIONS) if getattr(options, name) or options.save_precision_as == name]


def _local_reference(name: str | None) -> str | None:
    """The reference if it is on this machine. kohya_ss always sends a hub name, for what is made here anyway."""
    from library.families.registry import CheckpointError, NotDownloaded, find_model

    if name is None:
        return None
    try:
        find_model(name)
    except NotDownloaded:
        print(f"--reference_model {name} is not on this machine and not needed: scheduler and tokenizers are made here")
        return None
    except CheckpointError:
        pass  # the conversion reports it
    return name


def _metadata(text: str) -> dict[str, str] | None:
    """Parse --metadata, or return None if it is not a dictionary. sd-scripts evaluates it; here no code can run."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return {str(name): str(entry) for name, entry in value.items()} if isinstance(value, dict) else None


def _check_version(request: Request, claim: str) -> None:
    header, family = read(request)
    is_v2 = "v2" in family.capabilities
    if is_v2 != (claim == "v2"):
        what = f"--{claim}, but {header.path} is {family.title}"
        raise UserError([Mistake(what, f"remove --{claim}: the file tells what it is")])


TOOL = Tool(
    "Convert a checkpoint to a diffusers folder, or a folder to a checkpoint. An existing target is replaced.",
    "python tools/convert_diffusers20_original_sd.py MODEL_TO_LOAD MODEL_TO_SAVE [more flags]",
    ConvertOptions,
    work,
    required={
        "model_to_load": "give the model: convert_diffusers20_original_sd.py model.safetensors model_folder",
        "model_to_save": "give the new checkpoint or folder after the source",
    },
    check=check,
    positional=("model_to_load", "model_to_save"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Convert one model. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
