"""Files that vanish in the middle of a run: a few are left out, too many stop the run, and nothing is lost by that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import train_db
import train_network
from library.data import retries
from library.data.cache.latent_cache import CachedLatents, DiskLatents
from library.options.mistakes import Mistake, UserError
from library.training.console import Console
from library.training.recipe import Recipe
from tests import tiny
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

STEPS = 7


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    for folder in ("masked/2_sks dog", "masks"):
        tiny.write_images(world.root / folder, 3, size=(80, 64))
    return world


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DELAYS", (0.0, 0.0))


@dataclass
class Vanishing:
    """Files that are moved away after some steps, as if a network drive were gone."""

    moved: dict[Path, Path] = field(default_factory=dict)

    def move(self, files: Sequence[Path]) -> None:
        assert files
        for file in files:
            self.moved[file] = file.rename(file.with_name(file.name + ".gone"))

    def return_all(self) -> None:
        for file, place in self.moved.items():
            place.rename(file)
        self.moved.clear()


@pytest.fixture
def vanishing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Sequence[Path]]], Vanishing]]:
    """After three steps, files vanish."""
    gone = Vanishing()

    def after_three_steps(files: Callable[[], Sequence[Path]]) -> Vanishing:
        counted: list[float] = []
        original = Console.count_step

        def count_step(self: Console, *values: float) -> None:
            counted.append(0)
            if len(counted) == 3:
                gone.move(files())
            original(self, *values)

        monkeypatch.setattr(Console, "count_step", count_step)
        return gone

    yield after_three_steps
    gone.return_all()


@dataclass(frozen=True)
class Case:
    """`files`: patterns of what vanishes, below the folder of the world."""

    files: Sequence[str]
    flags: Mapping[str, Any]
    recipe: Recipe = train_db.RECIPE


CASES = {
    "images, one by one, dropout": Case(
        ["train/*/*.png"],
        {
            "network_module": "networks.lora", "network_dim": 2, "network_dropout": 0.3, "lr_scheduler": "cosine",
            "max_train_steps": 9,  # 8 an epoch
        },
        train_network.RECIPE,
    ),
    "images, workers, accumulation, regularisation": Case(
        ["train/*/*.png", "reg/*/*.png"],
        {
            "max_data_loader_n_workers": 1, "train_batch_size": 2, "gradient_accumulation_steps": 2,
            "reg_data_dir": "reg", "flip_aug": True,
        },
    ),
    "latents on disk": Case(["train/*/*.safetensors"], {"cache_latents_to_disk": True, "train_batch_size": 2}),
    "masks": Case(
        ["masks/*.png"],
        {
            "train_data_dir": "masked", "masked_loss": True, "conditioning_data_dir": "masks", "train_batch_size": 2,
        },
    ),
    "captions on disk": Case(
        ["remembered/captions/**/*.safetensors"],
        {
            "network_module": "networks.lora", "network_dim": 2, "network_train_unet_only": True,
            "cache_text_encoder_outputs_to_disk": True, "train_batch_size": 2,
        },
        train_network.RECIPE,
    ),
}  # fmt: skip


def go(world: World, out: Path, case: Case, capsys: pytest.CaptureFixture[str], **more: object) -> Outcome:
    folders = {"train_data_dir", "reg_data_dir", "conditioning_data_dir"}
    flags = {name: world.root / str(value) if name in folders else value for name, value in case.flags.items()}
    common = {"data_cache_dir": world.root / "remembered", "max_train_steps": STEPS}
    outcome = run(world.arguments(out, **{**common, **flags, **more}), capsys, case.recipe)
    assert "Traceback" not in outcome.err
    return outcome


@pytest.mark.parametrize("name", CASES)
def test_what_vanishes_stops_the_run_and_resumed_it_is_uninterrupted(
    name: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    vanishing: Callable[[Callable[[], Sequence[Path]]], Vanishing],
) -> None:
    """Model and state of the last finished step are there, bit for bit as without the incident."""
    case = CASES[name]
    whole = go(world, tmp_path / "whole", case, capsys)
    assert whole.code == 0, whole.err

    gone = vanishing(lambda: [path for pattern in case.files for path in sorted(world.root.glob(pattern))])
    stopped = go(world, tmp_path / "stopped", case, capsys)
    assert stopped.code == 2, stopped.err
    (found,) = re.findall(r"continue with --resume (.*)$", stopped.err, re.MULTILINE)
    state = Path(found)
    assert stopped.losses == {step: whole.losses[step] for step in stopped.losses} and len(stopped.losses) >= 3
    last = max(stopped.losses)
    assert state.name == f"dog-step{last:08d}-state"
    assert (state.parent / f"dog-step{last:08d}.safetensors").is_file()

    gone.return_all()
    resumed = go(world, tmp_path / "resumed", case, capsys, resume=state)
    assert resumed.code == 0, resumed.err
    end = case.flags.get("max_train_steps", STEPS)
    assert resumed.losses == {step: whole.losses[step] for step in range(last + 1, end + 1)}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "resumed" / "dog.safetensors")


def test_one_vanished_image_is_named_each_time_and_counted_at_the_end(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    vanishing: Callable[[Callable[[], Sequence[Path]]], Vanishing],
) -> None:
    """One of five is allowed."""
    lost = world.root / "train" / "2_sks dog" / "image_01.png"
    vanishing(lambda: [lost])
    outcome = go(world, tmp_path, Case([], {"train_batch_size": 1}), capsys, max_train_steps=16)
    assert outcome.code == 0, outcome.err
    told = re.findall(rf"step (\d+): sample left out: image {re.escape(str(lost))} cannot be decoded", outcome.err)
    assert len(told) >= 2
    assert f"left out, as they could not be read: {len(told)} samples of 1 image ({lost})" in outcome.err
    # a step of this sample alone has no loss
    assert sorted({*outcome.losses, *map(int, told)}) == list(range(1, 17))
    assert not outcome.losses.keys() & set(map(int, told))
    assert (tmp_path / "dog.safetensors").is_file()


def test_caption_files_are_not_needed_once_the_run_has_begun(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    vanishing: Callable[[Callable[[], Sequence[Path]]], Vanishing],
) -> None:
    case = Case([], {"train_batch_size": 4, "max_train_steps": 5})
    whole = go(world, tmp_path / "whole", case, capsys)
    vanishing(lambda: sorted(world.root.glob("train/*/*.txt")))
    without = go(world, tmp_path / "without", case, capsys)
    assert without.code == 0 and without.losses == whole.losses and "left out" not in without.err


def test_a_validation_that_cannot_read_its_files_is_left_out(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out images come after those that are trained on."""
    original = DiskLatents.get

    def get(self: DiskLatents, record: int, flipped: bool) -> CachedLatents:
        if record > 3:
            raise UserError([Mistake(f"latent cache {record} was removed")])
        return original(self, record, flipped)

    monkeypatch.setattr(DiskLatents, "get", get)
    flags = {"cache_latents_to_disk": True, "validation_split": 0.4, "validate_every_n_steps": 2}
    outcome = go(world, tmp_path, Case([], flags), capsys, max_train_steps=3)
    assert outcome.code == 0, outcome.err
    assert re.search(r"step 2: no validation loss: latent cache 4 was removed", outcome.err)
    assert sorted(outcome.losses) == [1, 2, 3] and (tmp_path / "dog.safetensors").is_file()
