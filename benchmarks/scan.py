"""Measure the time of scanning many images, first and unchanged, and the memory of the records.

    python benchmarks/scan.py [--images 20000] [--folder where] [--copies] [--keep]

The images are a few noisy JPEG and PNG files of 100 to 400 KB under many names, linked where the file system has hard
links (--copies: really copied, which takes 200 KB of disk each), with a caption file of 10 to 40 words beside each. The
first scan starts with an empty index, the second and third use its index. Each runs in a process of its own. Seconds do
not include the start of Python; processor seconds show the influence of other programs. The memory of the records is
measured by tracemalloc in a scan that is not timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402
from library.data.scan.scan import Scan, scan  # noqa: E402
from library.options.datasets import BucketSettings, DatasetSpec, SubsetSpec  # noqa: E402

LINKS = 2000  # names of one file: file systems have a limit, and real files are not one
SIZES = ((768, 1024), (1024, 768), (1024, 1024), (640, 960), (1536, 1024))
OLD = 1_600_000_000  # time of change: what was changed just now is not remembered


def make_source(path: Path, seed: int) -> None:
    """An image of at least 100 KB that compresses like a photograph: coarse noise under fine noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    width, height = SIZES[seed % len(SIZES)]
    if path.suffix == ".png":
        width, height = width // 3, height // 3
    coarse = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    fine = rng.integers(-12, 13, image.shape, dtype=np.int16)
    Image.fromarray(np.clip(image + fine, 0, 255).astype(np.uint8)).save(path, quality=85)
    if path.stat().st_size < 100_000:
        raise RuntimeError(f"{path} has only {path.stat().st_size} bytes")
    os.utime(path, (OLD, OLD))


def make_folder(folder: Path, images: int, *, copies: bool) -> int:
    """Fill a folder; the bytes of all images as a reader counts them."""
    sources = folder.with_name("sources")
    sources.mkdir(parents=True)
    folder.mkdir()
    rng = random.Random(0)
    total = 0
    source = sources
    for number in range(images):
        if number % LINKS == 0 or (copies and number < 20):
            source = sources / f"{number}{('.jpg', '.jpg', '.png')[number // (1 if copies else LINKS) % 3]}"
            make_source(source, number)
        name = f"{number:06d} {rng.choice(('portrait', 'landscape', 'still life'))} 作品{source.suffix}"
        place(source, folder / name, copies=copies)
        total += source.stat().st_size
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(10, 40)))
        caption = (folder / name).with_suffix(".txt")
        caption.write_text(words, encoding="utf-8")
        os.utime(caption, (OLD, OLD))
    return total


def place(source: Path, target: Path, *, copies: bool) -> None:
    """Link, or copy with `copies` or if the file system has no hard links."""
    if not copies:
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)


WORDS = "a the red blue dog cat house, tree, portrait of in front standing 1girl, smile, masterpiece, sky 犬".split()


def measure(folder: Path, index: Path, *, traced: bool) -> dict[str, float]:
    """One scan: seconds or, if traced, bytes of the records."""
    subset = SubsetSpec(folder, "benchmark", class_tokens="thing", caption_extensions=(".txt",))
    datasets = (DatasetSpec("benchmark", BucketSettings((512, 512), enabled=True), (subset,)),)
    if traced:
        tracemalloc.start()
    started, worked = time.perf_counter(), time.process_time()
    found: Scan = scan(datasets, index, progress=not traced)
    seconds, work = time.perf_counter() - started, time.process_time() - worked
    if found.mistakes:
        raise RuntimeError("\n".join(map(str, found.mistakes)))
    gc.collect()
    size, peak = tracemalloc.get_traced_memory() if traced else (0, 0)
    return {"seconds": seconds, "work": work, "records": len(found.records), "bytes": size, "peak": peak}


def in_process(folder: Path, index: Path, *, traced: bool = False) -> dict[str, float]:
    """measure() in a fresh process."""
    words = [sys.executable, __file__, "--folder", str(folder), "--measure", str(index), *(["--traced"] * traced)]
    answer = subprocess.run(words, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return json.loads(answer.stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the folder, scan it four times, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--copies", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure is not None:
        print(json.dumps(measure(given.folder, given.measure, traced=given.traced)))
        return
    place = Path(tempfile.mkdtemp(prefix="scan benchmark ", dir=given.folder))
    try:
        size = make_folder(place / "images", given.images, copies=given.copies)
        first, second, third = (in_process(place / "images", place / "index") for _ in range(3))
        traced = in_process(place / "images", place / "index", traced=True)
        print(describe())
        how = "copied" if given.copies else "linked"
        print(f"{given.images} images of {size / given.images / 1e3:.0f} KB on average, {how}")
        print(f"first scan    {first['seconds']:8.2f} s, {first['work']:.2f} s of a processor")
        print(f"second scan   {second['seconds']:8.2f} s, {second['work']:.2f} s of a processor")
        print(f"third scan    {third['seconds']:8.2f} s, {third['work']:.2f} s of a processor")
        print(f"records       {traced['bytes'] / 1e6:8.1f} MB ({traced['bytes'] / traced['records']:.0f} bytes each)")
        print(f"while reading {traced['peak'] / 1e6:8.1f} MB")
        print(f"index         {sum(f.stat().st_size for f in (place / 'index').iterdir()) / 1e6:8.1f} MB")
    finally:
        if not given.keep:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
