"""What surrounds a run: accelerator, global seed, console log, trackers; one context manager."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.mistakes import Mistake, UserError
from library.options.run import RunOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

LOGGER = logging.getLogger("dreamfolder")


@dataclass
class Run:
    """The accelerator of a run and its trackers' log function (values, step)."""

    accelerator: Accelerator
    logging_folder: Path | None

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand values to the trackers; without trackers this does nothing."""
        if self.logging_folder is not None:
            self.accelerator.log(values, step=step)


def logging_folder(options: RunOptions) -> Path | None:
    """`logging_dir / [log_prefix]YYYYmmddHHMMSS`, or None without --logging_dir."""
    if not options.logging_dir:
        return None
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"


@contextmanager
def open_run(options: RunOptions, mixed_precision: str, seed: int, config: Mapping[str, object]) -> Iterator[Run]:
    """Open accelerator and trackers, seed the global generators, and close the trackers at the end, come what may.

    `config` goes to the trackers when --log_config is set. Raises UserError when started as one of several processes.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    folder = logging_folder(options)
    tracker = tracker_names(options)
    accelerator = Accelerator(mixed_precision=mixed_precision, log_with=tracker or None, project_dir=folder)
    set_seed(seed % 2**32)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shown = {name: value for name, value in config.items() if options.log_config and value is not None}
        plain = {
            name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in shown.items()
        }
        accelerator.init_trackers(options.log_tracker_name or "dreambooth", plain, _tracker_settings(options))
    try:
        yield Run(accelerator, folder)
    finally:
        accelerator.end_training()


def tracker_names(options: RunOptions) -> list[str]:
    """The trackers to use: tensorboard when there is a logging_dir and nothing else is said; `all` means both."""
    if not options.logging_dir:
        return []
    return {"all": ["tensorboard", "wandb"], "wandb": ["wandb"]}.get(options.log_with or "", ["tensorboard"])


def _tracker_settings(options: RunOptions) -> dict[str, dict[str, object]]:
    """The content of --log_tracker_config, a TOML file with one table for each tracker."""
    if not options.log_tracker_config:
        return {}
    import tomllib

    try:
        return tomllib.loads(Path(options.log_tracker_config).read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        what = f"--log_tracker_config {options.log_tracker_config}: {error}"
        raise UserError((Mistake(what, "give a TOML file with a table named after the tracker"),)) from None


def quiet_libraries() -> None:
    """Libraries' remarks that no user can act on; what they raise still shows. Must run before they are imported."""
    for variable, level in (
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TF_CPP_MIN_LOG_LEVEL", "2"),
    ):
        os.environ.setdefault(variable, level)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def set_up_console(options: RunOptions) -> None:
    """Send the log to --console_log_file or to stderr, at --console_log_level."""
    handler: logging.Handler = logging.StreamHandler()
    if options.console_log_file:
        handler = logging.FileHandler(options.console_log_file, mode="w", encoding="utf-8")
    text = "%(message)s" if options.console_log_simple else "%(asctime)s %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(text, datefmt="%Y-%m-%d %H:%M:%S"))
    LOGGER.handlers = [handler]
    LOGGER.setLevel(options.console_log_level or "INFO")
    LOGGER.propagate = False
