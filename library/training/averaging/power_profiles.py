"""The profiles of power-function averages, and how averages that were kept are combined into another one. No torch,
and NumPy only where it is used.

    p(tau) = (g + 1) tau^g / t^(g + 1)   for 0 <= tau <= t: the share of step tau in the average at step t
    width  = standard deviation of p / t = sqrt((g + 1) / ((g + 2)^2 (g + 3)))

Source: arXiv 2312.02696, section 3 and appendix C. The recursion

    average <- (1 - k / t)^(g + 1) average + the rest of weights,   at every step t that is a multiple of k

gives the weights of the steps from t - k to t exactly the integral of p over them, and the first update copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTHS = (0.05, 0.1)
"""The averages that a run keeps: those of the paper, from which all widths around and above are rebuilt."""

WIDEST = 0.28
"""From 1 / sqrt(12) = 0.2887 on, the plain mean of all steps, the early steps would weigh more than the late ones."""


@dataclass(frozen=True)
class Profile:
    """The average of this width at a step."""

    width: float
    step: int


@dataclass(frozen=True)
class Combination:
    """The share of each kept average, which add up to 1, and the error ||sum x p - wanted|| / ||wanted|| of the profile
    that they make."""

    shares: tuple[float, ...]
    error: float


def exponent(width: float) -> float:
    """g of a width between 0 and WIDEST, by bisection: the width falls as g grows."""
    low, high = 0.0, 1e6
    while (middle := (low + high) / 2) not in (low, high):
        if ((middle + 1) / ((middle + 2) ** 2 * (middle + 3))) ** 0.5 > width:
            low = middle
        else:
            high = middle
    return low


def kept_share(width: float, step: int, interval: int = 1) -> float:
    """The factor of the average in the update at this step, `interval` steps after the last one."""
    return float((1 - interval / step) ** (exponent(width) + 1))


def combine(kept: Sequence[Profile], wanted: Profile) -> Combination:
    """The combination of the kept averages whose profile is nearest to the wanted one: least squares (section 3.2).

    The shares add up to 1, as another sum would scale the weights: by a Lagrange multiplier, which is nearer than
    dividing the shares of the free solution by their sum.
    """
    import numpy as np  # only runs with this flag need it

    steps = np.array([one.step for one in kept], dtype=float)
    powers = np.array([exponent(one.width) for one in kept])
    target = float(wanted.step), exponent(wanted.width)
    products = _product(steps[:, None], powers[:, None], steps, powers)
    with_target = _product(steps, powers, *target)
    lengths = np.sqrt(np.diag(products))  # profiles of early steps are high: scaled to length 1
    system = products / np.outer(lengths, lengths)
    sides = np.stack([with_target, np.ones(len(kept))], 1) / lengths[:, None]
    free, towards = (np.linalg.lstsq(system, sides, rcond=1e-12)[0] / lengths[:, None]).T
    shares = free + towards * (1 - free.sum()) / towards.sum()
    of_target = _product(*target, *target)
    square = (shares @ products @ shares - 2 * shares @ with_target + of_target) / of_target
    return Combination(tuple(shares.tolist()), float(max(0.0, square)) ** 0.5)


def _product(step_a: Any, power_a: Any, step_b: Any, power_b: Any) -> Any:
    """The integral of the product of two profiles, over the steps that both have."""
    import numpy as np

    power = np.where(np.less(step_a, step_b), power_b, power_a)
    near = np.minimum(step_a, step_b) / np.maximum(step_a, step_b)
    height = (power_a + 1) * (power_b + 1) / ((power_a + power_b + 1) * np.maximum(step_a, step_b))
    return height * near**power
