"""Tests of the pretend device itself: it computes what the CPU computes, refuses what a card refuses, and counts."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.pretend_device import device as pretend
from tests.pretend_device.device import Device


def here(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="pretend")


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "mm": lambda here, cpu: here @ cpu,
    "where": lambda here, cpu: torch.where(here > 0, here, cpu),
    "cat": lambda here, cpu: torch.cat([here, cpu]),
    "index_select": lambda here, cpu: F.embedding(cpu.long(), here),
    "two devices": lambda here, cpu: here + cpu,  # torch's own message, which comes first
    "at least two": lambda here, cpu: torch._foreach_add_([here, cpu], [cpu, here]),
    "same device": lambda here, cpu: here[0, cpu.long()[0]] + cpu[here.long()],
    "normal_": lambda here, cpu: here.normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("operation", MIXED)
def test_tensors_of_two_devices_are_refused(device: Device, operation: str) -> None:
    with pytest.raises(RuntimeError, match=operation):
        MIXED[operation](here(3, 3), torch.ones(3, 3))


def test_an_error_names_the_line(device: Device) -> None:
    with pytest.raises(RuntimeError, match=r"two devices in aten::mm at tests/pretend_device/test_device\.py:\d+"):
        here(2, 2) @ torch.ones(2, 2)


def test_scalars_of_the_cpu_may_take_part(device: Device) -> None:
    assert (here(2) * torch.tensor(3.0) + torch.tensor(1.0, dtype=torch.float64)).tolist() == [4.0, 4.0]
    assert device.of("upload") == []


def seen(device: Device, kind: pretend.Kind, act: Callable[[], Any]) -> list[tuple[str, int, bool]]:
    device.forget()
    act()
    assert all(event.line.startswith("tests/pretend_device/test_device.py:") for event in device.events)
    return [(event.operation, event.bytes, event.waits) for event in device.of(kind)]


def test_reads_are_counted(device: Device) -> None:
    x = here(4)
    copied = ("aten::copy_", 16, True)
    assert seen(device, "read", lambda: x.sum().item()) == [("aten::item", 4, True)]
    assert seen(device, "read", lambda: float(x[0]) + int(x[1])) == [("aten::item", 4, True)] * 2
    assert seen(device, "read", lambda: bool(x.any())) == [("aten::item", 1, True)]
    assert seen(device, "read", x.cpu) == [copied]
    assert seen(device, "read", lambda: torch.empty(4).copy_(x)) == [copied]
    assert seen(device, "read", x.tolist) == [copied]
    assert seen(device, "read", x.nonzero) == [("aten::nonzero", 0, True)]
    assert seen(device, "read", lambda: x[x > 2]) == [("aten::nonzero", 0, True)]
    assert seen(device, "read", lambda: x.masked_select(x > 2)) == [("aten::masked_select", 0, True)]
    assert seen(device, "read", lambda: torch.equal(x, x)) == [("aten::equal", 0, True)]
    assert seen(device, "read", lambda: x * 2 + x.sum() - x[1:2]) == []


def test_uploads_are_counted(device: Device) -> None:
    x, host = here(4), torch.ones(4)
    copied = ("aten::copy_", 16, True)
    assert seen(device, "upload", lambda: host.to("pretend")) == [copied]
    assert seen(device, "upload", lambda: x.copy_(host)) == [copied]
    assert seen(device, "upload", lambda: torch.tensor([1.0, 2.0, 3.0, 4.0], device="pretend")) == [copied]
    assert seen(device, "upload", lambda: x[torch.tensor([1, 2])]) == [copied]
    assert seen(device, "upload", lambda: x.index_put_((torch.tensor([1]),), x[:1])) == [
        ("aten::_index_put_impl_", 8, True)
    ]
    assert seen(device, "upload", lambda: (torch.zeros(3, device="pretend"), x.fill_(2), x.clone())) == []


def test_the_host_waits_for_copies_unless_they_are_pinned(device: Device) -> None:
    x, pinned = here(4), torch.ones(4).pin_memory()
    assert pinned.is_pinned() and pinned[2:].is_pinned() and not torch.ones(2).is_pinned()
    assert seen(device, "upload", lambda: pinned.to("pretend", non_blocking=True))[0][2] is False
    assert seen(device, "upload", lambda: torch.ones(4).to("pretend", non_blocking=True))[0][2] is True
    assert seen(device, "upload", lambda: pinned.to("pretend"))[0][2] is True
    assert seen(device, "read", lambda: x.to("cpu", non_blocking=True))[0][2] is False  # torch pins what it makes
    assert seen(device, "read", lambda: torch.empty(4).copy_(x, non_blocking=True))[0][2] is True


def test_waits_are_counted(device: Device) -> None:
    side = torch.Stream("pretend")

    def wait() -> None:
        event = torch.Event("pretend")
        with side:
            assert torch.accelerator.current_stream() == side
            event.record()
        torch.accelerator.current_stream().wait_event(event)  # the device waits, not the host
        event.synchronize()
        side.synchronize()
        torch.accelerator.synchronize()

    assert seen(device, "wait", wait) == [("event", 0, True), ("stream", 0, True), ("device", 0, True)]
    assert torch.accelerator.current_stream() != side


def test_memory_is_counted_by_storages(device: Device) -> None:
    gc.collect()
    before = device.memory
    device.reset_peak()
    x = torch.empty(1000, device="pretend")
    view, y = x[10:], x.half()
    assert device.memory - before == 4000 + 2000
    z = x @ x[:, None]  # a result that the CPU's kernel allocates
    assert device.memory - before == 6000 + 4
    del x
    assert device.memory - before == 6004, "a view keeps the storage"
    del view, y
    assert device.memory - before == 4
    assert device.peak - before == 6004
    z.untyped_storage().resize_(0)
    assert device.memory - before == 0
    device.reset_peak()
    assert device.peak == device.memory == torch.accelerator.memory_allocated()


def test_too_little_memory_is_an_error(device: Device) -> None:
    device.limit(device.memory + 1000)
    with pytest.raises(torch.OutOfMemoryError, match=r"4000 bytes beside .* at tests/pretend_device"):
        torch.empty(1000, device="pretend")
    device.limit(0)
    torch.empty(1000, device="pretend")


def test_random_numbers_are_its_own(device: Device) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, dropped = torch.rand(3, device="pretend"), F.dropout(here(64), 0.5)
    assert torch.equal(torch.get_rng_state(), state), "the CPU's generator did not move"
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), first.cpu())
    saved = torch.get_device_module("pretend").get_rng_state()
    again = torch.rand(3, device="pretend")
    torch.get_device_module("pretend").set_rng_state(saved)
    assert torch.rand(3, device="pretend").tolist() == again.tolist()
    given = torch.Generator("pretend").manual_seed(3)
    assert torch.rand(3, device="pretend", generator=given).tolist() == first.tolist()
    assert 0 < int((dropped == 0).sum()) < 64


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_unet_gives_what_the_cpu_gives(device: Device, precision: str) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    one = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    other = copy.deepcopy(one).to("pretend")
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1, 5]), torch.randn(2, 7, 8))
    for steps in range(2):
        losses = []
        for model, where in ((one, "cpu"), (other, "pretend")):
            with torch.autocast(where, torch.bfloat16, enabled=precision == "bf16"):
                out = model(*(each.to(where) for each in inputs)).sample
            loss = out.float().square().mean()
            loss.backward()
            torch.optim.AdamW(model.parameters(), 1e-3, foreach=False).step()
            losses.append(loss.item())
        # autocast computes norms in float32 on a card, in bfloat16 on a CPU
        assert losses[1] == (losses[0] if precision == "fp32" else pytest.approx(losses[0], rel=0.02)), steps
    if precision == "fp32":
        for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(a, b.cpu()), name


def test_results_of_other_sizes_reach_what_they_are_written_to(device: Device) -> None:
    out = torch.empty(0, device="pretend")
    torch.mul(here(3), 2, out=out)
    assert out.tolist() == [2.0, 2.0, 2.0]
    values, indices = torch.empty(0, device="pretend"), torch.empty(0, dtype=torch.long, device="pretend")
    torch.sort(torch.tensor([3.0, 1.0]).to("pretend"), out=(values, indices))
    assert values.tolist() == [1.0, 3.0] and indices.tolist() == [1, 0]


def test_a_module_that_moves_keeps_its_parameters(device: Device) -> None:
    module = torch.nn.Linear(2, 2)
    weight = module.weight
    for where in ("cpu", "pretend", "cpu", "pretend"):
        module.to(where)
        module(torch.ones(1, 2, device=where)).sum().backward()
        gradient = weight.grad
        assert module.weight is weight and weight.device.type == where
        assert gradient is not None and gradient.device.type == where
    weight.data = torch.zeros(2, 2)
    assert weight.device.type == "cpu" and module.weight is weight
