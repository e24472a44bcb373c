"""What several processes mean for a run: said in its plan, and decided alike by all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from library.messages import counted
from library.options.mistakes import Mistake, UserError
from library.training.plan.facts import RunFacts
from library.training.plan.identity import PROCESSES
from library.training.saving.state import Identity, SavedState

if TYPE_CHECKING:
    from library.options.mistakes import Mistakes
    from library.runtime.processes import Processes
    from library.training.adapter.plan import AdapterPlan

PlanT = TypeVar("PlanT", bound="HasIdentity")


class HasIdentity(Protocol):
    """A plan."""

    @property
    def identity(self) -> Identity: ...


@dataclass(frozen=True)
class _Decided:
    """What a process tells the others of its plan."""

    mistakes: tuple[Mistake, ...]
    identity: Identity


def describe_processes(facts: RunFacts, resume: SavedState | None) -> Iterator[str]:
    """Lines of the plan: the global batch, what learning rates mean, and what a resumed run with another number of
    processes keeps."""
    launch = facts.launch
    if launch.world > 1:
        accumulation = facts.options.memory.gradient_accumulation_steps
        sizes = sorted({dataset.batch_size for dataset in facts.images.scan.datasets})
        batch = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        times = f" x {accumulation} batches" if accumulation > 1 else ""
        total = counted(facts.window * sizes[-1], "sample")
        yield (
            f"{launch.world} processes{times} x batch size {batch}: up to {total} per step, the global batch; learning "
            "rates apply to it as they are, not multiplied by the processes"
        )
    if resume is not None and resume.options.get(PROCESSES, str(launch.world)) != str(launch.world):
        yield (
            "steps, samples, noise and timesteps are those of the saved run; another number of processes adds in "
            "another order, which changes the last bits of sums"
        )


def check_static_graph(facts: RunFacts, adapter: AdapterPlan | None, mistakes: Mistakes) -> None:
    """Refuse the promise of --ddp_static_graph where it would be broken."""
    if facts.launch.world > 1 and facts.options.processes.ddp_static_graph and adapter and adapter.skips_layers:
        mistakes.add(
            "--ddp_static_graph with module_dropout: which parameters get gradients changes from batch to batch",
            "remove --ddp_static_graph, or module_dropout from --network_args",
        )


def check_window(saved: SavedState, before: str, now: str, world: int, mistakes: Mistakes) -> None:
    """Refuse to go on with another number of batches per step: the steps would be others."""
    fits = before.isdecimal() and int(before) % world == 0
    remedy = f"use --gradient_accumulation_steps {int(before) // world}" if fits else "use another number of processes"
    mistakes.add(
        f"--resume {saved.folder}: an optimizer step had {before} batches (--gradient_accumulation_steps x processes) "
        f"when the state was saved, and has {now} now",
        f"{remedy}; to start a new run from the trained weights, remove --resume",
    )


def decide_together(decide: Callable[[], PlanT], ranks: Processes) -> PlanT:
    """The plan of this process. The writer makes its plan first, so that the others find what it remembers of the
    images. Raises UserError on all processes, with the mistakes of all, or because their plans differ."""
    plan: PlanT | None = None
    mistakes: tuple[Mistake, ...] = ()
    for _ in ranks.in_turn():
        try:
            plan = decide()
        except UserError as error:
            mistakes = error.mistakes
    found = ranks.gather(_Decided(mistakes, {} if plan is None else plan.identity))
    of_all = dict.fromkeys(mistake for each in found for mistake in each.mistakes)
    for rank, each in enumerate(found if not of_all else ()):
        first = found[0].identity
        if differing := sorted(fact for fact in first if each.identity.get(fact) != first[fact]):
            what = f"process {rank + 1} decides otherwise than the first one: {', '.join(differing)}"
            of_all[Mistake(what, "start all processes with the same command, packages, data and base model")] = None
    if of_all or plan is None:
        raise UserError(of_all)
    return plan
