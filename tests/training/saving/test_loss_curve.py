"""The loss curve beside the model: what it shows, what it carries, and how a resumed run continues it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.options.datasets import SubsetSpec
from library.options.groups.saving import SavingOptions
from library.options.mistakes import Mistakes
from library.training.saving import loss_curve
from library.training.saving.loss_curve import (
    BOTTOM,
    LEFT,
    MEAN,
    RIGHT,
    TOP,
    LossCurve,
    begin_curve,
    decide_curve,
    draw,
    round_values,
    running_mean,
)
from library.training.saving.outputs import decide_outputs
from tests.training.running import World, make_world, run

IDENTITY = {"seed": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def curve_of(path: Path, losses: list[float], finished: int = 0, identity: dict[str, str] = IDENTITY) -> LossCurve:
    curve = begin_curve(path, identity, finished, pytest.fail)
    for step, loss in enumerate(losses, finished + 1):
        curve.add(step, loss)
    curve.draw()
    return curve


def test_a_falling_loss_is_a_line_that_falls() -> None:
    """The mean of one value is the value: from the upper left to the lower right corner of the plot."""
    image = draw([2.0 - number / 10 for number in range(11)])
    colour = tuple(bytes.fromhex(MEAN[1:]))
    places = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == colour]
    (first_x, first_y), (last_x, last_y) = min(places), max(places)
    assert first_x <= LEFT + 1 and last_x >= RIGHT - 1
    assert TOP < first_y < TOP + 40 and BOTTOM - 40 < last_y < BOTTOM
    for x, y in places:
        assert abs((y - first_y) / (last_y - first_y) - (x - LEFT) / (RIGHT - LEFT)) < 0.02


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.5], [0.0, 0.0], [3e-9, 4e9]])
def test_any_losses_can_be_drawn(losses: list[float]) -> None:
    assert draw(losses).size == loss_curve.SIZE


def test_round_values_and_running_means() -> None:
    assert list(round_values(0, 60)) == [0, 10, 20, 30, 40, 50, 60]
    assert list(round_values(1, 4, whole=True)) == [1, 2, 3, 4]
    assert [f"{value:g}" for value in round_values(0.12, 0.34)] == ["0.15", "0.2", "0.25", "0.3"]
    assert list(running_mean([1, 2, 6, 4], 2)) == [1, 1.5, 4, 5]


def test_a_resumed_run_continues_the_curve_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_curve, "PER_CHUNK", 4)  # so that several texts carry the values
    losses = [1 / (number + 3) for number in range(12)]
    whole, parts = tmp_path / "whole.png", tmp_path / "parts.png"
    curve_of(whole, losses)
    curve_of(parts, losses[:9])  # trained on to 9, but the last state is that after 7 steps
    resumed = curve_of(parts, losses[7:], finished=7)
    assert resumed.first == 1 and len(resumed.losses) == 12
    assert parts.read_bytes() == whole.read_bytes()


def test_values_of_another_run_or_with_a_gap_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "dog-loss.png"
    curve_of(path, [0.5, 0.4, 0.3])
    assert begin_curve(path, {"seed": "2"}, 2, pytest.fail).first == 3
    assert begin_curve(path, IDENTITY, 4, pytest.fail).first == 5
    assert len(begin_curve(path, IDENTITY, 0, pytest.fail).losses) == 0
    assert begin_curve(path, IDENTITY, 3, pytest.fail).first == 1
    newer = {**IDENTITY, "--an_option_of_a_later_version": "off"}
    assert begin_curve(path, newer, 3, pytest.fail).first == 4
    assert begin_curve(path, newer, 3, pytest.fail, saved=IDENTITY).first == 1
    for content in (b"", b"no image", path.read_bytes()[:200]):
        path.write_bytes(content)
        assert begin_curve(path, IDENTITY, 3, pytest.fail).first == 4
    Image.new("RGB", (4, 4)).save(path)
    assert begin_curve(path, IDENTITY, 3, pytest.fail).first == 4


def test_steps_whose_samples_could_not_be_read_are_gaps(tmp_path: Path) -> None:
    path = tmp_path / "dog-loss.png"
    curve = begin_curve(path, IDENTITY, 0, pytest.fail)
    for step, loss in ((1, 0.5), (4, 0.25), (5, 0.75)):
        curve.add(step, loss)
    curve.draw()
    again = begin_curve(path, IDENTITY, 5, pytest.fail)
    assert [str(loss) for loss in again.losses] == ["0.5", "nan", "nan", "0.25", "0.75"]


def test_a_run_that_has_read_nothing_yet_draws_nothing(tmp_path: Path) -> None:
    """Resumed after a step whose samples could not be read, and ended before one that could."""
    path = tmp_path / "dog-loss.png"
    curve = begin_curve(path, IDENTITY, 0, pytest.fail)
    curve.add(2, 0.5)
    curve.draw()
    drawn = path.read_bytes()
    resumed = begin_curve(path, IDENTITY, 1, pytest.fail)
    assert [str(loss) for loss in resumed.losses] == ["nan"]
    resumed.draw()
    assert path.read_bytes() == drawn


def test_a_curve_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    said: list[str] = []
    curve = LossCurve(tmp_path / "file" / "dog-loss.png", "run", said.append)
    curve.add(1, 0.5)
    curve.draw()
    assert len(said) == 1 and "could not be written" in said[0]


def test_it_is_never_drawn_into_a_folder_of_training_images(tmp_path: Path) -> None:
    """The next run would train on it."""
    outputs = decide_outputs(SavingOptions(output_dir=tmp_path / "out", output_name="dog"), "adapter", 1, Mistakes())
    subset = SubsetSpec(tmp_path / "train", "here")
    assert decide_curve(outputs, [subset]) == tmp_path / "out" / "dog-loss.png"
    assert decide_curve(replace(outputs, name=None), []) == tmp_path / "out" / "last-loss.png"
    for inside in (
        replace(subset, image_dir=tmp_path / "x" / ".." / "out"),
        replace(subset, mask_dir=tmp_path / "out"),
        replace(subset, image_dir=tmp_path, recursive=True),
    ):
        assert decide_curve(outputs, [subset, inside]) is None
    assert decide_curve(outputs, [replace(subset, image_dir=tmp_path)]) is not None


def test_runs_draw_it_at_saves_and_continue_it(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"save_state": True, "save_every_n_steps": 2, "train_batch_size": 2, "output_name": "dog"}
    whole = run(world.arguments(tmp_path / "whole", max_train_steps=4, **flags), capsys)
    assert whole.code == 0, whole.err
    drawn = (tmp_path / "whole" / "dog-loss.png").read_bytes()
    known = begin_curve(tmp_path / "whole" / "dog-loss.png", IDENTITY, 0, pytest.fail)
    assert known.first == 1 and [whole.losses[step] for step in range(1, 5)] == pytest.approx(
        list(loss_curve._read(tmp_path / "whole" / "dog-loss.png", _run_of(drawn))[1])  # type: ignore[index]
    )
    state = tmp_path / "whole" / "dog-step00000002-state"
    resumed = run(world.arguments(tmp_path / "whole", max_train_steps=4, resume=state, **flags), capsys)
    assert resumed.code == 0, resumed.err
    assert (tmp_path / "whole" / "dog-loss.png").read_bytes() == drawn
    assert f"loss curve: {tmp_path / 'whole' / 'dog-loss.png'}" in whole.out


def _run_of(content: bytes) -> str:
    import io

    with Image.open(io.BytesIO(content)) as image:
        return str(image.text["run"])  # type: ignore[attr-defined]
