"""Sample images during training: drawing, logging, and no effect on the training."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from library.checkpoints.files import read_header
from library.data.buckets import Placement
from library.families.family import TextSettings
from library.families.registry import load_model
from library.options.train_options import build
from library.sampling.images import sample
from library.sampling.prompts import ImageRequest
from library.training.isolated_eval import isolated_eval
from library.training.preview import drawing
from library.training.preview.drawing import PromptEncoder, decoder, open_drawer
from library.training.preview.plan import plan_preview
from library.training.preview.preview import Draw, Preview
from library.training.run import DrawnImage
from library.training.saving.state import Progress
from tests import tiny

TIME = datetime(2026, 1, 31, 23, 59, 58)


@dataclass
class Recorder:
    """Draws images of one colour and records its calls."""

    said: list[str] = field(default_factory=list)
    asked: list[list[tuple[ImageRequest, int]]] = field(default_factory=list)
    logged: list[tuple[list[str], int]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @contextmanager
    def open_drawer(self) -> Iterator[Draw]:
        self.order.append("ready")
        yield self.draw
        self.order.append("away")

    def draw(
        self,
        requests: Sequence[ImageRequest],
        seeds: Sequence[int],
        places: Sequence[int],
        hand_over: object = None,
        so_far: object = None,
    ) -> list[Image.Image]:
        self.order.append("draw")
        self.places += places
        self.asked.append(list(zip(requests, seeds, strict=True)))
        if any(request.prompt == "too large" for request in requests):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Image.new("RGB", (request.width, request.height)) for request in requests]

    def log_images(self, images: Mapping[str, DrawnImage], step: int) -> None:
        self.logged.append((list(images), step))


def preview(tmp_path: Path, prompts: str, recorder: Recorder, **flags: object) -> Preview:
    file = tmp_path / "p.txt"
    file.write_text(prompts, encoding="utf-8")
    chosen = {"sample_every_n_steps": 1, "output_name": "dog", "output_dir": tmp_path, **flags}
    return Preview(
        plan=plan_preview(build({"sample_prompts": file, **chosen})),
        open_drawer=recorder.open_drawer,
        modules=(),
        say=recorder.said.append,
        warn=recorder.said.append,
        log_images=recorder.log_images,
        steps=100,
        steps_per_epoch=4,
        began=TIME,
    )


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "sample").iterdir())


def test_files_and_trackers_get_the_images(tmp_path: Path) -> None:
    recorder = Recorder()
    previews = preview(tmp_path, "a --w 64 --h 64 --d 5\nb --w 72 --h 64\n", recorder)
    previews.after_step(30)
    assert names(tmp_path) == ["dog_000030_00_20260131235958_5.png", "dog_000030_01_20260131235958.png"]
    with Image.open(tmp_path / "sample" / names(tmp_path)[1]) as image:
        size, text = image.size, image.text
    assert recorder.logged == [(["sample/00", "sample/01"], 30)]
    drawn = recorder.asked[1][0][1]
    settings = {"sampler": "ddim", "steps": "30", "scale": "7.5"}
    assert size == (72, 64) and text == {"prompt": "b", "negative-prompt": "", "seed": str(drawn), **settings}
    assert f"(seed {drawn})" in recorder.said[-1] and 0 <= drawn < 2**32


def test_before_training_at_epochs_and_when_off(tmp_path: Path) -> None:
    recorder = Recorder()
    previews = preview(tmp_path, "a --w 64 --h 64 --d 5", recorder, sample_every_n_epochs=2, sample_at_first=True)
    previews.before_training(Progress())
    for epoch in (1, 2):
        previews.after_step(epoch * 10)
        previews.after_epoch(epoch, epoch * 10)
    assert names(tmp_path) == ["dog_e000000_00_20260131235958_5.png", "dog_e000002_00_20260131235958_5.png"]
    previews.before_training(Progress(step=20, epoch=3))  # resumed: its model is no longer the initial one
    replace(previews, plan=None).after_epoch(2, 20)
    assert len(recorder.asked) == 2


@pytest.mark.parametrize("flags", [{"sample_every_n_epochs": 1}, {"sample_every_n_steps": 3}])
def test_when_the_loop_draws(flags: dict[str, object], tmp_path: Path) -> None:
    """Ten steps of four an epoch: the third epoch is cut short by the end of the run, and counts."""
    previews = replace(preview(tmp_path, "a --w 64 --h 64 --d 5", Recorder(), **flags), steps=10, steps_per_epoch=4)
    for step in range(1, 11):
        epoch, window = (step - 1) // 4 + 1, (step - 1) % 4 + 1
        previews.due(Progress(step, epoch, window), epoch_ended=False)
        if window == 4:
            previews.due(Progress(step, epoch, window), epoch_ended=True)
    by_epochs, by_steps = ["e000001", "e000002", "e000003"], ["000003", "000006", "000009"]
    drawn = [name.split("_")[1] for name in names(tmp_path)]
    assert drawn == (by_epochs if "sample_every_n_epochs" in flags else by_steps)


def test_an_image_that_is_drawn_again_replaces_the_one_before(tmp_path: Path) -> None:
    """So a resumed run leaves the images of one that was never interrupted."""
    previews = preview(tmp_path, "a --w 64 --h 64 --d 5", Recorder())
    previews.after_step(1)
    previews.after_step(1)
    assert names(tmp_path) == ["dog_000001_00_20260131235958_5.png"]


def test_the_prompt_file_is_read_each_time_and_may_go(tmp_path: Path) -> None:
    recorder = Recorder()
    previews = preview(tmp_path, "a --w 64 --h 64", recorder)
    previews.after_step(1)
    (tmp_path / "p.txt").write_text("b --w 64 --h 64 --ss euler_b", encoding="utf-8")
    previews.after_step(2)
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    previews.after_step(3)
    (tmp_path / "p.txt").write_text("\n", encoding="utf-8")
    previews.after_step(4)
    (tmp_path / "p.txt").unlink()
    previews.after_step(5)
    assert [(group[0][0].prompt, group[0][0].sampler) for group in recorder.asked] == [("a", "ddim"), ("b", "ddim")]
    said = "\n".join(recorder.said)
    assert 'unknown sampler "euler_b"' in said and "not in UTF-8" in said and "is empty" in said
    assert "p.txt cannot be read" in said
    assert len(recorder.logged) == 2


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1, 1, 1, 1]), (2, [2, 1, 1]), (8, [3, 1])])
def test_images_of_one_size_are_drawn_together(at_once: int, sizes: list[int], tmp_path: Path) -> None:
    recorder = Recorder()
    prompts = "a --w 64 --h 64\nb --w 72 --h 64\nc --w 64 --h 64\nd --w 64 --h 64"
    preview(tmp_path, prompts, recorder, sample_batch_size=at_once).after_step(1)
    assert [len(group) for group in recorder.asked] == sizes
    assert recorder.order == ["ready", *["draw"] * len(sizes), "away"]
    assert [name[11:13] for name in names(tmp_path)] == ["00", "01", "02", "03"]
    assert recorder.logged == [([f"sample/{place:02d}" for place in range(4)], 1)]


def test_refined_images_are_selected_by_prompt(tmp_path: Path) -> None:
    recorder = Recorder()
    previews = preview(tmp_path, "a\nb\nc\nd", recorder, sample_batch_size=8)
    assert previews.plan is not None
    placements = [Placement(size, size) for size in ((64, 64), (72, 64), (64, 64))]
    replace(previews, plan=replace(previews.plan, refined=placements)).after_step(1)
    assert recorder.places == [0, 2, 3, 1]
    assert [[one.width for one, _ in group] for group in recorder.asked] == [[64, 64, 64], [72]]


def test_a_prompt_that_fails_is_logged_and_the_others_are_drawn(tmp_path: Path) -> None:
    recorder = Recorder()
    preview(tmp_path, "too large --w 8192\nb --w 64 --h 64", recorder).after_step(1)
    assert [name[:13] for name in names(tmp_path)] == ["dog_000001_01"]
    assert any("prompt 0 was not drawn" in line and "out of memory" in line for line in recorder.said)


def test_a_folder_that_cannot_be_written_is_logged(tmp_path: Path) -> None:
    (tmp_path / "sample").write_text("a file", encoding="utf-8")
    recorder = Recorder()
    preview(tmp_path, "b --w 64 --h 64", recorder).after_step(1)
    assert any("could not be written" in line for line in recorder.said)


def test_isolated_eval_restores_modes_and_random_states() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    module[1].eval()
    module[1].requires_grad_(False)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    for error in (None, RuntimeError("stopped")):
        try:
            with isolated_eval([module]):
                assert not module[0].training and not torch.is_grad_enabled()
                random.random(), np.random.rand(), torch.rand(1)
                if error is not None:
                    raise error
        except RuntimeError as caught:
            assert caught is error
        assert module.training and module[0].training and not module[1].training and torch.is_grad_enabled()
        assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
        assert torch.equal(torch.get_rng_state(), states[2])


# --- the real model in miniature


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(read_header(tiny.write_single_file(tmp_path_factory.mktemp("m") / "x.safetensors", "sd1")))


REQUEST = ImageRequest("a photo of sks dog", "blurry", width=64, height=72, steps=2)
CPU = torch.device("cpu")


def drawn(model: Any, states: PromptEncoder, request: ImageRequest = REQUEST) -> Any:
    with open_drawer(model, states, vae=None, vae_format="fp32", device=CPU) as draw:
        return np.asarray(draw([request], [7], [0])[0])


@pytest.mark.parametrize("clip_skip", [None, 2])
def test_an_image_equals_that_of_the_saved_model(model: Any, clip_skip: int | None) -> None:
    settings = TextSettings(clip_skip=clip_skip)
    states = PromptEncoder(model.family, model.tokenizer, model.text_encoders, settings)
    assert np.array_equal(drawn(model, states), np.asarray(sample(model, REQUEST, 7, settings=settings)))


def test_encoded_prompts_need_no_text_encoder(model: Any) -> None:
    states = PromptEncoder(model.family, model.tokenizer, model.text_encoders)
    long = replace(REQUEST, prompt="dog " * 80)
    expected = [drawn(model, states, request) for request in (REQUEST, long)]
    states.encode_ahead([REQUEST, long])
    states.drop_text_encoders()
    for request, image in zip((REQUEST, long), expected, strict=True):
        # alone and in a batch the encoder's sums have other orders
        assert np.abs(drawn(model, states, request).astype(int) - image.astype(int)).max() <= 1
    with pytest.raises(Exception, match=r"(?s)a cat.*cache_text_encoder_outputs"):
        drawn(model, states, replace(REQUEST, prompt="a cat"))


def test_resting_text_encoders_visit_the_device_for_each_prompt(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states = PromptEncoder(model.family, model.tokenizer, model.text_encoders)
    expected = drawn(model, states)
    visited: list[torch.device] = []
    visit = drawing.visiting

    def visiting(modules: Any, device: torch.device) -> Any:
        visited.extend(device for _ in modules)
        return visit(modules, device)

    monkeypatch.setattr(drawing, "visiting", visiting)
    states.rest(CPU)
    assert np.array_equal(drawn(model, states), expected) and visited == [CPU]


def test_no_tensor_is_left_behind(model: Any) -> None:
    def count() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    states = PromptEncoder(model.family, model.tokenizer, model.text_encoders)
    drawn(model, states)
    before = count()
    for sampler in ("euler_a", "pndm", "dpmsolver++"):
        drawn(model, states, replace(REQUEST, sampler=sampler))
    assert count() == before


def test_the_vae_is_moved_to_the_device_and_back(model: Any) -> None:
    meta = torch.device("meta")
    vae = nn.Conv2d(1, 1, 1)
    vae.device = CPU  # type: ignore[assignment]
    computing = object()
    with decoder(vae, computing, "fp16", meta) as found:
        assert found is computing
    with decoder(vae, None, "bf16", CPU) as found:
        assert found is vae  # in main memory no copy is made
    with decoder(vae, None, "fp16", meta) as found:
        assert found is not vae and found.weight.dtype == torch.float16 and found.weight.device == meta
    assert vae.weight.device == CPU and vae.weight.dtype == torch.float32


def test_memory_is_released_after_an_error(model: Any) -> None:
    released = []
    states = PromptEncoder(model.family, model.tokenizer, model.text_encoders)
    with (
        pytest.raises(RuntimeError, match="stopped"),
        open_drawer(model, states, vae=None, vae_format="fp32", device=CPU, release=lambda: released.append(1)),
    ):
        raise RuntimeError("stopped")
    assert released == [1]
