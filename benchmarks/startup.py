"""Measure the time of --help, and of a training run from the start of Python to the end of its first step.

    python benchmarks/startup.py [--runs 5] [--file model.safetensors] [--images 16] [--rank 8] [-- more flags]

The run is DreamBooth of full-size SD1.5 with random weights on the CPU: U-Net and text encoder, fp32, AdamW, 256 px,
batch 1. The run is killed when its progress bar shows one step. "encoding" encodes all images first (--cache_latents);
"cached" reads their latents from disk, where an earlier run wrote them (--cache_latents_to_disk). The checkpoint is in
the page cache.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.full_size import make_file  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.pairs import running, spread  # noqa: E402

FLAGS = (
    *("--resolution", "256", "--train_batch_size", "1", "--mixed_precision", "no", "--optimizer_type", "AdamW"),
    *("--learning_rate", "1e-6", "--max_train_steps", "100", "--seed", "1"),
)
WAYS = {"encoding": ("--cache_latents",), "cached": ("--cache_latents", "--cache_latents_to_disk")}
# The output that marks each milestone; the last one ends the measurement.
MILESTONES = {
    "planned": re.compile(r"the plan of this run"),
    "loaded": re.compile(r"reading images"),
    "latents": re.compile(r"latents: \d+ read"),
    "wired": re.compile(r"running training"),
    "stepped": re.compile(r"steps: .*\| 1/\d+ "),
}


def help_seconds() -> float:
    """One `--help` from start to exit."""
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "train_db.py"), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_step(flags: Sequence[str]) -> dict[str, float]:
    """Seconds from the start of Python to each milestone. RuntimeError if the run ends before its first step."""
    seconds: dict[str, float] = {}
    script = "train_network.py" if "--network_module" in flags else "train_db.py"
    with running([sys.executable, str(ROOT / script), *flags]) as (_, output):
        for now, printed in output:
            for name, sign in MILESTONES.items():
                if name not in seconds and sign.search(printed):
                    seconds[name] = now
            if "stepped" in seconds:
                return seconds
    raise AssertionError("unreachable: a run that ends raises")


def make_images(folder: Path, count: int, side: int = 512) -> None:
    """Write `count` square images, smooth with some grain, into a folder."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side))
        grain = random.normal(0, 6, (side, side, 3))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{index:02}.png")


def report(model: Path, work: Path, runs: int, images: int, more: Sequence[str]) -> None:
    """Print the times of --help and of each way of starting, with the milestones of each run."""
    print(describe())
    print(f"--help    {spread([help_seconds() for _ in range(runs)])} s", flush=True)
    with model.open("rb") as stream:
        while stream.read(1 << 24):
            pass
    make_images(work / "train" / "1_sks dog", images)
    flags = [*FLAGS, "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(work / "train")]
    flags += ["--output_dir", str(work / "output"), *more]
    for way, own in WAYS.items():
        if "--cache_latents_to_disk" in own:
            first_step([*flags, *own])
        timed = []
        for _ in range(runs):
            timed.append(first_step([*flags, *own]))
            print("  " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in timed[-1].items()), flush=True)
        print(f"{way:9} {spread([run['stepped'] for run in timed])} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--file", type=Path, help="an SD1.x file in the original layout; default: one is made")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA; 0: all weights are trained")
    parser.add_argument("more", nargs="*", help="flags for the trainer, after --")
    options = parser.parse_args()
    if options.rank:
        options.more += ["--network_module", "networks.lora", "--network_dim", str(options.rank)]
    with tempfile.TemporaryDirectory() as folder:
        model = options.file or make_file(Path(folder) / "sd15.safetensors")
        report(model, Path(folder), options.runs, options.images, options.more)


if __name__ == "__main__":
    main()
