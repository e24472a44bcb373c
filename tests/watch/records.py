"""Write records of runs that never were."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from PIL import Image

BEGAN = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def line(type: str, step: int, **data: object) -> bytes:
    """An event, a second per step after the beginning, as docs/events.md has it."""
    time = (BEGAN + timedelta(seconds=step)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    event = {"type": type, "time": time, "step": step, "data": data}
    return json.dumps(event, ensure_ascii=False).encode() + b"\n"


def begin(stage: str = "started", step: int = 0, **data: object) -> bytes:
    """The event that a run begins with."""
    return line("lifecycle.stage", step, **{"stage": stage, "total_steps": 100, "output_dir": "output"} | data)


def status(step: int, **values: float | None) -> bytes:
    """The event of a step; `values` with __ for /."""
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return line("training.status", step, epoch=1, values=named, loss=values.get("loss"))


def drawn(path: str, step: int, prompt: str = "a dog", name: str = "sample/00") -> bytes:
    """The event of a preview."""
    return line("validation.image", step, name=name, path=path, prompt=prompt, seed=1, width=8, height=8)


def write(folder: Path, *lines: bytes, name: str = "dog") -> Path:
    """A record in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-run.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def write_image(path: Path) -> Path:
    """A small PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, "png")
    return path
