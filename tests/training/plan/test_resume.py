"""What --resume takes, what it refuses with which reason, and what it tells of changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import train_db
import train_network
from library.options.mistakes import UserError
from library.options.parse import parse
from library.runtime.launch import Launch
from library.training.plan.plan import Plan, decide
from library.training.plan.text import describe
from library.training.saving.state import Progress
from tests import tiny
from tests.training.running import World, make_world
from tests.training.saving.states import save
from tests.training.saving.test_state import a_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def plan(world: World, out: Path, program: object = train_db.RECIPE.program, **flags: object) -> Plan:
    if program is train_network.RECIPE.program:
        flags = {"network_module": "networks.lora", "use_safetensors": None, **flags}
    return decide(parse(world.arguments(out, max_train_steps=9, **flags), program))  # type: ignore[arg-type]


def state_of(made: Plan, name: str, step: int = 3) -> Path:
    """A state that the run of this plan could have saved."""
    folder = made.outputs.directory / name
    about = made.description
    save(
        folder, Progress(step=step, window=step), a_run(1), identity=about.identity, options=about.options,
        images=about.images, output_name=about.output_name,
    )  # fmt: skip
    return folder


def refused(world: World, out: Path, **flags: object) -> str:
    with pytest.raises(UserError) as error:
        plan(world, out, **flags)
    return str(error.value)


def test_auto_takes_the_newest_state_or_starts_anew(world: World, tmp_path: Path) -> None:
    first = plan(world, tmp_path, resume="auto")
    assert first.resume is None and first.start.step == 0
    told = " ".join(first.notes)
    assert f"there is no whole state of this run in {tmp_path}: it starts anew" in told and "add --save_state" in told
    state_of(first, "dog-step00000003-state")
    newest = state_of(first, "dog-000002-state", step=5)
    again = plan(world, tmp_path, resume="auto", save_state=True)
    assert again.resume is not None and again.resume.folder == newest and again.start.step == 5
    assert any(f"continues {newest}, after step 5" in note for note in again.notes)
    assert not any("add --save_state" in note for note in again.notes)


def test_a_damaged_state_that_is_named_is_refused(world: World, tmp_path: Path) -> None:
    folder = state_of(plan(world, tmp_path), "dog-state")
    content = bytearray((folder / "optimizer.bin").read_bytes())
    content[100] ^= 1
    (folder / "optimizer.bin").write_bytes(content)
    assert "the state is damaged: the content of optimizer.bin was changed" in refused(world, tmp_path, resume=folder)


def test_options_that_may_change_are_told_and_others_refused_with_the_reason(world: World, tmp_path: Path) -> None:
    folder = state_of(plan(world, tmp_path, save_every_n_steps=5), "dog-state")
    changed = plan(world, tmp_path, save_every_n_steps=2, resume=folder)
    (told,) = (note for note in changed.notes if "changed since the state was saved" in note)
    assert told.endswith("--save_every_n_steps was 5, is 2")
    answer = refused(world, tmp_path, resume=folder, seed=2, learning_rate=1e-4, train_batch_size=3)
    for line in (
        "seed was 1 when the state was saved and is 2 now: every random draw is keyed by it",
        "--learning_rate was 0.001 when the state was saved and is 0.0001 now: the state of optimizer and schedule",
        "--train_batch_size was 1 when the state was saved and is 3 now: the batches that are left would be others",
    ):
        assert line in answer


def test_no_secret_is_in_a_state(world: World, tmp_path: Path) -> None:
    folder = state_of(plan(world, tmp_path, wandb_api_key="k3y"), "dog-state")
    assert all(b"k3y" not in file.read_bytes() for file in folder.iterdir())


def test_images_that_changed_are_named(world: World, tmp_path: Path) -> None:
    data = tmp_path / "train"
    shutil.copytree(world.root / "train", data)
    folder = state_of(plan(world, tmp_path, train_data_dir=data), "dog-state")
    assert plan(world, tmp_path, train_data_dir=data, resume=folder).start.step == 3
    # the same size in pixels, another file
    tiny.write_images(data / "2_sks dog", 1, size=(80, 64), seed=77)
    answer = refused(world, tmp_path, train_data_dir=data, resume=folder)
    assert "image files have changed since the state was saved: edited: train/2_sks dog/image_00.png" in answer
    shutil.copy(data / "2_sks dog" / "image_01.png", data / "2_sks dog" / "more.png")
    (data / "1_zwx cat" / "image_00.png").unlink()
    answer = refused(world, tmp_path, train_data_dir=data, resume=folder)
    assert "new: train/2_sks dog/more.png; gone: train/1_zwx cat/image_00.png; edited: train/2_sks dog/" in answer


@pytest.mark.parametrize(
    ("name", "head", "begin"),
    [
        ("dog-step00000100-state", None, "--initial_step 100 --skip_until_initial_step"),
        ("dog-000003-state", None, "--initial_epoch 4"),
        ("last-state", {"current_epoch": 2, "current_step": 70}, "--initial_step 70 --skip_until_initial_step"),
        ("last-state", None, ""),
    ],
)
def test_states_of_sd_scripts_are_answered(name: str, head: object, begin: str, world: World, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file in ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / file).write_bytes(b"")
    if head is not None:
        (folder / "train_state.json").write_text(json.dumps(head), encoding="utf-8")
    answer = refused(world, tmp_path, resume=folder, program=train_network.RECIPE.program)
    assert "a training state of sd-scripts" in answer and "missing" not in answer
    assert f"remove --resume, and pass --network_weights {folder / 'model.safetensors'} {begin}".strip() in answer
    assert "as --pretrained_model_name_or_path" in refused(world, tmp_path, resume=folder)


def test_another_number_of_processes_is_told(world: World, tmp_path: Path) -> None:
    """If a step keeps its batches; both from two to one and from one to two."""
    words = [
        world.arguments(tmp_path, max_train_steps=9, gradient_accumulation_steps=steps, train_batch_size=1)
        for steps in (1, 2)
    ]
    program, pair = train_db.RECIPE.program, Launch(0, 2, 0, 2)
    by_two = state_of(decide(parse(words[0], program), pair), "two-state")
    by_one = state_of(decide(parse(words[1], program)), "one-state")
    for made, told in (
        (decide(parse([*words[1], "--resume", str(by_two)], program)), "the number of processes was 2, is 1"),
        (decide(parse([*words[0], "--resume", str(by_one)], program), pair), "the number of processes was 1, is 2"),
    ):
        assert any(note.endswith(told) for note in made.notes) and "the last bits of sums" in describe(made, 200)
    same = decide(parse([*words[0], "--resume", str(by_two)], program), pair)
    assert "number of processes was" not in str(same.notes) and "the last bits of sums" not in describe(same, 200)
