"""Convert a model of Stable Diffusion 1.x, 2.x, XL or XL's refiner to another kind of file.

python tools/convert_checkpoint.py model.safetensors model_folder
python tools/convert_checkpoint.py model_folder model.safetensors --save_precision fp16
python tools/convert_checkpoint.py model.ckpt model.safetensors --vae vae.safetensors --ema use
python tools/convert_checkpoint.py model.safetensors --dry_run

The target's extension sets what is written: .safetensors or .ckpt, or a diffusers folder if there is none. Weights are
converted one tensor at a time, so memory does not depend on the size of the model; without --save_precision they stay
the same, bit for bit. The target appears only when it is complete.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted, listed
from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, run_tool
from tools.lora_files import PRECISIONS, explain_write_errors

if TYPE_CHECKING:
    from library.checkpoints.header import Header
    from library.convert.convert_checkpoint import Ema
    from library.families.family import Family, SaveAs
    from library.objective.process import Prediction

SAVE_AS = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")
EMA_CHOICES = ("drop", "use", "keep")
_DTYPES = {"float": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class ConvertOptions:
    """Command-line options."""

    source: str = flag(None, "a .safetensors or .ckpt file, a diffusers folder, or a hub name in the local cache")
    target: Path | None = flag(None, "the new file or folder")
    save_model_as: SaveAs | None = flag(
        None, "format to write, if not set by the extension; diffusers: with .bin files", choices=SAVE_AS
    )
    save_precision: str | None = flag(None, "precision of the weights. Not set: unchanged", choices=PRECISIONS)
    vae: Path | None = flag(None, "replace the VAE (a file, a folder, or another model)")
    ema: Ema = flag(
        "drop", "EMA copies: leave them out, use them as the U-Net's weights, or keep both", choices=EMA_CHOICES
    )
    prediction_type: Prediction | None = flag(
        None, "prediction type of the U-Net, written to the target", choices=("epsilon", "v")
    )
    zero_terminal_snr: bool | None = flag(
        None, "mark the target as trained with zero terminal SNR; --no-zero_terminal_snr: as not. Not set: like source"
    )
    variant: str = flag("", "variant of a folder's files, such as fp16: diffusion_pytorch_model.fp16.*")
    source_variant: str = flag("", "variant to read if the source folder has several")
    overwrite: bool = flag(False, "replace an existing target once the new one is complete")
    dry_run: bool = flag(False, "only describe the source: family, precision, prediction, anything unusual")
    check_values: bool = flag(False, "describe the source, and read all tensors to find NaN and infinite values")


@dataclass(frozen=True)
class Request:
    """A conversion to run. `save_as` None: by the target's extension. `source_variant` and `variant`: of the files in
    folders that are read and written. `reference`: a folder to take scheduler and tokenizers from. `metadata` is added
    to a .safetensors file. The other fields are as in Conversion."""

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
    """Return header and family of the source. Raises UserError; a file of an unknown family is described first."""
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
    """Describe the source. Raises UserError if it is not a model."""
    from library.checkpoints.metadata_text import describe_metadata
    from library.convert.report import broken_tensors, describe

    header, family = read(request)
    with explain_write_errors():
        print("\n".join(describe(header, family)))
        if check_values:
            broken = broken_tensors(header)
            count = counted(len(broken), "tensor")
            print("values: " + (f"NaN or infinite in {count}: {listed(broken)}" if broken else "all finite"))
        else:
            print("values: not read (--check_values finds NaN and infinite ones)")
        print("\n".join(describe_metadata(header).splitlines()[2:]).strip())


def convert_model(request: Request) -> None:
    """Convert the model. Raises UserError; an existing target is left unchanged then."""
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
        conversion = Conversion(
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
        for note in convert(header, family, target, conversion):
            print(note)
    print(f"{target}: {save_as}, {request.precision or 'precision unchanged'}")


def _target(request: Request) -> tuple[Path, SaveAs]:
    """Return the target and its format. Raises UserError with every mistake."""
    from library.convert.convert_checkpoint import FOLDERS, kind_of

    mistakes = Mistakes()
    target = request.target
    if target is None:
        raise UserError([Mistake("no target", "give the new file or folder after the source, or add --dry_run")])
    save_as = request.save_as or kind_of(target, safetensors=request.safetensors)
    if save_as is None:
        remedy = "use .safetensors or .ckpt, no extension for a folder, or --save_model_as"
        mistakes.add(f"{target}: unknown extension {target.suffix}", remedy)
    if request.variant and save_as not in (None, *FOLDERS):
        mistakes.add(f"--variant {request.variant}: only the files of a folder have variants", "remove --variant")
    if target.exists() and not request.overwrite:
        mistakes.add(f"{target} already exists", "choose another name, or add --overwrite")
    if request.vae is not None and not request.vae.exists():
        mistakes.add(f"--vae {request.vae}: no such file or folder", "check the path")
    mistakes.raise_if_any()
    return target, cast("SaveAs", save_as)


def metadata_of(header: Header, family: Family, prediction: Prediction | None, title: str) -> dict[str, str]:
    """Return the metadata of the converted model: the source's own, otherwise modelspec with `title` and today's date.

    `prediction` overrides the source's metadata. If it is None, no prediction type is written: a wrong value would be
    trusted later.
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


def work(options: ConvertOptions) -> None:
    """Convert the model, or only describe it. Raises UserError."""
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
        show(request, check_values=options.check_values)
    else:
        convert_model(request)


TOOL = Tool(
    "Convert a model of Stable Diffusion 1.x, 2.x, XL or XL's refiner to another kind of file.\n"
    "The extension of TARGET sets what is written: .safetensors, .ckpt, or none for a diffusers folder.",
    "python tools/convert_checkpoint.py SOURCE TARGET [more flags]",
    ConvertOptions,
    work,
    required={"source": "give the model: convert_checkpoint.py model.safetensors model_folder"},
    positional=("source", "target"),
    aliases={"--no-zero_terminal_snr": "--zero_terminal_snr=false"},
)


def main(words: Sequence[str] | None = None) -> int:
    """Convert or describe one model. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    # Idle torch threads must not spin on the cores that read and write. Takes effect when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    raise SystemExit(main())
