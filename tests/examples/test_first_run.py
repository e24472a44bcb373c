"""The first run: its settings are what train_db.py takes, its pictures ship, and nothing is trained twice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from examples.first_run import first_run, make_tiny_model
from library.checkpoints.files import read_header
from library.families.registry import detect
from library.options.parse import parse

ROOT = Path(__file__).resolve().parent.parent.parent


def test_its_settings_are_without_a_mistake_and_name_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parsed = parse(["--config_file", str(first_run.CONFIG)])
    assert not parsed.mistakes
    options = parsed.options
    assert Path(options.model.pretrained_model_name_or_path or "") == first_run.MINIATURE
    assert options.dataset.train_data_dir == first_run.PICTURES
    assert options.saving.output_dir == first_run.OUTPUT
    assert f"{options.saving.output_name}.{options.saving.save_model_as}" == first_run.TRAINED.name
    assert options.run.logging_dir == first_run.LOGS


def test_its_pictures_ship_and_are_small() -> None:
    folder = ROOT / first_run.PICTURES / "10_sks robot"
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 6
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.mode == "RGB" and 64 <= min(picture.size) <= max(picture.size) <= 160
        assert path.stat().st_size < 10_000
    captions = sorted(folder.glob("*.txt"))
    assert captions and {path.stem for path in captions} < {path.stem for path in pictures}


def test_the_miniature_is_a_stable_diffusion_1_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    make_tiny_model.make(first)
    make_tiny_model.make(second)
    assert detect(read_header(first)).name == "sd1"
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 40e6


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Puts a file of the first run into a project folder elsewhere, with a time of its own."""
    monkeypatch.setattr(first_run, "ROOT", tmp_path)

    def put(path: Path, time: int) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
        os.utime(tmp_path / path, (time, time))

    return put


def test_what_is_trained_is_trained_again_only_after_a_change(place: Callable[[Path, int], None]) -> None:
    picture = first_run.PICTURES / "10_sks robot" / "robot.png"
    for path in (first_run.CONFIG, picture, first_run.MINIATURE):
        place(path, 100)
    assert not first_run.is_trained()
    place(first_run.TRAINED, 200)
    assert first_run.is_trained()
    for changed in (first_run.CONFIG, picture, first_run.MINIATURE):
        place(changed, 300)
        assert not first_run.is_trained()
        place(changed, 100)
