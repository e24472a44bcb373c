"""Gradient checkpointing block by block (arXiv 1604.06174): which blocks are recomputed, and where their inputs wait.

diffusers calls a function of ours for each block (`enable_gradient_checkpointing`). It checkpoints without reentry:
gradients also reach a block whose inputs need none (a text encoder behind frozen embeddings), and each parameter's
gradient is accumulated once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from library.options.mistakes import Mistake, UserError
from library.training.blocks.host_inputs import HostInputs

if TYPE_CHECKING:
    from library.training.blocks.plan import BlocksPlan

ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""The kernels behind torch's scaled_dot_product_attention that are one operation each. The one that is none (MATH) is
recomputed."""


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """Called with a block and its inputs, returns its outputs.

    `kept`: blocks that are not recomputed. `keeps_attention`: the results of attention are stored, the rest of a block
    is recomputed. `host`: where the inputs of blocks wait for the backward pass; None: on the device.
    """

    kept: Collection[nn.Module] = ()
    keeps_attention: bool = False
    host: HostInputs | None = None

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        """Compute a block."""
        if block in self.kept:
            return block(*inputs)
        contexts = partial(create_selective_checkpoint_contexts, attention_kernels())
        more: dict[str, Any] = {"context_fn": contexts} if self.keeps_attention else {}
        with nullcontext() if self.host is None else self.host.taking(inputs):
            return checkpoint(block, *inputs, use_reentrant=False, **more)


def attention_kernels() -> list[Any]:
    """Those of ATTENTION that this torch has."""
    found = (getattr(torch.ops.aten, name, None) for name in ATTENTION)
    return [kernel.default for kernel in found if kernel is not None]


def build_checkpoints(plan: BlocksPlan, backbone: nn.Module, device: torch.device) -> Checkpoints:
    """The checkpoints of a run's backbone."""
    blocks = [backbone.get_submodule(name) for name in plan.sizes]
    return Checkpoints(
        kept=every_second(blocks) if plan.policy == "half" else (),
        keeps_attention=plan.policy == "attention",
        host=HostInputs(device) if plan.to_host else None,
    )


def every_second(blocks: Collection[nn.Module]) -> frozenset[nn.Module]:
    """The blocks that keep their activations with --gradient_checkpointing_policy half: the second, the fourth, …"""
    return frozenset([*blocks][1::2])


def checkpoint_activations(module: nn.Module, checkpoints: Checkpoints | None = None) -> None:
    """Enable gradient checkpointing in a diffusers or transformers model: the backward pass recomputes activations.

    `checkpoints`: how, in a diffusers model; None: all blocks. transformers checkpoints in training mode only. Raises
    TypeError for a module without gradient checkpointing.
    """
    for name, arguments in (
        ("enable_gradient_checkpointing", {"gradient_checkpointing_func": checkpoints or Checkpoints()}),
        ("activation_checkpointing_enable", {"activation_checkpointing_kwargs": {"use_reentrant": False}}),
        ("gradient_checkpointing_enable", {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ):
        switch: Callable[..., None] | None = getattr(module, name, None)
        if switch is not None:
            if not arguments.keys() <= inspect.signature(switch).parameters.keys():
                _refuse_choices(checkpoints)
                arguments = {}
            switch(**arguments)
            return
    raise TypeError(f"{type(module).__name__} does not support gradient checkpointing")


def _refuse_choices(checkpoints: Checkpoints | None) -> None:
    """diffusers before 0.33 takes no function: it checkpoints all blocks without reentry, as Checkpoints() does. Raises
    UserError if it is to do anything else."""
    if checkpoints is not None and (checkpoints.kept or checkpoints.keeps_attention or checkpoints.host is not None):
        what = "--gradient_checkpointing_policy and --cpu_offload_checkpointing need diffusers 0.33 or newer"
        raise UserError([Mistake(what, "install the version of requirements.txt, or remove them")])
