"""Run a real recipe in this process on a miniature model, and record the outcome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_db
from library.training.command import run_recipe
from library.training.recipe import Recipe
from library.training.run import Run
from tests import tiny


@dataclass
class Outcome:
    """Exit code, output, and the loss of every optimizer step."""

    code: int
    out: str
    err: str
    losses: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """A miniature model and images to train it on: two training folders and one of regularisation images."""

    root: Path

    @property
    def model(self) -> Path:
        """SD1 in miniature, one file."""
        return self.root / "sd1.safetensors"

    def arguments(self, out: Path, **flags: object) -> list[str]:
        """A command line. True adds a flag without a value; None and False leave it out."""
        chosen: dict[str, object] = {
            "pretrained_model_name_or_path": self.model,
            "train_data_dir": self.root / "train",
            "resolution": 64,
            "output_dir": out,
            "output_name": "dog",
            "caption_extension": ".txt",
            "use_safetensors": True,
            "max_data_loader_n_workers": 0,
            "learning_rate": 1e-3,
            "seed": 1,
            **flags,
        }
        words: list[str] = []
        for name, value in chosen.items():
            if value is True:
                words.append(f"--{name}")
            elif isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            elif value is not None and value is not False:
                words.append(f"--{name}={value}")
        return words


def make_world(root: Path) -> World:
    """Write the model and the images."""
    tiny.write_single_file(root / "sd1.safetensors", "sd1")
    tiny.write_images(root / "train" / "2_sks dog", 3, size=(80, 64))
    tiny.write_images(root / "train" / "1_zwx cat", 2, size=(64, 96), seed=3)
    tiny.write_images(root / "reg" / "1_dog", 3, seed=9)
    caption = root / "train" / "2_sks dog" / "image_00.txt"
    caption.write_text("a photo of sks dog, grass, sky, sun", encoding="utf-8")
    return World(root)


def run(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], recipe: Recipe = train_db.RECIPE) -> Outcome:
    """Run a recipe with these arguments in this process."""
    capsys.readouterr()
    with recorded_losses() as losses:
        code = run_recipe(recipe, arguments)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err, losses)


@contextmanager
def recorded_losses() -> Iterator[dict[int, float]]:
    """Collect the losses of steps from the values logged to trackers. Resets accelerate's global state before and
    after."""
    from accelerate.state import AcceleratorState

    losses: dict[int, float] = {}
    log = Run.log

    def recording(self: Run, values: dict[str, float], step: int) -> None:
        losses.update((step, values[tag]) for tag in ("loss", "loss/current") if tag in values)
        log(self, values, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", recording)
        AcceleratorState._reset_state(True)
        try:
            yield losses
        finally:
            AcceleratorState._reset_state(True)


def assert_equal_files(first: Path, second: Path) -> None:
    """Both hold the same tensors, bit for bit."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different[:5]
