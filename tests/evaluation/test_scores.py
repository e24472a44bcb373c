"""A judge with encoders that are looked up in a table: each value is one that can be calculated by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from library.evaluation.prompts import SubjectWords, fill_in
from library.evaluation.scores import prepare_judge
from library.sampling.prompts import ImageRequest

HALF = math.sqrt(3) / 2
DIRECTIONS = {"east": (1.0, 0.0), "north": (0.0, 1.0), "sixty": (0.5, HALF), "west": (-1.0, 0.0)}


class Table:
    """ "Images" and texts are names of directions; a text is the direction that it begins with."""

    def images(self, names: Sequence[str]) -> torch.Tensor:
        return torch.tensor([DIRECTIONS[name] for name in names])

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self.images([text.split()[0] for text in texts])


def judged(prompts: Sequence[str], images: Any, of_class: Any = (), real: Sequence[str] = ("east", "north")):
    table: Any = Table()
    judge = prepare_judge(table, table, list(real), [f"{name}.png" for name in real])  # type: ignore[arg-type]
    words = SubjectWords("west", "sixty")
    return judge, judge.measure([fill_in(ImageRequest(prompt), words) for prompt in prompts], images, of_class)


def test_every_measure_of_two_prompts() -> None:
    judge, scores = judged(
        ["{subject} here", "{subject} there"], [["east", "north"], ["sixty", "sixty"]], [["east"], ["sixty"]]
    )
    assert judge.baseline() == pytest.approx({"dino": 0, "clip_i": 0}, abs=1e-7)
    mixed = (0.5 + HALF) / 2
    wanted = {
        "dino": [0.5, mixed],
        "clip_i": [0.5, mixed],
        "clip_t": [mixed, 1],  # with "sixty", the class
        "pres": [0.5, mixed],
        "div_dino": [1, 0],
        "nearest": [1, HALF],
        "clip_score": [(-100 + 0) / 2, -50],  # with "west", the whole prompt
    }
    assert list(scores.by_prompt) == list(wanted)
    for name, values in wanted.items():
        assert scores.by_prompt[name] == pytest.approx(values, abs=1e-6), name
    assert scores.means["dino"] == pytest.approx((0.5 + mixed) / 2) and scores.means["nearest"] == pytest.approx(1)


def test_records_of_images_name_the_nearest_real_image_and_copies() -> None:
    _, scores = judged(["{subject}"], [["north", "sixty"]])
    places = [(row["prompt"], row["copy"], row["nearest_image"]) for row in scores.by_image]
    assert places == [(0, 0, "north.png"), (0, 1, "north.png")]
    assert [row["copy"] for row in scores.copies] == [0]


def test_measures_without_their_images_are_left_out() -> None:
    _, scores = judged(["{subject}"], [["east"]], real=["east"])
    assert not {"pres", "div_dino"} & set(scores.by_prompt)
    table: Any = Table()
    only_clip = prepare_judge(None, table, ["east"], ["east.png"])  # type: ignore[arg-type, list-item]
    scores = only_clip.measure([fill_in(ImageRequest("sixty"), SubjectWords("west", None))], [["east"]])  # type: ignore[list-item]
    assert {name: values[0] for name, values in scores.by_prompt.items()} == pytest.approx(
        {"clip_i": 1, "clip_t": 0.5, "clip_score": 50}
    )
    assert scores.copies == [] and only_clip.baseline() == {}
