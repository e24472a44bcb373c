"""What happens to a save that fails: when it is tried again, where else a model may go, and which old files wait.

A full disk, a folder that is gone or read-only, a file that another program holds open: the last good files stay, the
training goes on, and the model is saved again a few minutes later. Nothing that was trained is lost for want of a
folder: in the end it goes to another one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from library.checkpoints.header import CheckpointError, NotFiniteError
from library.messages import readable_bytes
from library.options.mistakes import Mistake, UserError

AGAIN_AFTER = 300.0  # seconds after a save that failed, if none is due before
PATIENCE, APART = 600.0, 30.0  # seconds: how long the end of a run tries, and how often
SHARE_OF_ESTIMATE = 0.9  # of an estimated size that must be free


class Unsaved(UserError):
    """Raised for a file or folder that could not be written, though its values are fine. It may succeed later."""


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system (disk full, folder gone, file in use) into Unsaved, without a traceback, and
    values that are not finite into UserError."""
    from safetensors import SafetensorError

    remedy = "continue with --resume from the last saved state; older files were kept, no partial file was left"
    try:
        yield
    except NotFiniteError as error:
        raise UserError((Mistake(str(error), remedy),)) from error
    except CheckpointError as error:  # its message says what is wrong and what to do
        raise Unsaved((Mistake(str(error), remedy),)) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch wraps errors of the file system in a RuntimeError; one without a cause is another problem
        cause = error.__cause__ or error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        what = f"{path} could not be written: {getattr(cause, 'strerror', None) or cause}"
        raise Unsaved((Mistake(what, f"free some space or repair the folder, then {remedy}"),)) from error


def check_space(path: Path, size: float) -> None:
    """Raise Unsaved if the disk of `path` has less than `size` bytes free: a disk that is filled up stops other
    programs too."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # writing tells
        return
    if free < size:
        what = f"{path} was not written: it needs {readable_bytes(round(size))}, the disk has {readable_bytes(free)}"
        raise Unsaved((Mistake(what, "free some space; older files were kept"),))


@dataclass
class Postponed:
    """Whether a save has failed that is to be tried again, and when. `clock`: seconds."""

    clock: Callable[[], float] = time.monotonic
    _due_at: float | None = field(default=None, init=False)

    def failed(self) -> None:
        """Note that a save failed now."""
        self._due_at = self.clock() + AGAIN_AFTER

    def succeeded(self) -> None:
        """Note that a later save is complete."""
        self._due_at = None

    @property
    def is_due(self) -> bool:
        """Whether to try again now."""
        return self._due_at is not None and self.clock() >= self._due_at


@dataclass
class Expired:
    """Groups of old files that are to be removed. After a save that failed, the group of a later one stays in its
    place, so that there are as many good files as the user wants to keep."""

    _groups: list[tuple[Path, ...]] = field(default_factory=list, init=False)
    _missed: int = field(default=0, init=False)

    def after(self, expired: Sequence[Path], *, succeeded: bool) -> list[Path]:
        """What to remove after a save that makes these superfluous; nothing after one that failed."""
        self._groups = [group for group in (*self._groups, tuple(expired)) if group]
        if not succeeded:
            self._missed += 1
            return []
        there = [group for group in self._groups if any(os.path.lexists(path) for path in group)]
        self._missed = max(0, self._missed - (len(self._groups) - len(there)))  # those that were never written
        cut = max(0, len(there) - self._missed)
        self._groups = there[cut:]
        return [path for group in there[:cut] for path in group]


def other_folders(directory: Path, name: str) -> Iterator[Path]:
    """Folders for what cannot be saved in `directory`: beside it, in the current folder, the user's, and that for
    temporary files."""
    places = dict.fromkeys(
        path.absolute() for path in (directory.parent, Path.cwd(), _home(), Path(tempfile.gettempdir()))
    )
    for place in places:
        yield place / f"{Path(name).name}-rescued-{time.strftime('%Y%m%d%H%M%S')}"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no such thing
        return Path.cwd()


def patiently(attempt: Callable[[], None], clock: Callable[[], float], sleep: Callable[[float], None]) -> bool:
    """Try again and again, for ten minutes, what raises Unsaved. Whether it succeeded; Ctrl-C ends the attempts."""
    end = clock() + PATIENCE
    while clock() < end:
        try:
            sleep(APART)
            attempt()
        except Unsaved:
            continue
        except KeyboardInterrupt:
            return False
        return True
    return False
