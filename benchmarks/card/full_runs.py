"""Measure runs of full size in one process: each case at batch 1, then, if asked, at twice the batch until the device
has no more memory or gains nothing.

    python -m benchmarks.card.full_runs FOLDER DEADLINE {speed,memory} [--tiny] CASE …

FOLDER has the hollow checkpoints and the images, DEADLINE is a moment of time.time().
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.card.cases import Case, arithmetic, case_of
from benchmarks.card.gauge import Gauge, best_device, chosen_device
from benchmarks.card.lines import emit, leave_broken_device
from benchmarks.card.measured_run import Marks, Measured, command_words, measure, missing_flags

if TYPE_CHECKING:
    from library.training.recipe import Recipe

LEAST_GAIN = 1.03  # of images a second, for twice the batch
LARGEST = 1024
KERNELS = 10  # shown of a profile


def arguments(case: Case, folder: Path, batch: int, steps: int, *, tiny: bool) -> list[str]:
    """The command line of a case."""
    side = 64 if tiny else case.side
    flags: dict[str, object] = {
        "pretrained_model_name_or_path": folder / f"{model_of(case, tiny=tiny)}.safetensors",
        "train_data_dir": folder / f"train {side}",
        "resolution": side,
        "output_dir": folder / f"out {os.getpid()}",
        "output_name": "dog",
        "learning_rate": 1e-6,
        "max_train_steps": steps,
        "train_batch_size": batch,
        "max_data_loader_n_workers": 0,
        "seed": 1,
        **case.flags,
    }
    return command_words(flags)


def model_of(case: Case, *, tiny: bool) -> str:
    """The hollow checkpoint that it trains: one of hollow.MODELS."""
    return {"sd15": "tiny-sd1", "sdxl": "tiny-sdxl"}[case.model] if tiny else case.model


def recipe_of(case: Case) -> Recipe:
    """The program that trains it."""
    import train_db
    import train_network

    return train_network.RECIPE if case.trains == "adapter" else train_db.RECIPE


def forward_flops(case: Case, *, tiny: bool) -> dict[str, float]:
    """Multiplications and additions of a forward pass of one sample, by module, counted on tensors without values."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import full_size, full_size_xl

    if tiny:
        return {"unet": 1e9, "text_encoder": 1e8}
    made = full_size.modules() if case.model == "sd15" else full_size_xl.modules("sdxl")
    width = made["unet"].config.cross_attention_dim
    counts = {}
    with torch.device("meta"), torch.no_grad():
        latents, states = torch.empty(1, 4, case.side // 8, case.side // 8), torch.empty(1, 77, width)
        more: dict[str, Any] = {}
        if case.model == "sdxl":
            more = {"added_cond_kwargs": {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}}
        with FlopCounterMode(display=False) as counter:
            made["unet"](latents, torch.empty(1), states, **more)
        counts["unet"] = float(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            made["text_encoder"](torch.zeros(1, 77, dtype=torch.long))
        counts["text_encoder"] = float(counter.get_total_flops())
    return counts


def predicted_peak(recipe: Recipe, words: Sequence[str]) -> int | None:
    """The peak in bytes that the plan of a command predicts for this machine; None if it does not tell."""
    from library.options.mistakes import UserError
    from library.options.parse import parse
    from library.training.plan.plan import decide

    try:
        memory = decide(parse(words, recipe.program)).memory
    except UserError:
        return None
    return None if memory is None else memory.peak


def report(
    case: Case, batch: int, measured: Measured, flops: float, predicted: int | None = None, before: int = 0
) -> None:
    """Print the measurements of a run. `before`: what earlier ones left allocated, in bytes."""
    emit(
        "run",
        case=case.name,
        batch=batch,
        error=measured.why_not if measured.code else "",
        out_of_memory=measured.out_of_memory,
        seconds=measured.seconds,
        first_step=measured.first_step,
        flops=flops * batch,
        allocated=measured.peak.allocated,
        reserved=measured.peak.reserved,
        of_steps=measured.peak_of_steps.allocated,
        last_loss=max(measured.losses.items(), default=(0, None))[1],
        predicted=predicted,
        before=before,
    )
    leave_broken_device(measured.error)


def report_profile(case: Case, measured: Measured, marks: Marks) -> None:
    """Print what the device spent its time on, and how often the host waited for it, a step."""
    # an annotation such as "Optimizer.step" spans kernels that are listed themselves
    events = [event for event in measured.profile.key_averages() if not getattr(event, "is_user_annotation", False)]
    kernels = [
        event for event in events if _device_time(event) > 0 and str(event.device_type).endswith(("CUDA", "XPU"))
    ]
    kernels = kernels or [event for event in events if _device_time(event) > 0]
    total = sum(map(_device_time, kernels))
    waits = {name: sum(event.count for event in events if name in event.key) / marks.profiled for name in WAITS}
    largest = sorted(kernels, key=_device_time, reverse=True)[:KERNELS]
    emit(
        "profile",
        case=case.name,
        busy=total / 1e6 / marks.profiled,
        wall=(measured.profiled_seconds or 0.0) / marks.profiled,
        launched=sum(event.count for event in kernels) / marks.profiled,
        waits={name: count for name, count in waits.items() if count},
        kernels=[
            [event.key[:80], _device_time(event) / 1e6 / marks.profiled, event.count / marks.profiled]
            for event in largest
        ],
    )


# The runtime's calls that wait for the device or may do so, as the profiler names them, and torch's read-back
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "hipStreamSynchronize",
    "cudaMemcpyAsync",
    "aten::_local_scalar_dense",
)


def _device_time(event: Any) -> float:
    """Microseconds that an event took on the device itself; on a CPU, there."""
    for name in ("self_device_time_total", "self_cuda_time_total", "self_cpu_time_total"):
        value = getattr(event, name, 0)
        if value:
            return float(value)
    return 0.0


def run_case(case: Case, folder: Path, deadline: float, began: float, *, grows: bool, tiny: bool) -> None:
    """Measure a case at batch 1, and with `grows` at larger ones."""
    if missing := missing_flags(case.flags):
        report(case, 1, Measured(code=2, error=missing), 0.0)
        return
    gauge = Gauge(best_device())
    marks = Marks(2, 3, 2 if grows else 0) if tiny else Marks(5, 20, 3) if grows else Marks(2, 4)
    recipe = recipe_of(case)
    before = gauge.allocated()
    words = arguments(case, folder, 1, marks.total, tiny=tiny)
    measured = measure(recipe, words, marks, began)
    flops = arithmetic(case, forward_flops(case, tiny=tiny))
    report(case, 1, measured, flops, predicted_peak(recipe, words), before)
    if measured.profile is not None:
        report_profile(case, measured, marks)
    best, batch = 1 / (measured.seconds or 1e9), 1
    marks = Marks(2, 3) if tiny else Marks(3, 8)
    while grows and not measured.code and batch < (2 if tiny else LARGEST):
        batch *= 2
        if time.time() + 6 + marks.total * batch / best > deadline:  # what comes before the first step takes seconds
            break
        gauge.free()
        gauge.reset_peak()
        measured = measure(recipe, arguments(case, folder, batch, marks.total, tiny=tiny), marks)
        report(case, batch, measured, flops)
        images = batch / (measured.seconds or 1e9)
        if images < best * LEAST_GAIN:
            break
        best = images


def prepare(folder: Path, cases: Sequence[Case], *, tiny: bool) -> None:
    """Write the hollow checkpoints of some cases and eight images of each size, if they are not there."""
    from benchmarks.card.hollow import write_model
    from benchmarks.startup import make_images
    from library.families.sd.load import import_packages

    import_packages()
    for model in {model_of(case, tiny=tiny) for case in cases}:
        if not (folder / f"{model}.safetensors").exists():
            write_model(folder / f"{model}.safetensors", model)
    for side in {64 if tiny else case.side for case in cases}:
        images = folder / f"train {side}" / "1000_sks dog"
        if not images.exists():
            make_images(images, 8, side)


def main() -> None:
    """Command line."""
    began = time.time()
    folder, deadline, kind, *names = Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]
    cases = [case_of(name) for name in names if not name.startswith("--")]
    prepare(folder, cases, tiny="--tiny" in names)
    with chosen_device(names):
        for case in cases:
            if time.time() > deadline:
                break
            run_case(case, folder, deadline, began, grows=kind == "speed", tiny="--tiny" in names)
            began = time.time()
            gauge = Gauge(best_device())
            gauge.free()
            gauge.reset_peak()


if __name__ == "__main__":
    main()
