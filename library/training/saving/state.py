"""Training states: everything that a run needs to continue as if it had never stopped.

A state is a folder with the file names of accelerate (`model.safetensors`, `optimizer.bin`, `scheduler.bin`,
`scaler.pt`, `random_states_0.pkl`) and `train_state.json`. It is written under a temporary name and renamed when it is
complete. Pickled files contain only plain containers and tensors, and are read with `weights_only=True`.

Saving has two parts: `copied` takes what changes to main memory, for which the training waits, and `write_state` writes
it, beside the training (state_writer.py).
"""

from __future__ import annotations

import os
import pickle
import random
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypedDict

from library.bounded import read_json
from library.checkpoints.header import NotFiniteError
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.pickles import check_pickle
from library.checkpoints.writer import replacing, replacing_folder, write_json, write_safetensors
from library.messages import shortened
from library.options.mistakes import Mistake, UserError
from library.training.saving.checksums import FILES, STATE_FILE, list_files, sealed
from library.training.saving.nested_tensors import copied_tensors, tensors_of


class Standing(TypedDict):
    """The best value of a metric so far, after `step` optimizer steps (0: none yet); how often it was measured since
    without becoming better, and the last step at which it was measured."""

    value: float
    step: int
    waited: int
    measured: int


@dataclass
class Progress:
    """The progress of a run. `step`: finished optimizer steps; `epoch`: from 1; `window`: finished optimizer steps of
    the current epoch. `epoch_losses` are their losses, `last_epoch_losses` those of the epoch before, for the averages
    that are reported. `base_losses`: what validation measured of the base model. `standings`: of the metrics that the
    best checkpoint and the end of the run depend on, by name. `due_left`: what is due after the last step has not been
    done, as the run was stopped; who resumes it does that first. `began`: when the run began, YYYYmmddHHMMSS; "": long
    ago. `nonfinite`: how many of the last steps in a row were skipped, as they were not finite."""

    step: int = 0
    epoch: int = 1
    window: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    last_epoch_losses: list[float] = field(default_factory=list)
    base_losses: dict[str, list[list[Any]]] = field(default_factory=dict)
    standings: dict[str, Standing] = field(default_factory=dict)
    due_left: bool = False
    began: str = ""
    nonfinite: int = 0


Identity = dict[str, str]
"""Everything that must not change when a run is resumed: fact -> value."""


@dataclass(frozen=True)
class Description:
    """What a state says of its run besides its progress. `options`: those that may change when it is resumed, without
    secrets. `images`: a short hash of each image with its caption and settings, by its key; empty for very many.
    `output_name`: "" = not set."""

    identity: Identity
    options: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    output_name: str = ""


class Stateful(Protocol):
    """An object with saved state: a module, an optimizer, a schedule, a gradient scaler."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


RunState = Mapping[str, Stateful | None]
"""Everything that a run saves and restores besides its progress, by name, in the order of restoring. Each entry is a
file; None: this run does not have it."""

_FILES = {
    "optimizer": "optimizer.bin",
    "schedule": "scheduler.bin",
    "scaler": "scaler.pt",
    "random": "random_states_0.pkl",
}


IMAGES_FILE = "images.json"


@dataclass(frozen=True)
class SavedState:
    """The content of train_state.json of a state folder. `output_name` None: an earlier version did not note it."""

    folder: Path
    progress: Progress
    identity: Identity
    options: Mapping[str, str] = field(default_factory=dict)
    output_name: str | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether a sharded run saved it: library/training/sharding/state.py."""
        return (self.folder / "shards").is_dir()

    @property
    def weights(self) -> Path:
        """The file with the weights of the first trained module: the backbone, or the adapter."""
        return self.folder / "model.safetensors"


