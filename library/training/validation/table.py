"""The table of a run's validations, as CSV beside the model: one row per step, set, version and part of the timesteps.

A resumed run continues the table: rows of later steps are dropped, as they are of a run that did not go on.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import replacing
from library.training.saving.state import Identity, run_of

if TYPE_CHECKING:
    from library.training.saving.outputs import Outputs
    from library.training.validation.losses import Means

ENDING = "-validation.csv"
ALL = "all"
MIDDLE = slice(2, 6)  # the parts of the timesteps where memorising shows: not details, not outlines


@dataclass(frozen=True)
class Row:
    """A mean loss. `version`: `model`, `ema` or `base`; `timesteps`: `all`, or the first and last of a part; `error`:
    the standard error over images."""

    step: int
    epoch: int
    set: str
    version: str
    timesteps: str
    images: int
    loss: float
    error: float | None


COLUMNS = (*(each.name for each in fields(Row)), "run")


def table_path(outputs: Outputs) -> Path:
    """The file of the table: `NAME-validation.csv`, or `last-validation.csv`."""
    return outputs.directory / f"{outputs.final_stem()}{ENDING}"


@dataclass
class Table:
    """The rows of a run. `run` tells whose they are; `path` None: never written."""

    path: Path | None
    run: str
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)

    def add(self, step: int, epoch: int, version: str, parts: Sequence[tuple[int, int]], means: Means) -> None:
        """Add the means of a version of the weights, unless they are there. `parts`: [low, high) of each part."""
        if any(row.step == step and row.version == version for row in self.rows):
            return
        names = [ALL, *(f"{low}-{high - 1}" for low, high in parts)]
        for name, of_set in means.items():
            for timesteps, mean in zip(names, of_set, strict=True):
                self.rows.append(Row(step, epoch, name, version, timesteps, mean.images, mean.value, mean.error))

    def write(self) -> None:
        """Write the file. A table that cannot be written is no reason to end a run."""
        if self.path is None or not self.rows:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self.rows:
            values = [getattr(row, name) for name in COLUMNS[:-1]]
            writer.writerow(["" if value is None else value for value in values] + [self.run])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as stream:
                stream.write(text.getvalue().encode("utf-8"))
        except (OSError, CheckpointError) as error:
            self.say(f"the table of validations could not be written: {error}")

    def memorises(self) -> bool:
        """Whether in the last three validations the loss of training images falls while that of held-out images rises
        at middle timesteps, and did not before."""
        trained = self._losses("training", of_middle=False)
        held_out = self._losses("held_out", of_middle=True)
        return _diverges(trained, held_out, 3) and not _diverges(trained[:-1], held_out[:-1], 3)

    def _losses(self, of_set: str, *, of_middle: bool) -> list[float]:
        """The losses of the weights in training, by step: of all timesteps, or the mean of those in the middle."""
        by_step: dict[int, list[Row]] = {}
        for row in self.rows:
            if row.set == of_set and row.version == "model" and (row.timesteps != ALL) is of_middle:
                by_step.setdefault(row.step, []).append(row)
        chosen = [rows[MIDDLE] if of_middle else rows for _, rows in sorted(by_step.items())]
        return [sum(row.loss for row in rows) / len(rows) for rows in chosen]


def _diverges(falling: Sequence[float], rising: Sequence[float], count: int) -> bool:
    down, up = falling[-count:], rising[-count:]
    if len(down) < count or len(up) < count:
        return False
    return all(a > b for a, b in zip(down, down[1:], strict=False)) and all(
        a < b for a, b in zip(up, up[1:], strict=False)
    )


def begin_table(
    path: Path | None,
    identity: Identity,
    finished: int,
    say: Callable[[str], None],
    saved: Identity | None = None,
) -> Table:
    """The table of a run that begins after `finished` steps, with the rows of the same run up to there. `saved`: the
    identity in the state that is resumed, which an earlier version may have written with fewer options."""
    run, before = run_of(identity)[:16], run_of(saved or identity)[:16]
    table = Table(path, run, say)
    if finished and path is not None and path.is_file():
        table.rows = [row for row in _read(path, {run, before}) if row.step <= finished]
    return table


def _read(path: Path, runs: set[str]) -> list[Row]:
    """The rows of these runs; none of a file that is not ours."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            found = [each for each in csv.DictReader(file) if each["run"] in runs]
        return [
            Row(
                int(each["step"]), int(each["epoch"]), each["set"], each["version"], each["timesteps"],
                int(each["images"]), float(each["loss"]), float(each["error"]) if each["error"] else None,
            )
            for each in found
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []
