"""Rounding of updated float32 weights to bfloat16, so that small updates are not lost.

Rounded to the nearest, a weight w ignores every update below about |w| / 512: at learning rates of 1e-5 most weights
of a model never change. Stochastic rounding is right on average (arXiv 1502.02551); Kahan summation remembers what
was rounded away (arXiv 2010.06192), for two more bytes per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from library.runtime.seeds import device_generator

_ROUNDED_AT_ONCE = 2**20  # values, a multiple of 4: rounding needs several times their memory


class Rounding(Protocol):
    """How bfloat16 weights take part in a float32 step. `number`: the place of a weight among all that are trained."""

    def widen(self, number: int, weight: Tensor) -> Tensor:
        """The float32 values that a bfloat16 weight stands for."""

    def write(self, number: int, values: Tensor, weight: Tensor) -> None:
        """Round float32 values into a weight."""

    def stepped(self) -> None:
        """Count a step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state_dict(); an empty one is that of a run that rounded otherwise."""


@dataclass
class Stochastic:
    """Rounds up or down with a probability given by the distance, so that the mean is the value itself. The draws are
    keyed by seed, step and weight: the same on all processes, and in a resumed run."""

    seed: int
    step: int = 0

    def widen(self, number: int, weight: Tensor) -> Tensor:
        """Exact."""
        return weight.detach().float()

    def write(self, number: int, values: Tensor, weight: Tensor) -> None:
        """Round."""
        values, weight = local(values), local(weight)
        generator = device_generator(values.device, self.seed, "rounding", self.step, number)
        if values.is_contiguous() and weight.is_contiguous():
            values, weight = values.view(-1), weight.view(-1)
        parts = zip(torch.split(values, _ROUNDED_AT_ONCE), torch.split(weight, _ROUNDED_AT_ONCE), strict=True)
        for some, rounded in parts:
            rounded.copy_(stochastic_round(some, random_bits(some, generator)))

    def stepped(self) -> None:
        """Count a step."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.step = int(state.get("step", 0))


@dataclass
class Kahan:
    """Rounds to the nearest and keeps the error of each weight in bfloat16, for the next step."""

    errors: dict[int, Tensor] = field(default_factory=dict)

    def widen(self, number: int, weight: Tensor) -> Tensor:
        """The weight and its error."""
        values = weight.detach().float()
        if number in self.errors:
            self.errors[number] = self.errors[number].to(weight.device)  # a restored one is in main memory
            values += self.errors[number]
        return values

    def write(self, number: int, values: Tensor, weight: Tensor) -> None:
        """Round, and keep the error."""
        weight.copy_(values)
        error = torch.where(weight.isfinite(), values - weight, 0.0)
        if number in self.errors:
            self.errors[number].copy_(error)
        else:
            self.errors[number] = error.to(torch.bfloat16)

    def stepped(self) -> None:
        """Nothing to count."""

    def state_dict(self) -> dict[str, Any]:
        """The errors, by the number of the weight."""
        return {"errors": dict(self.errors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.errors = dict(state.get("errors", {}))


class Nearest:
    """Rounds to the nearest, and remembers nothing: for weights that are only looked at."""

    def widen(self, number: int, weight: Tensor) -> Tensor:
        """Exact."""
        return weight.detach().float()

    def write(self, number: int, values: Tensor, weight: Tensor) -> None:
        """Round."""
        weight.copy_(values)

    def stepped(self) -> None:
        """Nothing to count."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


def stochastic_round(values: Tensor, bits: Tensor) -> Tensor:
    """Round float32 values to bfloat16 by random bits, an int16 tensor of the same shape.

    A float32 is a bfloat16 and 16 more bits of the mantissa. Adding a uniform integer of 16 bits to them carries into
    the bfloat16 with the probability of their share, for either sign. Infinity stays infinity, NaN stays NaN.
    """
    sums = bits.to(torch.int32).bitwise_and_(0xFFFF).add_(values.view(torch.int32))
    rounded = sums.bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).to(torch.bfloat16)


def random_bits(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform int16 of the shape and on the device of a tensor, drawn by fours."""
    count = like.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(like.shape).to(like.device)


def local(tensor: Any) -> Tensor:
    """The part of a sharded tensor that this process has; a whole tensor itself."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
