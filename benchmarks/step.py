"""Compare seconds per step and peak memory of full training on the CPU with a bare PyTorch loop of the same arithmetic.

    python benchmarks/step.py [--rank 8] [--bf16] [--pairs 5] [--steps 8] [--file model.safetensors] [-- more flags]

Full-size SD1.5 with random weights, U-Net and text encoder, fp32, AdamW, 256 px, batch 1, latents in the cache:
`train_db.py` and `benchmarks/bare_loop.py` alternate as separate processes (benchmarks/pairs.py). Seconds per step are
the median from the third step on; earlier ones still allocate memory. Needs about 20 GB of memory, and on two cores a
minute per run. Without --file a checkpoint with random weights is created (2.1 GB of disk).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.full_size import make_file  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.pairs import Command, Run, alternate, table  # noqa: E402
from benchmarks.startup import FLAGS, make_images  # noqa: E402

# What a run imports, and its resident memory with nothing else in it.
IMPORTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import library.training.session, accelerate, cv2
from library.families.sd.load import import_packages
import_packages()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def commands(model: Path, work: Path, rank: int, *, bf16: bool, more: list[str]) -> dict[str, Command]:
    """The trainer on a few images, and the bare loop."""
    make_images(work / "train" / "100_sks dog", 4)
    flags = [*FLAGS, "--cache_latents", "--pretrained_model_name_or_path", str(model)]
    flags += ["--train_data_dir", str(work / "train"), "--output_dir", str(work / "output")]
    script = "train_db.py"
    if rank:
        script = "train_network.py"
        flags += ["--network_module", "networks.lora", "--network_dim", str(rank)]
    if bf16:
        flags += ["--mixed_precision", "bf16"]
    trainer = (sys.executable, str(ROOT / script), *flags, *more)
    bare = bare_loop(model, rank, *(["--bf16"] if bf16 else []))
    return {
        "trainer": Command(trainer, re.compile(r"steps: .*?\| (\d+)/\d+ ")),
        "bare loop": Command(bare, re.compile(r"^step (\d+)$", re.MULTILINE)),
    }


def bare_loop(model: Path, rank: int, *more: str) -> tuple[str, ...]:
    """The command of the bare loop."""
    return (sys.executable, str(ROOT / "benchmarks" / "bare_loop.py"), str(model), "--rank", str(rank), *more)


def floor(model: Path, rank: int) -> dict[str, int]:
    """The memory that a step needs at least, in bytes: imports, weights, gradients, optimizer state, saved tensors."""
    bare = bare_loop(model, rank, "--count")
    counted: dict[str, int] = json.loads(subprocess.run(bare, check=True, stdout=subprocess.PIPE).stdout)
    imports = subprocess.run([sys.executable, "-c", IMPORTS, str(ROOT)], check=True, stdout=subprocess.PIPE)
    return {"imports": int(imports.stdout), **counted}


def compare_memory(run: Run, needed: dict[str, int]) -> str:
    """The trainer's peak memory compared with the minimum."""
    total = sum(needed.values())
    parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in needed.items())
    return (
        f"needed: {total / 2**20:.0f} MiB ({parts}); "
        f"trainer's peak: {run.peak / 2**20:.0f} MiB, {run.peak / total - 1:+.1%}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of each run, 3 or more")
    parser.add_argument("--file", type=Path, help="an SD1.x file in the original layout; default: one is made")
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA; 0: all weights are trained")
    parser.add_argument("--bf16", action="store_true", help="both in bf16 autocast")
    parser.add_argument("more", nargs="*", help="flags for the trainer alone, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.file or make_file(Path(folder) / "sd15.safetensors")
        print(describe())
        runs = alternate(
            commands(model, Path(folder), options.rank, bf16=options.bf16, more=options.more),
            options.pairs,
            options.steps,
        )
        print(table(runs))
        print(compare_memory(max(runs["trainer"], key=lambda run: run.peak), floor(model, options.rank)))


if __name__ == "__main__":
    main()
