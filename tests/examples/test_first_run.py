"""The first run: its settings are what train_db.py takes, its images ship, and nothing is done twice."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.shapes import first_run, images
from examples.shapes.judge import load, read
from examples.shapes.world import OF_ROBOTS, SUBJECT, SUBJECT_BACKGROUNDS
from library.checkpoints.files import read_header
from library.families.registry import detect
from library.options.parse import parse

ROOT = Path(__file__).resolve().parent.parent.parent


def test_its_settings_are_without_a_mistake_and_name_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parsed = parse(["--config_file", str(first_run.CONFIG)])
    assert not parsed.mistakes
    options = parsed.options
    assert Path(options.model.pretrained_model_name_or_path or "") == first_run.BASE
    assert options.dataset.train_data_dir == first_run.IMAGES
    assert options.dataset.reg_data_dir == first_run.CLASS_IMAGES.parent
    assert options.saving.output_dir == first_run.OUTPUT
    assert f"{options.saving.output_name}.{options.saving.save_model_as}" == first_run.TRAINED.name
    assert options.run.logging_dir == first_run.LOGS


def test_its_images_ship_and_show_the_subject() -> None:
    folder = ROOT / first_run.IMAGES / "10_sks robot"
    paths = sorted(folder.glob("*.png"))
    assert len(paths) == 6
    shown = [np.asarray(Image.open(path)) for path in paths]
    for path, reading in zip(paths, read(load(), shown), strict=True):
        assert all(reading[name] == getattr(SUBJECT, name) for name in ("shape", "colour", *OF_ROBOTS))
        assert reading["background"] in SUBJECT_BACKGROUNDS
        assert f"{reading['background']} background" in path.with_suffix(".txt").read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Puts a file of the first run into a project folder elsewhere, with a time of its own."""
    monkeypatch.setattr(first_run, "ROOT", tmp_path)

    def put(path: Path, time: int) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
        os.utime(tmp_path / path, (time, time))

    return put


def test_what_is_trained_is_trained_again_only_after_a_change(
    place: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(first_run, "run", lambda *command: ran.append(" ".join(command)))
    everything = [" ".join(words) for words in (first_run.MAKE_CLASS_IMAGES, first_run.TRAIN, first_run.DRAW_SHEET)]
    image = first_run.IMAGES / "10_sks robot" / "robot.png"
    for path in (first_run.CONFIG, image, first_run.BASE):
        place(path, 100)

    def again() -> list[str]:
        ran.clear()
        first_run.main()
        return list(ran)

    assert again() == everything
    place(first_run.TRAINED, 200)
    place(first_run.SHEET, 200)
    assert again() == []
    place(first_run.TRAINED, 250)
    assert again() == [" ".join(first_run.DRAW_SHEET)]
    for changed in (first_run.CONFIG, image, first_run.BASE):
        place(changed, 300)
        assert again() == everything
        place(changed, 100)


def start(*command: str) -> int:
    """What `python command` exits with, in this process."""
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_its_commands_run_as_they_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three commands with fewer images and steps, as Python starts them, into another folder."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(images, "STEPS", 2)  # of each image on the sheet
    class_images, trained, paper = tmp_path / "class" / "1_robot", tmp_path / "robot.safetensors", tmp_path / "s.png"
    commands = (
        (*first_run.MAKE_CLASS_IMAGES, "--count", "2", "--outdir", str(class_images)),
        (
            *(
                *first_run.TRAIN,
                "--max_train_steps",
                "1",
                "--lr_warmup_steps",
                "0",
                "--reg_data_dir",
                str(class_images.parent),
            ),
            *("--output_dir", str(tmp_path), "--logging_dir", str(tmp_path / "logs")),
        ),
        (*first_run.DRAW_SHEET[:2], str(trained), str(paper)),
    )
    for command in commands:
        AcceleratorState._reset_state(True)
        monkeypatch.setattr(sys, "argv", list(command[command[0] == "-m" :]))
        assert start(*command) == 0
    AcceleratorState._reset_state(True)
    assert len(list(class_images.glob("*.png"))) == 2
    assert detect(read_header(trained)).name == "sd1"
    with Image.open(paper) as image:
        assert image.width > image.height > 500
