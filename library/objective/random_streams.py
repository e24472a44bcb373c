"""Separate random streams of a sample for each purpose, so that no option changes the draws of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from library.runtime.seeds import torch_generator

Purpose = Literal["timestep bias", "noise offset strength", "pyramid noise", "input noise", "input noise strength"]


@dataclass(frozen=True)
class Streams:
    """A seed for each sample of a batch, from which every purpose gets its own generator."""

    seeds: tuple[int, ...]

    @classmethod
    def drawn_from(cls, generators: Sequence[torch.Generator]) -> Streams:
        """One seed of 63 bits from each sample's main generator."""
        return cls(tuple(int(torch.randint(2**63 - 1, (), generator=generator)) for generator in generators))

    def generators(self, purpose: Purpose) -> list[torch.Generator]:
        """New CPU generators, one for each sample, in the same state at every call."""
        return [torch_generator(seed, purpose) for seed in self.seeds]
