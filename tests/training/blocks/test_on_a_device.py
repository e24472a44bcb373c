"""Memory of blocks on the pretend device, in bytes: what is swapped or waits in main memory is not on the device, and
the host waits for no copy."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from library.training.blocks.checkpoints import Checkpoints, checkpoint_activations
from library.training.blocks.host_inputs import HostInputs
from library.training.blocks.place import place
from library.training.blocks.plan import bytes_off_device
from library.training.blocks.swap import BlockSwap
from tests.pretend_device.device import Device
from tests.training.blocks.test_swap import adapted, blocks_of, swapping, unet


def there() -> torch.device:
    """Known to torch as soon as a test uses it."""
    return torch.device("pretend")


def on_device(swapped: bool) -> tuple[Any, list[nn.Parameter], BlockSwap | None]:
    model = unet()
    trained = adapted(model)
    swap = place(model, swapping(blocks_of(model) if swapped else ()), there(), pytest.fail)
    for parameter in trained:
        parameter.data = parameter.data.to(there())
    return model, trained, swap


def step(model: Any, size: int = 8) -> None:
    generator = torch.Generator().manual_seed(3)
    noisy, states = torch.randn(2, 4, size, size, generator=generator), torch.randn(2, 7, 64, generator=generator)
    time = torch.tensor([10, 700]).to(there())
    output = model(noisy.to(there()), time, encoder_hidden_states=states.to(there()), return_dict=False)[0]
    output.square().mean().backward()


def measured(device: Device, model: Any, trained: list[nn.Parameter], size: int = 8) -> tuple[list[torch.Tensor], int]:
    """The gradients of a second step, and its peak above what lies on the device before it."""
    for _ in range(2):
        for parameter in trained:
            parameter.grad = None
        gc.collect()
        device.forget()
        device.reset_peak()
        step(model, size)
    return [parameter.grad.cpu() for parameter in trained if parameter.grad is not None], device.peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_swapped_blocks_are_not_on_the_device(device: Device, checkpointing: bool) -> None:
    peaks, gradients = [], []
    for swapped in (False, True):
        model, trained, swap = on_device(swapped)
        if checkpointing:
            checkpoint_activations(model.train())
        rest = device.memory
        found, peak = measured(device, model, trained)
        waits = [event.line for event in (*device.of("read"), *device.of("upload")) if event.waits]
        assert not [line for line in waits if line.startswith("library/")], "the host waits for a block"
        gradients.append(found)
        peaks.append(peak)
        sizes = {block.module: block.memory.nbytes for block in swap.blocks} if swap is not None else {}
        del model, trained, swap
        gc.collect()
        assert device.memory <= rest
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert peaks[0] - peaks[1] >= 0.99 * bytes_off_device(sizes)


class Counted(HostInputs):
    """Counts the bytes that it takes."""

    taken = 0

    def _take(self, tensor: torch.Tensor) -> Any:
        self.taken += tensor.nbytes
        return super()._take(tensor)


def test_inputs_of_blocks_wait_in_main_memory(device: Device) -> None:
    """Of images of 32 x 32 latents, where they are most of the memory: less than three of them are on the device."""
    peaks = []
    for to_host in (False, True):
        model, trained, _ = on_device(swapped=False)
        host = Counted(there()) if to_host else None
        checkpoint_activations(model.train(), Checkpoints(host=host))
        found, peak = measured(device, model, trained, 32)
        waits = [event.line for event in device.events if event.waits and event.line.startswith("library/")]
        assert not waits
        peaks.append((found, peak))
        taken = 0 if host is None else host.taken // 2  # of two steps
        del model, trained, host
        gc.collect()
    (plain, before), (moved, after) = peaks
    assert all(torch.equal(one, other) for one, other in zip(plain, moved, strict=True))
    assert taken and before - after > 0.3 * taken
