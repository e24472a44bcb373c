"""Training states: everything a run needs to go on as if it had never stopped.

A state is a folder with the file names that users know from accelerate (`model.safetensors`, `optimizer.bin`,
`scheduler.bin`, `scaler.pt`, `random_states_0.pkl`, `train_state.json`). It is built beside its final name and moved
there when it is whole.
Pickled files hold plain containers and tensors only and are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import textwrap
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from library.checkpoints.writer import replacing, write_json, write_safetensors
from library.options.mistakes import Mistake, UserError

STATE_FILE = "train_state.json"


@dataclass
class Progress:
    """How far a run has come. `step` counts optimiser steps, `epoch` is 1-based, `window` counts the finished optimiser
    steps of the current epoch; `epoch_losses` are their losses, `last_epoch_losses` those of the epoch before, for the
    averages that are reported."""

    step: int = 0
    epoch: int = 1
    window: int = 0
    epoch_losses: list[float] = field(default_factory=list)
    last_epoch_losses: list[float] = field(default_factory=list)


Identity = dict[str, str]
"""What must be the same for a resumed run to be the continuation of the one that was saved: fact -> value."""


class Stateful(Protocol):
    """What can be saved and put back: modules, optimizers, schedules, gradient scalers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


RunState = Mapping[str, Stateful | None]
"""All that a run resumes from beside its progress, by name, in the order in which it is put back; None: this run has
no such thing. Each entry is a file of its own."""

_FILES = {
    "optimizer": "optimizer.bin",
    "schedule": "scheduler.bin",
    "scaler": "scaler.pt",
    "random": "random_states_0.pkl",
}


@dataclass(frozen=True)
class SavedState:
    """The readable head of a state folder (its train_state.json)."""

    folder: Path
    progress: Progress
    identity: Identity


def read_state(folder: Path) -> SavedState:
    """Read the head of a state folder, without torch. Raises UserError for a folder that is no whole state of this
    trainer."""
    file = folder / STATE_FILE
    remedy = "give a folder written by --save_state (NAME-state, NAME-000003-state, NAME-step00000100-state)"
    if not os.path.isfile(file):
        missing = f"it holds no {STATE_FILE}" if os.path.isdir(folder) else "there is no such folder"
        raise UserError((Mistake(f"--resume {folder}: no training state of this trainer there ({missing})", remedy),))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        progress = Progress(**content["progress"])
        identity = {str(fact): str(value) for fact, value in content["identity"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"--resume {folder}: no training state of this trainer there ({type(error).__name__}: {error})"
        raise UserError((Mistake(what, remedy),)) from None
    return SavedState(folder, progress, identity)


def save_state(folder: Path, progress: Progress, state: RunState, identity: Identity) -> None:
    """Write a state folder. The new folder is whole before an old one of the same name goes away.

    Raises OSError, CheckpointError (a full disk, weights that are not finite) and leaves nothing half-written.
    """
    building = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}.tmp")
    building.mkdir(parents=True)
    try:
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
        _put_in_place(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


_DAMAGED = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError
)  # fmt: skip


def load_state(saved: SavedState, state: RunState) -> Progress:
    """Put a saved state into the live objects, bit for bit, and return the progress it was saved at.

    Raises UserError for a folder that lacks a file or does not fit these objects.
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
                entry.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (*_DAMAGED, SafetensorError) as error:
        reason = " ".join(str(error).split())  # torch lists every tensor, a line each
        what = f"--resume {saved.folder}: this state cannot be read into the run ({textwrap.shorten(reason, 300)})"
        remedy = "the folder is damaged, or the run has another model, optimiser or precision than the saved one"
        raise UserError((Mistake(what, remedy),)) from error
    return saved.progress


def _write(file: Path, value: Any) -> None:
    import torch

    with replacing(file) as stream:
        torch.save(value, stream)


def _files(state: RunState) -> Iterator[tuple[str, Stateful, str]]:
    """Name, object and file of each entry: modules as model.safetensors, model_1.safetensors and so on."""
    from torch import nn

    modules = 0
    for name, entry in state.items():
        if isinstance(entry, nn.Module):
            yield name, entry, f"model_{modules}.safetensors" if modules else "model.safetensors"
            modules += 1
        elif entry is not None:
            yield name, entry, _FILES.get(name, f"{name}.bin")


def _put_in_place(building: Path, folder: Path) -> None:
    """Rename the new folder to its name; os.replace cannot overwrite a folder, so an old one steps aside first."""
    if not folder.exists():
        os.replace(building, folder)
        return
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}.old")
    os.replace(folder, aside)
    os.replace(building, folder)
    shutil.rmtree(aside, ignore_errors=True)


class RandomStates:
    """The global random generators of Python, NumPy and torch: training draws do not use them, but an optimizer or a
    third-party schedule may."""

    def state_dict(self) -> dict[str, Any]:
        """The state of each generator."""
        import numpy
        import torch

        of_numpy = numpy.random.get_state(legacy=False)
        twister = of_numpy["state"]
        state: dict[str, Any] = {
            "random_state": random.getstate(),
            "numpy_random_seed": (
                of_numpy["bit_generator"],
                torch.from_numpy(twister["key"].astype("int64")),
                twister["pos"],
                of_numpy["has_gauss"],
                of_numpy["gauss"],
            ),
            "torch_manual_seed": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["torch_cuda_manual_seed"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a saved `state_dict` back."""
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
    """A short name for a list of facts: equal lists, equal names."""
    import hashlib

    return hashlib.blake2b("\n".join(lines).encode("utf-8"), digest_size=16).hexdigest()
