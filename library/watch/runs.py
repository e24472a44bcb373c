"""Find the records of runs, follow them, and find the images that they name."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from library.messages import listed
from library.options.mistakes import Mistakes
from library.watch.record_file import RecordFile
from library.watch.run_state import RunState
from library.watch.snapshot import snapshot

ENDING = "-run.jsonl"
"""How the names of records end, after the name of the run."""
IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


@dataclass
class WatchedRun:
    """A run that is followed. Its methods may be called from several threads.

    `version` changes with everything that is read, and is not that of another server.
    """

    record: RecordFile
    state: RunState = field(default_factory=RunState)
    problem: str = ""  # why the record cannot be read now
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: str = field(default_factory=lambda: secrets.token_hex(4))
    _changes: int = 0
    _sent: tuple[str, bytes] = ("", b"")  # the last answer, by its version

    @property
    def name(self) -> str:
        """The name of the run: that of its record without the ending."""
        return self.record.path.name.removesuffix(ENDING)

    @property
    def version(self) -> str:
        """What an answer is known by."""
        return f"{self._server}-{self._changes}"

    def answer(self, known: str) -> bytes:
        """The run as JSON, or only the time if `known` is the version that it still has."""
        with self._lock:
            self._read()
            now = {"version": self.version, "now": time.time()}
            if known == self.version:
                return json.dumps(now).encode("ascii")
            if self._sent[0] != self.version:
                content = snapshot(self.state) | {
                    "name": self.name,
                    "record": str(self.record.path),
                    "damaged": self.record.damaged,
                    "problem": self.problem,
                }
                self._sent = self.version, json.dumps(content, allow_nan=False).encode("ascii")
            return json.dumps(now).encode("ascii")[:-1] + b", " + self._sent[1][1:]

    def image(self, key: str) -> Path | None:
        """The file of an image, if it is one of this run's and is still there."""
        with self._lock:
            found = (drawn.path for prompt in self.state.prompts.values() for drawn in prompt if drawn.key == key)
            path, output_dir = next(found, ""), str(self.state.start.get("output_dir") or "")
        return image_file(self.record.path.parent, output_dir, path) if path else None

    def _read(self) -> None:
        """Take in what is new in the record."""
        before = (self.record.damaged, self.problem)
        read = 0
        try:
            if self.record.was_replaced():
                self.state = RunState()
                read = 1
            for read, event in enumerate(self.record.new_events(), 1):  # noqa: B007 - their number
                self.state.add(event)
            self.problem = ""
        except OSError as error:
            self.problem = f"{self.record.path} cannot be read: {error.strerror or error}"
        if read or before != (self.record.damaged, self.problem):
            self._changes += 1


@dataclass
class Runs:
    """The runs of some folders. Records that appear later are found, too; numbers of runs stay."""

    folders: list[Path]
    runs: list[WatchedRun] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self) -> list[WatchedRun]:
        """All runs that there are now, by number."""
        with self._lock:
            known = {run.record.path for run in self.runs}
            found = [path for folder in self.folders for path in records_in(folder)]
            self.runs += [WatchedRun(RecordFile(path)) for path in dict.fromkeys(found) if path not in known]
            return list(self.runs)

    def first_shown(self) -> list[int]:
        """The numbers of the runs that are shown first: the newest of each folder that was asked for."""
        numbers = {run.record.path: number for number, run in enumerate(self.look())}
        found = [[path for path in records_in(folder) if path in numbers] for folder in self.folders]
        newest = [max(paths, key=_time) for paths in found if paths]
        return [numbers[path] for path in dict.fromkeys(newest)]


def find_runs(places: Iterable[Path]) -> Runs:
    """The runs of these folders, or of records named themselves. Raises UserError if a place has none."""
    mistakes, folders = Mistakes(), []
    for place in places:
        if not place.exists():
            mistakes.add(f"{place}: there is no such folder", "give the --output_dir of a run")
        elif not any(records_in(place)):
            mistakes.add(f"{place} holds no record of a run (NAME{ENDING})", _remedy(place))
        else:
            folders.append(place.absolute())
    mistakes.raise_if_any()
    return Runs(folders)


def _remedy(place: Path) -> str:
    below = sorted(path.parent for path in place.glob(f"*/*{ENDING}")) if place.is_dir() else []
    if below:
        return f"there are records in {listed(dict.fromkeys(below))}: give one of these folders"
    return (
        "give the --output_dir of a run that has begun. Runs of earlier versions wrote no record: their curves are in "
        "--logging_dir, for TensorBoard (tensorboard --logdir), and their images in the folder sample"
    )


def records_in(place: Path) -> Iterator[Path]:
    """The records in a folder, by name; a record is its own. A folder that cannot be read has none."""
    try:
        inside = sorted(place.iterdir()) if place.is_dir() else [place]
    except OSError:
        inside = []
    yield from (path for path in inside if path.name.endswith(ENDING) and path.is_file())


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it was deleted in this moment
        return 0.0


def image_file(folder: Path, output_dir: str, recorded: str) -> Path | None:
    """The file in `folder` that a run wrote as `recorded` into `output_dir`; None if it is no image in that folder.

    The folder may have been moved or copied from another system since. What a record says is not trusted: nothing
    outside of the folder is looked at.
    """
    parts = _parts_below(output_dir, recorded)
    if not parts or any(part == ".." or set(part) & set("\\/:\0") for part in parts):
        return None
    try:
        root = folder.resolve()
        path = root.joinpath(*parts).resolve()
        is_image = path.is_relative_to(root) and path.suffix.lower() in IMAGE_TYPES and path.is_file()
    except (OSError, RuntimeError, ValueError):  # a loop of links; a name that the system does not take
        return None
    return path if is_image else None


def _parts_below(output_dir: str, recorded: str) -> tuple[str, ...]:
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(recorded)
        if path.is_relative_to(kind(output_dir)) and not path.relative_to(kind(output_dir)).is_absolute():
            return path.relative_to(kind(output_dir)).parts
    return ()
