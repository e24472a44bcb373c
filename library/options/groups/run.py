"""Options of the run itself: configuration file, length, seed and logs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.flag import flag


@dataclass(frozen=True)
class RunOptions:
    """Configuration file, length, seed, trackers and console."""

    may_change_on_resume: ClassVar[bool] = True  # the seed is compared on its own: it may have been drawn

    config_file: Path | None = flag(
        None,
        "File with options: TOML, or SimpleTuner's config.json; .toml and .json may be omitted. The command line "
        "overrides it.",
        only_on_command_line=True,
    )
    output_config: bool = flag(
        False, "Write the options of this command to config_file and stop.", only_on_command_line=True
    )
    dry_run: bool = flag(False, "Print the plan of the run and stop before the model is loaded.")
    strict: bool = flag(
        False, "Stop if this machine lacks something the options need, instead of replacing it by an equivalent."
    )
    allow_unknown_keys: bool = flag(
        False, "Train although config_file holds keys that this program does not know; they are listed in a note."
    )
    seed: int | None = flag(
        None,
        "Random seed: the same seed gives the same run; not set = a new one each time.",
        at_least=0,
        too_low="leave --seed out for a new one each time; the plan and the saved file show it",
        metadata="ss_seed",
    )
    max_train_steps: int = flag(
        1600, "Length of the training in optimizer steps.", at_least=1, zero_is_off=True, metadata="ss_max_train_steps"
    )
    max_nonfinite_steps: int = flag(
        0,
        "Skip up to this many steps in a row whose loss or gradient is not finite; the next one stops the run. 0 = the "
        "first one stops it.",
        at_least=0,
    )
    loss_read_interval: int | None = flag(
        None,
        "Read the losses of steps from the device together, after so many steps at most: each reading waits for it. "
        "Changes no result. Not set = 10, on the CPU 1, where reading is free.",
        at_least=1,
        zero_is_off=True,
    )
    max_train_epochs: int | None = flag(
        None, "Length of the training in epochs; overrides max_train_steps.", at_least=1, zero_is_off=True
    )
    logging_dir: Path | None = flag(
        None, "Folder for logs, with a new folder for each run. On its own it means log_with tensorboard."
    )
    log_with: str | None = flag(None, "Tracker for losses and learning rates.", choices=("tensorboard", "wandb", "all"))
    log_prefix: str | None = flag(None, "Prefix of the log folder's name, before the date.")
    log_tracker_name: str | None = flag(
        None, "Name of the tracker; not set = dreambooth, or network_train for an adapter."
    )
    log_tracker_config: Path | None = flag(None, "TOML file with settings for the trackers.")
    wandb_run_name: str | None = flag(None, "Name of the wandb run.")
    wandb_api_key: str | None = flag(None, "API key for wandb; never shown, written or logged.", secret=True)
    log_config: bool = flag(False, "Log the options of the run too.")
    webhook_config: Path | None = flag(
        None, "JSON file with the webhooks that the events of the run are sent to (docs/events.md); SimpleTuner's form."
    )
    console_log_file: Path | None = flag(None, "Write console messages to this file.")
    console_log_level: str | None = flag(
        None,
        "Lowest level of console messages to show; not set = INFO.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_simple: bool = flag(False, "Show console messages as plain lines, without colours or columns.")
