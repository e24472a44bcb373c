"""The run itself: where options come from, how long it lasts, what it logs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.flag import flag


@dataclass(frozen=True)
class RunOptions:
    """Length, seed, logs, and what to do instead of training."""

    may_change_on_resume: ClassVar[bool] = True  # the seed is a fact of its own: it may have been drawn

    config_file: Path | None = flag(
        None,
        "TOML file with options; .toml may be left out. What stands on the command line beats the file.",
        only_on_command_line=True,
    )
    output_config: bool = flag(
        False, "Write the options of this command to the file named by config_file and stop.", only_on_command_line=True
    )
    dry_run: bool = flag(False, "Decide everything, print the plan of the run, and stop before the model is loaded.")
    strict: bool = flag(False, "Refuse what this machine lacks instead of replacing it by something equivalent.")
    seed: int | None = flag(
        None,
        "Seed of everything random; the same seed gives the same run. Not set = a new one each time.",
        at_least=0,
        metadata="ss_seed",
    )
    max_train_steps: int = flag(
        1600, "Length of the training in optimiser steps.", at_least=1, zero_is_off=True, metadata="ss_max_train_steps"
    )
    max_train_epochs: int | None = flag(
        None, "Length of the training in epochs; beats max_train_steps.", at_least=1, zero_is_off=True
    )
    logging_dir: Path | None = flag(
        None, "Folder for logs; each run gets a folder of its own in it. Given alone it means log_with tensorboard."
    )
    log_with: str | None = flag(
        None, "Where losses and learning rates are logged to.", choices=("tensorboard", "wandb", "all")
    )
    log_prefix: str | None = flag(None, "Put before the date in the name of a run's log folder.")
    log_tracker_name: str | None = flag(
        None, "Name of the run's tracker; not set = dreambooth, or network_train for an adapter."
    )
    log_tracker_config: Path | None = flag(None, "TOML file with settings for the trackers.")
    wandb_run_name: str | None = flag(None, "Name of the run in wandb.")
    wandb_api_key: str | None = flag(None, "Key for wandb; it is not shown, written or logged anywhere.", secret=True)
    log_config: bool = flag(False, "Log the options of the run too.")
    console_log_file: Path | None = flag(None, "Write the messages of the console to this file.")
    console_log_level: str | None = flag(
        None,
        "Least severe messages that are shown; not set = INFO.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_simple: bool = flag(False, "Show messages as plain lines without colours or columns.")
