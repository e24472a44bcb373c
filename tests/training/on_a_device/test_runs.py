"""Every kind of run gives on a device what it gives on the CPU."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from library.training import session
from tests.pretend_device.device import chosen
from tests.training.on_a_device.cases import CASES, Case, flags_of, make_data
from tests.training.on_a_device.steps import Step, recorded_steps
from tests.training.running import World, run

ROOM = 1 << 18  # bytes of noise, of encoded captions that a cache holds in main memory, and of numbers, in miniature


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_data(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def same_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU encodes images with channels last, which changes the last bits of latents; here it does as devices do."""
    make = session.encoding_vae

    def encoding_vae(*arguments: Any) -> Any:
        vae = make(*arguments)
        vae.encoder.to(memory_format=torch.contiguous_format)
        return vae

    monkeypatch.setattr(session, "encoding_vae", encoding_vae)


def assert_little_moves(step: Step, case: Case) -> None:
    """A step does not wait for the device, but for the reasons of its case, and moves no more than its batch, the noise
    of that and a few numbers: not a weight."""
    waiting = Counter(event.line.partition(":")[0] for event in step.events if event.waits)
    assert waiting.keys() <= case.waits.keys(), waiting
    assert case.copies_weights or step.moved <= 2 * step.batch + ROOM


@pytest.mark.parametrize("name", CASES)
def test_a_device_gives_the_losses_of_the_cpu(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    flags = flags_of(case, world)
    losses = {}
    for place in ("cpu", "device"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place / "cache"))
        with chosen() if place == "device" else nullcontext() as device:
            with recorded_steps(device) as steps:
                outcome = run(world.arguments(tmp_path / place, **flags), capsys, case.recipe)
            assert outcome.code == 0, outcome.err
            for step in steps[1:]:  # the first one also takes tables of the schedule to the device
                assert_little_moves(step, case)
            losses[place] = outcome.losses
            if place == "device" and case.resume_at is not None:
                state = tmp_path / place / f"dog-step{case.resume_at:08d}-state"
                rest = run(world.arguments(tmp_path / "rest", **flags, resume=state), capsys, case.recipe)
                assert rest.code == 0, rest.err
                assert rest.losses == {n: loss for n, loss in losses["device"].items() if n > case.resume_at}
    assert losses["device"] == pytest.approx(losses["cpu"], rel=case.tolerance, abs=0)
