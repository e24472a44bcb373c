"""Measure time and peak memory of loading a full-size SD1.5 file (fp16, 2.1 GB) as an fp32 model.

    python benchmarks/load.py [--runs 5] [--file model.safetensors]

Without --file, one with random weights is created in a temporary folder (10 s, 2.1 GB of disk). The file is first read
into the page cache; then every measurement runs in a process of its own, after an uncounted one. The clock starts after
all imports. "tensors": from the file to named fp32 tensors; "model": from the file to U-Net, VAE and text encoder.

Memory is the increase of anonymous memory (RssAnon of /proc/self/status, sampled every 2 ms in separate runs) since the
imports. Pages of the mapped file do not count, as the system can drop them at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.full_size import make_file  # noqa: E402


def load_tensors(path: Path) -> tuple[object, int]:
    """The file as named fp32 tensors, and their bytes."""
    import torch

    from library.checkpoints.files import open_tensors
    from library.checkpoints.loading import load_tensors
    from library.checkpoints.sd_layout import SD1, to_diffusers

    split = to_diffusers(open_tensors(path), SD1)
    parts = {part: load_tensors(tensors, torch.float32) for part, tensors in split.parts.items()}
    return parts, sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())


def load_model(path: Path) -> tuple[object, int]:
    """The file as the model that is trained, fp32, and the bytes of its parameters."""
    import torch

    from library.checkpoints.files import read_header
    from library.families import registry

    model = registry.load_model(read_header(path), dtype=torch.float32)
    modules = model.modules().values()
    return model, sum(parameter.nbytes for module in modules for parameter in module.parameters())


LOADERS: Mapping[str, Callable[[Path], tuple[object, int]]] = {"tensors": load_tensors, "model": load_model}


def anonymous_bytes() -> int:
    """This process's anonymous memory in bytes; 0 if unknown (Linux only)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(what: str, path: Path, *, watch_memory: bool) -> dict[str, float]:
    """Load once in this process: seconds, processor seconds, bytes of the result, peak bytes over the imports."""
    from library.families.sd import load as sd_load

    sd_load.import_packages()
    before = anonymous_bytes()
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    if watch_memory:
        watcher.start()
    start = time.perf_counter()
    busy = time.process_time()
    model, size = LOADERS[what](path)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    done.set()
    if watch_memory:
        watcher.join()
    peak = max(peak, anonymous_bytes())
    del model  # not earlier: freeing 4 GB is no part of loading
    return {"seconds": seconds, "processor": busy, "bytes": size, "peak": peak - before}


def in_new_process(what: str, path: Path, *, watch_memory: bool) -> dict[str, float]:
    """measure() in a fresh interpreter."""
    command = [sys.executable, __file__, "--file", str(path), "--measure", what, *(["--watch"] if watch_memory else [])]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout.splitlines()
    result: dict[str, float] = json.loads(lines[-1])
    return result


def report(path: Path, runs: int) -> None:
    """Print one line for each way of loading."""
    with path.open("rb") as stream:
        while stream.read(1 << 24):
            pass
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB, {os.cpu_count()} processors{load}")
    for what in LOADERS:
        in_new_process(what, path, watch_memory=False)
        timed = [in_new_process(what, path, watch_memory=False) for _ in range(runs)]
        seconds = sorted(run["seconds"] for run in timed)
        busy = statistics.median(run["processor"] for run in timed)
        memory = in_new_process(what, path, watch_memory=True)
        print(
            f"{what:8} median {statistics.median(seconds):.2f} s (from {seconds[0]:.2f} to {seconds[-1]:.2f}, "
            f"{runs} runs), {busy:.2f} s of processor time; peak anonymous memory {memory['peak'] / 1e9:.2f} GB = "
            f"{memory['peak'] / memory['bytes']:.3f} x the fp32 weights ({memory['bytes'] / 1e9:.2f} GB)",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--file", type=Path, help="an SD1.x file in the original layout; default: one is made")
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.file, watch_memory=options.watch)))
    elif options.file:
        report(options.file, options.runs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sd15.safetensors"
            make_file(path)
            report(path, options.runs)


if __name__ == "__main__":
    main()
