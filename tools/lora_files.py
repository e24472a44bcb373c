"""Shared by the tools for LoRA files: reading and writing files, devices, and errors that name the file.

Not a program. No torch at module level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.header import CheckpointError
from library.options.mistakes import Mistake, Mistakes, UserError
from library.runtime.device import describe_machine
from networks.adapter import AdapterError

if TYPE_CHECKING:
    from networks.adapter_files import AdapterFile
    from networks.arithmetic.factors import Factors

PRECISIONS = ("float", "fp16", "bf16")
ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth")


@contextmanager
def explain_write_errors(file: Path | None = None) -> Iterator[None]:
    """Turn errors of checkpoints and adapters into user errors; `file` is named where the error names no file."""
    try:
        yield
    except AdapterError as error:
        what = str(error) if file is None else f"{file}: {error}"
        raise UserError([Mistake(what, error.remedy)]) from error
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error


def together(*steps: Callable[[], Any]) -> list[Any]:
    """Return the result of each step. Raises UserError with the mistakes of all steps, not only of the first."""
    mistakes = Mistakes()
    answers = []
    for step in steps:
        try:
            answers.append(step())
        except UserError as error:
            mistakes.extend(error.mistakes)
    mistakes.raise_if_any()
    return answers


def check_ending(path: Path | None, mistakes: Mistakes, endings: Sequence[str] = ENDINGS) -> None:
    """Add a mistake unless --save_to has one of these extensions."""
    if path is not None and path.suffix not in endings:
        mistakes.add(f"--save_to {path} does not end in {', '.join(endings)}", f"use {path}{endings[0]}")


def read_files(paths: Sequence[Path]) -> list[AdapterFile]:
    """Read adapter files of any program, under kohya's names, and print notes on them. Names that are layers of several
    families are taken for those of the family that the other files fit. Raises UserError that names every file that
    cannot be read."""
    from library.families.registry import FAMILIES
    from networks.formats.layer_names import best_table, in_kohyas_names, layers_in, table_of
    from networks.formats.read_write import peft_config_beside

    files = read_as_they_are(paths)
    tables = [table_of(family.adapters) for family in FAMILIES]
    everything = layers_in(key for file in files for key in file.tensors)

    def rename(path: Path, file: AdapterFile) -> AdapterFile:
        with explain_write_errors(path):
            table = best_table(tables, layers_in(file.tensors), everything)
            return in_kohyas_names(file, table, peft_config_beside(path))

    renamed = together(*(partial(rename, path, file) for path, file in zip(paths, files, strict=True)))
    for path, file in zip(paths, renamed, strict=True):
        for note in file.notes:
            print(f"{path}: {note}")
    return renamed


def read_as_they_are(paths: Iterable[Path], *, damaged: bool = False) -> list[AdapterFile]:
    """Read adapter files under their own names, `damaged` ones too if set. Raises UserError that names every file that
    cannot be read."""
    from networks import adapter_files

    def read(path: Path) -> AdapterFile:
        with explain_write_errors():
            return adapter_files.read(path, damaged=damaged)

    return together(*(partial(read, path) for path in paths))


def layers_of(files: Iterable[tuple[Path, AdapterFile]]) -> list[dict[str, Factors]]:
    """Return the layers of each LoRA file. Raises UserError that names every file with other kinds of layers."""
    from networks.arithmetic.factors import read_factors

    def layers(path: Path, file: AdapterFile) -> dict[str, Factors]:
        with explain_write_errors():
            return read_factors(file.tensors, str(path))

    return together(*(partial(layers, path, file) for path, file in files))


def write_layers(path: Path, layers: Mapping[str, Factors], precision: str, metadata: Mapping[str, str]) -> None:
    """Write a LoRA file atomically. Raises UserError."""
    from library.runtime.precision import torch_dtype
    from networks import adapter_files
    from networks.arithmetic.factors import file_tensors

    with explain_write_errors():
        adapter_files.write(path, file_tensors(layers, torch_dtype(precision)), metadata)


def precision_of(file: AdapterFile) -> str:
    """Return the precision of a file's factors as in PRECISIONS; float if they differ."""
    names = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
    found = {names.get(str(tensor.dtype), "float") for key, tensor in file.tensors.items() if ".lora_" in key}
    return found.pop() if len(found) == 1 else "float"


def compute_device(name: str | None) -> str:
    """Return the device of --device: "cuda", "cuda:1", "mps" or "cpu"; not set: the CPU. Raises UserError.

    A device that this machine lacks is replaced by the CPU, with a note: front-ends always send `cuda`.
    """
    kind = (name or "cpu").partition(":")[0].lower()
    if kind not in ("cuda", "mps", "cpu"):
        raise UserError([Mistake(f"--device {name} is not a device", "remove it, or use cuda, cuda:0, mps or cpu")])
    if kind not in ("cpu", describe_machine().kind):
        print(f"--device {name} is not available: using the CPU")
        return "cpu"
    return name or "cpu"
