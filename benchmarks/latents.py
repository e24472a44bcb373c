"""How long an image takes on its way into the latent cache, beside a bare PyTorch loop over the same VAE.

    python benchmarks/latents.py [--pairs 5] [--images 12] [--file model.safetensors]
    python benchmarks/latents.py --fill [--pairs 5] [--images 64] [--side 512] [--batch 1] [--small]

Full-size SD1.5 with random weights on the CPU at 256 px, one image at a time. The trainer is `train_db.py
--cache_latents` with images of 512 px, which it decodes and scales, in fp32 and with --mixed_precision bf16. The bare
loop (--bare) only calls the VAE's encoder, on pixels that are already there, laid out as the convolutions like it best,
with freed memory kept. Both are processes of their own, in turn, watched from outside (benchmarks/pairs.py); seconds a
image are the median of a process from the third image on. On processors without AMX bf16 is slower than fp32:
the bare loop shows by how much. What an image takes at the least is the encoder's multiplications at the rate of a
large matrix product on the same processor, in the same number format.

With --fill: images a second of filling a cache on disk (decoding, scaling, encoding, writing) beside those of the
same encoder on pixels that are already there, in turn in one process, on the GPU if there is one. The photographs are
JPEGs of twice the side. --small takes a VAE of a fraction of the size, which shows the order of the cost an image.
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
from benchmarks.startup import FLAGS, make_images  # noqa: E402

FORMATS = {"fp32": "no", "bf16": "bf16"}  # as --mixed_precision calls them


def make_vae() -> Any:
    """The VAE of SD1.5 with random weights."""
    from library.families.sd.load import import_packages

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
    """Seconds an image would take if nothing but its multiplications counted, each as fast as in a matrix product."""
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
    """Encode random pixels, and print a line for each image, until somebody ends it."""
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
            print(f"image {done}", flush=True)


def commands(form: str, model: Path, work: Path) -> dict[str, Command]:
    """The trainer, which is stopped before it trains, and the bare loop."""
    flags = [*FLAGS, "--cache_latents", "--mixed_precision", FORMATS[form]]
    flags += ["--pretrained_model_name_or_path", str(model)]
    flags += ["--train_data_dir", str(work / "train"), "--output_dir", str(work / "output")]
    trainer = (sys.executable, str(ROOT / "train_db.py"), *flags)
    loop = (sys.executable, str(ROOT / "benchmarks" / "latents.py"), "--bare", form)
    return {
        "trainer": Command(trainer, re.compile(r"encoding latents: .*?\| (\d+)/\d+ ")),
        "bare loop": Command(loop, re.compile(r"^image (\d+)$", re.MULTILINE)),
    }


def fill_report(pairs: int, images: int, side: int, batch: int, *, small: bool) -> None:
    """Print images a second of the cache's filling and of its encoder alone, and their ratio pair by pair."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = (make_small_vae() if small else make_vae()).to(device)
    if device.type == "cuda":
        vae = vae.to(torch.bfloat16)
    if device.type == "cpu":
        vae.encoder.to(memory_format=torch.channels_last)
    rates: dict[str, list[float]] = {"fill": [], "encoder alone": []}
    with tempfile.TemporaryDirectory() as folder:
        work = FillWork(Path(folder), vae, images, side, batch)
        work.encode_alone()  # what is slow only the first time
        for turn in range(pairs):
            for name in rates if turn % 2 == 0 else reversed(rates):
                started = time.perf_counter()
                (work.fill if name == "fill" else work.encode_alone)()
                rates[name].append(images / (time.perf_counter() - started))
                print(f"  {name}: {rates[name][-1]:.2f} images/s", flush=True)
    ratios = [ours / alone for ours, alone in zip(rates["fill"], rates["encoder alone"], strict=True)]
    print(describe(), "")
    print("| | cache filled, images/s | encoder alone | ratio, pair by pair |\n|---|---|---|---|")
    what = f"{device.type}, {side} px, batch {batch}{', small VAE' if small else ''}"
    print(f"| {what} | {spread(rates['fill'])} | {spread(rates['encoder alone'])} | {spread(ratios, 3)} |")


