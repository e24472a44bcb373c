"""Checks before the first step that everything a run writes can be written."""

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
_LONGEST_SUFFIX = "-step00000000.safetensors"  # of --output_name in file names


def check_writable_paths(options: TrainOptions, mistakes: Mistakes) -> None:
    """Check that --output_dir, --logging_dir and --console_log_file can be written."""
    check_output_folder(options.saving, mistakes)
    check_logs(options.run, mistakes)


def check_output_folder(saving: SavingOptions, mistakes: Mistakes) -> None:
    """Check that files with the names of this run can be created in --output_dir, which need not exist."""
    if saving.output_dir is None:
        return  # reported by the rules of the options
    problem = write_problem(saving.output_dir)
    if problem is not None:
        remedy = "use another folder, or make this one writable"
        mistakes.add(f"--output_dir {saving.output_dir} cannot be written: {problem}", remedy)
        return
    name = saving.output_name or "epoch"
    problem = file_name_problem(name, on_windows=os.name == "nt")
    if problem is None:
        problem = write_problem((saving.output_dir / name).parent, Path(name).name + _LONGEST_SUFFIX)
    if problem is not None:
        mistakes.add(f"--output_name {name} cannot be used: {problem}", "use another name")


def file_name_problem(name: str, *, on_windows: bool) -> str | None:
    """Why `name` is not a valid file name, or None. On Windows a colon would name a stream of another file."""
    if name.endswith(("/", "\\") if on_windows else "/"):
        return f"it ends with {name[-1]}"
    invalid = [letter for letter in Path(name).name if letter < " " or (on_windows and letter in _NOT_ON_WINDOWS)]
    return f"it contains {invalid[0]!r}" if invalid else None


def check_final_model(outputs: Outputs, mistakes: Mistakes) -> None:
    """Check that no final model replaces a folder, or a file, or a folder that is not a model, and that snapshots of
    averages have a folder."""
    for path in outputs.models(outputs.final_stem()):
        _check_model(path, outputs, mistakes)
    folder = outputs.snapshot_folder
    if folder is not None and os.path.isfile(folder):
        remedy = "use another --output_name, or move it away"
        mistakes.add(f"--posthoc_ema_snapshots cannot use the folder {folder}: there is a file with that name", remedy)


def _check_model(path: Path, outputs: Outputs, mistakes: Mistakes) -> None:
    is_folder, is_file = os.path.isdir(path), os.path.isfile(path)  # as methods of Path they raise for a long name
    remedy = "use another --output_name, or move it away"
    if outputs.extension and is_folder:
        mistakes.add(f"the model cannot be saved as {path}: there is a folder with that name", remedy)
    elif not outputs.extension and is_file:
        mistakes.add(f"the model cannot be saved as the folder {path}: there is a file with that name", remedy)
    elif not outputs.extension and is_folder and any(path.iterdir()) and not (path / "model_index.json").is_file():
        mistakes.add(f"the model cannot replace the folder {path}: it contains something other than a model", remedy)


def check_logs(run: RunOptions, mistakes: Mistakes) -> None:
    """Check that --logging_dir and --console_log_file can be written."""
    if run.logging_dir is not None and (problem := write_problem(run.logging_dir)):
        mistakes.add(f"--logging_dir {run.logging_dir} cannot be written: {problem}", "use another folder")
    file = run.console_log_file
    if file is None:
        return
    problem = "it is a folder" if os.path.isdir(file) else write_problem(file.parent, file.name)
    if problem:
        mistakes.add(f"--console_log_file {file} cannot be written: {problem}", "use another file")


def write_problem(folder: Path, name: str = "write-test") -> str | None:
    """Why a file called `name` cannot be written to `folder` (a file is in the way, no permission, the name is too
    long), or None.

    Nothing is left behind: an existing folder is probed with an empty file, which is removed at once.
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
