"""Tables of an evaluation: means with bootstrap intervals, differences from the base model, warnings of copies."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from library.evaluation import measures
from library.evaluation.bootstrap import interval
from library.evaluation.model_values import ModelValues
from library.evaluation.scores import MEASURES
from library.messages import counted, listed

ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def as_markdown(values: Mapping[str, ModelValues], base: str) -> str:
    """Both tables: the models, then how they differ from the base model, prompt by prompt."""
    columns = _columns(values)
    rows = [["real images", *(_number(values[base].real.get(name)) for name in columns)]]
    rows += [[name, *(_cell(own, column) for column in columns)] for name, own in values.items()]
    lines = [*_table("Model", columns, rows), ""]
    others = [name for name in values if name != base]
    if others:
        differences = [
            [name, *(_difference(values[name], values[base], column) for column in columns)] for name in others
        ]
        lines += [*_table("Difference from the base model", columns, differences), ""]
    lines.append("In brackets: 95 % of bootstrap means over the prompts. nearest: the highest of all images.")
    return "\n".join(lines)


def as_csv(values: Mapping[str, ModelValues], base: str) -> str:
    """One line per model and measure: mean, interval, number of prompts, and the difference from the base model."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["model", "measure", "mean", "low", "high", "prompts", "difference", "difference_low", "difference_high"]
    )
    for measure, value in values[base].real.items():
        writer.writerow(["real images", measure, f"{value:.6f}", *[""] * 6])
    for name, own in values.items():
        for measure, by_prompt in own.by_prompt.items():
            row = [name, measure, f"{own.means[measure]:.6f}", *_bounds(_interval(measure, by_prompt)), len(by_prompt)]
            apart = [] if name == base else _differences(own, values[base], measure)
            row += [f"{measures.mean(apart):.6f}", *_bounds(interval(apart))] if apart else [""] * 3
            writer.writerow(row)
    return stream.getvalue()


def copy_warnings(values: Mapping[str, ModelValues]) -> Iterator[str]:
    """A line for each model that seems to have drawn its training images."""
    for name, own in values.items():
        if own.copies:
            ordered = sorted(own.copies, key=lambda row: -row["nearest"])
            pairs = (f"{row['file']} and {row['nearest_image']} ({row['nearest']:.3f})" for row in ordered)
            count = f"{len(own.copies)} of {counted(len(own.images), 'image')}"
            yield f"warning: {name}: {count} may copy a real image: {listed(pairs)}"


def _columns(values: Mapping[str, ModelValues]) -> list[str]:
    return [name for name in MEASURES if any(name in own.by_prompt for own in values.values())]


def _table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    titles = [MEASURES[name].title + ARROWS[MEASURES[name].better] for name in columns]
    yield "| " + " | ".join([heading, *titles]) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _cell(own: ModelValues, measure: str) -> str:
    by_prompt = own.by_prompt.get(measure)
    return "" if by_prompt is None else _number(own.means[measure]) + _brackets(_interval(measure, by_prompt))


def _difference(own: ModelValues, base: ModelValues, measure: str) -> str:
    apart = _differences(own, base, measure)
    return f"{measures.mean(apart):+.3f}{_brackets(interval(apart), '+')}" if apart else ""


def _differences(own: ModelValues, base: ModelValues, measure: str) -> list[float]:
    """By prompt; empty for a maximum, and for a measure that one of them lacks."""
    ours, theirs = own.by_prompt.get(measure, ()), base.by_prompt.get(measure, ())
    if measure == "nearest" or len(ours) != len(theirs):
        return []
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def _interval(measure: str, by_prompt: Sequence[float]) -> tuple[float, float] | None:
    return None if measure == "nearest" else interval(by_prompt)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _brackets(bounds: tuple[float, float] | None, sign: str = "") -> str:
    return "" if bounds is None else " [" + ", ".join(f"{bound:{sign}.3f}" for bound in bounds) + "]"


def _bounds(bounds: tuple[float, float] | None) -> list[str]:
    return ["", ""] if bounds is None else [f"{bound:.6f}" for bound in bounds]
