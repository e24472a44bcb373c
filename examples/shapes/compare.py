"""Train the same subject in several ways and compare: quality, preservation and cost.

    python -m examples.shapes.compare [adapters|rollout] [--seeds 1 2 3] [--only LoRA DoRA] [--draw sheet.png]
    python -m examples.shapes.compare --only LoRA --add "rank 4: lora --network_dim 4"

Each way is trained in a process of its own, one after the other, with class images and the settings of dreambooth.toml
or lora.toml. Prints a line for every way and seed, then the worst of each way over its seeds:

- subject and moved: see examples/shapes/evaluate.py;
- broken: the share of the images of both in which the judge is less than 90 % certain of shape, colour or background;
- seconds: the whole process; peak: resident memory, sampled ten times a second.

Results and files are kept in output/shapes/evaluation, so an interrupted comparison goes on; --again trains anew. The
sheet has a row of images for each way, with the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from examples.shapes import judge as judges
from examples.shapes.autoencoder import to_pixels
from examples.shapes.evaluate import (
    BASE,
    HERE,
    OUTPUT,
    ROOT,
    class_images,
    class_readings,
    subject_images,
    subject_share,
    total_variation,
)
from examples.shapes.images import open_model
from examples.shapes.judge import Judge, Reading
from examples.shapes.sheet import draw_sheet, draw_ways
from examples.shapes.world import Pixels
from library.families.family import Model
from library.whole_files import write_text
from networks import adapter_files, network

RECIPES: Mapping[str, tuple[str, ...]] = {
    "dreambooth": ("train_db.py", "--config_file", str(HERE / "dreambooth.toml")),
    "lora": ("train_network.py", "--config_file", str(HERE / "lora.toml")),
}
# six images and nothing else; one or two of the 20 steps in which images are drawn, for all samples from the middle on
FEW = "lora --reg_data_dir= --max_train_steps 200"
ROLLED = (
    f"{FEW} --scheduled_sampling_stride inference --scheduled_sampling_inference_steps 20 "
    "--scheduled_sampling_max_step_offset 2 --scheduled_sampling_probability 1 --scheduled_sampling_ramp_steps 100"
)
PRESERVED: Mapping[str, str] = {
    "none": "lora --reg_data_dir=",
    "reg_images": "lora",
    "base_prediction": "lora --preservation base_prediction",
    "class_prompt": "lora --reg_data_dir= --preservation class_prompt",
    "blank_prompt": "lora --reg_data_dir= --preservation blank_prompt",
    "base_prediction and class_prompt": "lora --preservation base_prediction class_prompt",
}
TABLES: Mapping[str, Mapping[str, str]] = {
    "adapters": {
        "DreamBooth": "dreambooth",
        "LoRA": "lora",
        "DoRA": "lora --network_args use_dora=True",
        "LoKr": "lora --network_module networks.lokr --network_args factor=4",
    },
    "preservation": PRESERVED,
    "preservation of all weights": {
        **{name: way.replace("lora", "dreambooth", 1) for name, way in PRESERVED.items()},
        "base_prediction=2 and class_prompt": "dreambooth --preservation base_prediction=2 class_prompt",
    },
    "quantised": {
        "float32": "lora",
        **{name: f"lora --base_model_precision {name}" for name in ("int8", "int4", "nf4", "fp8")},
    },
    "rollout": {
        "no rollout": FEW,
        "rollout": ROLLED,
        "rollout, original target": f"{ROLLED} --scheduled_sampling_target original",
    },
}
"""By table and name: a recipe and further flags."""

CERTAIN = 0.9
LONGEST_NAME = 100


@dataclass(frozen=True)
class Cost:
    """The cost of a training: seconds, peak memory in bytes, and the file that it wrote."""

    seconds: float
    peak: int
    file: Path


@dataclass(frozen=True)
class Result:
    """What came of a training: shares from 0 to 1, seconds, bytes."""

    subject: float
    moved: float
    broken: float
    seconds: float
    size: int
    peak: int

    def __str__(self) -> str:
        return (
            f"{self.subject:.1%} | {self.moved:.3f} | {self.broken:.1%} | {self.seconds:.0f} | {self.size / 1e6:.1f} | "
            f"{self.peak / 1e6:.0f}"
        )


def command_of(way: str) -> list[str]:
    """The command line of a way: the recipe's, and the flags after it."""
    recipe, *flags = shlex.split(way)
    return [*RECIPES[recipe], *flags]


def name_of(way: str, seed: int) -> str:
    """The name of a way's files, short enough for every file system."""
    name = "-".join(re.findall(r"[\w.]+", way))
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(way.encode('utf-8')).hexdigest()[:8]}"
    return f"{name}-seed{seed}"


