"""Evaluate the base model, and DreamBooth with and without class images.

    python -m examples.shapes.evaluate base examples/shapes/shapes.safetensors
    python -m examples.shapes.evaluate dreambooth --seeds 1 2 3

`base`: the share of 300 images that match their prompt according to the judge, for triples of colour, shape and
background that pretraining never saw together.

`dreambooth`: trains the subject with and without class images for every seed, and prints, followed by the worst values:

- subject: the share of 60 images of "sks robot", on backgrounds that are not in its six images, in which every
  attribute is the subject's and the background matches the prompt;
- preservation: for 200 images of "a robot", the change of the distributions of their attributes from the base model's,
  as total variation (half the sum of the absolute differences of the shares; 0 = the same, 1 = nothing in common), the
  mean over the attributes. Both models use the same seeds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from examples.shapes import judge as judges
from examples.shapes.draw_subject import NAME
from examples.shapes.images import draw, open_model
from examples.shapes.judge import Judge, Reading
from examples.shapes.world import COLOURS, OF_ROBOTS, SUBJECT, SUBJECT_BACKGROUNDS, Pixels, article, unseen_triples
from library.families.family import Model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BASE = HERE / "shapes.safetensors"
CONFIG = HERE / "dreambooth.toml"
OUTPUT = ROOT / "output" / "shapes" / "evaluation"

OF_ALL = ("shape", "colour", "background")
NEW_BACKGROUNDS = tuple(name for name in COLOURS if name not in (*SUBJECT_BACKGROUNDS, SUBJECT.colour))
SUBJECT_ON = tuple(background for background in NEW_BACKGROUNDS for _ in range(20))
CLASS_PROMPT, CLASS_IMAGES = "a robot", 200


def prompt_accuracy(model: Model, judge: Judge, images: int = 4) -> float:
    """The share of images, `images` for every unseen triple, whose colour, shape and background match the prompt."""
    triples = [triple for triple in unseen_triples() for _ in range(images)]
    prompts = [
        f"{article(colour)} {shape} on {article(background)} background" for colour, shape, background in triples
    ]
    readings = judges.read(judge, draw(model, prompts, range(len(prompts))))
    results = [(reading["colour"], reading["shape"], reading["background"]) for reading in readings]
    return sum(result == triple for result, triple in zip(results, triples, strict=True)) / len(triples)


def subject_images(model: Model) -> list[Pixels]:
    """Images of the subject on the new backgrounds."""
    prompts = [f"{NAME} on {article(background)} background" for background in SUBJECT_ON]
    return draw(model, prompts, range(1000, 1000 + len(prompts)))


def subject_share(judge: Judge, images: Sequence[Pixels]) -> float:
    """The share of `subject_images` that show the subject, on the background of their prompt."""
    return sum(map(_is_subject, judges.read(judge, images), SUBJECT_ON)) / len(SUBJECT_ON)


def _is_subject(reading: Reading, background: str) -> bool:
    own = all(reading[name] == getattr(SUBJECT, name) for name in ("shape", "colour", *OF_ROBOTS))
    return own and reading["background"] == background


def class_images(model: Model) -> list[Pixels]:
    """200 images of the class."""
    return draw(model, [CLASS_PROMPT] * CLASS_IMAGES, range(5000, 5000 + CLASS_IMAGES))


def class_readings(model: Model, judge: Judge) -> Sequence[Reading]:
    """The judge's readings of the class images."""
    return judges.read(judge, class_images(model))


def total_variation(before: Sequence[Reading], after: Sequence[Reading]) -> Mapping[str, float]:
    """The change of each attribute's distribution, in [0, 1]. Other shapes than robots count as having no eyes, …"""
    moved = {}
    for name in (*OF_ALL, *OF_ROBOTS):
        one, other = (Counter(reading[name] for reading in readings) for readings in (before, after))
        moved[name] = (
            sum(abs(one[value] / len(before) - other[value] / len(after)) for value in one.keys() | other.keys()) / 2
        )
    return moved


@dataclass(frozen=True)
class Outcome:
    """The result of a training."""

    subject: float
    moved: Mapping[str, float]

    @property
    def preservation(self) -> float:
        """The mean of the attributes' total variations."""
        return sum(self.moved.values()) / len(self.moved)


def train(seed: int, *, with_class_images: bool, threads: int, more: Sequence[str]) -> Path:
    """Run the trainer from the command line with this number of threads, and return the model file."""
    name = f"seed{seed}_{'with' if with_class_images else 'without'}"
    command = [sys.executable, "train_db.py", "--config_file", str(CONFIG), "--seed", str(seed)]
    command += ["--output_dir", str(OUTPUT), "--output_name", name, *more]
    command += [] if with_class_images else ["--reg_data_dir", ""]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        raise SystemExit(f"{name} was not trained:\n{done.stderr}")
    return OUTPUT / f"{name}.safetensors"


def compare(seeds: Sequence[int], jobs: int, more: Sequence[str]) -> None:
    """Train and judge both arms for every seed and print the figures."""
    judge = judges.load()
    base = open_model(BASE)
    before = class_readings(base, judge)
    print(f"base              subject {subject_share(judge, subject_images(base)):6.1%}", flush=True)
    arms = [(seed, arm) for seed in seeds for arm in (True, False)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        trained = list(pool.map(lambda arm: train(arm[0], with_class_images=arm[1], threads=threads, more=more), arms))
    outcomes: dict[bool, list[Outcome]] = {True: [], False: []}
    for (seed, arm), path in zip(arms, trained, strict=True):
        model = open_model(path)
        moved = total_variation(before, class_readings(model, judge))
        outcome = Outcome(subject_share(judge, subject_images(model)), moved)
        outcomes[arm].append(outcome)
        details = "  ".join(f"{name} {value:.2f}" for name, value in moved.items())
        print(
            f"seed {seed} {'with' if arm else 'without':7} subject {outcome.subject:6.1%}"
            f"  total variation {outcome.preservation:.3f}  ({details})",
            flush=True,
        )
    ratios = [one.preservation / other.preservation for one, other in zip(outcomes[True], outcomes[False], strict=True)]
    print(f"worst subject: with {min(one.subject for one in outcomes[True]):.1%}, ", end="")
    print(f"without {min(one.subject for one in outcomes[False]):.1%}")
    print(f"worst preservation: {max(ratios):.2f} of the total variation without class images")


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="how well a model follows prompts")
    base.add_argument("path", type=Path, nargs="?", default=BASE)
    dreambooth = commands.add_parser("dreambooth", help="train the subject and evaluate the result")
    dreambooth.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    dreambooth.add_argument("--jobs", type=int, default=1, help="number of parallel trainings")
    options, more = parser.parse_known_args()
    if options.command == "base":
        share = prompt_accuracy(open_model(options.path), judges.load())
        print(f"{share:.1%} of 300 images of unseen triples match colour, shape and background of the prompt")
    else:
        compare(options.seeds, options.jobs, more)


if __name__ == "__main__":
    main()
