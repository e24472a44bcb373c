"""The hashes by which WebUIs identify a model. Reading gigabytes takes seconds, so each file is hashed once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from library.bounded import read_json
from library.checkpoints.files import legacy_hash, sha256
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_json

_COARSEST = 2_000_000_000  # ns: FAT stores modification times in steps of two seconds


class Hashes(NamedTuple):
    """8 hex digits (ss_sd_model_hash) and 64 (ss_new_sd_model_hash), or a word that says why there are none."""

    short: str
    whole: str


def model_hashes(path: Path | str) -> Hashes:
    """Hash a whole model file. Returns "IsADirectory" or "NOFILE" twice if there is no file to read."""
    if Path(path).is_dir():
        return Hashes("IsADirectory", "IsADirectory")
    try:
        return Hashes(legacy_hash(path), sha256(path))
    except OSError:
        return Hashes("NOFILE", "NOFILE")


class ModelHashes:
    """The hashes of a file in its state at construction, computed on first use.

    `memory`: a folder that caches them between runs, while the file's size and modification time stay the same.
    """

    def __init__(self, path: Path, memory: Path | None = None) -> None:
        self._path = Path(os.path.abspath(path))
        self._stamp = _stamp(self._path)
        name = hashlib.sha256(os.fsencode(self._path)).hexdigest()[:32]
        self._remembered = None if memory is None else memory / f"{name}.json"
        self._lock = threading.Lock()
        self._found: Hashes | None = None
        self._begun = self._done = False

    def begin(self) -> None:
        """Compute the hashes in a background thread, once; hashing releases the GIL."""
        if self._begun:
            return
        self._begun = True
        threading.Thread(target=self.value, daemon=True).start()

    def value(self) -> Hashes | None:
        """Return the hashes; None if the file has been replaced meanwhile."""
        with self._lock:
            if not self._done:
                self._found, self._done = self._recall() or self._compute(), True
            return self._found

    def _compute(self) -> Hashes | None:
        found = model_hashes(self._path)
        if _stamp(self._path) != self._stamp:
            return None
        old_enough = self._stamp is not None and time.time_ns() - self._stamp[1] > _COARSEST
        if self._remembered is not None and old_enough:
            with contextlib.suppress(CheckpointError, OSError):  # without the cache it only takes longer
                write_json(self._remembered, {"stamp": self._stamp, **found._asdict()})
        return found

    def _recall(self) -> Hashes | None:
        if self._remembered is None or self._stamp is None:
            return None
        try:
            kept = read_json(self._remembered)
            if tuple(kept["stamp"]) == self._stamp:
                return Hashes(str(kept["short"]), str(kept["whole"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return size and modification time of a file; None for a folder or a missing file."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return None if path.is_dir() else (facts.st_size, facts.st_mtime_ns)
