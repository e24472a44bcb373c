"""Writes training states beside the training, which waits only until everything that changes is copied.

One state at a time: the next waits for the one before. Whatever goes wrong is raised in the run's own thread, at the
next call of `collect`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.messages import readable_bytes
from library.options.mistakes import UserError
from library.training.saving.state import (
    Description,
    Progress,
    RunState,
    StateCopy,
    bytes_of,
    copied,
    write_state,
)
from library.training.saving.unsaved import explain_write_errors

if TYPE_CHECKING:
    from library.training.sharding.shards import Shards

SHARE = 0.8  # of the memory that is free, which a copy may take
PATIENCE = 30.0  # seconds for the piece that is being written when a run is stopped at once


class Abandoned(Exception):
    """Raised in the thread when its state is no longer wanted."""


@dataclass
class _Writing:
    """A state that is being written. `done` is called once it is whole. `has_ended`: the thread has, or has raised
    `error`."""

    folder: Path
    done: Callable[[], None]
    has_ended: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


@dataclass
class StateWriter:
    """Writes states of `state`. `say`: a log line; `free_memory()`: bytes of main memory that can be had now. `shards`
    of a sharded run: its processes write them together, and the training waits."""

    state: RunState
    description: Description
    say: Callable[[str], None]
    free_memory: Callable[[], int]
    shards: Shards | None = None
    _writing: _Writing | None = field(default=None, init=False)
    _abandoned: threading.Event = field(default_factory=threading.Event, init=False)
    _waits: bool = field(default=False, init=False)  # for want of memory

    def begin(self, folder: Path, progress: Progress, done: Callable[[], None]) -> None:
        """Begin to write a state, after the one before. Raises what went wrong with that."""
        self.collect(wait=True)
        copy = self.shards is None and self._may_copy()
        state, add = (
            (copied(progress, self.state, copy=copy), _nothing) if self.shards is None else self.shards.parted(progress)
        )
        # a daemon: a run that ends at once does not wait for it
        writing = _Writing(folder, done)
        thread = threading.Thread(target=self._write, args=(writing, state, add), name="state", daemon=True)
        del state  # the thread drops it when it has written
        thread.start()
        self._writing = writing
        if not copy:
            writing.has_ended.wait()

    def collect(self, *, wait: bool = False) -> None:
        """Call `done` of a state that is whole, or raise what went wrong with it. `wait`: until it is written."""
        writing = self._writing
        if writing is None or not (wait or writing.has_ended.is_set()):
            return
        writing.has_ended.wait()
        self._writing = None
        if writing.error is not None:
            raise writing.error
        writing.done()

    def abandon(self) -> None:
        """Give up the state that is being written, and leave nothing of it, unless it is complete by now."""
        with suppress(UserError):  # the run ends anyway
            self.collect()
        self._abandoned.set()
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.has_ended.wait(PATIENCE)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """In this context states may be written. A run that ends waits for the last one, unless it ends at once."""
        try:
            yield
        except KeyboardInterrupt:
            self.abandon()
            raise
        except BaseException:
            with suppress(UserError):  # there is a worse error
                self.collect(wait=True)
            raise
        self.collect(wait=True)

    def _write(self, writing: _Writing, state: StateCopy, add: Callable[[Path], None]) -> None:
        """In the thread."""
        try:
            with explain_write_errors(writing.folder):
                write_state(writing.folder, state, self.description, self._check, add)
        except BaseException as error:  # noqa: BLE001 - raised again by `collect`
            writing.error = error
        finally:
            writing.has_ended.set()

    def _check(self) -> None:
        if self._abandoned.is_set():
            raise Abandoned

    def _may_copy(self) -> bool:
        """Whether there is room for a copy; else the training waits, which is said once."""
        needed, free = bytes_of(self.state), self.free_memory()
        if needed <= free * SHARE:
            return True
        if not self._waits:
            self._waits = True
            what = f"a copy of the training state takes {readable_bytes(needed)}, {readable_bytes(free)} are free"
            self.say(f"{what}: the training waits while a state is written")
        return False


def _nothing(folder: Path) -> None:
    """Add nothing."""


def free_memory(limit: int | None) -> int:
    """Bytes of main memory that this process can get without others losing theirs. `limit`: what it may have."""
    import psutil

    free = int(psutil.virtual_memory().available)
    return free if limit is None else max(0, min(free, limit - int(psutil.Process().memory_info().rss)))
