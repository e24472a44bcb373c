"""Checkpointing policies and inputs in main memory: the same gradients, and what is recomputed and what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from library.families.sd.sd import SD1
from library.training.blocks.checkpoints import Checkpoints, build_checkpoints, checkpoint_activations
from library.training.blocks.host_inputs import HostInputs
from library.training.blocks.plan import BlocksPlan, block_sizes
from tests.training.blocks.test_swap import CPU, adapted, gradients, output, unet


def calls(model: Any, name: str) -> list[str]:
    """The blocks of a class, whenever one of them computes."""
    called: list[str] = []
    for path, module in model.named_modules():
        if type(module).__name__ == name:
            module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
    return called


@pytest.mark.parametrize("to_host", [False, True])
@pytest.mark.parametrize("policy", ["all", "attention", "half"])
def test_every_policy_gives_the_same_gradients_bit_for_bit(policy: str, to_host: bool) -> None:
    plain = unet()
    model = copy.deepcopy(plain).train()
    expected = gradients(plain, adapted(plain), 1)
    trained = adapted(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    plan = BlocksPlan("U-Net", block_sizes(shapes, SD1.shard_units["unet"]), policy=policy, to_host=to_host)
    checkpoint_activations(model, build_checkpoints(plan, model, CPU))
    resnets = calls(model, "ResnetBlock2D")
    kernels = CountAttention()
    with kernels:
        value = output(model).square().mean()
        forward, attended = len(resnets), kernels.calls
        value.backward()
    found = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    kept = {*plan.sizes} - {*[*plan.sizes][::2]} if policy == "half" else set[str]()
    kept.add("mid_block.resnets.0")  # diffusers does not checkpoint it
    assert set(resnets[forward:]) == set(resnets[:forward]) - kept
    assert (kernels.calls == attended) == (policy == "attention")


class CountAttention(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts how often a kernel of attention computes."""

    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(function) and "backward" not in str(function):
            self.calls += 1
        return function(*args, **(kwargs or {}))


def test_inputs_wait_in_main_memory_but_not_what_blocks_share() -> None:
    model = unet().train()
    trained = adapted(model)
    host = HostInputs(CPU)
    taken: list[torch.Size] = []
    take = host._take

    def taking(tensor: torch.Tensor) -> Any:
        taken.append(tensor.shape)
        return take(tensor)

    host._take = taking  # type: ignore[method-assign]
    checkpoint_activations(model, Checkpoints(host=host))
    gradients(model, trained, 1)
    assert taken and all(len(shape) > 2 for shape in taken), "the timestep's embedding or the caption was taken along"
    assert host._ahead is None or host._ahead.arriving is None


def test_what_was_fetched_in_vain_is_dropped() -> None:
    """A backward pass may end before it has come to all blocks."""
    host = HostInputs(CPU)
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    saved = [host._take(tensor.detach()) for tensor in tensors]
    assert torch.equal(host._return(saved[2]), tensors[2]) and saved[1].arriving is not None
    with host.taking(()):
        pass
    assert saved[1].arriving is None
    assert torch.equal(host._return(saved[1]), tensors[1])
