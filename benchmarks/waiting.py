"""Measure the share of training time spent waiting for batches.

    python benchmarks/waiting.py [--steps 120]

The model of examples/shapes trains on its own images, whose smallness makes a step short (a fifth of a second on two
processor cores) and waiting show. Latents in memory, latents on disk, and images decoded and encoded on the way with
0, 1, 2 and 4 workers. A run is a process of its own; the clock starts with the second batch, when workers have started.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402

WAYS = {
    "latents in memory": ("--cache_latents",),
    "latents on disk": ("--cache_latents", "--cache_latents_to_disk"),
    **{
        f"images, {count} workers": ("--cache_latents=false", "--max_data_loader_n_workers", str(count))
        for count in (0, 1, 2, 4)
    },
}


def measure(flags: list[str]) -> dict[str, float]:
    """Train in this process: seconds from the second batch to the last, and those spent waiting for one."""
    from library.data.dataset import BatchLoader

    waited, started = 0.0, 0.0
    inner = BatchLoader.batches

    def timed(self: BatchLoader, requests: Iterable[object]) -> Iterator[object]:
        nonlocal waited, started
        batches = inner(self, requests)  # type: ignore[arg-type]
        yield next(batches)
        started = time.perf_counter()
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    BatchLoader.batches = timed  # type: ignore[method-assign, assignment]
    sys.argv = ["train_db.py", *flags]
    with suppress(SystemExit):
        runpy.run_path(str(ROOT / "train_db.py"), run_name="__main__")
    if not started:
        raise SystemExit("the run failed")
    return {"seconds": time.perf_counter() - started, "waited": waited}


def run(flags: list[str]) -> dict[str, float]:
    """measure() in a fresh interpreter."""
    command = [sys.executable, __file__, "--measure", *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Command line."""
    if "--measure" in sys.argv:
        print(json.dumps(measure(sys.argv[sys.argv.index("--measure") + 1 :])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    print("\n".join([describe(), "", "| | seconds | waiting |", "|---|---|---|"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config_file", str(ROOT / "examples" / "shapes" / "dreambooth.toml"), "--reg_data_dir", ""]
        images = Path(folder) / "train"
        shutil.copytree(ROOT / "examples" / "shapes" / "train", images)
        flags += [
            "--train_data_dir",
            str(images),
            "--output_dir",
            folder,
            "--max_train_steps",
            str(steps),
            "--lr_warmup_steps",
            "0",
        ]
        for name, own in WAYS.items():
            found = run([*flags, *own])
            share = found["waited"] / found["seconds"]
            print(f"| {name} | {found['seconds']:.1f} | {share:.2%} |", flush=True)


if __name__ == "__main__":
    main()
