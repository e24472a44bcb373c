"""Print the mistakes of a run so that they are the last thing on the screen, also below `accelerate launch`.

accelerate's launcher turns every exit code but 0 into 1 and, unless it got --quiet, ends with a traceback of its own,
after the program has ended. A program cannot change what another one prints. So it leaves a small process behind, which
waits until the launcher has ended and prints the mistakes once more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.mistakes import UserError

if TYPE_CHECKING:
    import psutil

ROOT = Path(__file__).resolve().parents[2]
USER_ERROR = 2  # exit code
_PATIENCE = 30  # seconds; the launcher ends within one


def report_mistakes(error: UserError) -> int:
    """Print all mistakes to standard error, and return the exit code for them."""
    print(f"\n{error}", file=sys.stderr, flush=True)
    launcher = _find_launcher()
    if launcher is not None:
        words = [sys.executable, "-m", __name__, str(launcher.pid)]
        repeating = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        if repeating.stdin is not None:
            repeating.stdin.write(str(error).encode())
            repeating.stdin.close()
    return USER_ERROR


def ends_in_traceback(words: Sequence[str]) -> bool:
    """Whether a command line is that of accelerate's launcher without --quiet."""
    program = " ".join(words[:3])  # Python, the script or -m, and its first word
    return "accelerate" in program and "launch" in program and not {"-q", "--quiet"} & set(words)


def _find_launcher() -> psutil.Process | None:
    """The launcher that started this program; None if there is none, or if it will be quiet."""
    if not any(name.startswith("ACCELERATE_") for name in os.environ) or os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    try:
        import psutil  # accelerate needs it

        # on Windows there is one more process between them: the Python of a virtual environment starts another
        above = psutil.Process().parents()[:3]
        return next((process for process in reversed(above) if ends_in_traceback(process.cmdline())), None)
    except ImportError:
        return None
    except psutil.Error:  # a process has just ended, or belongs to somebody else
        return None


def _repeat_after(launcher: int) -> None:
    """Print standard input to standard error after the process `launcher` has ended."""
    import psutil

    text = sys.stdin.buffer.read().decode()
    try:
        process, end = psutil.Process(launcher), time.monotonic() + _PATIENCE
        # a process that has ended stays a zombie until whoever started it asks for its exit code
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
            time.sleep(0.02)
    except (psutil.Error, KeyboardInterrupt):
        pass
    sys.stderr.reconfigure(errors="replace")  # type: ignore[union-attr]
    print(f"\n{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    _repeat_after(int(sys.argv[1]))
