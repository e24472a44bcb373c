"""Peak memory and seconds per step of the ways to update weights, on the CPU.

    python benchmarks/update.py [--file model.safetensors] [--steps 3] [--only fused ...] [-- more flags]

Full-size SD1.5 with random weights, U-Net and text encoder, fp32, AdamW, 256 px, batch 1, latents in the cache:
`train_db.py` as a process of its own for each way, one after the other. `whole` needs 17 GB of memory, the fused ones
13 GB, those in bf16 less. Without --file a checkpoint with random weights is created (2.1 GB of disk).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.full_size import make_file  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.pairs import Command, Run, watch  # noqa: E402
from benchmarks.startup import FLAGS, make_images  # noqa: E402

BF16 = ("--mixed_precision", "bf16", "--full_bf16")
UNCLIPPED = ("--max_grad_norm", "0")
WAYS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "fused": ("--fused_backward_pass",),
    "whole-unclipped": UNCLIPPED,
    "fused-unclipped": ("--fused_backward_pass", *UNCLIPPED),
    "groups-unclipped": ("--fused_optimizer_groups", "8", *UNCLIPPED),
    "bf16-nearest": (*BF16, "--bf16_rounding", "nearest"),
    "bf16-stochastic": BF16,
    "bf16-kahan": (*BF16, "--bf16_rounding", "kahan"),
    "bf16-fused-unclipped": (*BF16, "--fused_backward_pass", *UNCLIPPED),
}
"""Flags of each way, by its name."""


def measure(model: Path, work: Path, flags: tuple[str, ...], steps: int) -> Run:
    """One run of the trainer."""
    arguments = (sys.executable, str(ROOT / "train_db.py"), *FLAGS, "--cache_latents", *flags)
    arguments += ("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(work / "train"))
    arguments += ("--output_dir", str(work / "output"))
    return watch(Command(arguments, re.compile(r"steps: .*?\| (\d+)/\d+ ")), steps)


def row(name: str, run: Run, base: Run) -> str:
    """A row of the table: peak and seconds per step, and both as ratios to those of `base`."""
    return (
        f"| {name} | {run.peak / 2**20:.0f} | {run.peak / base.peak:.2f} "
        f"| {run.typical:.2f} | {run.typical / base.typical:.2f} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="an SD1.x file in the original layout; default: one is made")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run, 3 or more")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), help="the first is the base")
    parser.add_argument("more", nargs="*", help="flags for all runs, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_images(work / "train" / "100_sks dog", 4)
        model = options.file or make_file(work / "sd15.safetensors")
        print(describe())
        print("| | peak, MiB | ratio | seconds per step | ratio |\n|---|---|---|---|---|")
        base: Run | None = None
        for name in options.only:
            run = measure(model, work, (*WAYS[name], *options.more), options.steps)
            base = base or run
            print(row(name, run, base), flush=True)


if __name__ == "__main__":
    main()
