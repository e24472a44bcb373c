"""The prediction of memory in words: a line of the plan, and the table of tools/estimate_memory.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.messages import counted, readable_bytes

if TYPE_CHECKING:
    from library.runtime.device import Machine
    from library.training.plan.costs import Costs
    from library.training.plan.facts import RunFacts
    from library.training.plan.memory.prediction import Prediction

CARDS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 80, 141)
"""Sizes of graphics cards, in GB."""
GB = 2**30  # as cards are sold


def memory_lines(costs: Costs, prediction: Prediction | None, facts: RunFacts, *, is_unknown: bool) -> Iterator[str]:
    """Memory and disk space, for the plan: the predicted peak, or what is known where it cannot be predicted.
    `is_unknown`: what is trained is known only after it is made."""
    if facts.sharding is not None:
        yield from facts.sharding.describe(costs)
    if facts.zero is not None:
        yield from facts.zero.describe(costs)
    if is_unknown:
        yield f"{readable_bytes(costs.weights)} for the weights of the base model"
        yield "parameters and file size of the adapter are reported after it is created"
        return
    yield _without_activations(costs) if prediction is None else peak_line(prediction, facts.machine)
    free = "" if costs.free is None else f" of {readable_bytes(costs.free)} free"
    files = costs.files
    snapshots = f", {counted(files.snapshots, 'snapshot')} as large" if files.snapshots else ""
    states = f" and {counted(files.states, 'state')} of {readable_bytes(costs.state_folder)}" if files.states else ""
    models = f"{counted(files.models, 'model')} of {readable_bytes(costs.model_file)}"
    yield f"disk: up to {readable_bytes(costs.disk)}{free}: {models}{snapshots}{states}"


def _without_activations(costs: Costs) -> str:
    return (
        f"{readable_bytes(costs.training)} without activations: weights {readable_bytes(costs.weights)}, "
        f"gradients {readable_bytes(costs.gradients)}, optimizer state {readable_bytes(costs.optimizer)}"
        + (f", EMA {readable_bytes(costs.average)}" if costs.average else "")
        + (f", base {readable_bytes(costs.base)}" if costs.base else "")
    )


def peak_line(prediction: Prediction, machine: Machine) -> str:
    """The predicted peak with its parts, for the plan."""
    largest = prediction.largest
    parts = sorted(largest.parts.items(), key=lambda part: -part[1])
    context = readable_bytes(prediction.context)
    what = "Python and its packages" if machine.is_cpu else "the driver"
    fits = ""
    if not machine.is_cpu and machine.memory_bytes is not None and prediction.needed > machine.memory_bytes:
        fits = f"; this card has {readable_bytes(machine.memory_bytes)}, use --vram to choose options that fit"
    return (
        f"predicted peak {readable_bytes(prediction.peak)} (counted from shapes), in {largest.title}: "
        f"{', '.join(f'{title} {readable_bytes(size)}' for title, size in parts if size)}; {context} for {what} on "
        f"top{fits}"
    )


def smallest_card(prediction: Prediction) -> int | None:
    """The smallest size of a card that is large enough, in GB; None: there is none."""
    return next((size for size in CARDS if prediction.needed <= size * GB), None)


def table(prediction: Prediction, machine: Machine) -> Iterator[str]:
    """The moments of a run, part by part."""
    width = max(len(title) for moment in prediction.moments for title in moment.parts)
    for moment in prediction.moments:
        is_peak = moment is prediction.largest
        yield f"{moment.title}: {_gib(moment.total)}{' (the peak)' if is_peak else ''}"
        for title, size in sorted(moment.parts.items(), key=lambda part: -part[1]):
            if size:
                yield f"    {title:<{width}}  {_gib(size)}"
    yield f"peak: {_gib(prediction.peak)}, counted from shapes"
    if machine.is_cpu:
        yield f"with Python and its packages, {_gib(prediction.context)} as measured: main memory"
        return
    card = smallest_card(prediction)
    yield (
        f"on a card: {_gib(prediction.context)} for the driver's context and {prediction.spare:.0%} for fragmentation, "
        f"both assumed, make {_gib(prediction.needed)}: "
        + (f"fits on {card} GB" if card is not None else f"does not fit on {CARDS[-1]} GB")
    )


def _gib(count: float) -> str:
    return f"{count / GB:6.2f} GiB"
