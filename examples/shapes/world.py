"""A small world of captioned images: coloured shapes, houses and robots on coloured backgrounds, 64 by 64 pixels.

A complete diffusion model can learn it on a CPU, and every image can be classified automatically, so that the effect of
training can be measured. No torch.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 64
FINER = 4  # supersampling factor, for smooth edges

Pixels = NDArray[np.uint8]
"""An image, (64, 64, 3) RGB."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (246, 138, 20),
    "yellow": (250, 226, 50),
    "green": (40, 160, 60),
    "blue": (40, 84, 224),
    "purple": (146, 52, 184),
    "white": (244, 244, 244),
    "black": (24, 24, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "house", "robot")
EYES = ("one eye", "two eyes", "three eyes")
MOUTHS = ("smiling", "sad")
ANTENNAS = ("one antenna", "two antennas")
WINDOWS = ("one window", "two windows")

ATTRIBUTES: dict[str, Sequence[str]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "eyes": EYES,
    "mouth": MOUTHS,
    "antennas": ANTENNAS,
    "windows": WINDOWS,
}
"""All attributes of an image. The last four are None if the shape does not have them."""

OF_ROBOTS = ("eyes", "mouth", "antennas")
OF_HOUSES = ("windows",)

Triple = tuple[str, str, str]
"""(colour, shape, background)"""


@dataclass(frozen=True)
class Scene:
    """The contents of an image: attributes, centre in pixels, scale, and offsets of the two colours."""

    shape: str
    colour: str
    background: str
    eyes: str | None = None
    mouth: str | None = None
    antennas: str | None = None
    windows: str | None = None
    centre: tuple[float, float] = (32.0, 33.0)
    scale: float = 1.0
    shades: tuple[tuple[int, int, int], tuple[int, int, int]] = ((0, 0, 0), (0, 0, 0))

    @property
    def triple(self) -> Triple:
        """The main attributes: colour, shape and background."""
        return self.colour, self.shape, self.background


def triples() -> list[Triple]:
    """All combinations of colour, shape and background in which the background has another colour than the shape."""
    return [
        (colour, shape, background)
        for colour, shape, background in itertools.product(COLOURS, SHAPES, COLOURS)
        if colour != background
    ]


def unseen_triples() -> list[Triple]:
    """The 75 triples, one in six, that pretraining never shows together."""
    return random.Random(20).sample(triples(), 75)


def draw_scene(rng: random.Random, triple: Triple | None = None) -> Scene:
    """A random scene, of `triple` or of one that pretraining may use; robots are more frequent than other shapes."""
    if triple is None:
        unseen = _UNSEEN
        while True:
            shape = "robot" if rng.random() < 0.25 else rng.choice(SHAPES)
            colour, background = rng.sample(list(COLOURS), 2)
            if (colour, shape, background) not in unseen:
                break
    else:
        colour, shape, background = triple
    robot, house = shape == "robot", shape == "house"
    return Scene(
        shape,
        colour,
        background,
        eyes=rng.choice(EYES) if robot else None,
        mouth=rng.choice(MOUTHS) if robot else None,
        antennas=rng.choice(ANTENNAS) if robot else None,
        windows=rng.choice(WINDOWS) if house else None,
        centre=(32 + rng.uniform(-4, 4), 33 + rng.uniform(-4, 4)),
        scale=rng.uniform(0.88, 1.1),
        shades=(_shade(rng), _shade(rng)),
    )


def _shade(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(-10, 10), rng.randint(-10, 10), rng.randint(-10, 10)


def caption(scene: Scene, rng: random.Random) -> str:
    """A random caption of a scene; each attribute may be omitted.

    "a blue star on a yellow background", "a smiling robot with two eyes", "house", …
    """
    robot = scene.shape == "robot"
    colour_probability = 0.55 if robot else 0.8  # lower for robots, so that "a robot" can have any colour
    before = [scene.mouth] if scene.mouth and rng.random() < 0.5 else []
    before += [scene.colour] if rng.random() < colour_probability else []
    features = [text for text in (scene.eyes, scene.antennas) if text and rng.random() < 0.5]
    features += [scene.windows] if scene.windows and rng.random() < 0.5 else []
    after = [f"with {' and '.join(features)}"] if features else []
    after += [f"on {article(scene.background)} background"] if rng.random() < 0.8 else []
    words = " ".join([*before, scene.shape, *after])
    return article(words) if rng.random() < 0.75 else words


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def render(scene: Scene) -> Pixels:
    """The image of a scene, (64, 64, 3) RGB."""
    body = _shifted(COLOURS[scene.colour], scene.shades[0])
    behind = _shifted(COLOURS[scene.background], scene.shades[1])
    canvas = np.full((SIDE * FINER, SIDE * FINER, 3), behind, dtype=np.uint8)
    pen = Pen(canvas, scene.centre, scene.scale)
    if scene.shape == "robot":
        _robot(pen, scene, body)
    elif scene.shape == "house":
        _house(pen, scene, body)
    elif scene.shape == "circle":
        pen.disc(0, 0, 19, body)
    else:
        pen.polygon(OUTLINES[scene.shape], body)
    return np.asarray(cv2.resize(canvas, (SIDE, SIDE), interpolation=cv2.INTER_AREA), dtype=np.uint8)


Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


def _shifted(colour: Colour, shade: Colour) -> Colour:
    red, green, blue = (min(255, max(0, value + change)) for value, change in zip(colour, shade, strict=True))
    return red, green, blue


def _star(points: int, outer: float, inner: float) -> Points:
    angles = [math.pi * index / points - math.pi / 2 for index in range(2 * points)]
    radii = itertools.cycle((outer, inner))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle, radius in zip(angles, radii, strict=False)]


