"""A recipe: a training program and its choice of what to train. Everything else is shared."""

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
"""Writes a log line."""


@dataclass(frozen=True)
class Recipe:
    """`choose(model, facts, optimization, adapter, say)` selects the modules to train. It is called once, after loading
    and before anything is moved or frozen; `adapter` is None where the model's own weights are trained."""

    program: Program
    choose: Callable[[Model, RunFacts, Optimization, AdapterPlan | None, Say], Trainable]
