"""The judge: a small network that classifies the attributes of an image of the example world.

It is trained on rendered images with a little blur, tint and noise, so that it also works on a model's images.

    python -m examples.shapes.judge train examples/shapes/judge.safetensors
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from examples.shapes.autoencoder import to_pixels
from examples.shapes.world import ATTRIBUTES, OF_HOUSES, OF_ROBOTS, Pixels, Scene, draw_scene, render

FILE = Path(__file__).resolve().parent / "judge.safetensors"
Reading = Mapping[str, str | None]
"""The attributes of an image; None if its shape does not have the attribute."""


class Judge(nn.Module):
    """Pixels (B, 3, 64, 64) in [-1, 1] to the logits of every attribute, {name: (B, values)}."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, width, 2 * width, 2 * width, 3 * width)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1] * 4, len(of)) for name, of in ATTRIBUTES.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.features(pixels)
        return {name: head(features) for name, head in self.heads.items()}


@torch.no_grad()
def read(judge: Judge, images: Sequence[Pixels]) -> list[Reading]:
    """The attributes of each image."""
    readings: list[Reading] = []
    for start in range(0, len(images), 64):
        logits = judge(to_pixels(images[start : start + 64]))
        chosen = {name: values.argmax(1).tolist() for name, values in logits.items()}
        for row in range(len(chosen["shape"])):
            readings.append(_meaningful({name: ATTRIBUTES[name][rows[row]] for name, rows in chosen.items()}))
    return readings


def _meaningful(reading: dict[str, str]) -> Reading:
    only = {"robot": OF_ROBOTS, "house": OF_HOUSES}.get(reading["shape"], ())
    return {
        name: value if name in ("shape", "colour", "background", *only) else None for name, value in reading.items()
    }


def truth(scene: Scene) -> Reading:
    """The attributes of a scene, in the form of `read`."""
    return {name: getattr(scene, name) for name in ATTRIBUTES}


def load(path: Path = FILE) -> Judge:
    """The judge of a file, in evaluation mode."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


def share_right(judge: Judge, count: int, seed: int) -> float:
    """The share of `count` random images whose attributes are all classified correctly."""
    rng = random.Random(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    readings = read(judge, [render(scene) for scene in scenes])
    return sum(reading == truth(scene) for reading, scene in zip(readings, scenes, strict=True)) / count


def train(steps: int = 1500, batch: int = 64, seed: int = 0) -> Judge:
    """Train a judge for `steps` steps of AdamW on random images."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    start = time.perf_counter()
    for step in range(steps):
        scenes = [draw_scene(rng) for _ in range(batch)]
        logits = judge(_degrade(to_pixels([render(scene) for scene in scenes])))
        loss = torch.stack([_loss(name, logits[name], scenes) for name in ATTRIBUTES]).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"judge {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    return judge.eval()


def _loss(name: str, logits: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Cross-entropy over the scenes that have the attribute."""
    values = [getattr(scene, name) for scene in scenes]
    rows = [row for row, value in enumerate(values) if value is not None]
    if not rows:
        return logits.sum() * 0
    wanted = torch.tensor([list(ATTRIBUTES[name]).index(values[row]) for row in rows])
    return cross_entropy(logits[rows], wanted)


def _degrade(pixels: Tensor) -> Tensor:
    """Pixels with noise, a slight tint, and half of them blurred."""
    blurred = avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand(len(pixels), 1, 1, 1) * (torch.rand(len(pixels), 1, 1, 1) < 0.5)
    tint = torch.randn(len(pixels), 3, 1, 1) * 0.03
    noise = torch.randn_like(pixels) * torch.rand(len(pixels), 1, 1, 1) * 0.1
    return pixels + amount * (blurred - pixels) + tint + noise


def main() -> None:
    """Train a judge, print its accuracy on random images, and write it."""
    parser = argparse.ArgumentParser(description="Train the judge of the world of shapes.")
    parser.add_argument("command", choices=["train"])
    parser.add_argument("path", type=Path, help="the .safetensors file to write")
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    judge = train(options.steps)
    print(f"all attributes correct: {share_right(judge, 4000, seed=1):.2%} of 4000 random images")
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, options.path)


if __name__ == "__main__":
    main()
