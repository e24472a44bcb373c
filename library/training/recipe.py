"""A recipe: the program that a user starts, and its say in what is trained. Everything else is shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.parse import Program

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.learning_rates import Optimization
    from library.training.plan.facts import RunFacts
    from library.training.trainable import Trainable

Say = Callable[[str], None]
"""A line for the user."""


@dataclass(frozen=True)
class Recipe:
    """`choose(model, facts, optimization, adapter, say)` is called once, with the weights loaded and nothing moved or
    frozen yet; `adapter` is None where all weights are trained."""

    program: Program
    choose: Callable[[Model, RunFacts, Optimization, AdapterPlan | None, Say], Trainable]
