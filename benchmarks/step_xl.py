"""Measure seconds per step and peak memory of a LoRA on full-size Stable Diffusion XL on the CPU, within 24 GB.

    python benchmarks/step_xl.py --file base.safetensors [--rank 8] [--size 256] [--pairs 1] [--steps 4] [-- more flags]

`train_network.py` itself, U-Net only: the frozen weights in half precision and the arithmetic in fp32, AdamW, batch 1,
latents and captions in the cache, which is filled in the same run. With and without gradient checkpointing in turn, as
separate processes that are watched from outside (benchmarks/pairs.py). Seconds a step are the median of a run's steps
from the third on. First come seconds and peak memory of `--dry_run`. The file is one of benchmarks/full_size_xl.py, or
any other of this family; without --file one is made (6.9 GB of disk).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.full_size_xl import make_file  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.pairs import Command, alternate, table  # noqa: E402
from benchmarks.startup import make_images  # noqa: E402

FLAGS = (
    *("--network_module", "networks.lora", "--network_train_unet_only", "--base_precision", "fp16"),
    *("--cache_latents", "--cache_text_encoder_outputs", "--mixed_precision", "no", "--optimizer_type", "AdamW"),
    *("--learning_rate", "1e-4", "--train_batch_size", "1", "--max_train_steps", "100", "--seed", "1"),
)


def flags_of(model: Path, work: Path, rank: int, size: int, more: Sequence[str]) -> list[str]:
    """The trainer's flags on a few images, which are made."""
    make_images(work / "train" / "100_sks dog", 4)
    flags = [*FLAGS, "--network_dim", str(rank), "--resolution", str(size)]
    flags += ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(work / "train")]
    return [*flags, "--output_dir", str(work / "output"), *more]


def dry_run(flags: Sequence[str]) -> str:
    """Seconds and peak memory of the plan alone. RuntimeError if there is none."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "train_network.py"), *flags, "--dry_run"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    if not hasattr(os, "wait4"):
        return f"{time.perf_counter() - started:.2f} s" if process.wait() == 0 else "failed"
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return f"{time.perf_counter() - started:.2f} s, peak {used.ru_maxrss / 2**10:.0f} MiB"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a file of Stable Diffusion XL; default: one is made")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="steps of each run, 3 or more")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--only", choices=("kept", "checkpointing"), help="one of the two alone")
    parser.add_argument("more", nargs="*", help="flags for the trainer, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.file or Path(folder) / "sdxl.safetensors"
        if options.file is None:
            make_file(model, "sdxl")
        flags = flags_of(model, Path(folder), options.rank, options.size, options.more)
        print(describe())
        print(f"--dry_run: {dry_run(flags)}", flush=True)
        trainer = (sys.executable, str(ROOT / "train_network.py"), *flags)
        finished = re.compile(r"steps: .*?\| (\d+)/\d+ ")
        commands = {
            "kept": Command(trainer, finished),
            "checkpointing": Command((*trainer, "--gradient_checkpointing"), finished),
        }
        if options.only:
            commands = {options.only: commands[options.only]}
        runs = alternate(commands, options.pairs, options.steps)
        if len(runs) > 1:
            print(table(runs))


if __name__ == "__main__":
    main()
