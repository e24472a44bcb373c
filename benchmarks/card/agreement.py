"""Train the miniatures for 20 steps on one device, row after row in one process, and print the losses of each.

    python -m benchmarks.card.agreement FOLDER {device,cpu} STEPS FIRST [--tiny] [--pretend]

FOLDER is this process's own, FIRST the number of rows to leave out at the beginning.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks.card.agreement_rows import Row, rows
from benchmarks.card.gauge import chosen_device
from benchmarks.card.lines import emit, leave_broken_device


def make_world(folder: Path, families: set[str]) -> None:
    """Write the miniatures, images to train them on, and prompts."""
    from library.families.sd.load import import_packages

    import_packages()  # without what diffusers would import for features that are not used
    from tests import tiny

    for family in families:
        tiny.write_single_file(folder / f"{family}.safetensors", family)
    tiny.write_images(folder / "train" / "2_sks dog", 3, size=(80, 64))
    tiny.write_images(folder / "train" / "1_zwx cat", 2, size=(64, 96), seed=3)
    (folder / "prompts.txt").write_text("a photo of sks dog --w 64 --h 64 --s 2\n", encoding="utf-8")


def arguments(row: Row, folder: Path, out: Path, steps: int, *, strict: bool) -> list[str]:
    """The command line of a row."""
    from benchmarks.card.measured_run import command_words

    flags: dict[str, object] = {
        "pretrained_model_name_or_path": folder / f"{row.family}.safetensors",
        "train_data_dir": folder / "train",
        "resolution": 64,
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "max_bucket_reso": 128,
        "output_dir": out,
        "output_name": "dog",
        "max_data_loader_n_workers": 0,
        # Adam moves a weight by as much for a gradient that is next to nothing, whose sign rounding decides: at larger
        # learning rates a difference of 2e-6 at the first step grows tenfold every few steps
        "learning_rate": 3e-5 if row.trains == "adapter" else 1e-6,
        "max_train_steps": steps,
        "train_batch_size": 2,
        "seed": 1,
        "strict": strict,
        "v2": row.family == "sd2",
        "sample_prompts": folder / "prompts.txt" if "prompts" in row.files else None,
        **row.flags,
    }
    return command_words(flags)


def run_row(row: Row, folder: Path, steps: int, *, strict: bool) -> None:
    """Train one row and print its losses, or why it cannot be trained here. `strict`: nothing may be replaced by what
    the machine has instead."""
    import torch

    import train_db
    import train_network
    from benchmarks.card.measured_run import Measured, measure, missing_flags

    torch.backends.cudnn.allow_tf32 = row.tf32
    torch.set_float32_matmul_precision("high" if row.tf32 else "highest")
    recipe = train_network.RECIPE if row.trains == "adapter" else train_db.RECIPE
    out = folder / f"out {os.getpid()} {row.name}".replace(",", "")
    started = time.perf_counter()
    emit("begin", row=row.name)
    error = missing_flags(row.flags)
    measured = Measured()
    if not error:
        measured = measure(recipe, arguments(row, folder, out, steps, strict=strict), None, random=False, saves=True)
        error = measured.why_not if measured.code else ""
    emit(
        "losses",
        row=row.name,
        losses=[[step, loss] for step, loss in sorted(measured.losses.items())],
        error=error,
        seconds=time.perf_counter() - started,
    )
    leave_broken_device(error)


def main() -> None:
    """Command line."""
    folder, where, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if where == "cpu":  # before torch is imported
        os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    words = [] if where == "cpu" else sys.argv
    known = rows(tiny="--tiny" in sys.argv)[int(sys.argv[4]) :]
    make_world(folder, {row.family for row in known})
    with chosen_device(words):
        for row in known:
            if where == "device" or not row.against:  # of the CPU only what others are compared with
                run_row(row, folder, steps, strict=where == "device")


if __name__ == "__main__":
    main()
