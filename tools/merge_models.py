"""Merge models into one by a weighted sum, tensor by tensor.

python tools/merge_models.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output both.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.mistakes import Mistakes
from library.options.tool_command import Tool, run_tool
from tools.lora_files import PRECISIONS, compute_device, explain_write_errors, together

if TYPE_CHECKING:
    from library.convert.merge_checkpoints import Merged, MergeSource

_DTYPES = {"float": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class ModelSumOptions:
    """Command-line options, named as in sd-scripts."""

    models: tuple[Path, ...] = flag(
        (), "the models, .safetensors or .ckpt; tensors that others lack are taken from the first"
    )
    ratios: tuple[float, ...] = flag((), "the weight of each model; may be negative. Not set: equal weights")
    output: Path | None = flag(None, "the new file; .safetensors is appended to other names")
    unet_only: bool = flag(False, "merge only the U-Nets; text encoders and VAE are taken from the first model")
    precision: str = flag("float", "precision of the computation", choices=PRECISIONS)
    saving_precision: str = flag("float", "precision of the new file", choices=PRECISIONS)
    device: str | None = flag(None, "device to compute on: cuda, cuda:1, mps or cpu. Not set: cpu")
    show_skipped: bool = flag(False, "list every tensor that the first model lacks")

    @property
    def shares(self) -> tuple[float, ...]:
        """The ratios; equal weights if none are set."""
        return self.ratios or (1 / len(self.models),) * len(self.models)

    @property
    def path(self) -> Path:
        """The file to write."""
        here = self.output
        if here is None:
            raise ValueError("no --output")
        return here if here.suffix == ".safetensors" else here.with_name(f"{here.name}.safetensors")


def check(options: ModelSumOptions, mistakes: Mistakes) -> None:
    """Add mistakes that concern more than one flag."""
    models, ratios = options.models, options.ratios
    if len(models) == 1:
        mistakes.add(f"--models {models[0]}: needs two models or more", "add a model; convert_checkpoint.py copies one")
    if ratios and models and len(ratios) != len(models):
        what = f"--models has {counted(len(models), 'file')} and --ratios {counted(len(ratios), 'value')}"
        mistakes.add(what, "give one per model, in the same order, or remove --ratios for equal weights")
    if options.output is None:
        return
    if options.output.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        remedy = "write a .safetensors and convert it with tools/convert_checkpoint.py"
        mistakes.add(f"--output {options.output}: merged models are written as .safetensors only", remedy)
    if any(_same(model, options.path) for model in models):
        mistakes.add(f"--output {options.path} is one of the models", "choose another name")


def _same(one: Path, other: Path) -> bool:
    return one.expanduser().resolve() == other.expanduser().resolve()


def work(options: ModelSumOptions) -> None:
    """Compare the headers, then write the weighted sum. Raises UserError."""
    from library.checkpoints.writer import write_safetensors
    from library.convert.merge_checkpoints import Arithmetic, check, merge

    sources = together(*(partial(_open, *pair) for pair in zip(options.models, options.shares, strict=True)))
    mistakes = Mistakes()
    check(sources, mistakes)
    mistakes.raise_if_any()
    device = compute_device(options.device)
    arithmetic = Arithmetic(_DTYPES[options.precision], _DTYPES[options.saving_precision], device)
    with explain_write_errors():
        merged = merge(sources, arithmetic, unet_only=options.unet_only)
        for source in sources:
            print(f"{source.header.path}: ratio {source.ratio:g}")
        for line in _notes(merged, options):
            print(line, flush=True)
        write_safetensors(options.path, merged.tensors, _metadata(sources, options))
    print(f"{options.path}: {counted(len(merged.tensors), 'tensor')}")


def _open(path: Path, ratio: float) -> MergeSource:
    from library.checkpoints.files import read_header
    from library.convert.merge_checkpoints import open_source

    with explain_write_errors():
        return open_source(read_header(path.expanduser()), ratio)


def _notes(merged: Merged, options: ModelSumOptions) -> list[str]:
    lines = list(merged.notes)
    if merged.skipped:
        more = "" if options.show_skipped else f", such as {merged.skipped[0]} (--show_skipped lists them)"
        lines.append(f"left out, as the first model lacks them: {counted(len(merged.skipped), 'tensor')}{more}")
        if options.show_skipped:
            lines += [f"  {name}" for name in merged.skipped]
    return lines


def _metadata(sources: Sequence[MergeSource], options: ModelSumOptions) -> dict[str, str]:
    """Return the first model's metadata, with a new title, date and modelspec.merged_from."""
    from networks.arithmetic.result_metadata import title_of, without_hashes
    from tools.lora_models import Opened, merged_metadata

    first, *others = sources
    names = [title_of(source.header.metadata, source.header.path.stem) for source in others]
    prediction = next((source.prediction for source in sources if source.prediction), None)
    if first.family is not None:
        return merged_metadata(Opened(first.header, first.family, prediction), options.path.stem, names)
    before = without_hashes(first.header.metadata) if first.header.kind == "safetensors" else {}
    own = title_of(before, first.header.path.stem)
    made = {"title": options.path.stem, "merged_from": ", ".join([own, *names]), "sai_model_spec": "1.0.1"}
    return before | {f"modelspec.{key}": value for key, value in made.items()}


TOOL = Tool(
    "Merge models into one by a weighted sum.",
    "python tools/merge_models.py --models A B [C] --ratios 0.7 0.3 --output FILE [more flags]",
    ModelSumOptions,
    work,
    required={
        "models": "give the models: --models a.safetensors b.safetensors",
        "output": "give the new file: --output sum.safetensors",
    },
    check=check,
)


def main(words: Sequence[str] | None = None) -> int:
    """Merge. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
