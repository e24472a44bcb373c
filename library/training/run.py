"""Open a run: accelerator, global seed, console and trackers, in one context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """The accelerator, console, trackers and processes of a run.

    `listeners` are called with all values that are logged, also in a run without trackers.
    """

    accelerator: Accelerator
    console: Console
    is_tracked: bool = False
    processes: Processes = Processes()
    listeners: list[Callable[[Mapping[str, float]], None]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """The device that the run computes on."""
        device: torch.device = self.accelerator.device
        return device

    def say(self, text: str) -> None:
        """Write a log line."""
        self.console.say(text)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log values to the trackers, if there are any. `step`: of some names the number of the epoch."""
        for listen in self.listeners:
            listen(values)
        if self.is_tracked:
            self.accelerator.log(values, step=step)

    def log_images(self, images: Mapping[str, Image], step: int) -> None:
        """Log images to the trackers, if there are any, each under its name."""
        import numpy

        for tracker in self.accelerator.trackers:
            # arrays are (1, height, width, 3); TensorBoard expects channels first by default
            arguments = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            arrays = {name: numpy.asarray(image)[None] for name, image in images.items()}
            tracker.log_images(arrays, step=step, **arguments)


@contextmanager
def open_run(options: TrainOptions, run_trackers: Trackers, mixed_precision: str, seed: int) -> Iterator[Run]:
    """Open the accelerator and the trackers and seed the global generators. The trackers are always closed at the end.

    Raises UserError if a tracker cannot be started.
    """
    with large_imports():
        from accelerate import Accelerator
        from accelerate.utils import set_seed

    folder = trackers.run_folder(run_trackers, options.run.log_prefix)
    names = list(run_trackers.names)
    accelerator = Accelerator(mixed_precision=mixed_precision, log_with=names or None, project_dir=folder)
    set_seed(seed % 2**32)
    if names:
        trackers.start(accelerator, run_trackers, folder, options)
    try:
        yield Run(accelerator, Console(options.run), bool(names), Processes.current())
    finally:
        accelerator.end_training()
