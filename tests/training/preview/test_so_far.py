"""Pictures of a preview on its way: where they go, and that nothing else changes for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train_network
from library.families.family import LatentSpace
from library.options.mistakes import Mistakes
from library.options.train_options import build
from library.sampling.prompts import ImageRequest
from library.sampling.sampling_path import Estimate
from library.training.events.record import read_record
from library.training.preview.plan import plan_preview
from library.training.preview.so_far import SoFar, SoFarDecoder
from library.training.preview.so_far_plan import SoFarPlan, decide_so_far
from library.training.run import DrawnImage
from tests.training.running import make_world, run

SPACE = LatentSpace(channels=4, stride=8, scale=0.5, cache_suffix="_x.npz")
CPU = torch.device("cpu")


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """A VAE that shows the first three channels."""
    if vae == "broken":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


FAMILY: Any = SimpleNamespace(latent=SPACE, decode_latents=decode)


@dataclass
class Kept:
    """What was logged and said."""

    logged: list[tuple[dict[str, DrawnImage], int, bool]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def log_images(self, drawn: Mapping[str, DrawnImage], step: int, *, to_trackers: bool) -> None:
        self.logged.append((dict(drawn), step, to_trackers))


def so_far(kept: Kept, decoder: str, *targets: str) -> SoFar:
    plan = SoFarPlan(2, decoder, None, frozenset(targets))
    samples = [torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed)) / 4 for seed in range(2)]
    decoding = SoFarDecoder(plan, FAMILY, CPU, lambda: samples, kept.said.append)
    return SoFar(plan, decoding, kept.log_images, kept.said.append)


def show(pictures: SoFar, tmp_path: Path, mark: str = "000012", vae: object = SimpleNamespace(device=CPU)) -> None:
    plan = plan_preview(build({"sample_prompts": tmp_path / "p.txt", "sample_at_first": True, "output_dir": tmp_path}))
    assert plan is not None
    group = pictures.of(
        plan, mark, "_ema", {3: ImageRequest("a"), 7: ImageRequest("b", seed=5)}, 12, datetime(2026, 1, 31)
    )
    latents = torch.linspace(-0.4, 0.4, 4)[None, :, None, None].expand(1, 4, 2, 3) * SPACE.scale
    group.show(vae, Estimate(1, 4, 20, 801.0, latents))


@pytest.mark.parametrize("decoder", ["vae", "linear"])
def test_a_picture_is_a_file_and_an_event(decoder: str, tmp_path: Path) -> None:
    """The VAE of the test is linear, so both decoders show the same."""
    kept = Kept()
    show(so_far(kept, decoder), tmp_path)
    ((drawn, step, to_trackers),) = kept.logged
    (each,) = drawn.values()
    assert list(drawn) == ["so_far/07_ema/04"] and step == 12 and not to_trackers
    assert each.request.prompt == "b" and each.path.is_file()
    assert each.about == {"step_label": "4/20", "timestep": 801.0, "severity": "debug"}
    assert each.path.parent == tmp_path / "sample" / "so_far" and each.path.name.endswith("_5_ema_04of20.png")
    with Image.open(each.path) as picture:
        pixels = np.asarray(picture)
    # -0.4, -0.4 + 0.8 / 3, -0.4 + 1.6 / 3 of [-1, 1] as bytes
    assert pixels.shape == (16, 24, 3) and np.abs(pixels.astype(int) - [76, 110, 145]).max() <= 1
    assert any("fitted to the VAE, off by 0.0%" in line for line in kept.said) == (decoder == "linear")


def test_targets() -> None:
    for targets, expected in ((("tensorboard",), (True, "debug")), (("webhook",), (False, "info"))):
        kept = Kept()
        pictures = so_far(kept, "vae", *targets)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("library.training.preview.so_far.write_image", lambda *_: None)
            show(pictures, Path("nowhere"))
        ((drawn, _, to_trackers),) = kept.logged
        assert (to_trackers, next(iter(drawn.values())).about["severity"]) == expected


def test_a_failure_is_said_once_and_the_next_drawing_tries_again(tmp_path: Path) -> None:
    kept = Kept()
    pictures = so_far(kept, "vae")
    for mark in ("000001", "000001", "000002"):
        show(pictures, tmp_path, mark, "broken")
    assert kept.said == ["no pictures while drawing: OutOfMemoryError: CUDA out of memory"]
    show(pictures, tmp_path, "000002")
    assert not kept.logged, "that drawing goes on without"
    show(pictures, tmp_path, "000003")
    assert len(kept.logged) == 1


def test_the_plan(tmp_path: Path) -> None:
    def decided(**flags: object) -> tuple[SoFarPlan | None, list[str]]:
        mistakes = Mistakes()
        plan = decide_so_far(build(flags), FAMILY, mistakes)
        return plan, [mistake.what for mistake in mistakes]

    assert decided() == (None, [])
    plan, _ = decided(validation_preview_steps=5, preview_target="all")
    assert plan == SoFarPlan(5, "linear", None, frozenset({"tensorboard", "webhook"}))
    assert str(plan) == (
        "and the predicted clean image every 5 sampler steps, decoded by a linear map fitted to the VAE, "
        "to tensorboard too, to webhook too"
    )
    assert "no tiny autoencoder" in decided(validation_preview_steps=5, preview_decoder="tae")[1][0]
    assert "cannot be read" in decided(validation_preview_steps=5, preview_tae=tmp_path / "gone")[1][0]


def test_drawing_and_training_are_the_same_with_and_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the bit; and a run tells of its pictures, in the folder and in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    world = make_world(tmp_path / "world")
    shared = {
        "network_module": "networks.lora", "network_dim": 2, "max_train_steps": 2, "sample_every_n_steps": 1,
        "sample_prompts": "a dog --w 64 --h 64 --s 5 --d 5", "sample_sampler": "euler_a",
    }  # fmt: skip
    more = {"validation_preview_steps": 2, "preview_target": "tensorboard"}
    for name, flags in (("without", {}), ("with", more)):
        logs = tmp_path / "logs" / name  # runs of the same second would share a folder
        outcome = run(
            world.arguments(tmp_path / name, **shared, **flags, logging_dir=logs), capsys, train_network.RECIPE
        )
        assert outcome.code == 0 and "no pictures" not in outcome.err, outcome.err
    images = [sorted((tmp_path / name / "sample").glob("*.png")) for name in ("without", "with")]
    assert len(images[0]) == 2
    assert [path.read_bytes() for path in images[0]] == [path.read_bytes() for path in images[1]]
    one, other = ((tmp_path / name / "dog.safetensors").read_bytes() for name in ("without", "with"))
    assert one[-50_000:] == other[-50_000:]
    told = [event.data for event in read_record(tmp_path / "with" / "dog-run.jsonl") if "step_label" in event.data]
    assert [data["step_label"] for data in told] == ["2/5", "4/5"] * 2
    assert all(Path(str(data["path"])).is_file() for data in told)
    (place,) = {path.parent for path in (tmp_path / "logs").rglob("events.out.*") if "so_far" in str(tags(path))}
    assert EventAccumulator(str(place), {"images": 0}).Reload().Tags()["images"] == [
        "so_far/00/02", "so_far/00/04", "sample/00",
    ]  # fmt: skip


def tags(path: Path) -> list[str]:
    """The images in a file of events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: list[str] = EventAccumulator(str(path), {"images": 0}).Reload().Tags()["images"]
    return found
