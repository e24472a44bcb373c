"""How long a picture takes on its way into the latent cache, beside a bare PyTorch loop over the same VAE.

    python benchmarks/latents.py [--pairs 5] [--pictures 12] [--file model.safetensors]

Full-size SD1.5 with random weights on the CPU at 256 px, one picture at a time. The trainer is `train_db.py
--cache_latents` with pictures of 512 px, which it decodes and scales, in fp32 and with --mixed_precision bf16. The bare
loop (--bare) only calls the VAE's encoder, on pixels that are already there, laid out as the convolutions like it best,
with freed memory kept. Both are processes of their own, in turn, watched from outside (benchmarks/pairs.py); seconds a
picture are the median of a process from the third picture on. On processors without AMX bf16 is slower than fp32:
the bare loop shows by how much. What a picture takes at the least is the encoder's multiplications at the rate of a
large matrix product on the same processor, in the same number format.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.full_size import make_file  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.pairs import Command, alternate, spread  # noqa: E402
from benchmarks.startup import FLAGS, make_pictures  # noqa: E402

FORMATS = {"fp32": "no", "bf16": "bf16"}  # as --mixed_precision calls them


def make_vae() -> Any:
    """The VAE of SD1.5 with random weights."""
    from library.families.sd_load import import_packages

    import_packages()
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).eval()


def least_seconds(form: str) -> float:
    """Seconds a picture would take if nothing but its multiplications counted, each as fast as in a matrix product."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = make_vae()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            vae.encode(torch.empty(1, 3, 256, 256))
    side = 4096
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    one, other = torch.rand(side, side, dtype=dtype), torch.rand(side, side, dtype=dtype)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(one, other)
        took.append(time.perf_counter() - start)
    return float(counter.get_total_flops()) * min(took) / (2 * side**3)


def bare(form: str) -> None:
    """Encode random pixels, and print a line for each picture, until somebody ends it."""
    import torch

    from library.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    torch.manual_seed(1)
    vae = make_vae().to(dtype=dtype, memory_format=torch.channels_last)
    pixels = torch.rand(1, 3, 256, 256).to(dtype=dtype, memory_format=torch.channels_last) * 2 - 1
    done = 0
    with torch.inference_mode():
        while True:
            vae.encode(pixels)
            done += 1
            print(f"picture {done}", flush=True)


def commands(form: str, model: Path, work: Path) -> dict[str, Command]:
    """The trainer, which is stopped before it trains, and the bare loop."""
    flags = [*FLAGS, "--cache_latents", "--mixed_precision", FORMATS[form]]
    flags += ["--pretrained_model_name_or_path", str(model)]
    flags += ["--train_data_dir", str(work / "train"), "--output_dir", str(work / "output")]
    trainer = (sys.executable, str(ROOT / "train_db.py"), *flags)
    loop = (sys.executable, str(ROOT / "benchmarks" / "latents.py"), "--bare", form)
    return {
        "trainer": Command(trainer, re.compile(r"encoding latents: .*?\| (\d+)/\d+ ")),
        "bare loop": Command(loop, re.compile(r"^picture (\d+)$", re.MULTILINE)),
    }


def report(model: Path, work: Path, pairs: int, pictures: int) -> None:
    """Print one table, a row for each number format."""
    make_pictures(work / "train" / "1_sks dog", pictures)
    rows = ["| | trainer, seconds a picture | bare loop | trainer / bare loop, pair by pair | at the least |"]
    rows.append("|---|---|---|---|---|")
    for form in FORMATS:
        print(form, flush=True)
        runs = alternate(commands(form, model, work), pairs, pictures)
        trainer, loop = ([run.typical for run in each] for each in runs.values())
        ratios = [ours / theirs for ours, theirs in zip(trainer, loop, strict=True)]
        rows.append(
            f"| {form} | {spread(trainer)} | {spread(loop)} | {spread(ratios, 3)} | {least_seconds(form):.2f} |"
        )
    print("\n".join([describe(), "", *rows]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=12, help="pictures of each run, 4 or more")
    parser.add_argument("--file", type=Path, help="an SD1.x file in the original layout; default: one is made")
    parser.add_argument("--bare", choices=FORMATS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(options.bare)
    with tempfile.TemporaryDirectory() as folder:
        model = options.file or Path(folder) / "sd15.safetensors"
        if options.file is None:
            make_file(model)
        report(model, Path(folder), options.pairs, options.pictures)


if __name__ == "__main__":
    main()
