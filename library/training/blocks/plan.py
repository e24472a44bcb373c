"""Decide what happens block by block: recomputed activations, weights in main memory, compiling. Imports no torch.

A block is what the family calls so (`shard_units`): a residual or transformer block of the backbone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.messages import counted, readable_bytes
from library.options.mistakes import Mistakes
from library.runtime.precision import BYTES
from library.training.blocks.compile_plan import Compilation, decide_compilation

if TYPE_CHECKING:
    from library.runtime.device import Machine
    from library.training.adapter.plan import AdapterPlan
    from library.training.plan.facts import RunFacts

_ON_DEVICE = 2  # swapped blocks that are on the device at once: the one that computes and the next


@dataclass(frozen=True)
class BlocksPlan:
    """`title`: the backbone's name in messages. `sizes`: parameters of its blocks by name. `swapped`: those in main
    memory, with `swapped_bytes` of weights less on the device. `policy`: --gradient_checkpointing_policy; `to_host`:
    inputs of recomputed blocks wait in main memory. `compilation`: None: blocks are not compiled."""

    title: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    swapped_bytes: int = 0
    policy: str = "all"
    to_host: bool = False
    compilation: Compilation | None = None

    def lines(self) -> Iterator[str]:
        """What the plan says."""
        if self.compilation is not None:
            yield self.compilation.line()
        if self.swapped:
            yield (
                f"{len(self.swapped)} of {counted(len(self.sizes), 'block')} of the {self.title} in main memory: "
                f"{readable_bytes(self.swapped_bytes)} of weights less on the device"
            )


def decide_blocks(facts: RunFacts, adapter: AdapterPlan | None, mistakes: Mistakes, notes: list[str]) -> BlocksPlan:
    """The plan of a run. Mistakes: more blocks than there are, blocks that are trained."""
    family, options = facts.base_model.family, facts.options.memory
    sizes = block_sizes(facts.base_model.sizes.shapes[family.backbone], family.shard_units[family.backbone])
    idle = _without_effect(facts, notes)
    swapped: tuple[str, ...] = ()
    count = options.blocks_to_swap or 0
    if count > len(sizes):
        mistakes.add(
            f"--blocks_to_swap {count}: the {family.backbone_title} has {counted(len(sizes), 'block')}",
            f"use a number from 1 to {len(sizes)}",
        )
    elif count and adapter is None:
        mistakes.add(
            f"--blocks_to_swap {count}: all weights are trained, and their gradients and the optimizer's state would "
            "have to move with each block",
            "remove it; --gradient_checkpointing, an 8-bit optimizer and --full_bf16 save memory here",
        )
    elif "blocks_to_swap" not in idle:
        swapped = choose_swapped(sizes, count)
    saved = bytes_off_device({name: sizes[name] for name in swapped}) * BYTES[facts.precision.base]
    return BlocksPlan(
        title=family.backbone_title,
        sizes=sizes,
        swapped=swapped,
        swapped_bytes=saved,
        policy=options.gradient_checkpointing_policy,
        to_host=_offloads_inputs(facts) and "cpu_offload_checkpointing" not in idle,
        compilation=decide_compilation(facts, mistakes, notes),
    )


def is_main_memory(machine: Machine) -> bool:
    """Whether the device computes in main memory, so that nothing is saved by keeping something there."""
    return machine.kind in ("cpu", "mps")


def _without_effect(facts: RunFacts, notes: list[str]) -> list[str]:
    """The flags that have no effect on this machine, with a note."""
    options = facts.options.memory
    found = ["blocks_to_swap"] if options.blocks_to_swap else []
    if _offloads_inputs(facts):
        found.append("cpu_offload_checkpointing")
    if not is_main_memory(facts.machine):
        return []
    notes.extend(f"--{name} has no effect: {facts.machine.name} computes in main memory" for name in found)
    return found


def _offloads_inputs(facts: RunFacts) -> bool:
    options = facts.options.memory
    return options.cpu_offload_checkpointing and options.gradient_checkpointing


def block_sizes(shapes: Mapping[str, Sequence[int]], patterns: Sequence[str]) -> dict[str, int]:
    """Number of parameters of each block. `shapes`: by name, of all tensors of a module; `patterns`: regular
    expressions for names of blocks."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        block = next(filter(None, (re.match(rf"({pattern})\.", name) for pattern in patterns)), None)
        if block is not None:
            sizes[block.group(1)] = sizes.get(block.group(1), 0) + math.prod(shape)
    return sizes


def choose_swapped(sizes: Mapping[str, int], count: int) -> tuple[str, ...]:
    """The blocks that --blocks_to_swap keeps in main memory: the largest. Of equally large ones those that are evenly
    spread, so that others compute while the next arrives."""
    chosen: set[str] = set()
    for size in sorted(set(sizes.values()), reverse=True):
        equal = [name for name, own in sizes.items() if own == size]
        left = min(count - len(chosen), len(equal))
        chosen |= {
            name for number, name in enumerate(equal) if (number + 1) * left // len(equal) > number * left // len(equal)
        }
    return tuple(name for name in sizes if name in chosen)


def bytes_off_device(swapped: Mapping[str, int]) -> int:
    """What swapping blocks of these sizes saves on the device, in the unit of the sizes: two of them, at worst the
    largest, are there at once."""
    return sum(swapped.values()) - sum(sorted(swapped.values())[-_ON_DEVICE:])
