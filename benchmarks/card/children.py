"""Start measuring processes, pass on what they report as it comes, and end them at their time limit."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.card.lines import parse

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 1.0  # seconds for the last lines of a process that is over


class Child:
    """A running measuring process: `python -m MODULE …` with a time limit in seconds. Its results go into a queue."""

    def __init__(
        self, module: str, words: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.limit = module.rsplit(".", 1)[-1], limit
        self.end = time.monotonic() + limit
        self.tail: deque[str] = deque(maxlen=8)
        self.ended = ""
        self._over: float | None = None  # since when the process is seen to be over
        self._found: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, *words],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=os.name == "posix",  # so that its own children end with it
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            found = parse(line)
            if found is not None:
                self._found.put(found)
            elif line.strip():
                self.tail.append(line.rstrip()[-300:])
        self._found.put(None)

    def poll(self, wait: float) -> dict[str, Any] | None:
        """The next result within so many seconds, or None. Ends the process when its time is over."""
        if self.ended:
            return None
        try:
            found = self._found.get(timeout=max(0.0, min(wait, self.end - time.monotonic())))
        except queue.Empty:
            now = time.monotonic()
            if now >= self.end:
                self.kill()
                self.ended = f"stopped after {self.limit:.0f} s"
            elif self._over is None:
                self._over = None if self._process.poll() is None else now
            elif now >= self._over + LAST_LINES:  # what it started, such as compilers, keeps its output open
                self._end_group()
                self._note_end()
            return None
        if found is None:
            self._note_end()
        return found

    def _note_end(self) -> None:
        code = self._process.wait()
        self.ended = "done" if code == 0 else f"exit code {code}: {' / '.join(self.tail)[-600:]}"

    @property
    def broke(self) -> bool:
        """Whether the process ended by itself with an error, and its time is not over."""
        return self.ended.startswith("exit code") and time.monotonic() < self.end

    def results(self) -> Iterator[dict[str, Any]]:
        """All results, until the process ends or its time is over."""
        try:
            while not self.ended:
                found = self.poll(5.0)
                if found is not None:
                    yield found
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process and its own."""
        if self._process.poll() is not None:
            return
        self._end_group()
        self._process.kill()
        self._process.wait()

    def _end_group(self) -> None:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
