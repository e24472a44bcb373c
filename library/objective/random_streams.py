"""Random streams of a sample beside its main one, so that no option changes the draws of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from library.runtime.seeds import torch_generator

Purpose = Literal["timestep bias", "noise offset strength", "pyramid noise", "input noise", "input noise strength"]


@dataclass(frozen=True)
class Streams:
    """For each sample of a batch a seed, of which every purpose gets a generator of its own."""

    seeds: tuple[int, ...]

    @classmethod
    def drawn_from(cls, generators: Sequence[torch.Generator]) -> Streams:
        """One seed of 63 bits from each sample's main generator."""
        return cls(tuple(int(torch.randint(2**63 - 1, (), generator=generator)) for generator in generators))

    def of(self, purpose: Purpose) -> list[torch.Generator]:
        """Fresh CPU generators, one for each sample: the same at every call."""
        return [torch_generator(seed, purpose) for seed in self.seeds]