def make_small_vae() -> Any:
    """A VAE of four levels with few channels and random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
    ).eval()


class FillWork:
    """Images in a folder, the same decoded, and what encodes either."""

    def __init__(self, folder: Path, vae: Any, images: int, side: int, batch: int) -> None:
        import torch

        from library.data.buckets import Placement

        self.folder, self.vae, self.batch = folder, vae, batch
        self.placements = [Placement((side, side), (side, side))] * images
        self.records = [photograph(folder / f"{number:05}.jpg", 2 * side, number) for number in range(images)]
        decoded = [self.read(index)[0] for index in range(min(images, 4 * batch))]
        self.batches = [
            torch.stack([decoded[(start + place) % len(decoded)] for place in range(min(batch, images - start))])
            for start in range(0, min(images, 4 * batch), batch)
        ]
        self.turns = 0

    def read(self, index: int) -> tuple[Any, None]:
        """The pixels of an image, (3, H, W) in [-1, 1]."""
        import torch

        from library.data import images
        from library.options.datasets import ImageSettings

        place, record = self.placements[index], self.records[index]
        centred = images.decide_geometry(place, ImageSettings(), record.name, record.size)
        pixels = images.apply(images.load(record.path, record.size), centred)
        return torch.from_numpy(images.to_float(pixels)), None

    def encode(self, pixels: Any, generators: Any) -> Any:
        """As a family encodes."""
        from library.families.sd.vae import encode_images

        return encode_images(self.vae, pixels, generators)

    def fill(self) -> None:
        """Fill a cache on disk that is empty: each turn is another VAE to it."""
        from library.data.cache import latent_cache

        self.turns += 1
        latent_cache.build_latent_cache(
            self.records, self.placements, self.read, self.encode, vae=f"turn {self.turns}", suffix="_sd.npz",
            to_disk=True, flip=[False] * len(self.records), batch_size=self.batch, progress=False,
        )  # fmt: skip

    def encode_alone(self) -> None:
        """Encode as many images as there are, from pixels that are there."""
        import torch

        done = 0
        while done < len(self.records):
            pixels = self.batches[done // self.batch % len(self.batches)][: len(self.records) - done]
            self.encode(pixels, [torch.Generator() for _ in pixels])
            done += len(pixels)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def photograph(path: Path, side: int, seed: int) -> Any:
    """Write a JPEG of smooth noise, about as many bytes as a photograph has, and return its record."""
    import numpy as np
    from PIL import Image

    from library.data.scan.image_record import ImageRecord

    coarse = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
    return ImageRecord(path.parent, path.name, 0, 0, (side, side), "", from_file=True, repeats=1, is_reg=False)


def report(model: Path, work: Path, pairs: int, images: int) -> None:
    """Print one table, a row for each number format."""
    make_images(work / "train" / "1_sks dog", images)
    rows = ["| | trainer, seconds an image | bare loop | trainer / bare loop, pair by pair | at the least |"]
    rows.append("|---|---|---|---|---|")
    for form in FORMATS:
        print(form, flush=True)
        runs = alternate(commands(form, model, work), pairs, images)
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
    parser.add_argument("--images", type=int, help="images of each run, 4 or more; default 12, with --fill 64")
    parser.add_argument("--file", type=Path, help="an SD1.x file in the original layout; default: one is made")
    parser.add_argument("--bare", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--fill", action="store_true", help="filling a cache beside its encoder alone")
    parser.add_argument("--side", type=int, default=512, help="of the images encoded with --fill, pixels")
    parser.add_argument("--batch", type=int, default=1, help="images encoded together with --fill")
    parser.add_argument("--small", action="store_true", help="a small VAE with --fill")
    options = parser.parse_args()
    if options.bare:
        bare(options.bare)
    images = options.images or (64 if options.fill else 12)
    if options.fill:
        fill_report(options.pairs, images, options.side, options.batch, small=options.small)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.file or make_file(Path(folder) / "sd15.safetensors")
        report(model, Path(folder), options.pairs, images)


if __name__ == "__main__":
    main()
