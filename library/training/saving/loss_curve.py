"""The loss curve of a run: a drawing beside the model, which carries its values, so that a resumed run continues it."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import replacing
from library.training.saving.state import Identity, run_of

if TYPE_CHECKING:
    from PIL import Image as PilImage
    from PIL.ImageDraw import ImageDraw
    from PIL.PngImagePlugin import PngInfo

    from library.options.datasets import SubsetSpec
    from library.training.saving.outputs import Outputs

ENDING = "-loss.png"
SIZE = (960, 480)
LEFT, TOP, RIGHT, BOTTOM = 80, 40, 940, 430  # of the plot, in pixels
PAPER, GRID, INK, STEPS, MEAN = "#ffffff", "#e4e4e4", "#404040", "#a9c7e8", "#1f5fa8"
PER_CHUNK = 100_000  # values per text of the file: readers refuse texts of more than a megabyte


def decide_curve(outputs: Outputs, subsets: Sequence[SubsetSpec]) -> Path | None:
    """The file of the loss curve. None where images are trained from the output folder: the next run would train on it
    too."""
    target = outputs.directory.absolute().resolve()
    for subset in subsets:
        for folder in (subset.image_folder, subset.mask_folder):
            place = None if folder is None else folder.absolute().resolve()
            if place == target or (subset.recursive and place is not None and place in target.parents):
                return None
    return outputs.directory / f"{outputs.name or 'last'}{ENDING}"


@dataclass
class LossCurve:
    """The losses of the steps from `first` on, as float32. `run` tells whose they are. `path` None: never drawn."""

    path: Path | None
    run: str
    say: Callable[[str], None]
    first: int = 1
    losses: array[float] = field(default_factory=lambda: array("f"))

    def add(self, step: int, loss: float) -> None:
        """Add the loss of an optimizer step, counted from 1. Steps without a loss in between are gaps (NaN)."""
        self.losses.extend([math.nan] * (step - self.first - len(self.losses)))
        self.losses.append(loss)

    def draw(self) -> None:
        """Write the file. A curve that cannot be written is no reason to end a run."""
        if self.path is None or not any(map(math.isfinite, self.losses)):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as stream:
                draw(self.losses, self.first).save(stream, "png", pnginfo=self._texts())
        except (OSError, CheckpointError) as error:
            self.say(f"the loss curve could not be written: {error}")

    def _texts(self) -> PngInfo:
        from PIL.PngImagePlugin import PngInfo

        texts = PngInfo()
        texts.add_text("run", self.run)
        texts.add_text("first step", str(self.first))
        for start in range(0, len(self.losses), PER_CHUNK):
            part = _little_endian(self.losses[start : start + PER_CHUNK]).tobytes()
            texts.add_text(f"losses {start // PER_CHUNK:04d}", base64.b85encode(part).decode("ascii"), zip=True)
        return texts


def begin_curve(
    path: Path | None,
    identity: Identity,
    finished: int,
    say: Callable[[str], None],
    saved: Identity | None = None,
) -> LossCurve:
    """The curve of a run that begins after `finished` steps: what the file holds of the same run up to there, if it is
    complete, else an empty one. `saved`: the identity in the state that is resumed, which an earlier version may have
    written with fewer options."""
    run = run_of(identity)
    curve = LossCurve(path, run, say, first=finished + 1)
    if finished and path is not None and path.is_file():
        known = _read(path, {run, run_of(saved or identity)})
        if known is not None and known[0] <= finished < known[0] + len(known[1]):
            curve.first = known[0]
            curve.losses = known[1][: finished + 1 - known[0]]
    return curve


def _read(path: Path, runs: set[str]) -> tuple[int, array[float]] | None:
    """First step and losses of a file; None if it is of none of these runs, or no file of ours."""
    from PIL import Image as PilImage

    losses = array("f")
    try:
        with PilImage.open(path, formats=("PNG",)) as image:
            texts: dict[str, str] = image.text  # type: ignore[attr-defined]
            for name in sorted(texts):
                if name.startswith("losses "):
                    losses.frombytes(base64.b85decode(texts[name]))
            if texts["run"] not in runs:
                return None
            return int(texts["first step"]), _little_endian(losses)
    except (OSError, ValueError, LookupError, AttributeError, SyntaxError):  # the last is Pillow's for damaged files
        return None


def _little_endian(values: array[float]) -> array[float]:
    if sys.byteorder == "little":
        return values
    swapped = array("f", values)
    swapped.byteswap()
    return swapped


def draw(losses: Sequence[float], first: int = 1) -> PilImage.Image:
    """The image of a curve: every step that has a loss (one at least), and the mean of the steps up to it."""
    from PIL import Image as PilImage
    from PIL import ImageDraw

    image = PilImage.new("RGB", SIZE, PAPER)
    pen = ImageDraw.Draw(image)
    finite = {step: loss for step, loss in enumerate(losses, first) if math.isfinite(loss)}
    low, high = min(finite.values()), max(finite.values())
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    low, high = max(0.0, low - margin) if low >= 0 else low - margin, high + margin
    last = first + len(losses) - 1

    def place(step: float, loss: float) -> tuple[float, float]:
        across = 0.5 if last == first else (step - first) / (last - first)
        return LEFT + across * (RIGHT - LEFT), BOTTOM - (loss - low) / (high - low) * (BOTTOM - TOP)

    for loss in round_values(low, high):
        _, y = place(first, loss)
        pen.line((LEFT, y, RIGHT, y), GRID)
        pen.text((LEFT - 8, y), f"{loss:g}", INK, anchor="rm")
    for step in round_values(first, last, whole=True):
        x, _ = place(step, low)
        pen.line((x, TOP, x, BOTTOM), GRID)
        pen.text((x, BOTTOM + 8), f"{step:.0f}", INK, anchor="mt")
    width = max(1, len(losses) // 20)
    means = running_mean(list(finite.values()), width)
    _line(pen, [place(step, loss) for step, loss in finite.items()], STEPS, 1)
    _line(pen, [place(step, mean) for step, mean in zip(finite, means, strict=True)], MEAN, 3)
    title = "loss of each step" + (f", and the mean of {width} steps up to it" if width > 1 else "")
    pen.text((LEFT, TOP - 14), title, INK, anchor="ls")
    pen.text((RIGHT, BOTTOM + 34), "step", INK, anchor="rm")
    return image


def _line(pen: ImageDraw, points: list[tuple[float, float]], colour: str, width: int) -> None:
    if len(points) == 1:
        (x, y) = points[0]
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
    else:
        pen.line(points, colour, width, joint="curve" if width > 1 else None)


def running_mean(values: Sequence[float], width: int) -> Iterator[float]:
    """The mean of each value and the `width` - 1 before it, or of as many as there are."""
    total = 0.0
    for number, value in enumerate(values):
        total += value
        if number >= width:
            total -= values[number - width]
        yield total / min(number + 1, width)


def round_values(low: float, high: float, *, whole: bool = False) -> Iterator[float]:
    """About six values from `low` to `high` that are easy to read: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        yield low
        return
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    apart = max(1.0, apart) if whole else apart
    for number in range(math.ceil(low / apart), math.floor(high / apart) + 1):
        yield number * apart
