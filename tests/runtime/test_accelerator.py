"""Tests of what is asked of whichever accelerator there is, on the pretend device and on the CPU."""

from __future__ import annotations

import torch

from library.runtime import accelerator
from library.runtime.seeds import keyed_draws
from library.training.isolated_eval import isolated_eval
from library.training.saving.state import RandomStates
from tests.pretend_device.device import Device

HERE = "pretend"


def draws() -> tuple[list[float], list[float]]:
    return torch.rand(2).tolist(), torch.rand(2, device=HERE).tolist()


def test_draws_aside_leave_no_trace_in_any_generator(device: Device) -> None:
    states = RandomStates()
    torch.manual_seed(1)
    saved, expected = states.state_dict(), draws()
    for aside in (keyed_draws(7), isolated_eval([]), accelerator.forked_generators()):
        torch.manual_seed(1)
        with aside:
            draws()
        assert draws() == expected
    assert draws() != expected
    states.load_state_dict(saved)  # as a resumed run does
    assert draws() == expected


def test_draws_of_a_key_are_the_same(device: Device) -> None:
    with keyed_draws("dropout", 3):
        first = draws()
    with keyed_draws("dropout", 3):
        assert draws() == first


def test_memory_is_that_of_the_device(device: Device) -> None:
    before = accelerator.bytes_in_use(torch.device(HERE))
    device.reset_peak()
    tensor = torch.empty(1000, device=HERE)
    assert before is not None and accelerator.bytes_in_use(torch.device(HERE)) == before + 4000
    del tensor
    accelerator.release_cached()
    assert accelerator.bytes_in_use(torch.device(HERE)) == before
    assert accelerator.peak_bytes(torch.device(HERE)) == before + 4000


def test_a_cpu_has_nothing_of_its_own() -> None:
    cpu = torch.device("cpu")
    assert accelerator.bytes_in_use(cpu) is None and accelerator.peak_bytes(cpu) is None
    assert accelerator.random_states() == []
    accelerator.release_cached()
    accelerator.set_random_states([])
