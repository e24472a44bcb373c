"""Memory that is allocated and freed, in bytes, with its peak. Nothing is allocated: blocks are only counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Purpose = Literal["activations", "gradients"]


@dataclass
class Ledger:
    """Counts live bytes by purpose. `at_peak`: what was live, by purpose, when the sum was largest.

    `granularity`: allocators hand out multiples of it (CUDA: 512; 1: exact).
    """

    granularity: int = 1
    live: dict[Purpose, int] = field(default_factory=lambda: {"activations": 0, "gradients": 0})
    at_peak: dict[Purpose, int] = field(default_factory=lambda: {"activations": 0, "gradients": 0})
    peak: int = 0

    def allocate(self, nbytes: int, purpose: Purpose = "activations") -> Block:
        """A new block, which lives until the last reference to it is gone."""
        block = Block(self, -(-nbytes // self.granularity) * self.granularity, purpose)
        self.live[purpose] += block.nbytes
        total = sum(self.live.values())
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.live)
        return block


class Block:
    """Memory of one tensor, or of several that share it. Freed as torch frees it: with the last reference.

    `owners`: gradients in flight that use it.
    """

    __slots__ = ("ledger", "nbytes", "owners", "purpose")

    def __init__(self, ledger: Ledger, nbytes: int, purpose: Purpose) -> None:
        self.ledger, self.nbytes, self.purpose = ledger, nbytes, purpose
        self.owners = 0

    def __del__(self) -> None:
        self.ledger.live[self.purpose] -= self.nbytes

    def becomes(self, purpose: Purpose) -> None:
        """Count it for another purpose from now on."""
        self.ledger.live[self.purpose] -= self.nbytes
        self.ledger.live[purpose] += self.nbytes
        self.purpose = purpose