def _heart() -> Points:
    turns = [2 * math.pi * index / 48 for index in range(48)]
    return [
        (
            1.25 * 16 * math.sin(t) ** 3,
            -1.25 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) - 1,
        )
        for t in turns
    ]


OUTLINES: dict[str, Points] = {
    "square": [(-17, -17), (17, -17), (17, 17), (-17, 17)],
    "triangle": [(0, -21), (22, 17), (-22, 17)],
    "star": _star(5, 24, 9.5),
    "heart": _heart(),
    "cross": [(-7, -21), (7, -21), (7, -7), (21, -7), (21, 7), (7, 7), (7, 21), (-7, 21), (-7, 7), (-21, 7), (-21, -7),
              (-7, -7)],
}  # fmt: skip


@dataclass(frozen=True)
class Pen:
    """Draws on a canvas in the coordinates of an object: pixels around its centre, y downwards."""

    canvas: NDArray[np.uint8]
    centre: tuple[float, float]
    scale: float

    def place(self, x: float, y: float) -> tuple[int, int]:
        """The canvas's pixel for a point."""
        at_x, at_y = self.centre
        return round((x * self.scale + at_x) * FINER), round((y * self.scale + at_y) * FINER)

    def length(self, pixels: float) -> int:
        """Canvas pixels for a length, at least one."""
        return max(1, round(pixels * self.scale * FINER))

    def polygon(self, points: Points, colour: Colour) -> None:
        """A filled polygon."""
        cv2.fillPoly(self.canvas, [np.array([self.place(x, y) for x, y in points], dtype=np.int32)], colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """A filled rectangle."""
        cv2.rectangle(self.canvas, self.place(left, top), self.place(right, bottom), colour, cv2.FILLED)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """A filled circle."""
        cv2.circle(self.canvas, self.place(x, y), self.length(radius), colour, cv2.FILLED)

    def line(self, start: tuple[float, float], end: tuple[float, float], width: float, colour: Colour) -> None:
        """A line with round ends."""
        cv2.line(self.canvas, self.place(*start), self.place(*end), colour, self.length(width))

    def arc(
        self, centre: tuple[float, float], axes: tuple[float, float], turn: tuple[int, int], colour: Colour
    ) -> None:
        """A part of an ellipse's outline, `turn` in degrees clockwise from the right."""
        sizes = self.length(axes[0]), self.length(axes[1])
        cv2.ellipse(self.canvas, self.place(*centre), sizes, 0, turn[0], turn[1], colour, self.length(3))


def _ink(colour: Colour) -> Colour:
    """Dark or light, for contrast with a colour."""
    bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
    return (20, 20, 26) if bright > 120 else (250, 250, 250)


def _robot(pen: Pen, scene: Scene, body: Colour) -> None:
    ink = _ink(COLOURS[scene.colour])
    for x in (0,) if scene.antennas == "one antenna" else (-10, 10):
        pen.line((x, -11), (x, -20), 3, body)
        pen.disc(x, -21, 3.6, body)
    for side in (-1, 1):
        pen.box(side * 9 - 4, 16, side * 9 + 4, 22, body)
    pen.box(-19, -12, 19, 17, body)
    for x in {"one eye": (0,), "two eyes": (-8, 8), "three eyes": (-12, 0, 12)}[scene.eyes or EYES[0]]:
        pen.disc(x, -4, 4, ink)
    if scene.mouth == "smiling":
        pen.arc((0, 5), (10, 7), (0, 180), ink)
    else:
        pen.arc((0, 13), (10, 7), (180, 360), ink)


def _house(pen: Pen, scene: Scene, walls: Colour) -> None:
    ink = _ink(COLOURS[scene.colour])
    pen.polygon([(-22, -4), (0, -23), (22, -4)], walls)
    pen.box(-16, -4, 16, 21, walls)
    pen.line((-21, -4), (21, -4), 2.5, ink)
    for x in (0,) if scene.windows == "one window" else (-8, 8):
        pen.box(x - 4.5, 3, x + 4.5, 14, ink)


_UNSEEN = frozenset(unseen_triples())

SUBJECT = Scene("robot", "green", "white", eyes="two eyes", mouth="smiling", antennas="two antennas")
"""The robot that DreamBooth has to learn; its background varies."""

SUBJECT_BACKGROUNDS = ("red", "yellow", "blue", "white")
"""Backgrounds of the subject's six images; the evaluation uses the others."""


def subject_scene(background: str, rng: random.Random) -> Scene:
    """The subject on a background, with random position, scale and shades."""
    scene = draw_scene(rng, (SUBJECT.colour, SUBJECT.shape, background))
    return replace(
        SUBJECT,
        background=background,
        centre=scene.centre,
        scale=scene.scale,
        shades=scene.shades,
    )
