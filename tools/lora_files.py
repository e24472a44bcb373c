"""What the tools for LoRA files have in common: files read and written, devices, and errors that name the file.

No program: tools/merge_lora.py and its neighbours stand on it. No torch at module level.
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
    """Turn what files and adapters refuse into a message without a traceback; `file` goes before what names none."""
    try:
        yield
    except AdapterError as error:
        what = str(error) if file is None else f"{file}: {error}"
        raise UserError([Mistake(what, error.remedy)]) from error
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error


def together(*steps: Callable[[], Any]) -> list[Any]:
    """What each step answers. Raises UserError with the mistakes of all of them, not of the first alone."""
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
    """A mistake unless --save_to ends as one of the kinds of files that are written."""
    if path is not None and path.suffix not in endings:
        mistakes.add(f"--save_to {path} has none of the endings {', '.join(endings)}", f"write {path}{endings[0]}")


def read_files(paths: Iterable[Path]) -> list[AdapterFile]:
    """Adapter adapter_files. Raises UserError that names every one that cannot be read."""
    from networks import adapter_files

    def read(path: Path) -> AdapterFile:
        with explain_write_errors():
            return adapter_files.read(path)

    return together(*(partial(read, path) for path in paths))


def layers_of(files: Iterable[tuple[Path, AdapterFile]]) -> list[dict[str, Factors]]:
    """The layers of LoRA adapter_files. Raises UserError that names every file with other layers."""
    from networks.arithmetic.factors import read_factors

    def layers(path: Path, file: AdapterFile) -> dict[str, Factors]:
        with explain_write_errors():
            return read_factors(file.tensors, str(path))

    return together(*(partial(layers, path, file) for path, file in files))


def write_layers(path: Path, layers: Mapping[str, Factors], precision: str, metadata: Mapping[str, str]) -> None:
    """Write a LoRA file, whole or not at all. Raises UserError."""
    from library.runtime.precision import torch_dtype
    from networks import adapter_files
    from networks.arithmetic.factors import file_tensors

    with explain_write_errors():
        adapter_files.write(path, file_tensors(layers, torch_dtype(precision)), metadata)


def precision_of(file: AdapterFile) -> str:
    """The precision that a file's factors have, by the options' names; float if they differ."""
    names = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
    found = {names.get(str(tensor.dtype), "float") for key, tensor in file.tensors.items() if ".lora_" in key}
    return found.pop() if len(found) == 1 else "float"


def compute_device(name: str | None) -> str:
    """The device that --device means: "cuda", "cuda:1", "mps" or "cpu"; not set: the CPU. Raises UserError.

    What this machine lacks is replaced by the CPU, and told: front-ends send `cuda` wherever they are.
    """
    kind = (name or "cpu").partition(":")[0].lower()
    if kind not in ("cuda", "mps", "cpu"):
        raise UserError([Mistake(f"--device {name} is no device", "leave it out, or give cuda, cuda:0, mps or cpu")])
    if kind not in ("cpu", describe_machine().kind):
        print(f"--device {name}: there is none here; the CPU is used instead")
        return "cpu"
    return name or "cpu"
