"""What a real run writes to its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.options.train_options import FLAGS
from library.training.command import run_recipe
from library.training.events.events import Event
from library.training.events.record import read_record
from tests.training.events.receiver import receiving
from tests.training.running import World, make_world
from train_db import RECIPE


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("wörld"))


def train(words: list[str], code: int = 0) -> None:
    """Train without replacing Run.log, as tests.training.running does."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    assert run_recipe(RECIPE, words) == code
    AcceleratorState._reset_state(True)


def of(events: list[Event], type: str) -> list[Event]:
    return [event for event in events if event.type == type]


def test_the_record_of_a_run(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Start, steps, evaluations, images, files and end; interrupted runs go on in it. The secret is nowhere."""
    secret = next(name for name, flag in FLAGS.items() if flag.secret)
    words = world.arguments(
        tmp_path, max_train_steps=3, save_every_n_steps=2, save_state=True, validation_split=0.4,
        validate_every_n_steps=2, sample_prompts="a <b>犬</b> --w 64 --h 64 --s 2 --d 5", sample_every_n_steps=3,
        **{secret: "hidden-key"},
    )  # fmt: skip
    train(words)
    path = tmp_path / "dog-run.jsonl"
    events = read_record(path)
    first, last = events[0], events[-1]
    assert first.data | {"plan": 0, "run": 0, "options": 0} == {
        "stage": "started", "name": "dog", "output_dir": str(tmp_path), "total_steps": 3, "steps_per_epoch": 6,
        "epochs": 1, "plan": 0, "run": 0, "options": 0,
    }  # fmt: skip
    assert ["model", f"{world.model} (Stable Diffusion 1.x, safetensors)"] in first.data["plan"]  # type: ignore[operator]
    assert first.data["options"]["save_state"] is True and secret not in first.data["options"]  # type: ignore[index,operator]
    assert "hidden-key" not in path.read_text(encoding="utf-8")
    assert (last.type, last.step, last.data) == ("lifecycle.stage", 3, {"stage": "finished"})

    steps = [event for event in of(events, "training.status") if "loss" in event.data]
    assert [event.step for event in steps] == [1, 2, 3]
    assert all(event.data["values"]["loss"] == event.data["loss"] for event in steps)  # type: ignore[index]
    assert steps[0].data["values"]["lr/unet"] == 1e-3 and steps[2].data["remaining_seconds"] == 0  # type: ignore[index]
    (evaluated,) = of(events, "evaluation")
    assert evaluated.step == 2
    assert {"loss/validation/step_average", "loss/validation/step_average_base"} <= evaluated.data["values"].keys()  # type: ignore[attr-defined]
    (image,) = of(events, "validation.image")
    assert image.data["prompt"] == "a <b>犬</b>" and image.data["seed"] == 5 and Path(str(image.data["path"])).is_file()
    saved = {Path(str(event.data["path"])): event.data for event in of(events, "training.checkpoint")}
    assert len(saved) == 4 and all(path.exists() for path in saved)
    assert saved[tmp_path / "dog.safetensors"]["bytes"] == (tmp_path / "dog.safetensors").stat().st_size
    shown = capsys.readouterr().err
    assert all(str(event.data["message"]) in shown for event in of(events, "notification"))

    before = path.read_bytes()
    train([*words, f"--resume={tmp_path / 'dog-step00000002-state'}", "--max_train_steps=4"])
    assert path.read_bytes().startswith(before)
    steps = [event for event in of(read_record(path), "training.status") if "loss" in event.data]
    assert [event.step for event in steps] == [1, 2, 3, 4]
    stages = [(event.step, event.data["stage"]) for event in of(read_record(path), "lifecycle.stage")]
    assert stages == [(0, "started"), (2, "resumed"), (4, "finished")]


def test_it_lies_beside_training_images_and_is_no_data(world: World, tmp_path: Path) -> None:
    folder = world.root / "train" / "2_sks dog"
    train(world.arguments(folder, max_train_steps=1, output_name="last"))
    lines = (folder / "last-run.jsonl").read_text(encoding="utf-8").splitlines()
    plans = [json.loads(lines[0])["data"]["plan"]]
    train(world.arguments(folder, max_train_steps=1, output_name="last"))
    lines = (folder / "last-run.jsonl").read_text(encoding="utf-8").splitlines()
    plans.append(json.loads(lines[0])["data"]["plan"])
    data = [[line for line in plan if line[0] == "data"] for plan in plans]
    assert data[0] == data[1]


def test_a_run_sends_its_events_and_keeps_the_secrets(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with receiving() as receiver:
        hook = {"webhook_type": "raw", "callback_url": receiver.url, "auth_token": "to-ken", "secret": "sec-ret"}
        (tmp_path / "hook.json").write_text(json.dumps(hook), encoding="utf-8")
        train(world.arguments(out, max_train_steps=1, webhook_config=tmp_path / "hook.json"))
    sent = [(event["type"], event["step"], event["data"]) for event in receiver.events()]
    recorded = read_record(out / "dog-run.jsonl")
    assert sent == [(event.type, event.step, event.data) for event in recorded]
    told = capsys.readouterr()
    everything = (told.out + told.err).encode() + b"".join(path.read_bytes() for path in out.glob("*"))
    assert not [secret for secret in (b"pass-word", b"to-ken", b"sec-ret") if secret in everything]
    assert b"hook.json" in everything
