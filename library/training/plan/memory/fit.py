"""--vram: choose the fastest options with which a run fits on a card, by predicted memory.

The ladder of choices.py is climbed until the run fits; then those that turn out not to be needed are taken back, the
slowest first. What the user set is left as it is. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from library.messages import counted
from library.options.mistakes import Mistake, UserError
from library.options.parse import Parsed
from library.options.sources import RawOption
from library.options.train_options import values_of
from library.runtime.abilities import computes_bf16
from library.runtime.device import Machine
from library.training.plan.memory.choices import CHOICES, Choice
from library.training.plan.memory.describe import GB
from library.training.plan.memory.prediction import Prediction

Predict = Callable[[Parsed], Prediction | None]
"""The memory of a run with these options; raises UserError for mistakes in them."""


@dataclass(frozen=True)
class _Found:
    """Options that were tried, and the memory of the run with them."""

    chosen: tuple[Choice, ...]
    parsed: Parsed
    memory: Prediction


def choose_for_card(parsed: Parsed, machine: Machine, predict: Predict) -> Parsed:
    """The options with what --vram chooses, with notes about it; as they are without --vram.

    Raises UserError if nothing fits, and for mistakes in the options as they are.
    """
    size = parsed.options.memory.vram
    if size is None or parsed.mistakes or parsed.with_choices is None:
        return parsed
    if machine.is_cpu:
        note = f"--vram {size} has no effect: this machine has no graphics card; see tools/estimate_memory.py"
        return replace(parsed, notes=(*parsed.notes, note))
    first = predict(parsed)
    if first is None:
        what = f"--vram {size}: the memory of this run cannot be predicted (sharded, or a network module of others)"
        raise UserError([Mistake(what, "remove --vram, and choose by docs/memory_and_precision.md")])
    return _choose(_Found((), parsed, first), size, machine, predict)


def _choose(start: _Found, size: int, machine: Machine, predict: Predict) -> Parsed:
    available, blocked = _available(start.parsed, machine)
    found = start
    for choice in available:
        if choice.always or found.memory.needed > size * GB:
            found = _with(start, (*found.chosen, choice), size, predict) or found
    if found.memory.needed > size * GB:
        raise UserError([_too_small(found, size, blocked)])
    for choice in sorted(found.chosen, key=lambda each: -each.time):
        needed_by_others = any(each.cheaper_with & {*choice.names} for each in found.chosen)
        if choice in found.chosen and not (choice.always or needed_by_others):
            fewer = _with(start, tuple(each for each in found.chosen if each != choice), size, predict)
            found = fewer if fewer is not None and fewer.memory.needed <= size * GB else found
    return replace(found.parsed, notes=(*found.parsed.notes, *_notes(found, size)))


def _available(parsed: Parsed, machine: Machine) -> tuple[list[Choice], list[str]]:
    """What may be chosen, and the flags of the user that stand in the way of the rest."""
    is_adapter = parsed.options.adapter.network_module is not None
    available, blocked = [], []
    for choice in CHOICES:
        if choice.script == ("train_db.py" if is_adapter else "train_network.py"):
            continue
        decided = [name for name in (*choice.names, *choice.unless) if name in parsed.set_by_user]
        if not decided:
            available.append(_for_machine(choice, machine))
        else:
            origin = parsed.origins[decided[0]]
            blocked.append(f"--{decided[0]} ({origin}) in place of {choice}")
    return available, blocked


def _for_machine(choice: Choice, machine: Machine) -> Choice:
    """fp16 on a card that is known to have no arithmetic for bf16."""
    if choice.values.get("mixed_precision") == "bf16" and computes_bf16(machine) is False:
        return replace(choice, values={"mixed_precision": "fp16"})
    return choice


def _with(start: _Found, chosen: tuple[Choice, ...], size: int, predict: Predict) -> _Found | None:
    """The run with these choices; None if they cannot be combined with each other or with the options of the user, or
    imply more than they say: captions cannot be encoded ahead by a text encoder that is trained."""
    assert start.parsed.with_choices is not None
    origin = f"--vram {size}"
    options = [RawOption(name, value, origin) for choice in chosen for name, value in choice.values.items()]
    parsed = start.parsed.with_choices(options)
    before, after = values_of(start.parsed.options), values_of(parsed.options)
    implied = {name for name in before if before[name] != after[name]} - {option.name for option in options}
    try:
        memory = None if parsed.mistakes or implied else predict(parsed)
    except UserError:
        return None
    return None if memory is None else _Found(chosen, parsed, memory)


def _notes(found: _Found, size: int) -> Iterator[str]:
    needed = found.memory.needed / GB
    peak = found.memory.peak / GB
    yield (
        f"--vram {size}: predicted peak {peak:.2f} GiB, with the driver's context and fragmentation {needed:.2f} of "
        f"{size} GiB; chose {counted(len(found.chosen), 'option')}"
    )
    for choice in found.chosen:
        yield f"--vram {size} sets {choice}: {choice.price} ({choice.source})"


def _too_small(found: _Found, size: int, blocked: Sequence[str]) -> Mistake:
    what = (
        f"--vram {size}: this run does not fit. With all that saves memory it needs {found.memory.needed / GB:.1f} GiB "
        f"({found.memory.largest.title})"
    )
    ways = "use a smaller --train_batch_size or --resolution, or train an adapter (train_network.py)"
    if blocked:
        ways = f"in the way: {'; '.join(blocked)}. Or {ways}"
    return Mistake(what, ways)
