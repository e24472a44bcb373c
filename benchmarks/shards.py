"""Measure memory and start of a run whose images are in shards, by the number of images: it should not grow with them.

    python benchmarks/shards.py [--images 10000 100000] [--processes 2] [--batches 200] [--folder where]

Writes small images (64 x 48 to 64 x 64 pixels, 3 KB of disk each with caption and archive) into shards, and for each
number of images starts as many processes as asked for. Each makes the data part of a plan, and reads its own batches
from the beginning and the end of an epoch, as one rank of a run does, with or without a shard buffer. Printed are the
seconds from the start of the plan to the first batch, the most memory of a process in the plan and while it reads, and
both in comparison with the smallest number of images. The ranks' samples are counted: together they are
each sample once. All that is written is deleted at the end.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402

SHARD = 20_000_000  # bytes
BATCH = 16
MB = 1 << 20


def make_shards(folder: Path, images: int) -> int:
    """Write images, all different, straight into shards; the bytes of the shards."""
    from PIL import Image

    from library.data.scan.image_headers import Header
    from library.data.shards.archive import Loaded, ShardWriter
    from library.data.shards.member import TABLE_NAME
    from library.data.shards.pack import row_of
    from library.data.shards.table import Row, write_table

    writer = ShardWriter(folder, "part", SHARD)
    grey = Image.linear_gradient("L")

    def rows() -> Iterator[Row]:
        for number in range(images):
            size = (64, 48 + 16 * (number % 2))
            image = grey.resize(size).convert("RGB")
            image.paste((number % 256, number // 256 % 256, number // 65536), (8, 8, 40, 40))
            file = io.BytesIO()
            image.save(file, "png", compress_level=1)
            text = f"image {number} of a generated set, with the number in its colour"
            files = [Loaded(file.getvalue(), f"{number:08d}.png"), Loaded(text.encode(), f"{number:08d}.txt")]
            place, _ = writer.add(files)
            yield row_of(files[0].name, files[0].data, place, Header(size, transparent=False), text)
        writer.close()

    write_table(folder / TABLE_NAME, folder.name, writer.entries, rows())
    return sum(entry.length for entry in writer.entries)


def read(folder: Path, rank: int, world: int, batches: int, buffer: int) -> dict[str, float]:
    """One rank: the data part of a plan, and batches from both ends of an epoch. Returns what was measured."""
    import psutil

    from library.data.dataset import BatchLoader, TrainingDataset
    from library.options.mistakes import Mistakes
    from library.options.parse import parse
    from library.training.inputs import image_reader
    from library.training.plan.images import decide_images

    process = psutil.Process()
    before = process.memory_info().rss
    began, processor = time.monotonic(), time.process_time()
    words = f"--train_data_dir {folder.parent} --resolution 64 --min_bucket_reso 64 --bucket_reso_steps 16"
    words += f" --enable_bucket --output_dir {folder.parent} --pretrained_model_name_or_path none"
    words += f" --train_batch_size {BATCH} --shard_buffer {buffer} --data_cache_dir {folder.parent / 'cache'}"
    mistakes = Mistakes()
    images = decide_images(parse(words.split()).options, None, mistakes, 1)
    if images is None or mistakes:
        raise SystemExit(str(list(mistakes)))
    order = images.order(world, 1, buffer)  # a step has one batch of each rank
    planned, peak = time.monotonic(), peak_memory()
    dataset = TrainingDataset(image_reader(images), lambda texts: (), seed=1, steps=order.steps_per_epoch)
    loader = BatchLoader(dataset)
    ends = max(0, order.steps_per_epoch - batches // 2)
    requests = chain(islice(order.requests(1, 0, rank, world), batches // 2), order.requests(1, ends, rank, world))
    first, used, most = 0.0, 0.0, 0
    for _ in loader.batches(requests):
        if not first:
            first, used = time.monotonic(), time.process_time()
        most = max(most, process.memory_info().rss)
    seen = sorted(
        sample for request in order.requests(1, 0, rank, world) if request.is_counted for sample, _ in request.samples
    )
    return {
        "images": len(images.records),
        "seen": len(set(seen)),
        "sum": sum(seen),
        "start": first - began,
        "plan": planned - began,
        "processor": used - processor,
        "reading": most / MB,
        "grown": (most - before) / MB,
        "peak": peak / MB,
    }


def peak_memory() -> float:
    """The largest resident memory of this process so far, in bytes; where it is not known, the memory now."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return float(psutil.Process().memory_info().rss)
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def measure(folder: Path, processes: int, batches: int, buffer: int) -> list[dict[str, float]]:
    """All ranks at the same time, each in a process of its own."""
    own = [sys.executable, __file__, "--read", str(folder), "--batches", str(batches), "--buffer", str(buffer)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*own, "--rank", str(rank), "--processes", str(processes)],
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=environment,
        )
        for rank in range(processes)
    ]
    found = []
    for process in started:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(process.returncode)
        found.append(json.loads(out.splitlines()[-1]))
    images = int(found[0]["images"])
    if sum(each["seen"] for each in found) != images or sum(each["sum"] for each in found) != sum(range(images)):
        raise SystemExit("the ranks do not read each image once")
    return found


def report(images: Sequence[int], processes: int, batches: int, buffer: int, folder: Path) -> None:
    """Measure every number of images and print a table."""
    print("| Images | Disk (MB) | First batch (s) | of a processor (s) | Plan (MB) | Ratio | Reading (MB) | Ratio |")
    print("|---|---|---|---|---|---|---|---|")
    first: tuple[float, float] | None = None
    for number in images:
        place = folder / str(number) / "1_set"
        size = make_shards(place, number)
        found = measure(place, processes, batches, buffer)
        names = ("start", "processor", "reading", "peak")
        start, used, reading, peak = (max(each[name] for each in found) for name in names)
        first = first or (reading, peak)
        memory = f"{peak:.0f} | {peak / first[1]:.3f} | {reading:.0f} | {reading / first[0]:.3f}"
        print(f"| {number} | {size / 1e6:.0f} | {start:.1f} | {used:.1f} | {memory} |", flush=True)
        shutil.rmtree(folder / str(number))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--batches", type=int, default=200, help=f"batches of {BATCH} that each process reads")
    parser.add_argument("--buffer", type=int, default=0, help="--shard_buffer of the runs")
    parser.add_argument("--folder", type=Path, help="where the images are written; default: the temporary folder")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.read is not None:
        print(json.dumps(read(chosen.read, chosen.rank, chosen.processes, chosen.batches, chosen.buffer)))
        return
    print(describe())
    print(f"{chosen.processes} processes at a time, each reads {chosen.batches} batches of {BATCH}\n")
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        report(chosen.images, chosen.processes, chosen.batches, chosen.buffer, Path(folder))


if __name__ == "__main__":
    main()
