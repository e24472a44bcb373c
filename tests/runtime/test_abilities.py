"""What cards can do, by their makers' documents: those of a few that everybody knows."""

from __future__ import annotations

import pytest

from library.options.groups.memory import MemoryOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.mistakes import Mistakes
from library.runtime.abilities import computes_bf16
from library.runtime.device import DEVICES, Machine
from library.runtime.precision import resolve
from library.runtime.torch_build import TorchBuild
from library.training.optim.optimizer_device import check_device
from library.training.optim.optimizers import choose_optimizer
from library.training.plan.memory import assumptions
from library.training.quantised.formats import FORMATS

ROCM = TorchBuild("2.13.0+rocm7.2", hip="7.2")
APPLE, ARC = Machine("mps", "Apple GPU"), Machine("xpu", "Intel GPU")


def radeon(architecture: str) -> Machine:
    return Machine("cuda", f"AMD GPU {architecture}", torch=ROCM, architecture=architecture)


# H100, RTX 3060, RTX 2080, GTX 1080; MI100, MI250, MI300, MI350, RX 7900, RX 9070, Strix Halo; Vega, MI50, RX 6800
@pytest.mark.parametrize("capability", [(9, 0), (8, 6), (7, 5), (6, 1)])
def test_nvidia_computes_in_bf16_from_ampere_on(capability: tuple[int, int]) -> None:
    assert computes_bf16(Machine("cuda", "a card", compute_capability=capability)) is (capability >= (8, 0))


@pytest.mark.parametrize("new", ["gfx908", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "gfx1151"])
@pytest.mark.parametrize("old", ["gfx900", "gfx906", "gfx1030"])
def test_amd_computes_in_bf16_from_cdna_and_rdna_3_on(new: str, old: str) -> None:
    assert computes_bf16(radeon(new)) is True
    assert computes_bf16(radeon(old)) is False


def test_what_is_not_known_is_not_claimed() -> None:
    assert computes_bf16(radeon("")) is None
    assert computes_bf16(Machine("cuda", "a card")) is None
    assert computes_bf16(APPLE) is None


def test_the_plan_says_that_bf16_is_slow_on_an_old_card() -> None:
    asked = MemoryOptions(mixed_precision="bf16")
    for strict in (False, True):
        (note,) = resolve(asked, radeon("gfx1030"), strict=strict).notes
        assert "bf16" in note and "slow" in note and "gfx1030" in note
    assert not resolve(asked, radeon("gfx1100")).notes
    assert not resolve(MemoryOptions(mixed_precision="fp16"), radeon("gfx1030")).notes


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedLion8bit"])
def test_bitsandbytes_has_no_optimizer_for_apples_gpus(name: str) -> None:
    choice = choose_optimizer(OptimizerOptions(optimizer_type=name))
    for machine in (APPLE, ARC, radeon("gfx1100"), Machine("cuda", "a card"), Machine("cpu", "a processor")):
        mistakes, notes = Mistakes(), list[str]()
        check_device(choice, machine, mistakes, notes)
        assert bool(mistakes) is (machine is APPLE)
        assert bool(notes) is (machine is ARC and name.startswith("Paged"))
    mistakes = Mistakes()
    check_device(choose_optimizer(OptimizerOptions(optimizer_type="AdamW")), APPLE, mistakes, [])
    assert not mistakes


def test_every_device_has_its_row_in_the_tables_of_the_plan() -> None:
    """A device without one would end the plan with a KeyError."""
    assert set(assumptions.DEVICES) == set(DEVICES)
    assert FORMATS["int8"].devices == set(DEVICES)
