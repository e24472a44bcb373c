"""What the device can do at all: matrix products, memory, transfers; and the VAE, whose speed is images a second.

    python -m benchmarks.card.rates [--vae] [--tiny] [--pretend]

Each is a line of JSON (lines.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.card.gauge import Gauge, best_device, chosen_device
from benchmarks.card.lines import emit

if TYPE_CHECKING:
    import torch


def describe_device(gauge: Gauge) -> None:
    """Print name, memory, driver and versions."""
    import importlib.metadata

    import torch

    device, facts = gauge.device, {}
    if gauge.module is not None and hasattr(gauge.module, "get_device_properties"):
        found = gauge.module.get_device_properties(device)
        for name in (
            "name",
            "total_memory",
            "major",
            "minor",
            "multi_processor_count",
            "gcnArchName",
            "driver_version",
        ):
            if hasattr(found, name):
                facts[name] = getattr(found, name)
    if shutil.which("nvidia-smi"):
        asked = "--query-gpu=driver_version,clocks.max.sm,power.limit"
        try:
            answer = subprocess.run(
                ["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, timeout=10, check=False
            )
            facts["driver, clock, power"] = answer.stdout.decode("utf-8", "replace").strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            facts["driver, clock, power"] = f"nvidia-smi: {type(error).__name__}"
    names = (
        "diffusers",
        "transformers",
        "accelerate",
        "bitsandbytes",
        "xformers",
        "torchao",
        "optimum-quanto",
        "triton",
    )
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    build = {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version()}
    emit("device", type=device.type, torch=torch.__version__, build=build, versions=versions, facts=facts)


def seconds_of(gauge: Gauge, work: Callable[[], object], least: float = 0.2) -> float:
    """Seconds of one call, from as many as take `least` seconds, after some that are not counted."""
    for _ in range(3):
        work()
    count, took = 1, 0.0
    while True:
        start = gauge.now()
        for _ in range(count):
            work()
        took = gauge.now() - start
        if took >= least or count >= 10_000:
            return took / count
        count = max(count + 1, int(count * min(8.0, 1.2 * least / max(took, 1e-6))))


def matrix_rates(gauge: Gauge, side: int, least: float) -> None:
    """Print the rate of square matrix products, FLOP/s, by number format; random values, as zeros are faster."""
    import torch

    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        if gauge.device.type == "cpu" and name in ("fp16", "tf32"):
            continue
        try:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            one = torch.randn(side, side, device=gauge.device).to(dtype)
            other = torch.randn(side, side, device=gauge.device).to(dtype)
            seconds = seconds_of(gauge, lambda one=one, other=other: torch.mm(one, other), least)  # type: ignore[misc]
            emit("rate", name=name, flops=2 * side**3 / seconds)
        except RuntimeError as error:
            emit("rate", name=name, error=str(error).splitlines()[0][:160])
    torch.set_float32_matmul_precision("highest")


def memory_rates(gauge: Gauge, size: int, least: float) -> None:
    """Print bytes a second: copies on the device (read and written), and uploads from pinned and ordinary memory."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, device=gauge.device)
    target = torch.empty_like(source)
    emit(
        "bandwidth", name="copy on the device", bytes=2 * size / seconds_of(gauge, lambda: target.copy_(source), least)
    )
    if gauge.device.type == "cpu":
        return
    for name, pinned in (("upload, pinned", True), ("upload, not pinned", False)):
        try:
            host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=pinned)
            part = target[: size // 4]
            seconds = seconds_of(gauge, lambda host=host, part=part: part.copy_(host, non_blocking=True), least)  # type: ignore[misc]
            emit("bandwidth", name=name, bytes=size / 4 / seconds)
        except RuntimeError as error:
            emit("bandwidth", name=name, error=str(error).splitlines()[0][:160])


def vae_rates(gauge: Gauge, *, tiny: bool) -> None:
    """Print images a second of the VAE's encoder as the trainer calls it, by size and batch."""
    import torch

    from benchmarks.latents import make_small_vae, make_vae
    from library.families.sd.vae import encode_images

    dtype = torch.float32 if gauge.device.type == "cpu" else torch.bfloat16
    with torch.device(gauge.device):
        vae = (make_small_vae() if tiny else make_vae()).to(dtype)
    for side, batch in ((64, 1), (64, 2)) if tiny else ((512, 1), (512, 8), (1024, 1), (1024, 4)):
        pixels = torch.rand(batch, 3, side, side) * 2 - 1
        try:
            work = _encoding(encode_images, vae, pixels)
            emit("vae", side=side, batch=batch, images=batch / seconds_of(gauge, work, 0.1 if tiny else 0.6))
        except RuntimeError as error:
            emit("vae", side=side, batch=batch, error=str(error).splitlines()[0][:160])


def _encoding(encode: Any, vae: Any, pixels: torch.Tensor) -> Callable[[], object]:
    import torch

    return lambda: encode(vae, pixels, [torch.Generator() for _ in pixels])


def main() -> None:
    """Command line."""
    with chosen_device(sys.argv):
        measure(Gauge(best_device()), only_vae="--vae" in sys.argv, tiny="--tiny" in sys.argv)


def measure(gauge: Gauge, *, only_vae: bool, tiny: bool) -> None:
    """Print everything, or the VAE's rates alone."""
    if only_vae:
        vae_rates(gauge, tiny=tiny)
        return
    describe_device(gauge)
    matrix_rates(gauge, 256 if tiny else 8192, 0.02 if tiny else 0.2)
    memory_rates(gauge, 2**20 if tiny else 2**30, 0.02 if tiny else 0.2)


if __name__ == "__main__":
    main()
