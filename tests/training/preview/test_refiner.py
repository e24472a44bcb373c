"""Preview images that a refiner finishes, beside those of the base model in training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train_network
from library.checkpoints.files import read_header
from library.families.registry import load_model
from library.sampling.images import sample_batch
from library.sampling.prompts import ImageRequest
from library.sampling.sampling_path import HandOver
from library.training.preview.refiner import Refiner
from tests import tiny
from tests.training.preview.test_preview import Recorder, names, preview
from tests.training.running import World, assert_equal_files, make_world, run

PROMPT = "a photo of sks dog --n blurry --w 64 --h 72 --s 10 --d 5 --ss euler_a\na cat --w 64 --h 64 --s 2\n"
REQUEST = ImageRequest("a photo of sks dog", "blurry", 64, 72, 5, 10, 7.5, "euler_a")
LORA = {"network_module": "networks.lora", "network_dim": 1, "network_dropout": 0.3, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    new_world = make_world(tmp_path_factory.mktemp("world"))
    (new_world.root / "prompts.txt").write_text(PROMPT, encoding="utf-8")
    for family in ("sdxl", "refiner"):
        tiny.write_single_file(new_world.root / f"{family}.safetensors", family)
    return new_world


def arguments(world: World, out: Path, base: str = "sdxl", **flags: object) -> list[str]:
    drawn = {"sample_prompts": world.root / "prompts.txt", "sample_at_first": True, "max_train_steps": 1}
    return world.arguments(out, pretrained_model_name_or_path=world.root / f"{base}.safetensors", **drawn, **flags)


def test_the_refiner_finishes_what_the_base_model_draws_and_training_stays_the_same(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"save_state_on_train_end": True, "sample_every_n_steps": 1, "use_safetensors": True, **LORA}
    given = {"preview_refiner": world.root / "refiner.safetensors"}
    alone, both = (
        run(arguments(world, tmp_path / name, **shared, **more), capsys, train_network.RECIPE)
        for name, more in (("alone", {}), ("both", given))
    )
    assert alone.code == both.code == 0, alone.err + both.err
    # prompt 1 has two steps, at timesteps 501 and 1: the second is the refiner's
    drawn = sorted("_".join(path.stem.split("_")[1:3]) for path in (tmp_path / "both" / "sample").glob("*_refined.png"))
    assert drawn == ["000001_00", "000001_01", "e000000_00", "e000000_01"]
    assert len(list((tmp_path / "both" / "sample").iterdir())) == 8 and "refined" not in "".join(
        path.name for path in (tmp_path / "alone" / "sample").iterdir()
    )
    assert alone.losses == both.losses
    assert_equal_files(tmp_path / "alone" / "dog.safetensors", tmp_path / "both" / "dog.safetensors")
    one, other = (
        torch.load(tmp_path / name / "dog-state" / "random_states_0.pkl", weights_only=True)
        for name in ("alone", "both")
    )
    assert one["random_state"] == other["random_state"]
    assert torch.equal(one["torch_manual_seed"], other["torch_manual_seed"])
    # before the first step: the two models, one after the other, and the VAE of the base model
    hand_over = HandOver(200)
    base, refiner = (load_model(read_header(world.root / f"{name}.safetensors")) for name in ("sdxl", "refiner"))
    (plain,) = sample_batch(base, [REQUEST], [5], hand_over=hand_over)
    finishing = replace(refiner, vae=base.vae)
    (refined,) = sample_batch(finishing, [REQUEST], [5], unfinished=[hand_over.kept[0]])
    for ending, expected in (("_5.png", plain), ("_5_refined.png", refined)):
        (path,) = (tmp_path / "both" / "sample").glob(f"dog_e000000_00_*{ending}")
        with Image.open(path) as image:
            shown, text = np.asarray(image).astype(int), image.text  # type: ignore[attr-defined]
        assert np.abs(shown - np.asarray(expected).astype(int)).max() <= 1
        assert text["seed"] == "5" and text["prompt"] == "a photo of sks dog"


@pytest.mark.parametrize(
    ("base", "refiner", "expected"),
    [
        ("sd1", "refiner.safetensors", "--preview_refiner has no meaning for Stable Diffusion 1.x"),
        ("refiner", "refiner.safetensors", "itself is trained: its previews are images of the dataset, refined"),
        ("sdxl", "sdxl.safetensors", "is Stable Diffusion XL, not a refiner"),
        ("sdxl", "gone.safetensors", "gone.safetensors: no such file or folder"),
        ("sdxl", "prompts.txt", "prompts.txt"),
    ],
)
def test_mistakes_end_the_plan(
    base: str, refiner: str, expected: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(world, tmp_path, base, preview_refiner=world.root / refiner, dry_run=True, **LORA)
    refused = run(words, capsys, train_network.RECIPE)
    assert refused.code == 2 and "--preview_refiner" in refused.err and expected in refused.err


def test_the_plan_says_what_it_costs(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"preview_refiner": world.root / "refiner.safetensors", "refiner_training_strength": 0.3, "dry_run": True}
    said = run(arguments(world, tmp_path, **given, **LORA), capsys, train_network.RECIPE).out
    words = " ".join(said.split())
    parts = tiny.diffusers_modules("refiner")
    count = sum(each.numel() for module in (parts.unet, parts.text_encoder_2) for each in module.parameters())
    assert f"{4 * count / 1e6:.1f} MB (fp32) are read each time" in words
    assert "last 30% of the timesteps" in words and "has no effect" not in words


def test_it_has_no_effect_where_nothing_is_drawn(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ({"sample_prompts": None, "sample_at_first": False}, {"sample_at_first": False}):
        given = {"preview_refiner": tmp_path / "gone.safetensors", "dry_run": True, "max_train_steps": 1}
        flags = {"sample_prompts": world.root / "prompts.txt", "sample_at_first": True, **LORA, **given, **more}
        words = world.arguments(tmp_path, pretrained_model_name_or_path=world.root / "sdxl.safetensors", **flags)
        planned = run(words, capsys, train_network.RECIPE)
        assert planned.code == 0 and re.search(r"preview_refiner .*has no effect: n", " ".join(planned.out.split()))


class Handing(Recorder):
    """Draws, and hands over every image but those of two steps."""

    def draw(
        self,
        requests: Sequence[ImageRequest],
        seeds: Sequence[int],
        places: Sequence[int],
        hand_over: Any,
        so_far: object = None,
    ) -> Any:
        if requests[0].steps > 2:
            hand_over.kept |= dict.fromkeys(range(len(requests)), "on its way")
        return super().draw(requests, seeds, places)


def refiner(fails: str = "") -> Refiner:
    @contextmanager
    def opened() -> Iterator[Any]:
        if fails == "opening":
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield finish

    def finish(requests: Sequence[ImageRequest], unfinished: Sequence[Any]) -> list[Image.Image]:
        if fails == requests[0].prompt:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert unfinished == ["on its way"] * len(requests)
        return [Image.new("RGB", (request.width, request.height)) for request in requests]

    return Refiner(SimpleNamespace(below=200), opened)  # type: ignore[arg-type]


PROMPTS = "a --w 64 --h 64 --d 5\nb --w 72 --h 64 --d 6\nfew --d 7 --w 64 --h 64 --s 2\n"


@pytest.mark.parametrize(
    ("fails", "refined", "said"),
    [
        ("", {"00", "01"}, "prompt 2 was not refined: none of the 2 steps of ddim is below 200; use more steps"),
        ("a", {"01"}, "prompt 0 was not refined: OutOfMemoryError"),
        ("opening", set(), "images were not refined: OutOfMemoryError"),
    ],
)
def test_what_cannot_be_refined_is_told_and_the_rest_is_there(
    fails: str, refined: set[str], said: str, tmp_path: Path
) -> None:
    recorder = Handing()
    replace(preview(tmp_path, PROMPTS, recorder), refiner=refiner(fails)).after_step(3)
    found = names(tmp_path)
    assert {name.split("_")[2] for name in found if name.endswith("_refined.png")} == refined
    assert {name.split("_")[2] for name in found if not name.endswith("_refined.png")} == {"00", "01", "02"}
    assert any(said in line for line in recorder.said)
    assert recorder.logged[0][0] == sorted(
        [*("sample/00", "sample/01", "sample/02"), *(f"sample/{place}_refined" for place in refined)]
    )


def test_averages_are_refined_too(tmp_path: Path) -> None:
    drawing = preview(tmp_path, "a --w 64 --h 64 --d 5", Handing())
    versions = {**drawing.versions, "_ema": drawing.versions[""]}
    replace(drawing, refiner=refiner(), versions=versions).after_step(3)
    assert [name.partition("_5")[2] for name in names(tmp_path)] == [
        ".png", "_ema.png", "_ema_refined.png", "_refined.png",
    ]  # fmt: skip
