"""What surrounds a run: accelerator, global seed, console, trackers; one context manager."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.runtime.imports import large_imports
from library.runtime.processes import Processes
from library.training import trackers
from library.training.console import Console

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from PIL.Image import Image

    from library.options.train_options import TrainOptions
    from library.training.trackers import Trackers


@dataclass
class Run:
    """What every room of a run may need: the accelerator, the console, the trackers, and the other processes."""

    accelerator: Accelerator
    console: Console
    is_tracked: bool = False
    processes: Processes = Processes()

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        device: torch.device = self.accelerator.device
        return device

    def say(self, text: str) -> None:
        """Write a line for the user."""
        self.console.say(text)

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
        yield Run(accelerator, Console(options.run), bool(names), Processes.current())
    finally:
        accelerator.end_training()
