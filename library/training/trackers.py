"""Who follows a run: TensorBoard, Weights & Biases and webhooks. Chosen without importing them, then started."""

from __future__ import annotations

import importlib.util
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.bounded import toml_of
from library.messages import pip_install
from library.options.flag import Flag
from library.options.groups.run import RunOptions
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.rules.apply_rules import DEFAULT
from library.options.sources import COMMAND_LINE
from library.options.text_files import FileKind, other_kind, read_text
from library.options.train_options import FLAGS, TrainOptions, values_of
from library.training.events.webhook_config import Webhook, decide_webhooks

if TYPE_CHECKING:
    from accelerate import Accelerator

_NAMES: Mapping[str, tuple[str, ...]] = {
    "": (),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "all": ("tensorboard", "wandb"),
}


_SETTINGS = FileKind("a file of settings of trackers", "pass it as --log_tracker_config")


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run (accelerate's names), --logging_dir, the settings of each from --log_tracker_config, and
    webhooks."""

    names: tuple[str, ...] = ()
    folder: Path | None = None
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    webhooks: tuple[Webhook, ...] = ()


def decide_trackers(options: RunOptions, origin: str, mistakes: Mistakes, notes: list[str]) -> Trackers:
    """Without --log_with, a --logging_dir means tensorboard. wandb needs no folder.

    `origin` is that of --log_with. If a file asks for wandb, which is not installed, tensorboard is used and a note
    added, unless --strict is set: presets of front-ends hold it.
    """
    by_folder = "tensorboard" if options.logging_dir else ""
    names = _NAMES[options.log_with or by_folder]
    from_file = origin not in (COMMAND_LINE, DEFAULT)
    if "wandb" in names and from_file and not options.strict and importlib.util.find_spec("wandb") is None:
        names = _NAMES[by_folder]
        instead = "the run is logged for tensorboard" if names else "nothing is logged"
        notes.append(
            f'--log_with = "{options.log_with}" ({origin}): the package wandb is not installed, so {instead}; to '
            f"install it: {pip_install('wandb')}"
        )
    for name in names:
        if importlib.util.find_spec(name) is None:
            what = f"--log_with {options.log_with or name}: the package {name} is not installed"
            mistakes.add(what, pip_install(name))
    settings = _read_settings(options.log_tracker_config, mistakes) if names else {}
    return Trackers(names, options.logging_dir, settings, decide_webhooks(options.webhook_config, mistakes))


def _read_settings(path: Path | None, mistakes: Mistakes) -> Mapping[str, Mapping[str, object]]:
    """Read --log_tracker_config: a TOML file with a table per tracker."""
    if path is None:
        return {}
    named, remedy = f"--log_tracker_config {path}", "use a TOML file with a table per tracker, such as [wandb]"
    text = read_text(path, named)
    if isinstance(text, Mistake):
        mistakes.extend([text])
        return {}
    if (other := other_kind(named, text, _SETTINGS)) is not None:
        mistakes.extend([other])
        return {}
    try:
        tables = toml_of(text)
    except tomllib.TOMLDecodeError as error:
        mistakes.add(f"{named} is not valid TOML: {error}", remedy)
        return {}
    unknown = [name for name, table in tables.items() if name not in _NAMES["all"] or not isinstance(table, dict)]
    if unknown:
        mistakes.add(f"{named}: {', '.join(unknown)} is not the table of a tracker", remedy)
        return {}
    return tables


def run_folder(trackers: Trackers, prefix: str | None) -> Path | None:
    """The log folder of a run that starts now, `logging_dir/[log_prefix]YYYYmmddHHMMSS`; None without --logging_dir."""
    return trackers.folder and Path(f"{trackers.folder}/{prefix or ''}{time.strftime('%Y%m%d%H%M%S')}")


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Keep threads of TensorBoard from printing tracebacks: what is logged next raises their error."""
    before = threading.excepthook

    def print_others(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            before(failed)

    threading.excepthook = print_others
    try:
        yield
    finally:
        threading.excepthook = before


def start(accelerator: Accelerator, trackers: Trackers, folder: Path | None, options: TrainOptions) -> None:
    """Start the trackers, which log to `folder`. Raises UserError if one of them fails."""
    settings = {name: dict(trackers.settings.get(name, {})) for name in trackers.names}
    if "wandb" in settings and folder is not None:
        settings["wandb"].setdefault("dir", str(folder))
    if "wandb" in settings and options.run.wandb_run_name:
        settings["wandb"].setdefault("name", options.run.wandb_run_name)
    config = logged_options(options) if options.run.log_config else None
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        if "wandb" in settings and options.run.wandb_api_key:
            importlib.import_module("wandb").login(key=options.run.wandb_api_key)
        accelerator.init_trackers(options.run.log_tracker_name or _tracker_name(options), config, settings)
    except Exception as error:  # each tracker raises its own types
        what = f"{' and '.join(trackers.names)} could not be started: {error}"
        remedy = "check --logging_dir, --log_tracker_name and --log_tracker_config, or remove --log_with"
        raise UserError((Mistake(what, remedy),)) from error


def _tracker_name(options: TrainOptions) -> str:
    """The default names of kohya's scripts."""
    return "network_train" if options.adapter.network_module else "dreambooth"


def logged_options(options: TrainOptions) -> dict[str, int | float | str | bool]:
    """The options that --log_config logs: all that are set, except paths, private ones and secrets."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in values_of(options).items()
        if value is not None and not _is_withheld(FLAGS[name])
    }


def _is_withheld(flag: Flag) -> bool:
    return flag.secret or flag.private or flag.kind in ("path", "paths", "path or URL")
