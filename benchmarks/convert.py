"""Compare the conversion of a full-size SDXL file (fp16, 6.9 GB) with a plain copy: speed and memory.

    python benchmarks/convert.py --folder /some/disk [--rounds 3] [--file model.safetensors] [--only folder back]

Without --file, one with random weights is made in the folder, and left there for the next time (sdxl.safetensors).
Space for three times the file is needed. Each round runs `cp --reflink=never` and every conversion in turn, who begins
changes; what was written is on the disk when the clock stops (fsync), and is removed before the next. The clock runs
from the start of the process to its end, so imports count. The source lies in the page cache in both cases. Before each
run is a pause: a virtual machine gives free memory back to its host after some seconds, and who writes next waits for
it; without the pause that would be the conversion alone, which begins to write a second and a half after its start.

Memory is anonymous memory (RssAnon of /proc/PID/status, sampled every 5 ms): pages of the mapped source and of what was
written are the page cache's, and can be dropped by the system at any time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402
from benchmarks.pairs import spread  # noqa: E402

SLOWEST = 0.6  # of the speed of a copy
PAUSE = 8  # seconds
MOST_MEMORY = 2e9


@dataclass(frozen=True)
class Run:
    """Seconds of a process, and its peak anonymous memory in bytes (0 if unknown)."""

    seconds: float
    peak: int


def watch(command: Sequence[str], after: Callable[[], None] = lambda: None) -> Run:
    """Run a command, then `after`, whose time counts too. Raises CalledProcessError when it fails."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.005)
    after()
    seconds = time.perf_counter() - start
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{output}")
    return Run(seconds, peak)


def anonymous_bytes(process: int) -> int:
    """Anonymous memory of a running process in bytes; 0 if unknown (Linux only)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or folder that a run has made."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def conversions(file: Path, made: Path) -> dict[str, tuple[Path, Path, tuple[str, ...]]]:
    """Name -> source, target and flags of each conversion. `made` is the file as a folder, for the way back."""
    out = file.with_name("converted")
    return {
        "file": (file, out.with_suffix(".safetensors"), ("--prediction_type", "epsilon")),
        "folder": (file, out, ()),
        "bin": (file, out, ("--save_model_as", "diffusers")),
        "back": (made, out.with_suffix(".safetensors"), ()),
        "ckpt": (file, out.with_suffix(".ckpt"), ()),
    }


def measure(file: Path, rounds: int, only: Sequence[str]) -> dict[str, list[Run]]:
    """The copy and the conversions, `rounds` times in turn; who begins changes every time."""
    made, copied = file.with_name("as_folder"), file.with_name("copied")
    chosen = {name: case for name, case in conversions(file, made).items() if name in only}
    convert = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    if "back" in chosen:
        watch([*convert, str(file), str(made), "--overwrite"])
    runs: dict[str, list[Run]] = {name: [] for name in ("cp", *chosen)}
    try:
        for turn in range(rounds):
            for name in runs if turn % 2 == 0 else reversed(runs):
                time.sleep(PAUSE)
                with file.open("rb") as stream:  # in the page cache, before each of them
                    while stream.read(1 << 24):
                        pass
                if name == "cp":
                    run = watch(["cp", "--reflink=never", str(file), str(copied)], lambda: flush(copied))
                    remove(copied)
                else:
                    source, target, flags = chosen[name]
                    run = watch([*convert, str(source), str(target), *flags])
                    remove(target)
                runs[name].append(run)
                print(f"  {name}: {run.seconds:.2f} s, {run.peak / 1e6:.0f} MB", flush=True)
    finally:
        for path in (copied, made, *(target for _, target, _ in chosen.values())):
            remove(path)
    return runs


def table(runs: Mapping[str, Sequence[Run]], size: int) -> str:
    """A row for each: seconds, GB/s, the speed as a share of the copy's in the same round, anonymous memory."""
    rows = ["| | seconds | GB/s | of the copy's speed | anonymous memory, MB |", "|---|---|---|---|---|"]
    for name, each in runs.items():
        share = [copy.seconds / run.seconds for copy, run in zip(runs["cp"], each, strict=True)]
        cells = (
            spread([run.seconds for run in each]),
            spread([size / run.seconds / 1e9 for run in each]),
            spread(share),
            spread([run.peak / 1e6 for run in each], 0),
        )
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    """Command line. 1 where a conversion is slower, or takes more memory, than is promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--file", type=Path, help="a model to convert, which is copied into the folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["file", "folder", "back"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / ("sdxl.safetensors" if options.file is None else f"source{options.file.suffix}")
    if options.file is not None:
        shutil.copyfile(options.file, file)
    elif not file.exists():
        from benchmarks.full_size_xl import make_file

        print("making the file", flush=True)
        make_file(file, "sdxl")
    size = file.stat().st_size
    print(f"{describe()}\n{file.name}: {size / 1e9:.2f} GB, load average {os.getloadavg()[0]:.1f}", flush=True)
    runs = measure(file, options.rounds, options.only)
    print(table(runs, size))
    slow = [name for name in options.only if median_share(runs, name) < SLOWEST]
    large = [name for name in options.only if max(run.peak for run in runs[name]) > MOST_MEMORY]
    print(
        f"slower than {SLOWEST:.0%} of a copy: {slow or 'none'}; more than {MOST_MEMORY / 1e9:g} GB: {large or 'none'}"
    )
    return 1 if slow or large else 0


def median_share(runs: Mapping[str, Sequence[Run]], name: str) -> float:
    """A conversion's speed as a share of the copy's, the median of the rounds."""
    shares = sorted(copy.seconds / run.seconds for copy, run in zip(runs["cp"], runs[name], strict=True))
    return shares[len(shares) // 2]


if __name__ == "__main__":
    raise SystemExit(main())
