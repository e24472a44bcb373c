"""Timesteps and noise of the validation: a function of the content of an image."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from library.options.mistakes import UserError
from library.training.validation import points
from library.training.validation.plan import TIMESTEPS
from tests.data.image_files import record, save


def test_timesteps_are_those_of_the_formula() -> None:
    """floor((b + H("img1|b") / 2^64) / 8 * 1000) with BLAKE2b, calculated with Python's hashlib by itself."""
    drawn = [points.timestep_of("img1", part, 0, 1000) for part in range(TIMESTEPS)]
    assert drawn == [37, 141, 317, 434, 617, 746, 786, 961]
    low = [points.timestep_of("img1", part, 200, 600) for part in range(TIMESTEPS)]
    assert [(t - 200) // 50 for t in low] == list(range(TIMESTEPS))


def test_a_renamed_image_keeps_its_points_and_an_edited_one_gets_others(tmp_path: Path) -> None:
    first = save(tmp_path / "a.png")
    (tmp_path / "other").mkdir()
    renamed = shutil.copy(first, tmp_path / "other" / "b.png")
    edited = save(tmp_path / "c.png")
    keys = points.content_keys([0, 1, 2], [record(Path(path), (64, 48)) for path in (first, renamed, edited)])
    assert keys[0] == keys[1] != keys[2]
    assert torch.equal(points.noise_of(keys[0], 3, (4, 2, 2)), points.noise_of(keys[1], 3, (4, 2, 2)))
    assert not torch.equal(points.noise_of(keys[0], 3, (4, 2, 2)), points.noise_of(keys[0], 4, (4, 2, 2)))


def test_an_image_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.data.retries.DELAYS", ())
    with pytest.raises(UserError, match=r"gone\.png cannot be read"):
        points.content_keys([0], [record(tmp_path / "gone.png", (64, 48))])