def train(way: str, seed: int) -> Cost:
    """Run a training from the command line."""
    name = name_of(way, seed)
    words = ["--seed", str(seed), "--output_dir", str(OUTPUT), "--output_name", name]
    log = OUTPUT / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started, peak = time.perf_counter(), 0
    with log.open("w", encoding="utf-8") as stream:
        command = [sys.executable, *command_of(way), *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        memory = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, memory.memory_info().rss)
            except psutil.Error:  # it has just ended
                break
            time.sleep(0.1)
        status = process.wait()
    if status != 0:
        raise SystemExit(f"{way}: the training failed, see {log}")
    return Cost(time.perf_counter() - started, peak, OUTPUT / f"{name}.safetensors")


def trained_model(way: str, file: Path) -> Model:
    """The trained model; for an adapter the base model with the adapter merged in."""
    if way.startswith("dreambooth"):
        return open_model(file)
    model = open_model(BASE)
    network.from_tensors(model.modules(), model.family.adapters, adapter_files.read(file).tensors).merge()
    return model


def evaluate(model: Model, before: Sequence[Reading], judge: Judge, cost: Cost) -> Result:
    """How well the subject is learned, how much other robots changed, and how many images are broken."""
    of_class, of_subject = class_images(model), subject_images(model)
    moved = total_variation(before, judges.read(judge, of_class))
    return Result(
        subject=subject_share(judge, of_subject),
        moved=sum(moved.values()) / len(moved),
        broken=broken_share(judge, [*of_class, *of_subject]),
        seconds=cost.seconds,
        size=cost.file.stat().st_size,
        peak=cost.peak,
    )


@torch.no_grad()
def broken_share(judge: Judge, images: Sequence[Pixels]) -> float:
    """The share of images in which the judge is not certain of shape, colour or background."""
    logits = judge(to_pixels(images))
    least = torch.stack([logits[name].softmax(1).amax(1) for name in ("shape", "colour", "background")]).amin(0)
    return float((least < CERTAIN).float().mean())


def compare(ways: Mapping[str, str], seeds: Sequence[int], *, again: bool) -> Iterator[tuple[str, int, Result, Path]]:
    """Train and evaluate each way with each seed, unless its result is kept from before. Yields name, seed, result, and
    the trained file."""
    store = OUTPUT / "compare.json"
    kept: dict[str, dict[str, float]] = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    judge = judges.load()
    before: Sequence[Reading] | None = None
    for seed in seeds:
        for name, way in ways.items():
            key = f"{way} --seed {seed}"
            file = OUTPUT / f"{name_of(way, seed)}.safetensors"
            if again or key not in kept or not file.exists():
                before = class_readings(open_model(BASE), judge) if before is None else before
                cost = train(way, seed)
                kept[key] = asdict(evaluate(trained_model(way, cost.file), before, judge, cost))
                write_text(store, json.dumps(kept, indent=1))
            yield name, seed, Result(**kept[key]), file  # type: ignore[arg-type]


def chosen_ways(table: str, only: Sequence[str] | None, added: Sequence[str]) -> dict[str, str]:
    """The ways of a table that are named, or all of them, and those added as "name: recipe flags"."""
    ways = {name: way for name, way in TABLES[table].items() if only is None or name in only}
    for text in added:
        name, _, way = text.partition(":")
        ways[name.strip()] = way.strip()
    return ways


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=list(TABLES), default="adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="*", help="names of the table")
    parser.add_argument("--add", action="append", default=[], help='another way, as "name: recipe flags"')
    parser.add_argument("--again", action="store_true", help="train what has a result, too")
    parser.add_argument("--draw", type=Path, help="write a sheet of images before and after the LoRA to this file")
    parser.add_argument("--sheet", type=Path, help="write a sheet of all ways, with the first seed, to this file")
    options = parser.parse_args()
    ways = chosen_ways(options.table, options.only, options.add)
    unknown = set(options.only or ()) - set(ways)
    if unknown:
        parser.error(
            f"--only {' '.join(sorted(unknown))}: the table {options.table} has {', '.join(TABLES[options.table])}"
        )
    if options.draw is not None and "LoRA" not in ways:
        parser.error("--draw is for the way LoRA of the table adapters; --sheet draws all ways")
    head = "| | Seed | Subject | Moved | Broken | Seconds | File, MB | Peak memory, MB |"
    print(f"{head}\n|---|---|---|---|---|---|---|---|", flush=True)
    results: dict[str, list[Result]] = {name: [] for name in ways}
    models: dict[str, Callable[[], Model]] = {"before": partial(open_model, BASE)}
    for name, seed, result, file in compare(ways, options.seeds, again=options.again):
        results[name].append(result)
        print(f"| {name} | {seed} | {result} |", flush=True)
        models.setdefault(name, partial(trained_model, ways[name], file))
    if options.draw is not None:
        draw_sheet(models["before"](), models["LoRA"](), options.draw)
    if options.sheet is not None:
        draw_ways(models, options.sheet)
    for name, own in results.items() if len(options.seeds) > 1 else ():
        print(f"| {name} | worst | {worst(own)} |")


def worst(results: Sequence[Result]) -> Result:
    """The worst value of each column."""
    rows = [asdict(result) for result in results]
    return Result(**{name: (min if name == "subject" else max)(row[name] for row in rows) for name in rows[0]})


if __name__ == "__main__":
    main()
