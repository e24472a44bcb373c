"""A run that a signal stops saves where it is, and resumed it is the uninterrupted run: losses, files, measurements."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from library.runtime import signals
from library.training.evaluation.evaluation import Evaluation
from library.training.preview.preview import Preview
from library.training.run import Run
from library.training.saving.saver import Saver
from library.training.validation.validation import Validation
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

# 4 + 2 samples in batches of 2, two of them a step: 2 steps an epoch, the second of one batch. An image is held out.
FLAGS: dict[str, Any] = {
    "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 5, "flip_aug": True,
    "validation_split": 0.34, "validate_every_n_steps": 2, "sample_every_n_epochs": 1, "keep_best": "validation_loss",
}  # fmt: skip


# without measurements
PLAIN: dict[str, Any] = dict.fromkeys(
    ("validation_split", "validate_every_n_steps", "keep_best", "sample_every_n_epochs")
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    (made.root / "prompts.txt").write_text(
        "a dog --w 64 --h 64 --s 2 --d 1\na cat --w 64 --h 64 --s 2 --d 2\n", "utf-8"
    )
    return made


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    return tmp_path_factory.mktemp("whole"), []


def go(world: World, out: Path, capsys: pytest.CaptureFixture[str], **more: object) -> Outcome:
    outcome = run(world.arguments(out, **{**FLAGS, "sample_prompts": world.root / "prompts.txt", **more}), capsys)
    assert "Traceback" not in outcome.err, outcome.err
    return outcome


@contextmanager
def signalled(room: type, name: str, number: int, wanted: Callable[..., bool], times: int = 1) -> Iterator[None]:
    """Raise a signal as soon as `room.name` is called with arguments that are `wanted`."""
    original, left = getattr(room, name), [times]

    def calling(self: object, *arguments: Any, **named: Any) -> Any:
        if left[0] and wanted(*arguments, **named):
            left[0] -= 1
            signal.raise_signal(number)
        return original(self, *arguments, **named)

    before = signal.signal(number, signal.default_int_handler)  # a background job of a shell ignores Ctrl-C
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, name, calling)
            yield
    finally:
        signal.signal(number, before)


def at_step(step: int) -> Callable[..., bool]:
    return lambda values, now: now == step and "loss" in values


POINTS: dict[str, tuple[type, str, Callable[..., bool], int]] = {
    "in a step, within an epoch": (Run, "log", at_step(1), 2),
    "in a step of an epoch's end": (Run, "log", at_step(3), 4),
    "in a validation": (Validation, "_batch", lambda *_: True, 2),
    "between two samples": (Preview, "_draw_group", lambda plan, mark, *_: mark == "e000002", 4),
}


@pytest.mark.parametrize("point", POINTS)
def test_stopped_and_resumed_is_uninterrupted(
    point: str, world: World, whole: tuple[Path, list[Outcome]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once, known = whole
    if not known:
        known.append(go(world, at_once, capsys))
        assert known[0].code == 0, known[0].err
    room, name, wanted, step = POINTS[point]
    if room is Validation:  # not that of the base model
        seen = iter([False] * 3)
        wanted = lambda *_: next(seen, True)  # noqa: E731
    with signalled(room, name, signal.SIGINT, wanted):
        stopped = go(world, tmp_path, capsys)
    assert stopped.code == 130, stopped.err
    state = tmp_path / f"dog-step{step:08d}-state"
    assert f"stopped after step {step}: model and state are saved" in stopped.err and str(state) in stopped.err
    assert state.is_dir() and (tmp_path / f"dog-step{step:08d}.safetensors").is_file()
    rest = go(world, tmp_path, capsys, resume=state)
    assert rest.code == 0, rest.err
    assert {**stopped.losses, **rest.losses} == known[0].losses and min(rest.losses) == step + 1
    for file in ("dog.safetensors", "dog_best.safetensors"):
        assert_equal_files(at_once / file, tmp_path / file)
    assert (at_once / "dog-validation.csv").read_text("utf-8") == (tmp_path / "dog-validation.csv").read_text("utf-8")


ENDS = {name: getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)}


@pytest.mark.parametrize("name", ENDS)
def test_the_exit_code_names_the_signal(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with signalled(Run, "log", ENDS[name], at_step(1)):
        stopped = go(world, tmp_path, capsys, **PLAIN)
    assert stopped.code == 128 + ENDS[name] and "stopped after step 2" in stopped.err


def test_a_second_signal_stops_at_once_and_leaves_no_partial_file(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that follows at once is the same wish, sent twice by a launcher."""
    with signalled(Run, "log", signal.SIGTERM, at_step(1), times=2):
        assert go(world, tmp_path / "twice", capsys, **PLAIN).code == 143
    monkeypatch.setattr(signals, "AGAIN_AFTER", 0.0)
    with (
        signalled(Run, "log", signal.SIGINT, at_step(1)),
        signalled(Saver, "_save_state", signal.SIGTERM, lambda *_, **__: True),
    ):
        stopped = go(world, tmp_path / "again", capsys, **PLAIN)
    assert stopped.code == 143 and "interrupted after step 2: the last saved model is" in stopped.err
    left = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert left == ["dog-run.jsonl", "dog-step00000002.safetensors"], left


def test_before_the_first_step_one_signal_is_enough(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with signalled(Evaluation, "begin", signal.SIGTERM, lambda *_, **__: True):
        stopped = go(world, tmp_path, capsys)
    assert stopped.code == 143 and "interrupted after step 0: no model was saved" in stopped.err
    assert "dog-step00000000-state" not in {path.name for path in tmp_path.iterdir()}


def test_a_run_that_was_cut_off_before_its_last_files_is_finished(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the last step nothing is left to train, but what is due at the end of the epoch, and the final model."""
    flags: dict[str, object] = {"max_train_steps": 4, "save_every_n_steps": 4, "save_state": True, "resume": "auto"}
    final = lambda path, *_: path.name == "dog.safetensors"  # noqa: E731
    with signalled(Saver, "_save_model", signal.SIGTERM, final):
        assert go(world, tmp_path, capsys, **flags).code == 143
    assert not (tmp_path / "dog.safetensors").exists()
    samples = {path: path.read_bytes() for path in (tmp_path / "sample").iterdir()}
    finished = go(world, tmp_path, capsys, **flags)
    assert finished.code == 0 and not finished.losses, finished.err
    assert_equal_files(tmp_path / "dog.safetensors", tmp_path / "dog-step00000004.safetensors")
    assert {path: path.read_bytes() for path in (tmp_path / "sample").iterdir()} == samples
