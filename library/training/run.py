"""What surrounds a run: accelerator, global seed, console log, trackers; one context manager."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.runtime.imports import large_imports
from library.training import trackers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

    from library.options.groups.run import RunOptions
    from library.options.train_options import TrainOptions
    from library.training.trackers import Trackers

LOGGER = logging.getLogger("dreamfolder")


@dataclass
class Run:
    """The accelerator of a run, and the log function (values, step) of its trackers."""

    accelerator: Accelerator
    is_tracked: bool

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand values to the trackers; without trackers this does nothing."""
        if self.is_tracked:
            self.accelerator.log(values, step=step)

    def log_images(self, images: Mapping[str, Image], step: int) -> None:
        """Hand images to the trackers, each under its name; without trackers this does nothing."""
        import numpy

        for tracker in self.accelerator.trackers:
            # rows of (1, height, width, 3), which TensorBoard must be told
            arguments = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            rows = {name: numpy.asarray(image)[None] for name, image in images.items()}
            tracker.log_images(rows, step=step, **arguments)


@contextmanager
def open_run(options: TrainOptions, tracked_by: Trackers, mixed_precision: str, seed: int) -> Iterator[Run]:
    """Open accelerator and trackers, seed the global generators, and close the trackers at the end, come what may.

    Raises UserError when a tracker cannot be started.
    """
    with large_imports():
        from accelerate import Accelerator
        from accelerate.utils import set_seed

    folder = trackers.run_folder(tracked_by, options.run.log_prefix)
    names = list(tracked_by.names)
    accelerator = Accelerator(mixed_precision=mixed_precision, log_with=names or None, project_dir=folder)
    set_seed(seed % 2**32)
    if names:
        trackers.start(accelerator, tracked_by, folder, options)
    try:
        yield Run(accelerator, bool(names))
    finally:
        accelerator.end_training()


def set_up_console(options: RunOptions) -> None:
    """Send the log to --console_log_file or to stderr, at --console_log_level."""
    handler: logging.Handler = logging.StreamHandler()
    if options.console_log_file:
        options.console_log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(options.console_log_file, mode="w", encoding="utf-8")
    text = "%(message)s" if options.console_log_simple else "%(asctime)s %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(text, datefmt="%Y-%m-%d %H:%M:%S"))
    LOGGER.handlers = [handler]
    LOGGER.setLevel(options.console_log_level or "INFO")
    LOGGER.propagate = False
