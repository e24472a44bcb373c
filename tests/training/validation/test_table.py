"""The table of validations: what it holds, how a resumed run continues it, and what it says of memorising."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from library.training.validation.losses import Mean
from library.training.validation.plan import TIMESTEPS, SetName
from library.training.validation.table import Table, begin_table

PARTS = [(low, low + 125) for low in range(0, 1000, 125)]
IDENTITY = {"--seed": "1"}


def means(held_out: float, trained: float, middle: float = 0.0) -> dict[SetName, list[Mean]]:
    """Means of one image; `middle`: what held-out images have more at middle timesteps."""
    shape = [0.0] * 3 + [middle] * 4 + [0.0] * 2
    rows: dict[SetName, list[Mean]] = {
        "held_out": [Mean(held_out + more, 0.125, 3) for more in shape],
        "training": [Mean(trained, None, 1)] * (1 + TIMESTEPS),
    }
    return rows


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def made(path: Path | None, finished: int = 0, **identity: str) -> Table:
    return begin_table(path, {**IDENTITY, **identity}, finished, lambda text: None)


def test_a_row_for_each_step_set_version_and_part(tmp_path: Path) -> None:
    table = made(tmp_path / "new" / "dog-validation.csv")
    table.add(0, 0, "base", PARTS, means(0.5, 0.25))
    table.add(7, 2, "model", PARTS, means(1 / 3, 0.25))
    table.add(7, 2, "model", PARTS, means(9, 9))  # due at the end of an epoch too
    table.write()
    rows = read(tmp_path / "new" / "dog-validation.csv")
    assert len(rows) == 2 * 2 * (1 + TIMESTEPS)
    assert list(rows[0]) == ["step", "epoch", "set", "version", "timesteps", "images", "loss", "error", "run"]
    assert [rows[18][name] for name in rows[0]][:-1] == [
        "7",
        "2",
        "held_out",
        "model",
        "all",
        "3",
        repr(1 / 3),
        "0.125",
    ]
    assert [row["timesteps"] for row in rows[:9]] == ["all", *(f"{low}-{high - 1}" for low, high in PARTS)]
    assert rows[9]["set"] == "training" and rows[9]["error"] == ""


def test_a_resumed_run_continues_the_table_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "dog-validation.csv"
    whole = made(path)
    for step in (2, 4, 6):
        whole.add(step, 1, "model", PARTS, means(1 / step, 0.1 * step))
        whole.write()
    expected = path.read_bytes()
    rest = made(path, finished=4)
    assert {row.step for row in rest.rows} == {2, 4} and rest.rows == whole.rows[:36]
    rest.add(6, 1, "model", PARTS, means(1 / 6, 0.1 * 6))
    rest.write()
    assert path.read_bytes() == expected
    path.write_bytes(b"\xef\xbb\xbf" + expected.replace(b"\n", b"\r\n"))  # as a spreadsheet saves it
    assert made(path, 4).rows == whole.rows[:36]
    assert not made(path).rows and not made(path, 4, other="yes").rows
    newer = {**IDENTITY, "--an_option_of_a_later_version": "off"}
    assert begin_table(path, newer, 4, pytest.fail, saved=IDENTITY).rows == whole.rows[:36]
    path.write_text("something else", encoding="utf-8")
    assert not made(path, 4).rows


def test_a_table_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "dog-validation.csv").mkdir()
    table = Table(tmp_path / "dog-validation.csv", "run", said.append)
    table.add(1, 1, "model", PARTS, means(1, 1))
    table.write()
    assert len(said) == 1 and "could not be written" in said[0]


@pytest.mark.parametrize(
    ("trained", "middle", "alarms"),
    [
        ([5, 4, 3, 2], [1, 2, 3, 4], [3]),  # once
        ([5, 4, 3, 2], [1, 2, 2, 3], []),
        ([5, 4, 5, 4, 3], [1, 2, 3, 4, 5], [5]),
        ([1, 2, 3, 4], [1, 2, 3, 4], []),
        ([5, 4], [1, 2], []),
    ],
)
def test_memorising_is_told_when_it_begins(trained: list[float], middle: list[float], alarms: list[int]) -> None:
    """Falling on training images and rising on held-out ones at middle timesteps, three times in a row. What the mean
    of all timesteps does, and the EMA, does not matter."""
    table, found = made(None), []
    for step, (own, unseen) in enumerate(zip(trained, middle, strict=True), 1):
        table.add(step, 1, "model", PARTS, means(10.0 - step, own, unseen + step))
        table.add(step, 1, "ema", PARTS, means(1, 1))
        if table.memorises():
            found.append(step)
    assert found == alarms
