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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from library.checkpoints.writer import replacing, write_json, write_safetensors
from library.options.mistakes import Mistake, UserError
from library.training.optim import optimizers
from library.training.trainable import Part

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


def save_state(
    folder: Path,
    parts: Sequence[Part],
    optimizer: Any,
    schedule: Any,
    scaler: Any | None,
    progress: Progress,
    identity: Identity,
) -> None:
    """Write a state folder. The new folder is whole before an old one of the same name goes away.

    Raises OSError, CheckpointError (a full disk, weights that are not finite) and leaves nothing half-written.
    """
    building = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}.tmp")
    building.mkdir(parents=True)
    try:
        for index, part in enumerate(parts):
            write_safetensors(building / _model_file(index), part.module.state_dict(), {"part": part.name})
        _write(building / "optimizer.bin", optimizer.state_dict())
        _write(building / "scheduler.bin", schedule.state_dict())
        if scaler is not None:
            _write(building / "scaler.pt", scaler.state_dict())
        _write(building / "random_states_0.pkl", _random_states())
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


def load_state(saved: SavedState, parts: Sequence[Part], optimizer: Any, schedule: Any, scaler: Any | None) -> Progress:
    """Put a saved state into the live objects, bit for bit, and return the progress it was saved at."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    def read(name: str) -> Any:
        return torch.load(saved.folder / name, map_location="cpu", weights_only=True)

    try:
        for index, part in enumerate(parts):
            part.module.load_state_dict(load_file(saved.folder / _model_file(index)))
        optimizers.load_state(optimizer, read("optimizer.bin"))
        schedule.load_state_dict(read("scheduler.bin"))
        if scaler is not None:
            scaler.load_state_dict(read("scaler.pt"))
        _restore_random_states(read("random_states_0.pkl"))
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


def _model_file(index: int) -> str:
    return f"model_{index}.safetensors" if index else "model.safetensors"


def _put_in_place(building: Path, folder: Path) -> None:
    """Rename the new folder to its name; os.replace cannot overwrite a folder, so an old one steps aside first."""
    if not folder.exists():
        os.replace(building, folder)
        return
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}.old")
    os.replace(folder, aside)
    os.replace(building, folder)
    shutil.rmtree(aside, ignore_errors=True)


def _random_states() -> dict[str, Any]:
    """The global generators: training draws do not use them, but an optimiser or a foreign scheduler may."""
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


def _restore_random_states(state: dict[str, Any]) -> None:
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
