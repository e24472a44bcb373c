"""The flags of tools/make_masks.py, those of SimpleTuner's mask generator among them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.convert_values import read_colour
from library.options.flag import flag
from library.options.groups.dataset import DatasetOptions
from library.options.mistakes import Mistakes
from library.runtime.device import DEVICES

CLIPSEG = "CIDAS/clipseg-rd64-refined"
THRESHOLD = 0.3
TOLERANCE = 32


@dataclass(frozen=True)
class MaskMakingOptions:
    """Command-line options. Each of text_input, alpha, background_color, boxes and grabcut is a source; the mask is the
    union of what they find."""

    input_dir: Path = flag(None, "folder of the images")
    output_dir: Path = flag(
        None, "folder of the masks. If it is the folder of the images, masks are named like img0-masklabel.png"
    )
    text_input: str | None = flag(
        None, 'source: what --model recognises as these words, such as "person" or "dog, ball" for both'
    )
    model: str | None = flag(
        None,
        "folder of a transformers model that segments or detects, or its hub name if it was downloaded before. Not "
        f"set: {CLIPSEG}",
    )
    threshold: float | None = flag(
        None, f"how sure the model must be, 0 to 1. Not set: {THRESHOLD:g}", at_least=0, at_most=1
    )
    device: str | None = flag(None, "device of the model. Not set: the best available", choices=DEVICES)
    alpha: bool = flag(False, "source: the image's own transparency")
    background_color: tuple[str, ...] = flag(
        (), "source: all but these colours, as #rrggbb; for images before a screen of one colour"
    )
    color_tolerance: int | None = flag(
        None,
        f"how far red, green and blue may each be from --background_color, 0 to 255. Not set: {TOLERANCE}",
        at_least=0,
        at_most=255,
    )
    boxes: Path | None = flag(
        None,
        'source: a JSON file of boxes by image, {"img0.png": [[left, top, right, bottom]]}, in pixels of the upright '
        "image",
    )
    grabcut: bool = flag(
        False,
        "source: what differs from the margin of the image (GrabCut, without a model); with --boxes or --text_input "
        "what differs from the outside of what they find, in its place",
    )
    min_area: float = flag(
        0.001, "smallest share of the image that a connected part of the mask must have", at_least=0, at_most=1
    )
    mask_padding: int = flag(0, "pixels by which the mask grows", at_least=0, at_most=4096)
    mask_blur: int = flag(0, "pixels on each side of the edge over which the mask fades", at_least=0, at_most=128)
    invert_mask: bool = flag(False, "keep everything but what is found")
    recursive: bool = flag(False, "the sub-folders too; the masks get the same sub-folders")
    overwrite: bool = flag(False, "make all masks again, also those made or changed by hand")
    max_image_memory: float = flag(
        DatasetOptions.max_image_memory, "memory in GiB that a decoded image may need, at 4 bytes per pixel", above=0
    )

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """The colours of --background_color, RGB."""
        return tuple(colour for text in self.background_color if (colour := read_colour(text)) is not None)

    @property
    def phrases(self) -> tuple[str, ...]:
        """What --text_input asks for, without repetitions."""
        return tuple(dict.fromkeys(part.strip() for part in (self.text_input or "").split(",") if part.strip()))


def check(options: MaskMakingOptions, mistakes: Mistakes) -> None:
    """Add mistakes that can be told from the flags alone."""
    sources = ("text_input", "alpha", "background_color", "boxes", "grabcut")
    reported = " ".join(mistake.what for mistake in mistakes)
    if not any(getattr(options, name) or f"--{name} " in reported for name in sources):
        what = "nothing says what the masks are made from"
        mistakes.add(what, f"set one or more of {', '.join(f'--{name}' for name in sources)}")
    needs = {"model": "text_input", "threshold": "text_input", "device": "text_input",
             "color_tolerance": "background_color"}  # fmt: skip
    for name, source in needs.items():
        if getattr(options, name) is not None and not getattr(options, source):
            mistakes.add(f"--{name} has no effect without --{source}", f"add --{source}, or remove --{name}")
    if options.text_input and not options.phrases:
        mistakes.add(f'--text_input "{options.text_input}" names nothing', 'write words such as "person"')
    for text in options.background_color:
        if read_colour(text) is None:
            mistakes.add(f'--background_color "{text}" is not a colour', "write it as #rrggbb; green is #00ff00")
