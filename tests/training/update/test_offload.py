"""Optimizer state in main memory, on the pretend device: the same steps, and nothing of it on the device meanwhile."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from library.training.loop import Loop
from library.training.update import fused, stepping
from library.training.update.plan import UpdatePlan
from tests.pretend_device.device import Device
from tests.training.running import World, assert_equal_files, make_world, run
from tests.training.update.test_fused import CLIPPED, Trained
from tests.training.update.test_plan import plan_of as read_plan

BF16 = {"rounding": "stochastic"}
FUSED = {"fuses": True, "two_passes": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


class OnDevice(Trained):
    """The toy on the pretend device."""

    def __init__(self, device: Device, plan: UpdatePlan, dtype: torch.dtype = torch.float32) -> None:
        place, device = torch.device("pretend"), device

        class Moved(torch.nn.Linear):
            def __init__(self, *sizes: int) -> None:
                super().__init__(*sizes, device="cpu")
                self.to(place)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn, "Linear", Moved)
            super().__init__("AdamW", plan, CLIPPED, dtype)
        self.toy.inputs, self.toy.targets = self.toy.inputs.to(place), self.toy.targets.to(place)

    def state(self) -> list[torch.Tensor]:
        """What has more than a number."""
        values = (value for state in self.toy.optimizer.state.values() for value in state.values())
        return [value for value in values if isinstance(value, torch.Tensor) and value.dim()]


@pytest.mark.parametrize("more", [{}, BF16, FUSED, {**BF16, **FUSED}], ids=["plain", "bf16", "fused", "fused bf16"])
def test_steps_are_the_same_and_the_state_is_in_main_memory(
    more: dict[str, Any], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights after five steps, the third in a run that was resumed with the flag, the fourth without it again."""
    monkeypatch.setattr(stepping, "AT_ONCE", 3000)
    monkeypatch.setattr(fused, "AT_ONCE", 3000)
    dtype = torch.bfloat16 if "rounding" in more else torch.float32
    whole = OnDevice(device, UpdatePlan(**more), dtype)
    for _ in range(5):
        assert whole.step()
    run_before: OnDevice | None = None
    for offloads, steps in ((True, 2), (True, 1), (False, 2)):
        run_now = OnDevice(device, UpdatePlan(**more, offloads=offloads, casts_state=True), dtype)
        if run_before is not None:
            file = io.BytesIO()
            torch.save(run_before.stepping.state_dict(), file)
            file.seek(0)
            with torch.no_grad():
                for weight, old in zip(run_now.toy.weights(), run_before.toy.weights(), strict=True):
                    weight.copy_(old)
            held = device.memory
            run_now.stepping.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            assert not offloads or device.memory - held < 1000  # counters of steps
        for _ in range(steps):
            assert run_now.step()
        places = {value.device.type for value in run_now.state()}
        assert places == ({"cpu"} if offloads else {"pretend"})
        assert all(value.is_pinned() for value in run_now.state()) or not offloads
        run_before = run_now
    assert run_before is not None
    for weight, other in zip(whole.toy.weights(), run_before.toy.weights(), strict=True):
        assert torch.equal(weight.cpu(), other.cpu())


def test_a_run_on_the_device(
    world: World, tmp_path: Path, device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused, with bf16 weights and offloaded state, of a whole model: the losses of a run that does neither, and a peak
    that is lower by the state of all that is not being stepped."""
    monkeypatch.setattr(stepping, "AT_ONCE", 100_000)
    monkeypatch.setattr(fused, "AT_ONCE", 100_000)
    flags = {"train_batch_size": 1, "max_train_steps": 3, "cache_latents": True, "mixed_precision": "bf16"}
    flags |= {"full_bf16": True, "gradient_checkpointing": True}
    peaks = []
    train = Loop.train

    def measured(self: Loop, progress: Any) -> Any:
        device.reset_peak()
        result = train(self, progress)
        peaks.append(device.peak)
        return result

    monkeypatch.setattr(Loop, "train", measured)
    losses = []
    for name, more in (("plain", {}), ("small", {"fused_backward_pass": True, "offload_optimizer": True})):
        gc.collect()
        held = device.memory
        outcome = run(world.arguments(tmp_path / name, **flags, **more), capsys)
        assert outcome.code == 0, outcome.err
        losses.append(outcome.losses)
        peaks[-1] -= held
    assert losses[0] == losses[1]
    assert_equal_files(tmp_path / "plain" / "dog.safetensors", tmp_path / "small" / "dog.safetensors")
    sizes = read_plan(world, tmp_path).facts.base_model.sizes
    trained, largest = sizes.total(("unet", "text_encoder")), sizes.largest(("unet", "text_encoder"))
    # two float32 moments of all weights, but for those of the largest while it is stepped
    assert peaks[0] - peaks[1] > 8 * (trained - largest - 100_000)
