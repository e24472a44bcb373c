"""Whether what a run writes can be written: tried out before the first step, not found out after the last one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from library.options.groups.run import RunOptions
from library.options.groups.saving import SavingOptions
from library.options.mistakes import Mistakes
from library.options.train_options import TrainOptions
from library.training.plan.costs import nearest_existing
from library.training.saving.outputs import Outputs

_NOT_ON_WINDOWS = frozenset('<>:"|?*')
_LONGEST_ADDITION = "-step00000000.safetensors"  # to --output_name, in the names of files


def check_places(options: TrainOptions, mistakes: Mistakes) -> None:
    """--output_dir, --logging_dir and --console_log_file can be written, under the names to come."""
    check_output_folder(options.saving, mistakes)
    check_logs(options.run, mistakes)


def check_output_folder(saving: SavingOptions, mistakes: Mistakes) -> None:
    """Files with the names of this run can be made in --output_dir, which need not exist."""
    if saving.output_dir is None:
        return  # the options' own rules say that it is required
    refusal = write_problem(saving.output_dir)
    if refusal is not None:
        remedy = "give another folder, or make this one writable"
        mistakes.add(f"--output_dir {saving.output_dir} cannot be written: {refusal}", remedy)
        return
    name = saving.output_name or "epoch"
    refusal = file_name_problem(name, on_windows=os.name == "nt")
    if refusal is None:
        refusal = write_problem((saving.output_dir / name).parent, Path(name).name + _LONGEST_ADDITION)
    if refusal is not None:
        mistakes.add(f"--output_name {name} cannot name files: {refusal}", "give another name")


def file_name_problem(name: str, on_windows: bool) -> str | None:
    """Why no file can be called so, or None. Windows would take a colon for a hidden part of another file."""
    if name.endswith(("/", "\\") if on_windows else "/"):
        return "it ends like a folder"
    bad = [letter for letter in Path(name).name if letter < " " or (on_windows and letter in _NOT_ON_WINDOWS)]
    return f"it holds {bad[0]!r}" if bad else None


def check_final_model(outputs: Outputs, mistakes: Mistakes) -> None:
    """No folder stands where a file is to be, no file where a folder, and no folder of something else."""
    path = outputs.final_model()
    is_folder, is_file = os.path.isdir(path), os.path.isfile(path)  # as methods of Path they raise for a long name
    remedy = "give another --output_name, or move it away"
    if outputs.extension and is_folder:
        mistakes.add(f"the model is to be the file {path}, and a folder of that name is there", remedy)
    elif not outputs.extension and is_file:
        mistakes.add(f"the model is to be the folder {path}, and a file of that name is there", remedy)
    elif not outputs.extension and is_folder and any(path.iterdir()) and not (path / "model_index.json").is_file():
        mistakes.add(f"the model is to replace the folder {path}, which holds something else than a model", remedy)


def check_logs(run: RunOptions, mistakes: Mistakes) -> None:
    """--logging_dir and --console_log_file can be written."""
    if run.logging_dir is not None and (refusal := write_problem(run.logging_dir)):
        mistakes.add(f"--logging_dir {run.logging_dir} cannot be written: {refusal}", "give another folder")
    file = run.console_log_file
    if file is None:
        return
    refusal = "it is a folder" if os.path.isdir(file) else write_problem(file.parent, file.name)
    if refusal:
        mistakes.add(f"--console_log_file {file} cannot be written: {refusal}", "give another file")


def write_problem(folder: Path, name: str = "write-test") -> str | None:
    """Why no file called `name` can be written into `folder` (a file is in the way, no permission, the name is too
    long), or None.

    Nothing is left behind: an existing folder is probed with a file of no bytes that is removed at once.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()
        existing = nearest_existing(folder)
        if not existing.is_dir():
            return f"{existing} is a file, not a folder"
        probe = existing / f".{name}.{os.getpid()}.tmp"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None
