"""Training states: everything that a run needs to continue as if it had never stopped.

A state is a folder with the file names of accelerate (`model.safetensors`, `optimizer.bin`, `scheduler.bin`,
`scaler.pt`, `random_states_0.pkl`) and `train_state.json`. It is written under a temporary name and renamed when it is
complete. Pickled files contain only plain containers and tensors, and are read with `weights_only=True`.
"""

from __future__ import annotations

import os
import pickle
import random
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

from library.bounded import read_json
from library.checkpoints.header import NotFiniteError
from library.checkpoints.pickles import check_pickle
from library.checkpoints.writer import replacing, replacing_folder, write_json, write_safetensors
from library.options.mistakes import Mistake, UserError

STATE_FILE = "train_state.json"


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


@dataclass(frozen=True)
class SavedState:
    """The content of train_state.json of a state folder."""

    folder: Path
    progress: Progress
    identity: Identity

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
        identity = {str(fact): str(value) for fact, value in content["identity"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"--resume {folder}: not a training state of this trainer ({type(error).__name__}: {error})"
        raise UserError((Mistake(what, remedy),)) from None
    return SavedState(folder, progress, identity)


def save_state(folder: Path, progress: Progress, state: RunState, identity: Identity) -> None:
    """Write a state folder. The new folder is complete before an old one of the same name is removed.

    Raises CheckpointError (full disk, weights or averages that are not finite) and leaves no partial folder.
    """
    with replacing_folder(folder) as building:
        for name, entry, file in _files(state):
            if file.endswith(".safetensors"):
                write_safetensors(building / file, entry.state_dict(), {"part": name})
            else:
                _write(building / file, entry.state_dict())
        head = {
            "current_epoch": progress.epoch,
            "current_step": progress.step,
            "progress": asdict(progress),
            "identity": identity,
        }
        write_json(building / STATE_FILE, head)


_DAMAGED = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError
)  # fmt: skip


def load_state(saved: SavedState, state: RunState) -> Progress:
    """Restore a saved state into `state`, bit for bit, and return its progress.

    Raises UserError if a file is missing or does not fit these objects.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
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
        raise UserError((Mistake(what, remedy),)) from error
    return saved.progress


def _write(file: Path, value: Any) -> None:
    import torch

    for name, tensor in _tensors(value, file.name):
        if tensor.is_floating_point() and tensor.numel() and bool(tensor.amin().isnan()):
            raise NotFiniteError(f"{file}: not written, because {name} contains NaN. Nothing was changed.")
    with replacing(file) as stream:
        torch.save(value, stream)


def _files(state: RunState) -> Iterator[tuple[str, Stateful, str]]:
    """(name, object, file name) of each entry; modules are model.safetensors, model_1.safetensors and so on."""
    from torch import nn

    modules = 0
    for name, entry in state.items():
        if isinstance(entry, nn.Module):
            yield name, entry, f"model_{modules}.safetensors" if modules else "model.safetensors"
            modules += 1
        elif entry is not None:
            yield name, entry, _FILES.get(name, f"{name}.bin")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All tensors in nested dicts, lists and tuples, each with a name that leads to it."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _tensors(inner, f"{name}.{place}")


class RandomStates:
    """The global random generators of Python, NumPy and torch. Training itself does not use them, but an optimizer or
    third-party schedule may."""

    def state_dict(self) -> dict[str, Any]:
        """The state of each generator."""
        import numpy
        import torch

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
        if torch.cuda.is_available():
            state["torch_cuda_manual_seed"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved `state_dict`."""
        import numpy
        import torch

        version, internal, gauss = state["random_state"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, position, has_gauss, cached = state["numpy_random_seed"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
        torch.set_rng_state(state["torch_manual_seed"])
        if torch.cuda.is_available() and "torch_cuda_manual_seed" in state:
            torch.cuda.set_rng_state_all(state["torch_cuda_manual_seed"])


def fingerprint(lines: Sequence[str]) -> str:
    """A short hash of a list of lines."""
    import hashlib

    return hashlib.blake2b("\n".join(lines).encode("utf-8"), digest_size=16).hexdigest()
