"""The end of a run: how long it took, what it wrote, and what to do with that; a run that was asked to stop."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.messages import counted, readable_bytes, readable_time
from library.runtime.signals import Interrupt

if TYPE_CHECKING:
    import torch

    from library.training.adapter.plan import AdapterPlan
    from library.training.plan.facts import RunFacts
    from library.training.run import Run
    from library.training.saving.saver import Saver
    from library.training.saving.state import Progress
    from library.training.sharding.shards import OnWriter

ROOT = Path(__file__).resolve().parents[2]
MOST_NAMED = 12  # files and folders at the end of a run, the last ones


def end_stopped(
    run: Run, saver: Saver, progress: Progress, before: int, resumed: Path | None, on_writer: OnWriter
) -> None:
    """End a run that began after step `before` and was asked to stop, with a saved state. Raises Interrupt."""
    explanation = ""
    if progress.step > before:
        explanation = on_writer(saver.stop)(progress) or ""
    elif run.processes.is_writer:
        explanation = saver.explain_interrupt(progress.step, resumed)
    # the others end when it is saved; some may not have got the signal
    number = max(run.processes.gather(run.stop.number or 0))
    raise Interrupt(number or signal.SIGINT, explanation)


def describe_end(steps: int, seconds: float, device: torch.device, written: Iterable[Path | None]) -> Iterator[str]:
    """Lines for the log: the run in numbers, then the files and folders that are there, with their sizes."""
    took = f"{counted(steps, 'step')} in {readable_time(seconds)} with loading and saving"
    yield f"done: {took}, at most {' and '.join(peak_memory(device))}"
    yield "written:"
    there = [path for path in dict.fromkeys(written) if path is not None and path.exists()]
    if len(there) > MOST_NAMED:
        yield f"  {len(there) - MOST_NAMED} earlier ones"
    for path in there[-MOST_NAMED:]:
        yield f"  {path} ({readable_bytes(size_of(path))})"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def peak_memory(device: torch.device) -> Iterator[str]:
    """The largest amounts of memory that this process had: "686.5 MB of memory", and for a GPU its own."""
    if sys.platform == "win32":
        import psutil

        yield f"{readable_bytes(psutil.Process().memory_info().peak_wset)} of memory"
    else:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # getrusage(2): kilobytes, on macOS bytes
        yield f"{readable_bytes(most * (1 if sys.platform == 'darwin' else 1024))} of memory"
    from library.runtime.accelerator import peak_bytes

    peak = peak_bytes(device)
    if peak is not None:
        yield f"{readable_bytes(peak)} of GPU memory"


def memory_in_use(device: torch.device) -> dict[str, int]:
    """Bytes that this process has now: `memory_bytes`, and on a GPU the tensors there as `gpu_memory_bytes`."""
    import psutil

    from library.runtime.accelerator import bytes_in_use

    in_use = {"memory_bytes": int(psutil.Process().memory_info().rss)}
    on_device = bytes_in_use(device)
    if on_device is not None:
        in_use["gpu_memory_bytes"] = on_device
    return in_use


def next_step(facts: RunFacts, adapter: AdapterPlan | None, saved: Path) -> str:
    """What to do with the saved file, with a command that works as it is printed."""
    words = ["--ckpt", str(saved)] if adapter is None else _with_adapter(facts, adapter, saved)
    record = facts.images.records[0]
    words += ["--prompt", prompt_of(record.caption)]
    words += ["--v_parameterization"] if facts.options.model.v_parameterization else []
    words += ["--zero_terminal_snr"] if facts.options.objective.zero_terminal_snr else []
    words += ["--clip_skip", str(facts.options.model.clip_skip)] if facts.options.model.clip_skip else []
    words += ["--image_path", str(record.path)] if facts.base_model.family.refines else []
    return f"next: {command('gen_img.py', *words)}"


def _with_adapter(facts: RunFacts, adapter: AdapterPlan, saved: Path) -> list[str]:
    """The flags that draw with the base model, the adapters that the run merged into it, and the trained one."""
    base = [str(path) for path, _ in adapter.base]
    words = ["--ckpt", str(facts.base_model.header.path)]
    words += ["--vae", str(facts.base_model.vae)] if facts.base_model.vae is not None else []
    words += ["--network_weights", *base, str(saved)]
    words += ["--network_mul", *(f"{multiplier:g}" for _, multiplier in adapter.base), "1"] if base else []
    return words + (["--network_module", *[adapter.module] * (len(base) + 1)] if adapter.settings is None else [])


def prompt_of(caption: str) -> str:
    """The beginning of a caption as a prompt."""
    text = textwrap.shorten(caption, 120, placeholder="").strip(" ,")
    return text if text and not text.startswith("-") else "a photo"


def command(program: str, *words: str) -> str:
    """A command line for the shell, with the running Python, from the current folder."""
    line = [_from_here(Path(sys.executable)), _from_here(ROOT / program), *words]
    return subprocess.list2cmdline(line) if os.name == "nt" else shlex.join(line)


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
