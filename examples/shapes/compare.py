"""Compare DreamBooth, LoRA, LoKr and DoRA on the same subject: quality, preservation and cost.

    python -m examples.shapes.compare [--seed 1] [--only LoRA DoRA] [--draw sheet.png]

Each is trained in a process of its own, one after the other, with class images and the settings of dreambooth.toml or
lora.toml. Prints a table:

- subject and moved: see examples/shapes/evaluate.py;
- seconds: the whole process; peak: resident memory, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from examples.shapes import judge as judges
from examples.shapes.evaluate import BASE, HERE, OUTPUT, ROOT, Outcome, class_readings, subject_share, total_variation
from examples.shapes.images import open_model
from examples.shapes.judge import Judge, Reading
from examples.shapes.sheet import draw_sheet
from library.families.family import Model
from networks import adapter_files, network

DREAMBOOTH = ("train_db.py", "--config_file", str(HERE / "dreambooth.toml"))
LORA = ("train_network.py", "--config_file", str(HERE / "lora.toml"))
METHODS: Mapping[str, tuple[str, ...]] = {
    "DreamBooth": DREAMBOOTH,
    "LoRA": LORA,
    "DoRA": (*LORA, "--network_args", "use_dora=True"),
    "LoKr": (*LORA, "--network_module", "networks.lokr", "--network_args", "factor=4"),
}


@dataclass(frozen=True)
class Cost:
    """The cost of a training: seconds, peak memory in bytes, and the file that it wrote."""

    seconds: float
    peak: int
    file: Path


def train(name: str, seed: int) -> Cost:
    """Run a training from the command line."""
    command = [sys.executable, *METHODS[name], "--seed", str(seed), "--output_dir", str(OUTPUT), "--output_name", name]
    log = OUTPUT / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started, peak = time.perf_counter(), 0
    with log.open("w", encoding="utf-8") as stream:
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
        raise SystemExit(f"{name}: the training failed, see {log}")
    return Cost(time.perf_counter() - started, peak, OUTPUT / f"{name}.safetensors")


def trained_model(name: str, cost: Cost) -> Model:
    """The trained model; for an adapter the base model with the adapter merged in."""
    if name == "DreamBooth":
        return open_model(cost.file)
    model = open_model(BASE)
    network.from_tensors(model.modules(), model.family.adapters, adapter_files.read(cost.file).tensors).merge()
    return model


def evaluate(model: Model, before: Sequence[Reading], judge: Judge) -> Outcome:
    """How well the subject is learned, and how much other robots changed."""
    return Outcome(subject_share(model, judge), total_variation(before, class_readings(model, judge)))


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--draw", type=Path, help="write a sheet of images of the LoRA to this file")
    options = parser.parse_args()
    judge = judges.load()
    before = class_readings(open_model(BASE), judge)
    print("| | Subject | Moved | Seconds | File, MB | Peak memory, MB |\n|---|---|---|---|---|---|", flush=True)
    for name in options.only:
        cost = train(name, options.seed)
        model = trained_model(name, cost)
        outcome = evaluate(model, before, judge)
        size = cost.file.stat().st_size
        print(
            f"| {name} | {outcome.subject:.1%} | {outcome.preservation:.3f} | {cost.seconds:.0f} | {size / 1e6:.1f} | "
            f"{cost.peak / 1e6:.0f} |",
            flush=True,
        )
        if name == "LoRA" and options.draw is not None:
            draw_sheet(open_model(BASE), model, options.draw)


if __name__ == "__main__":
    main()
