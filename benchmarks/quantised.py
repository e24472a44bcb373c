"""Measure peak memory and seconds per step of a LoRA over a base model in each format.

    python benchmarks/quantised.py [--formats fp16 int8] [--steps 4] [--rank 8] [--file model.safetensors] [-- more]

Full-size SD1.5 with random weights on the CPU, U-Net and text encoder, fp32 arithmetic, AdamW, 256 px, batch 1, latents
in the cache: as benchmarks/step.py. `fp16` is `--base_precision fp16`; the other formats are those of
`--base_model_precision` and `--text_encoder_1_precision`, with `--base_precision fp16` for what is not quantised. Each
is one process, stopped after its last step. `more`: flags for the trainer. Without --file a checkpoint with random
weights is created (2.1 GB of disk).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.full_size import make_file  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.pairs import Command, watch  # noqa: E402
from benchmarks.step import commands  # noqa: E402

FORMATS = ("fp16", "int8", "fp8", "nf4", "int4")


def command(model: Path, work: Path, rank: int, name: str, more: list[str]) -> Command:
    """The trainer over a base model in this format."""
    flags = ["--base_precision", "fp16", *more]
    if name != "fp16":
        flags += ["--base_model_precision", name, "--text_encoder_1_precision", name]
    return commands(model, work, rank, bf16=False, more=flags)["trainer"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--steps", type=int, default=4, help="steps of each run, 3 or more")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--file", type=Path, help="an SD1.x file in the original layout; default: one is made")
    parser.add_argument("more", nargs="*", help="flags for the trainer, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.file or make_file(Path(folder) / "sd15.safetensors")
        print(describe())
        print("| | peak, MiB | seconds a step | first step ends after, s |\n|---|---|---|---|", flush=True)
        for name in options.formats:
            run = watch(command(model, Path(folder) / name, options.rank, name, options.more), options.steps)
            print(f"| {name} | {run.peak / 2**20:.0f} | {run.typical:.2f} | {run.first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
