"""A recipe: the program that a user starts, and its say in what is trained. Everything else is shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.options.parse import Program

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.plan.plan import Plan
    from library.training.trainable import Trainable

Say = Callable[[str], None]
"""A line for the user."""


@dataclass(frozen=True)
class Recipe:
    """`choose(model, plan, say)` is called once, with the weights loaded and nothing moved or frozen yet."""

    program: Program
    choose: Callable[[Model, Plan, Say], Trainable]
