"""The world of shapes: what captions say is so, what is held back is never shown, and the model that ships knows it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.shapes import autoencoder, evaluate, judge, muon, pretrain, sheet
from examples.shapes import images as drawing
from examples.shapes.world import (
    ATTRIBUTES,
    COLOURS,
    OF_HOUSES,
    OF_ROBOTS,
    SHAPES,
    SIDE,
    SUBJECT,
    caption,
    draw_scene,
    render,
    triples,
    unseen_triples,
)
from library.checkpoints.files import read_header
from library.families.registry import detect

ROOT = Path(__file__).resolve().parent.parent.parent


def scenes(count: int) -> list:
    rng = random.Random(3)
    return [draw_scene(rng) for _ in range(count)]


def test_scenes_are_whole_and_never_of_a_triple_that_is_held_back() -> None:
    assert len(triples()) == len(SHAPES) * len(COLOURS) * (len(COLOURS) - 1)
    held_back = set(unseen_triples())
    assert len(held_back) == 75
    drawn = scenes(4000)
    assert not held_back & {scene.triple for scene in drawn}
    # what is held back is a combination, never a pair: each pair of a held-back triple is seen
    for first, second in ((0, 1), (1, 2), (0, 2)):
        seen = {(scene.triple[first], scene.triple[second]) for scene in drawn}
        assert {(triple[first], triple[second]) for triple in held_back} <= seen
    for scene in drawn:
        assert scene.colour != scene.background
        assert all((getattr(scene, name) is not None) == (scene.shape == "robot") for name in OF_ROBOTS)
        assert all((getattr(scene, name) is not None) == (scene.shape == "house") for name in OF_HOUSES)


def test_a_caption_says_only_what_the_image_shows() -> None:
    """And of the right thing: a colour before the shape is the shape's, one before "background" is the background's."""
    rng = random.Random(4)
    said = Counter()
    for scene in scenes(2000):
        words = caption(scene, rng)
        thing, _, behind = words.partition(" on ")
        colours = [word for word in thing.split() if word in COLOURS]
        assert colours in ([], [scene.colour]), (words, scene)
        assert [word for word in thing.split() if word in SHAPES] == [scene.shape]
        assert not behind or behind.split()[1:] == [scene.background, "background"]
        features = {value for name in (*OF_ROBOTS, *OF_HOUSES) for value in ATTRIBUTES[name] if value in thing}
        assert features <= {getattr(scene, name) for name in (*OF_ROBOTS, *OF_HOUSES)}, (words, scene)
        said.update({"colour": bool(colours), "background": bool(behind), "features": bool(features)})
    assert min(said["colour"], said["background"], said["features"]) > 200


def test_images_are_small_and_differ_with_what_they_show() -> None:
    image = render(SUBJECT)
    assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
    assert tuple(image[1, 1]) == COLOURS[SUBJECT.background]
    assert tuple(image[34, 16]) == COLOURS[SUBJECT.colour]


def test_the_judge_is_right_on_fresh_images() -> None:
    assert judge.share_right(judge.load(), 1000, seed=7) >= 0.99


def test_the_model_that_ships_is_a_small_stable_diffusion_1() -> None:
    header = read_header(evaluate.BASE)
    family = detect(header)
    assert family.name == "sd1"
    assert family.sizes(header).total() <= 12_000_000
    assert evaluate.BASE.stat().st_size <= 24_000_000
    assert {info.dtype for info in header.tensors.values()} == {"F16"}


def test_it_draws_what_it_never_saw_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = evaluate.open_model(evaluate.BASE)
    # One image for a third of the 75, in half of the steps; `python -m examples.shapes.evaluate base` draws 4 for each.
    some = evaluate.unseen_triples()[::3]
    monkeypatch.setattr(evaluate, "unseen_triples", lambda: some)
    monkeypatch.setattr(drawing, "STEPS", drawing.STEPS // 2)
    assert evaluate.prompt_accuracy(model, judge.load(), images=1) >= 0.9


def test_total_variation_is_half_the_sum_of_differences() -> None:
    def reading(colour: str) -> judge.Reading:
        return {"shape": "robot", "background": "red", "eyes": "one eye", "mouth": "sad", "antennas": "one antenna",
                "colour": colour}  # fmt: skip

    before = [reading("green"), reading("red"), reading("red"), reading("blue")]
    after = [reading("green"), reading("green"), reading("green"), reading("red")]
    # green 1/4 -> 3/4, red 2/4 -> 1/4, blue 1/4 -> 0: (1/2 + 1/4 + 1/4) / 2
    moved = evaluate.total_variation(before, after)
    assert moved == {**dict.fromkeys(moved, 0.0), "colour": 0.5}


def test_muon_steps_along_the_nearest_orthogonal_matrix() -> None:
    gradient = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    found = muon.orthogonal(gradient)
    # the published coefficients bring singular values near 1, not to it
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.4
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_the_sheet_shows_every_row_before_and_after() -> None:
    images = [render(scene) for scene in scenes(sheet.ACROSS)]
    paper = sheet.sheet([images] * len(sheet.ROWS), [images] * len(sheet.ROWS), images)
    pixels = np.asarray(paper)
    left = sheet.GAP
    top = sheet.GAP + sheet.LINE + sheet.SIDE + sheet.GAP + 2 * sheet.LINE
    right = sheet.ACROSS * (SIDE + sheet.GAP) + 2 * sheet.GAP
    for place in (left, right):
        assert np.array_equal(pixels[top : top + SIDE, place : place + SIDE], images[0])


def test_pretraining_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "BATCH", 2)
    vae = autoencoder.train(steps=1, batch=1, learning_rate=1e-3, seed=0)
    images = pretrain.encode_images(vae, 6, random.Random(0))

    def fresh(folder: str):
        (tmp_path / folder).mkdir()
        return pretrain.new_model(vae, tmp_path / folder, 0)

    whole = pretrain.Pretraining(fresh("a"), 3, 0)
    for done in (1, 2, 3):
        whole.step(images)
        if done == 2:
            torch.save(whole.state(), tmp_path / "state.pt")
    second = pretrain.pretrain(fresh("b"), images, 3, 0, tmp_path / "state.pt")
    for one, other in zip(whole.averaged().backbone.parameters(), second.backbone.parameters(), strict=True):
        assert torch.equal(one, other)
