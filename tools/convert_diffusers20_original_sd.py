"""kohya's command for tools/convert_checkpoint.py: a checkpoint as a diffusers folder, or a folder as a checkpoint.

python tools/convert_diffusers20_original_sd.py model.safetensors model_folder --use_safetensors
python tools/convert_diffusers20_original_sd.py model_folder model.safetensors --fp16

A target with an ending is a checkpoint, one without is a folder. An existing target is replaced, as sd-scripts does.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.options.mistakes import Mistake, Mistakes, UserError
from tools.convert_checkpoint import Request, carry_out, parse, read, run
from tools.lora_files import PRECISIONS


def work(options: argparse.Namespace) -> None:
    """What sd-scripts' flags ask for. Raises UserError."""
    mistakes = Mistakes()
    precision = _precision(options, mistakes)
    if options.v1 and options.v2:
        mistakes.add("--v1 and --v2: a model is one of them", "leave both out; the file tells what it is")
    metadata = _metadata(options.metadata, mistakes)
    mistakes.raise_if_any()
    request = Request(
        source=options.model_to_load,
        target=options.model_to_save,
        safetensors=options.use_safetensors,
        precision=precision,
        source_variant=options.variant or "",
        reference=options.reference_model,
        metadata=metadata,
        epoch=options.epoch,
        steps=options.global_step,
        overwrite=True,
    )
    if options.v1 or options.v2:
        _check_version(request, "v2" if options.v2 else "v1")
    carry_out(request)


def _precision(options: argparse.Namespace, mistakes: Mistakes) -> str | None:
    """The one precision that is asked for, if any."""
    given = {name for name in PRECISIONS if getattr(options, name)}
    given |= {options.save_precision_as} - {None, "no"}
    if len(given) > 1:
        mistakes.add(f"more than one precision: {', '.join(sorted(given))}", "keep one of them")
    return next(iter(given), None)


def _metadata(text: str | None, mistakes: Mistakes) -> dict[str, str]:
    """--metadata, which sd-scripts gives to Python's eval; here nothing of it can run."""
    if text is None:
        return {}
    try:
        read = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        read = None
    if not isinstance(read, dict):
        mistakes.add(f"--metadata {text} is no dictionary", """write it as '{"name": "value"}'""")
        return {}
    return {str(name): str(value) for name, value in read.items()}


def _check_version(request: Request, said: str) -> None:
    header, family = read(request)
    is_v2 = "v2" in family.capabilities
    if is_v2 != (said == "v2"):
        what = f"--{said}, but {header.path} is {family.title}"
        raise UserError([Mistake(what, f"leave --{said} out; the file tells what it is")])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model_to_load", help="a checkpoint, a diffusers folder, or a name in the hub's local cache")
    add("model_to_save", type=Path, help="a checkpoint (with an ending) or a diffusers folder (without one)")
    add("--v1", action="store_true", help="the model is no 2.x; the file itself tells, a contradiction is an error")
    add("--v2", action="store_true", help="the model is a 2.x; the file itself tells, a contradiction is an error")
    add("--unet_use_linear_projection", action="store_true", help="nothing to ask for: a 2.x folder always is so")
    add("--fp16", action="store_true", help="write numbers in fp16, into a folder too; no precision: as they are")
    add("--bf16", action="store_true", help="write numbers in bf16")
    add("--float", action="store_true", help="write numbers in float32")
    add("--save_precision_as", choices=("no", *PRECISIONS), help="the same by one flag")
    add("--epoch", type=int, default=0, help="added to the epoch in a .ckpt")
    add("--global_step", type=int, default=0, help="added to the step in a .ckpt")
    add("--metadata", help="""for a .safetensors, as '{"name": "value"}'""")
    add("--variant", help="variant to read of a diffusers folder, such as fp16")
    add("--reference_model", help="a diffusers folder to take scheduler and tokenizer from; nothing is downloaded")
    add("--use_safetensors", action="store_true", help="a folder with .safetensors files; not set: .bin")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Convert one model. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    options = parse(_parser(), words)
    return options if isinstance(options, int) else run(lambda: work(options))


if __name__ == "__main__":
    raise SystemExit(main())
