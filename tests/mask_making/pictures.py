"""Images whose subject is known: the robots of the example, and photograph-like ones with light, texture, blur and
noise."""

from __future__ import annotations

import random
from dataclasses import replace

import cv2
import numpy as np

from examples.shapes.world import SUBJECT_BACKGROUNDS, render, subject_scene


def robot(number: int) -> tuple[np.ndarray, np.ndarray]:
    """The image robot_<number> of the example, and where its robot is: where black and white behind it do not show."""
    backgrounds = (*SUBJECT_BACKGROUNDS, *SUBJECT_BACKGROUNDS[:2])
    scene = subject_scene(backgrounds[number - 1], random.Random(number))
    shades = scene.shades[0], (0, 0, 0)
    black, white = (render(replace(scene, background=name, shades=shades)).astype(int) for name in ("black", "white"))
    return render(scene), np.abs(white - black).max(axis=2) < 110  # the two backgrounds are 220 apart


def photograph(seed: int, height: int = 120, width: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and where its subject is: a shaded, mottled blob before a mottled gradient, with a soft edge
    and noise. The two have colours that differ by 70 or more on average."""
    rng = np.random.default_rng(seed)

    def mottled(grain: float, strength: float) -> np.ndarray:
        noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)).astype(np.float32), (0, 0), grain)
        return noise / noise.std() * strength

    y, x = np.mgrid[:height, :width].astype(np.float32)
    first, second, third = rng.uniform(40, 215, (3, 3))
    behind = first + (second - first) * (x / width)[..., None] + 0.4 * (third - first) * (y / height)[..., None]
    behind = behind + mottled(12, 14) + mottled(2, 8)
    colour = rng.uniform(30, 225, 3)
    while np.abs(colour - behind.reshape(-1, 3).mean(axis=0)).max() < 70:
        colour = rng.uniform(30, 225, 3)
    subject = colour + mottled(9, 16) + ((x - y) / width * 40)[..., None]
    middle_x, middle_y, turn = width * rng.uniform(0.42, 0.58), height * rng.uniform(0.42, 0.58), rng.uniform(0, 3)
    across = (x - middle_x) * np.cos(turn) + (y - middle_y) * np.sin(turn)
    down = (y - middle_y) * np.cos(turn) - (x - middle_x) * np.sin(turn)
    truth = (across / (0.24 * width)) ** 2 + (down / (0.16 * width)) ** 2 < 1
    truth |= (x - middle_x - 0.12 * width) ** 2 + (y - middle_y) ** 2 < (0.11 * width) ** 2
    cover = cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 1.2)[..., None]
    image = behind * (1 - cover) + subject * cover + rng.normal(size=behind.shape) * 6
    return np.clip(image, 0, 255).astype(np.uint8), truth


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two areas."""
    return float((one & other).sum() / (one | other).sum())
