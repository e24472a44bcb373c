"""A run as the page shows it: plain data for JSON, without numbers that JSON does not have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.watch.run_state import Prompt, RunState

FIRST_CHARTS = ("loss", "validation loss", "divergence", "evaluation", "CLIP score")
LAST_CHARTS = ("learning rate", "speed", "memory")
MOST_MESSAGES = 1000  # the last ones
MOST_WARNINGS = 200


def snapshot(state: RunState) -> dict[str, Any]:
    """What page.js reads."""
    plan = _plan(state.start.get("plan"))
    given = state.start.get("options")
    options = given if isinstance(given, Mapping) else {}
    return {
        "stage": state.stage,
        "ending": state.ending,
        "step": state.step,
        "steps": _number(state.start.get("total_steps")),
        "epochs": _number(state.start.get("epochs")),
        "began": state.began,
        "last": state.last,
        "status": {name: number for name, value in state.status.items() if (number := _number(value)) is not None},
        "charts": list(_charts(state)),
        "prompts": [_prompt(prompt) for _, prompt in sorted(state.prompts.items())],
        "notes": [line for title, line in plan if title == "notes"],
        "plan": plan,
        "options": {str(name): text_of(value) for name, value in options.items()},
        "warnings": [[message.step, message.text] for message in state.messages if message.is_warning][-MOST_WARNINGS:],
        "messages": [[message.step, message.time, message.text] for message in state.messages[-MOST_MESSAGES:]],
        "earlier_messages": max(0, len(state.messages) - MOST_MESSAGES),
        "checkpoints": [
            {"step": step, "path": str(data.get("path", "")), "bytes": _number(data.get("bytes"))}
            for step, data in state.checkpoints
        ],
    }


def _prompt(prompt: Prompt) -> dict[str, Any]:
    so_far = prompt.so_far
    return {
        "name": prompt.name,
        "text": prompt.text,
        "images": [[image.step, image.key] for image in prompt.images],
        "so_far": None if so_far is None else [so_far.step, so_far.key, so_far.label],
    }


def _charts(state: RunState) -> Iterator[dict[str, Any]]:
    """Charts in the order of the page, each with its curves."""
    present = list(dict.fromkeys(chart for chart, _ in state.curves))
    others = sorted(chart for chart in present if chart not in FIRST_CHARTS + LAST_CHARTS)
    for chart in (*FIRST_CHARTS, *others, *LAST_CHARTS):
        curves = [(name, curve) for (of, name), curve in state.curves.items() if of == chart]
        if curves:
            yield {
                "name": chart,
                "curves": [
                    {"name": name, "not_finite": len(curve.not_finite), **vars(curve.thinned())}
                    for name, curve in curves
                ],
            }


def _plan(plan: object) -> list[tuple[str, str]]:
    """(title, line) of the plan's lines."""
    rows = plan if isinstance(plan, list) else []
    return [(str(row[0]), str(row[1])) for row in rows if isinstance(row, list) and len(row) == 2]


def text_of(value: object) -> str:
    """The value of an option as text, as on a command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(text_of(each) for each in value)
    return str(value)


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON has whole numbers of any length
        return None
    return number if math.isfinite(number) else None