def read_state(folder: Path) -> SavedState:
    """Read train_state.json of a state folder, without torch. Raises UserError if the folder is not a complete state of
    this trainer."""
    file = folder / STATE_FILE
    remedy = "use a folder written by --save_state (NAME-state, NAME-000003-state, NAME-step00000100-state)"
    if not os.path.isfile(file):
        missing = f"{STATE_FILE} is missing" if os.path.isdir(folder) else "there is no such folder"
        raise UserError((Mistake(f"--resume {folder}: not a training state of this trainer ({missing})", remedy),))
    try:
        content = read_json(file)
        progress = Progress(**content["progress"])
        _check(progress)
        identity = {str(fact): str(value) for fact, value in content["identity"].items()}
        options = {str(name): str(value) for name, value in content.get("options", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = shortened(f"{type(error).__name__}: {error}", 300)
        what = f"--resume {folder}: not a training state of this trainer ({reason})"
        raise UserError((Mistake(what, remedy),)) from None
    return SavedState(folder, progress, identity, options, content.get("output_name"))


def _check(progress: Progress) -> None:
    """Raise ValueError for what no run has written. `began` becomes part of file names."""
    counts = (progress.step, progress.epoch, progress.window, progress.nonfinite)
    tables = (progress.base_losses, progress.standings)
    if not all(type(count) is int and 0 <= count < 2**53 for count in counts):
        raise ValueError("its step, epoch or window is no number of steps")
    for losses in (progress.epoch_losses, progress.last_epoch_losses):
        if not isinstance(losses, list) or not all(type(loss) in (int, float) for loss in losses):
            raise ValueError("its losses are no numbers")
    if not all(
        isinstance(table, dict) and all(isinstance(value, list | dict) for value in table.values()) for table in tables
    ):
        raise ValueError("its values are in no table")
    if not isinstance(progress.began, str) or not re.fullmatch(r"[0-9A-Za-z_-]{0,40}", progress.began):
        raise ValueError("it began at no time")


def read_images(state: SavedState) -> dict[str, str]:
    """The hashes of the images of a state: see Description. Empty if it has none, or they cannot be read."""
    try:
        content = read_json(state.folder / IMAGES_FILE)
        return {str(key): str(value) for key, value in content.items()}
    except (OSError, ValueError, AttributeError):
        return {}


@dataclass(frozen=True)
class StateCopy:
    """A state in main memory, which the training does not change: its progress, and name, file and content of each
    entry."""

    progress: Progress
    entries: tuple[tuple[str, str, Any], ...]


def copied(progress: Progress, state: RunState, *, copy: bool = True) -> StateCopy:
    """Copy everything that changes to main memory, on the CPU too, where training changes tensors in place. Without
    `copy` the tensors are those of the training, which has to wait until they are written."""
    entries = [(name, file, entry.state_dict()) for name, entry, file in _files(state)]
    if copy:
        entries = [(name, file, copied_tensors(content)) for name, file, content in entries]
    return StateCopy(deepcopy(progress), tuple(entries))


def bytes_of(state: RunState) -> int:
    """The bytes that `copied` takes."""
    return sum(
        tensor.numel() * tensor.element_size()
        for _, entry, file in _files(state)
        for _, tensor in tensors_of(entry.state_dict(), file)
    )


def write_state(
    folder: Path,
    state: StateCopy,
    description: Description,
    check: Callable[[], None] = lambda: None,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a state folder. The new folder is complete before an old one of the same name is removed. `check` is called
    again and again, and may raise to end the writing; `add` writes more into the folder.

    Raises CheckpointError (full disk, weights or averages that are not finite) and leaves no partial folder.
    """
    with replacing_folder(folder) as building:
        add(building)
        for name, file, content in state.entries:
            check()
            if file.endswith(".safetensors"):
                checked = {key: _checked(tensor, check) for key, tensor in content.items()}
                write_safetensors(building / file, checked, {"part": name})
            else:
                _write(building / file, content, check)
        if description.images:
            write_json(building / IMAGES_FILE, dict(description.images))
        head = {
            "current_epoch": state.progress.epoch,
            "current_step": state.progress.step,
            "progress": asdict(state.progress),
            "identity": description.identity,
            "options": dict(description.options),
            "output_name": description.output_name,
            FILES: list_files(building),
        }
        check()
        write_json(building / STATE_FILE, sealed(head))


def save_state(folder: Path, progress: Progress, state: RunState, description: Description) -> None:
    """Write a state folder while the training waits: see write_state."""
    write_state(folder, copied(progress, state, copy=False), description)


_DAMAGED = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError
)  # fmt: skip


def load_state(saved: SavedState, state: RunState, mesh: Any | None = None) -> Progress:
    """Restore a saved state into `state`, bit for bit, and return its progress. `mesh`: what the tensors of the run are
    sharded over, if they are.

    Raises UserError if a file is missing or does not fit these objects.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if saved.is_sharded:
            from library.training.sharding.state import load_shards

            load_shards(saved.folder, state, mesh)
            return saved.progress
        for _, entry, file in _files(state):
            path = saved.folder / file
            if file.endswith(".safetensors"):
                entry.load_state_dict(load_file(path))
            else:
                check_pickle(path)
                entry.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (*_DAMAGED, SafetensorError) as error:
        reason = " ".join(str(error).split())  # torch lists every tensor on a line of its own
        what = f"--resume {saved.folder}: the state cannot be loaded ({textwrap.shorten(reason, 300)})"
        remedy = "use the model, optimizer and precision of the saved run; if they are the same, the folder is damaged"
        raise UserError((Mistake(what, getattr(error, "remedy", remedy)),)) from error
    return saved.progress


def _write(file: Path, value: Any, check: Callable[[], None]) -> None:
    import torch

    for name, tensor in tensors_of(value, file.name):
        if tensor.is_floating_point() and tensor.numel() and bool(tensor.amin().isnan()):
            raise NotFiniteError(f"{file}: not written, because {name} contains NaN. Nothing was changed.")
    with replacing(file) as whole:
        stream: Any = _CheckedStream(whole, check)
        torch.save(value, stream)


class _CheckedStream:
    """A stream that calls `check` before each write."""

    def __init__(self, stream: BinaryIO, check: Callable[[], None]) -> None:
        self._stream, self._check = stream, check

    def write(self, data: Any) -> int:
        """Write."""
        self._check()
        return self._stream.write(data)

    def flush(self) -> None:
        """Flush."""
        self._stream.flush()


def _checked(tensor: Any, check: Callable[[], None]) -> LazyTensor:
    """A tensor that calls `check` before it is written."""
    lazy = LazyTensor.of(tensor)

    def load() -> Any:
        check()
        return lazy.load()

    return replace(lazy, load=load)


def file_of(name: str) -> str:
    """The file of an entry that is no module of its own."""
    return _FILES.get(name, f"{name}.bin")


def _files(state: RunState) -> Iterator[tuple[str, Stateful, str]]:
    """(name, object, file name) of each entry; modules are model.safetensors, model_1.safetensors and so on."""
    from torch import nn

    from library.training.saving.trained_weights import TrainedWeights

    modules = 0
    for name, entry in state.items():
        if isinstance(entry, (nn.Module, TrainedWeights)):
            yield name, entry, f"model_{modules}.safetensors" if modules else "model.safetensors"
            modules += 1
        elif entry is not None:
            yield name, entry, file_of(name)


class RandomStates:
    """The global random generators of Python, NumPy and torch. Training itself does not use them, but an optimizer or
    third-party schedule may."""

    def state_dict(self) -> dict[str, Any]:
        """The state of each generator."""
        import numpy
        import torch

        from library.runtime.accelerator import random_states

        numpy_state = numpy.random.get_state(legacy=False)
        twister = numpy_state["state"]
        state: dict[str, Any] = {
            "random_state": random.getstate(),
            "numpy_random_seed": (
                numpy_state["bit_generator"],
                torch.from_numpy(twister["key"].astype("int64")),
                twister["pos"],
                numpy_state["has_gauss"],
                numpy_state["gauss"],
            ),
            "torch_manual_seed": torch.get_rng_state(),
        }
        on_devices = random_states()
        if on_devices:
            state[_of_devices()] = on_devices
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved `state_dict`."""
        import numpy
        import torch

        from library.runtime.accelerator import set_random_states

        version, internal, gauss = state["random_state"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, position, has_gauss, cached = state["numpy_random_seed"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
        torch.set_rng_state(state["torch_manual_seed"])
        if torch.accelerator.is_available():
            set_random_states(state.get(_of_devices(), []))


def _of_devices() -> str:
    """accelerate's name for the random states of the devices that there are: torch_cuda_manual_seed."""
    import torch

    accelerator: Any = torch.accelerator.current_accelerator()
    return f"torch_{accelerator.type}_manual_seed"


def fingerprint(lines: Sequence[str]) -> str:
    """A short hash of a list of lines."""
    import hashlib

    return hashlib.blake2b("\n".join(lines).encode("utf-8"), digest_size=16).hexdigest()


def run_of(identity: Identity) -> str:
    """A short hash that tells whose a file is."""
    return fingerprint([f"{fact}={value}" for fact, value in sorted(identity.items())])
