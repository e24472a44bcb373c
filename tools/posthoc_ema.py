"""Make the average of any width out of the snapshots of a training with --posthoc_ema_snapshots.

python tools/posthoc_ema.py output/dog-posthoc_ema --sigma_rel 0.15 --save_to output/dog_posthoc.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, run_tool
from library.training.averaging.power_profiles import WIDEST, Combination, Profile, combine
from tools.lora_files import PRECISIONS, check_ending, explain_write_errors

if TYPE_CHECKING:
    from library.training.averaging.snapshot_files import Snapshot

_DTYPES = {"float": "F32", "fp16": "F16", "bf16": "BF16"}
_LARGE = 0.1  # an error of the profile that is worth a hint


@dataclass(frozen=True)
class PosthocOptions:
    """Command-line options."""

    snapshots: Path | None = flag(None, "the folder of a run's snapshots, NAME-posthoc_ema")
    sigma_rel: float | None = flag(
        None,
        "relative width of the average: the standard deviation of the steps in it as a share of all steps, such as "
        "0.15; smaller values average over fewer of the last steps",
        at_least=0.01,
        at_most=WIDEST,
    )
    step: int | None = flag(None, "the average at this step. Not set: at the last snapshot", at_least=1)
    save_to: Path | None = flag(None, "the new file, .safetensors")
    save_precision: str | None = flag(
        None, "precision of the new file. Not set: that of the snapshots", choices=PRECISIONS
    )


def check(options: PosthocOptions, mistakes: Mistakes) -> None:
    """Add mistakes that concern more than one flag."""
    check_ending(options.save_to, mistakes, (".safetensors",))
    folder, file = options.snapshots, options.save_to
    if folder is not None and file is not None and file.expanduser().resolve().parent == folder.expanduser().resolve():
        mistakes.add(f"--save_to {file} is in the folder of the snapshots", "use another folder")


def work(options: PosthocOptions) -> None:
    """Read the headers, find the best combination, print its error, and write the sum. Raises UserError."""
    from library.training.averaging.snapshot_files import read_snapshots

    folder, file, width = options.snapshots, options.save_to, options.sigma_rel
    if folder is None or file is None or width is None:
        raise ValueError("a required option is missing")
    with explain_write_errors():
        snapshots = read_snapshots(folder.expanduser())
    steps = sorted({snapshot.profile.step for snapshot in snapshots})
    wanted = Profile(width, options.step or steps[-1])
    if wanted.step > steps[-1]:
        what = f"--step {wanted.step}: the last snapshot is of step {steps[-1]}"
        raise UserError([Mistake(what, f"use {steps[-1]} or an earlier step")])
    if wanted.step < steps[0]:
        what = f"--step {wanted.step}: the first snapshot is of step {steps[0]}"
        raise UserError([Mistake(what, f"use {steps[0]} or a later step")])
    widths = [f"{one:g}" for one in sorted({snapshot.profile.width for snapshot in snapshots})]
    kept = f"{counted(len(snapshots), 'snapshot')} of relative width {' and '.join(widths)}"
    print(f"{folder}: {kept}, steps {steps[0]} to {steps[-1]}")
    combination = combine([snapshot.profile for snapshot in snapshots], wanted)
    about = f"relative width {width:g} at step {wanted.step}"
    print(f"{about}: reconstruction error of the profile {combination.error:.2%}")
    if combination.error > _LARGE:
        print(f"  smaller with a width near {widths[0]} to {widths[-1]}, and with more --posthoc_ema_snapshots")
    with explain_write_errors():
        count = _write(file.expanduser(), snapshots, wanted, combination, options.save_precision)
    print(f"{file}: {counted(count, 'tensor')}")


def _write(
    file: Path, snapshots: Sequence[Snapshot], wanted: Profile, combination: Combination, precision: str | None
) -> int:
    """Write the average, and return the number of its tensors."""
    from library.checkpoints.writer import write_safetensors
    from library.convert.merge_checkpoints import weighted_sum
    from library.training.averaging.snapshot_files import snapshot_metadata
    from library.training.saving.model_file import time_of_saving
    from networks import adapter_files
    from networks.arithmetic.result_metadata import without_hashes

    like = [snapshot for snapshot in snapshots if snapshot.profile.step <= wanted.step][-1]
    headers = [snapshot.header for snapshot in snapshots]
    tensors = weighted_sum(headers, combination.shares, like.header, _DTYPES[precision] if precision else None)
    before = dict(like.header.metadata)
    metadata = without_hashes(before) | snapshot_metadata(wanted, combination.error)
    metadata["modelspec.date"] = time_of_saving().replace(microsecond=0).isoformat()
    if "ss_steps" in metadata:
        metadata["ss_steps"] = str(wanted.step)
    if without_hashes(before) == before:
        write_safetensors(file, tensors, metadata)
    else:  # only adapters have hashes of their tensors
        adapter_files.write(file, {name: lazy.load() for name, lazy in tensors.items()}, metadata)
    return len(tensors)


TOOL = Tool(
    "Make the average of any width out of the snapshots of a training with --posthoc_ema_snapshots.",
    "python tools/posthoc_ema.py FOLDER --sigma_rel 0.15 --save_to FILE [--step N] [--save_precision fp16]",
    PosthocOptions,
    work,
    required={
        "snapshots": "give the folder of a run's snapshots: posthoc_ema.py output/dog-posthoc_ema",
        "sigma_rel": "give the relative width: --sigma_rel 0.15",
        "save_to": "give the new file: --save_to output/dog_posthoc.safetensors",
    },
    check=check,
    positional=("snapshots",),
)


def main(words: Sequence[str] | None = None) -> int:
    """Make one average. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
