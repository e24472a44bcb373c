"""What a measuring process tells the one that started it: lines of its output with a mark and a JSON object."""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "@@card "


def emit(kind: str, **values: Any) -> None:
    """Print one result at once, on the real output even while `sys.stdout` is another."""
    stream = sys.__stdout__ or sys.stdout
    stream.write(f"{MARK}{json.dumps({'kind': kind, **values})}\n")
    stream.flush()


def leave_broken_device(error: str) -> None:
    """End the process after an error that leaves the device unusable for it (an illegal access to memory): whoever
    started it starts another one for what is left."""
    if any(
        sign in error for sign in ("CUDA error", "HIP error", "device-side assert", "CUBLAS_STATUS_EXECUTION_FAILED")
    ):
        sys.exit(3)


def parse(line: str) -> dict[str, Any] | None:
    """The result in a line of output; None if it is another line."""
    place = line.find(MARK)  # a progress bar may stand before it
    if place < 0:
        return None
    try:
        found = json.loads(line[place + len(MARK) :])
    except ValueError:  # the process was killed while it wrote
        return None
    return found if isinstance(found, dict) and "kind" in found else None
