"""Whether a training state is whole, and the newest one of a run. No torch.

A state lists the size and CRC-32 of each of its files, and of its list itself. So a file that is cut off, missing or
changed in a single bit is found, by reading the state once: it has to be read anyway, and what was read stays in the
memory of the operating system. A cryptographic hash would take longer and find no more accidents.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.bounded import read_json
from library.options.mistakes import UserError
from library.training.saving.checksums import FILES, STATE_FILE, checksum, is_sealed
from library.training.saving.state import SavedState, read_state


def damage(state: SavedState) -> str:
    """What is wrong with the files of a state; "" for a whole one. One of an earlier version lists no files: then only
    those that are cut off are found, when they are loaded."""
    try:
        head = read_json(state.folder / STATE_FILE)
        if not is_sealed(head):
            return f"{STATE_FILE} was changed"
        for name, known in head.get(FILES, {}).items():
            path = state.folder / name
            if state.folder.absolute() not in Path(os.path.abspath(path)).parents:
                return f"{STATE_FILE} names a file elsewhere: {name}"
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != known["bytes"]:
                return f"{name} has {size} of {known['bytes']} bytes"
        for name, known in head.get(FILES, {}).items():
            if checksum(state.folder / name) != known["crc32"]:
                return f"the content of {name} was changed"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@dataclass(frozen=True)
class Newest:
    """The newest whole state of a run, if there is one, and what the user should know of those that are not."""

    state: SavedState | None
    notes: tuple[str, ...]


def newest_whole(directory: Path, name: str | None) -> Newest:
    """The state with the most steps in the output folder of the run of this --output_name. States of other names are
    left out, and those that are not whole, which is said."""
    found: list[tuple[int, float, SavedState]] = []
    notes: list[str] = []
    for folder in _folders(directory, name):
        try:
            state = read_state(folder)
        except UserError as error:
            notes.append(f"--resume auto: {folder} is passed over: {error.mistakes[0].what}")
            continue
        if state.output_name in (None, name or ""):
            found.append((state.progress.step, (folder / STATE_FILE).stat().st_mtime, state))
    for _, _, state in sorted(found, key=lambda each: each[:2], reverse=True):
        wrong = damage(state)
        if not wrong:
            notes.append(f"--resume auto: continues {state.folder}, after step {state.progress.step}")
            return Newest(state, tuple(notes))
        notes.append(f"--resume auto: {state.folder} is damaged ({wrong}): the state before it is taken")
    return Newest(None, tuple(notes))


def _folders(directory: Path, name: str | None) -> Iterator[Path]:
    """The folders with the names of a run's states: see outputs.py."""
    last, epoch, step = (re.escape(name or default) for default in ("last", "epoch", "at"))
    pattern = re.compile(rf"{last}-state|{epoch}-\d{{6,}}-state|{step}-step\d{{8,}}-state")
    try:
        folders = sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name) and path.is_dir())
    except OSError:
        return
    yield from folders
