"""Upload what a run saves, in a thread: a server that is slow, refuses or hangs never ends a run.

The thread takes one file after the other, the oldest first. What fails for a reason that may pass is tried again until
it is uploaded; what is refused is not. A run waits for an upload only without --async_upload, at most a few minutes,
and not at all after one has failed. Everything that is said or removed happens in the run's own thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.messages import counted, listed, quoted
from library.training.ending import size_of
from library.training.hub.plan import UploadPlan
from library.training.hub.repository import HubError, Repository

if TYPE_CHECKING:
    from collections.abc import Mapping

    from library.training.run import Run, SavedKind

QUEUE = 8  # files that wait; each may be one that would have been removed from the disk
PAUSES = (5.0, 30.0, 120.0, 300.0)  # seconds between attempts; the last one from then on
LAST_ATTEMPTS = 3  # of each file once the training has ended, LAST_PAUSE apart
LAST_PAUSE = 5.0
LONGEST_WAIT = 300.0  # seconds that a run waits for one upload: other processes wait too, for --ddp_timeout
SLOWEST = 1e6  # bytes per second at which an upload would be waited for
PATIENCE = 15.0  # seconds for the file that is on its way when a run is interrupted


@dataclass
class _Upload:
    path: Path
    was_tried: bool = False
    remove: Callable[[], None] | None = None  # what retention would have done


@dataclass
class Uploads:
    """The uploads of a run. `repository` does them; `say` and `warn` write log lines. The methods are called by the
    run's thread only."""

    plan: UploadPlan
    repository: Repository
    say: Callable[[str], None]
    warn: Callable[[str], None]
    pauses: Sequence[float] = PAUSES
    last_pause: float = LAST_PAUSE
    longest_wait: float = LONGEST_WAIT
    patience: float = PATIENCE
    lost: list[Path] = field(default_factory=list, init=False)
    _waiting: list[_Upload] = field(default_factory=list, init=False)
    _current: _Upload | None = field(default=None, init=False)
    _to_do: list[Callable[[], None]] = field(default_factory=list, init=False)
    _problem: str = field(default="", init=False)
    _count: int = field(default=0, init=False)
    _failures: int = field(default=0, init=False)  # of the current one
    _is_ending: bool = field(default=False, init=False)
    _ends_at: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def saved(self, path: Path, kind: SavedKind) -> None:
        """Upload a file or folder that was saved. Without --async_upload wait for it, for a bounded time."""
        if kind == "state" and not self.plan.states:
            return
        upload = _Upload(path)
        with self._changed:
            self._waiting = [other for other in self._waiting if other.path != path]  # replaced before it was uploaded
            if len(self._waiting) >= QUEUE:
                self._give_up(self._waiting.pop(0), "too many files wait")
            self._waiting.append(upload)
            self._changed.notify_all()
            if self.plan.waits and not self._problem:
                limit = min(self.longest_wait, 60 + size_of(path) / SLOWEST)
                if not self._changed.wait_for(lambda: upload.was_tried or self._problem, limit):
                    self._tell(self.warn, f"{path.name} takes long and is uploaded while the run trains on")
        self.catch_up()

    def release(self, path: Path, remove: Callable[[], None]) -> None:
        """Remove what has expired: now, or once it is uploaded."""
        with self._changed:
            for upload in (*self._waiting, self._current):
                if upload is not None and upload.path == path:
                    upload.remove = remove
                    return
        remove()

    def catch_up(self, values: Mapping[str, float] | None = None) -> None:
        """Say and remove what is due. Also a listener of the run's values."""
        with self._changed:
            calls, self._to_do = self._to_do, []
        for call in calls:
            call()

    def finish(self) -> None:
        """Wait until everything is uploaded, or the last attempts have failed."""
        with self._changed:
            self._is_ending, self._failures = True, 0
            left = len(self._waiting) + (self._current is not None)
            self._changed.notify_all()
        if left:
            self.say(f"waiting for {counted(left, 'upload')} to {self.plan.repository}")
        while self._thread.is_alive():
            self._thread.join(1.0)
            self.catch_up()
        self.close()

    def close(self) -> None:
        """Stop after the file that is on its way, `patience` seconds at most, and say what was not uploaded."""
        with self._changed:
            self._is_ending = True
            self._ends_at = time.monotonic() + self.patience
            self._changed.notify_all()
        self._thread.join(self.patience)
        self.catch_up()
        with self._changed:
            left = [upload.path for upload in (self._current, *self._waiting) if upload is not None]
            missing = [path for path in dict.fromkeys([*self.lost, *left]) if path.exists()]
        if self._count:
            self.say(
                f"uploaded to {self.plan.repository}: {counted(self._count, 'file or folder', 'files or folders')}"
            )
        if missing:
            self.warn(f"not uploaded: {listed(missing, 8)}. {self._by_hand(missing[-1])}")

    def _by_hand(self, path: Path) -> str:
        plan = self.plan
        target = f"{plan.folder}/{path.name}" if plan.folder else path.name
        kind = "" if plan.type == "model" else f" --repo-type {plan.type}"
        return f"By hand: hf upload {plan.repository} {quoted(path)} {quoted(target)}{kind}"

    def _work(self) -> None:
        """Open the repository, so that a wrong token is told before hours of training; then upload."""
        self._attempt(self.repository.prepare)
        while (upload := self._take()) is not None:
            while not self._try(upload):
                if not self._pause():
                    return

    def _take(self) -> _Upload | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_ending)
            if not self._waiting or self._ends_at is not None:
                return None
            self._current, self._failures = self._waiting.pop(0), 0
            return self._current

    def _try(self, upload: _Upload) -> bool:
        """One attempt. Returns whether there is nothing more to do."""
        error = self._attempt(lambda: self.repository.commit(upload.path))
        with self._changed:
            upload.was_tried = True
            self._failures += error is not None
            is_last = self._is_ending and self._failures >= LAST_ATTEMPTS
            if error is None:
                self._count += 1
                self.lost = [path for path in self.lost if path != upload.path]
                self._tell(self.say, f"uploaded {upload.path.name} to {self.plan.repository}")
                if upload.remove is not None:
                    self._to_do.append(upload.remove)
            elif error.is_final or is_last:
                self._give_up(upload, str(error))
            is_done = error is None or error.is_final or is_last
            if is_done:
                self._current = None
            self._changed.notify_all()
            return is_done

    def _attempt(self, action: Callable[[], str | None]) -> HubError | None:
        """Do something at the Hub, and tell of problems and their end, each once."""
        try:
            told, error = action(), None
        except HubError as refused:
            told, error = None, refused
        with self._changed:
            if told:
                self._tell(self.warn, f"{self.plan.repository}: {told}")
            if error is not None and str(error) != self._problem and not error.is_final:
                self._tell(self.warn, f"{self.plan.repository}: uploads wait and are tried again: {error}")
            elif error is not None and str(error) != self._problem:
                self._tell(self.warn, f"{self.plan.repository}: {error}. The run goes on, and its files stay here")
            elif error is None and self._problem:
                self._tell(self.say, f"{self.plan.repository}: it answers again")
            self._problem = "" if error is None else str(error)
            self._changed.notify_all()
        return error

    def _give_up(self, upload: _Upload, why: str) -> None:
        self.lost.append(upload.path)
        self._tell(self.warn, f"{upload.path.name} is not uploaded: {why}")
        if upload.remove is not None:
            self._to_do.append(upload.remove)

    def _tell(self, say: Callable[[str], None], text: str) -> None:
        self._to_do.append(lambda: say(text))

    def _pause(self) -> bool:
        """Wait before another attempt, at most until the training ends if it still goes on. Returns whether there is
        time for one."""
        with self._changed:
            was_ending = self._is_ending
            pause = self.last_pause if was_ending else self.pauses[min(self._failures, len(self.pauses)) - 1]
            self._changed.wait_for(lambda: self._ends_at is not None or self._is_ending != was_ending, timeout=pause)
            return self._ends_at is None


class NoUploads:
    """A run that uploads nothing."""

    def release(self, path: Path, remove: Callable[[], None]) -> None:
        """Remove what has expired."""
        remove()


@contextmanager
def uploading(plan: UploadPlan | None, run: Run) -> Iterator[Uploads | NoUploads]:
    """Upload what the run saves while this is open. At a regular end everything is uploaded or its last attempt has
    failed; an interrupted run does not wait for more than the file that is on its way. Only the writing process
    uploads."""
    if plan is None or not run.processes.is_writer:
        yield NoUploads()
        return
    uploads = Uploads(plan, Repository(plan), run.say, run.warn)
    run.listeners.append(uploads.catch_up)
    run.saving_listeners.append(uploads.saved)
    try:
        yield uploads
        uploads.finish()
    except BaseException:
        uploads.close()
        raise
