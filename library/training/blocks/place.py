"""Move the backbone to the device, with what happens block by block there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.training.blocks.compiled import compile_blocks
from library.training.blocks.swap import BlockSwap

if TYPE_CHECKING:
    from library.training.blocks.plan import BlocksPlan


def place(backbone: nn.Module, plan: BlocksPlan, device: torch.device, say: Callable[[str], None]) -> BlockSwap | None:
    """Let the blocks be compiled, and move a backbone to the device, but for the blocks that are swapped: None if none
    is."""
    compile_blocks(backbone, tuple(plan.sizes), plan.compilation)
    if not plan.swapped:
        backbone.to(device)
        return None
    blocks = [backbone.get_submodule(name) for name in plan.swapped]
    swap = BlockSwap(blocks, device, say)  # around what is compiled
    inside = {module for block in blocks for module in block.modules()}
    for module in backbone.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]
        else:
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
    return swap
