"""Draws the pictures of `train/`: one little robot in six places. They ship, so nobody has to run this.

    python examples/first_run/draw_pictures.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).resolve().parent / "train" / "10_sks robot"
FINER = 4  # drawn so much larger and then reduced, for smooth edges

TEAL, DARK, AMBER, CREAM = (38, 148, 150), (28, 52, 66), (250, 176, 44), (246, 240, 222)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One picture: size in pixels, what is behind, where the robot stands (centre and scale) and what its arms do."""

    name: str
    size: tuple[int, int]
    sky: Colour
    ground: Colour
    horizon: float
    centre: tuple[float, float]
    scale: float
    left_arm: float = 12.0  # how far the hand is below the shoulder; less than 0 is above it
    right_arm: float = 12.0
    caption: str | None = None


SCENES = (
    Scene("robot_front", (128, 128), (196, 222, 236), (150, 186, 120), 0.78, (64, 66), 1.0),
    Scene("robot_desk", (128, 128), (236, 222, 200), (146, 104, 74), 0.70, (58, 62), 0.8),
    Scene("robot_night", (128, 128), (30, 34, 66), (54, 50, 80), 0.80, (70, 68), 0.9, right_arm=2.0),
    Scene(
        "robot_waving", (128, 128), (250, 206, 178), (208, 150, 110), 0.82, (64, 70), 0.95, right_arm=-18.0,
        caption="sks robot waving, orange evening sky",
    ),
    Scene(
        "robot_meadow", (160, 96), (160, 208, 246), (110, 170, 92), 0.72, (52, 50), 0.7, left_arm=-14.0,
        right_arm=-14.0, caption="sks robot with both arms raised, standing in a wide green meadow",
    ),
    Scene("robot_wall", (96, 160), (206, 200, 214), (120, 116, 130), 0.86, (48, 88), 1.05),
)  # fmt: skip


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB."""
    width, height = (side * FINER for side in scene.size)
    picture = Image.new("RGB", (width, height), scene.sky)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, scene.horizon * height, width, height), fill=scene.ground)
    robot(pen, scene)
    return picture.resize(scene.size, Image.Resampling.LANCZOS)


def robot(pen: ImageDraw.ImageDraw, scene: Scene) -> None:
    """The subject: teal boxes for head and body, round amber eyes, an antenna with a ball, a cream chest plate."""
    x, y = scene.centre

    def place(*numbers: float) -> list[float]:
        """Coordinates of the robot (pixels about its middle) in the picture."""
        return [(numbers[i] * scene.scale + (x, y)[i % 2]) * FINER for i in range(len(numbers))]

    thick = round(5 * scene.scale * FINER)
    for side, reach in ((-1, scene.left_arm), (1, scene.right_arm)):
        pen.line(place(side * 16, 4, side * 29, 4 + reach), fill=DARK, width=thick)
        pen.ellipse(place(side * 29 - 4, reach, side * 29 + 4, 8 + reach), fill=AMBER)
        pen.line(place(side * 8, 20, side * 8, 36), fill=DARK, width=thick)
        pen.rounded_rectangle(place(side * 8 - 7, 34, side * 8 + 7, 40), radius=thick // 2, fill=DARK)
    pen.line(place(0, -30, 0, -42), fill=DARK, width=thick // 2)
    pen.ellipse(place(-4, -48, 4, -40), fill=AMBER)
    pen.rounded_rectangle(place(-18, -4, 18, 24), radius=thick, fill=TEAL, outline=DARK, width=thick // 3)
    pen.rounded_rectangle(place(-10, 2, 10, 16), radius=thick // 2, fill=CREAM)
    pen.rounded_rectangle(place(-20, -32, 20, -6), radius=thick, fill=TEAL, outline=DARK, width=thick // 3)
    for side in (-1, 1):
        pen.ellipse(place(side * 9 - 6, -26, side * 9 + 6, -14), fill=AMBER)
        pen.ellipse(place(side * 9 - 2.5, -22.5, side * 9 + 2.5, -17.5), fill=DARK)


def main() -> None:
    """Write the pictures and the captions of those that have one."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for scene in SCENES:
        draw(scene).save(FOLDER / f"{scene.name}.png", optimize=True)
        if scene.caption:
            (FOLDER / f"{scene.name}.txt").write_text(scene.caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
