"""A model of Stable Diffusion 1.x, 2.x, XL or XL's refiner as another kind of file.

python tools/convert_checkpoint.py model.safetensors model_folder
python tools/convert_checkpoint.py model_folder model.safetensors --save_precision fp16
python tools/convert_checkpoint.py model.ckpt model.safetensors --vae vae.safetensors --ema use
python tools/convert_checkpoint.py model.safetensors --dry_run

The target's ending says what is written: .safetensors or .ckpt, and without an ending a diffusers folder. Weights pass
through tensor by tensor, so the size of the model does not matter; without --save_precision they stay as they are, bit
for bit. The target appears when all of it is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.options.mistakes import Mistake, Mistakes, UserError
from tools.lora_files import PRECISIONS, explain_write_errors

if TYPE_CHECKING:
    from library.checkpoints.header import Header
    from library.convert.convert_checkpoint import Ema
    from library.families.family import Family, SaveAs
    from library.objective.process import Prediction

SAVE_AS = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")
_DTYPES = {"float": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Request:
    """What is to become of which model. `save_as` None: what the target's ending says; `source_variant` and `variant`
    are of the files of folders read and written; `reference` is a folder that scheduler and tokenizer are taken from;
    `metadata` goes into a .safetensors file beside what is known of the model; the rest is as in Conversion."""

    source: str
    target: Path | None
    save_as: SaveAs | None = None
    safetensors: bool = True
    precision: str | None = None
    vae: Path | None = None
    ema: Ema = "drop"
    prediction: Prediction | None = None
    zero_terminal_snr: bool | None = None
    variant: str = ""
    source_variant: str = ""
    reference: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    epoch: int = 0
    steps: int = 0
    overwrite: bool = False


def read(request: Request) -> tuple[Header, Family]:
    """Header and family of the source. Raises UserError; a file of no family is described first."""
    from library.checkpoints.header import CheckpointError
    from library.convert.report import describe_unknown
    from library.families.registry import detect

    with explain_write_errors():
        header = _header(request.source, request.source_variant)
        try:
            return header, detect(header)
        except CheckpointError:
            print("\n".join(describe_unknown(header)))
            raise


def _header(name: str, variant: str = "") -> Header:
    from library.checkpoints.files import read_header
    from library.families.registry import find_model

    return read_header(find_model(name), variant)


def show(request: Request, *, check_values: bool) -> None:
    """Say what the source is. Raises UserError for what is no model."""
    from library.checkpoints.metadata_text import describe_metadata
    from library.convert.report import broken_tensors, describe, some

    header, family = read(request)
    with explain_write_errors():
        print("\n".join(describe(header, family)))
        if check_values:
            broken = broken_tensors(header)
            what = f"NaN or infinite values in {len(broken)} tensors: {some(broken)}" if broken else "all finite"
            print(f"values: {what}")
        else:
            print("values: not read; --check_values looks for NaN and infinite ones")
        print("\n".join(describe_metadata(header).splitlines()[2:]).strip())


def carry_out(request: Request) -> None:
    """Convert. Raises UserError, leaving what was there."""
    from library.convert.convert_checkpoint import Conversion, convert
    from library.families.registry import declared_prediction
    from library.runtime.imports import quiet_libraries

    target, save_as = _target(request)
    header, family = read(request)
    if header.path.resolve() == target.resolve():
        raise UserError([Mistake(f"{target} is the source", "choose another name")])
    prediction = request.prediction or declared_prediction(header).prediction
    quiet_libraries()
    with explain_write_errors():
        wanted = Conversion(
            save_as,
            dtype=None if request.precision is None else _DTYPES[request.precision],
            vae=request.vae,
            ema=request.ema,
            prediction=request.prediction,
            zero_terminal_snr=request.zero_terminal_snr,
            variant=request.variant,
            reference=None if request.reference is None else _header(request.reference),
            metadata=dict(metadata_of(header, family, prediction, target.stem), **request.metadata),
            epoch=request.epoch,
            steps=request.steps,
        )
        print(f"{header.path}: {family.title}", flush=True)
        for note in convert(header, family, target, wanted):
            print(note)
    print(f"{target}: {save_as}, {request.precision or 'numbers as they were'}")


def _target(request: Request) -> tuple[Path, SaveAs]:
    """Where to write, and what. Raises UserError with every mistake."""
    from library.convert.convert_checkpoint import FOLDERS, kind_of

    mistakes = Mistakes()
    target = request.target
    if target is None:
        raise UserError([Mistake("no target", "give the new file or folder behind the source, or --dry_run")])
    save_as = request.save_as or kind_of(target, safetensors=request.safetensors)
    if save_as is None:
        remedy = "end it in .safetensors or .ckpt, leave the ending out for a folder, or say --save_model_as"
        mistakes.add(f"{target}: {target.suffix} says nothing of what to write", remedy)
    if request.variant and save_as not in (None, *FOLDERS):
        mistakes.add(f"--variant {request.variant}: only the files of a folder have variants", "leave --variant out")
    if target.exists() and not request.overwrite:
        mistakes.add(f"{target} exists", "choose another name, or --overwrite")
    if request.vae is not None and not request.vae.exists():
        mistakes.add(f"--vae {request.vae}: no such file or folder", "check the path")
    mistakes.raise_if_any()
    return target, cast("SaveAs", save_as)


def metadata_of(header: Header, family: Family, prediction: Prediction | None, title: str) -> dict[str, str]:
    """The metadata of the same model in another file: what its file says, else modelspec with `title` and today.

    `prediction` beats what it says. Where neither tells, nothing is said: a wrong word would be believed later.
    """
    from library.checkpoints.metadata import build_modelspec
    from library.training.saving.model_file import time_of_saving
    from networks.arithmetic.result_metadata import without_hashes

    assumed: Prediction = prediction or "epsilon"
    spec = build_modelspec(
        architecture=family.architectures[assumed],
        title=title,
        made_at=time_of_saving(),
        resolution=family.preview[assumed],
        prediction=assumed,
    )
    of_prediction = ("modelspec.prediction_type", "modelspec.architecture")
    before = without_hashes(header.metadata) if header.kind == "safetensors" else {}
    if prediction is not None:
        return spec | before | {key: spec[key] for key in of_prediction}
    del spec["modelspec.prediction_type"]
    for key, facts in (("architecture", family.architectures), ("resolution", family.preview)):
        if len(set(facts.values())) > 1:
            del spec[f"modelspec.{key}"]
    return spec | before


def run(work: Callable[[], None]) -> int:
    """Do it; mistakes go to the user. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    try:
        work()
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing half-written was left", file=sys.stderr)
        return 130
    return 0


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace | int:
    """The options, or the exit code after --help or a mistake that argparse has told. Output is UTF-8 from here on."""
    for stream in (sys.stdout, sys.stderr):  # names of files are in any script, also where the output is sent to a file
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return parser.parse_args(words)
    except SystemExit as end:
        return int(end.code or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("source", help="a .safetensors or .ckpt file, a diffusers folder, or a name in the hub's local cache")
    add("target", type=Path, nargs="?", help="the new file or folder")
    add("--save_model_as", choices=SAVE_AS, help="what to write, where the ending is not to say it; diffusers: .bin")
    add("--save_precision", choices=PRECISIONS, help="numbers of the weights; not set: as they are")
    add("--vae", type=Path, help="put this VAE in (a file, a folder, or another model)")
    add("--ema", choices=("drop", "use", "keep"), default="drop",
        help="EMA copies: leave them out (default), use them as the weights of the U-Net, or keep both")  # fmt: skip
    add("--prediction_type", choices=("epsilon", "v"), help="what the U-Net predicts, written into the target")
    add("--zero_terminal_snr", action=argparse.BooleanOptionalAction, default=None,
        help="mark the target as trained to zero terminal SNR, or not; not set: as the source is marked")  # fmt: skip
    add("--variant", default="", help="variant of a folder's files, such as fp16: diffusion_pytorch_model.fp16.*")
    add("--source_variant", default="", help="variant to read of a source folder that has several")
    add("--overwrite", action="store_true", help="replace a target that exists; it stands until the new one is whole")
    add("--dry_run", action="store_true", help="only say what the source is: family, precision, prediction, oddities")
    add("--check_values", action="store_true", help="with --dry_run: read all tensors, and name those with NaN values")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Convert or describe one model. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    options = parse(_parser(), words)
    if isinstance(options, int):
        return options
    request = Request(
        source=options.source,
        target=options.target,
        save_as=options.save_model_as,
        precision=options.save_precision,
        vae=options.vae,
        ema=options.ema,
        prediction=options.prediction_type,
        zero_terminal_snr=options.zero_terminal_snr,
        variant=options.variant,
        source_variant=options.source_variant,
        overwrite=options.overwrite,
    )
    if options.dry_run or options.check_values:
        return run(lambda: show(request, check_values=options.check_values))
    return run(lambda: carry_out(request))


if __name__ == "__main__":
    # torch's threads would wait for work by counting, on the cores that read and write; read when torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    raise SystemExit(main())
