"""Open a run: accelerator, global seed, console, events and trackers, in one context manager."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.runtime.imports import large_imports
from library.runtime.processes import Processes
from library.runtime.signals import StoppedAside, StopRequest
from library.training import trackers
from library.training.console import Console
from library.training.ending import memory_in_use, size_of
from library.training.events.events import Events, lifecycle, type_of_values

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from PIL.Image import Image

    from library.options.train_options import TrainOptions
    from library.sampling.prompts import ImageRequest
    from library.training.trackers import Trackers

Say = Callable[[str], None]
SavedKind = Literal["model", "state"]


@dataclass(frozen=True)
class DrawnImage:
    """An image that was drawn for `request`, with the seed that it got, and the file that it was written to. `about`:
    more that its event says."""

    image: Image
    request: ImageRequest
    path: Path
    about: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Run:
    """The accelerator, console, trackers, processes and events of a run. What is said, logged, drawn and saved comes
    through here, and becomes an event.

    `listeners` are called with all values that are logged, also in a run without trackers; `saving_listeners` with each
    model and training state that is complete. `stop`: whether the user, or a scheduler, wants the run to stop after its
    step.
    """

    accelerator: Accelerator
    console: Console
    is_tracked: bool = False
    processes: Processes = Processes()
    events: Events = field(default_factory=Events)
    listeners: list[Callable[[Mapping[str, float]], None]] = field(default_factory=list)
    saving_listeners: list[Callable[[Path, SavedKind], None]] = field(default_factory=list)
    stop: StopRequest = field(default_factory=StopRequest)

    def check_stop(self) -> None:
        """Give up what is computed beside the training, if the run is to stop: the run that resumes it does that again.
        Called between its parts. Of several processes none gives up alone: the others would wait for it."""
        if self.stop and self.processes.world == 1:
            raise StoppedAside

    @contextmanager
    def autocast_aside(self) -> Iterator[None]:
        """accelerate's autocast, for computations beside the training."""
        self.check_stop()
        with self.accelerator.autocast():
            yield

    @property
    def device(self) -> torch.device:
        """The device that the run computes on."""
        device: torch.device = self.accelerator.device
        return device

    def say(self, text: str) -> None:
        """Write a log line."""
        self.console.say(text)
        self.events.emit("notification", {"message": text})

    def warn(self, text: str) -> None:
        """Write a log line about something that went wrong, or may, and did not end the run."""
        self.console.say(text, logging.WARNING)
        self.events.emit("notification", {"message": text, "severity": "warning"})

    def log(self, values: dict[str, float], step: int) -> None:
        """Log values to the trackers, if there are any. `step` is the place on their axis: of some names the number of
        the epoch."""
        for listen in self.listeners:
            listen(values)
        if self.is_tracked:
            with self._tracking():
                self.accelerator.log(values, step=step)
        if self.events.sinks:
            kind = type_of_values(values)
            state = self._state(values) if kind == "training.status" else {}
            of_step = "loss" in values or "loss/current" in values  # which may have been read late
            data = {"epoch": self.events.progress.epoch, "values": values} | state
            self.events.emit(kind, data, step if of_step else None)

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        """Trackers that fail (a disk that is full or gone, a service that is away) are told of and no longer used: they
        are no reason to end a run."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each tracker raises its own types
            if not self.is_tracked:  # told before
                return
            self.is_tracked = False
            names = " and ".join(tracker.name for tracker in self.accelerator.trackers)
            self.warn(f"{names} failed and is no longer used, the training goes on: {type(error).__name__}: {error}")

    def end(self) -> None:
        """Close the trackers."""
        with self._tracking() if self.accelerator.trackers else nullcontext():
            self.accelerator.end_training()

    def _state(self, values: Mapping[str, float]) -> dict[str, object]:
        """What a training.status event holds besides the values of a step."""
        pace, loss = self.console.pace(), values.get("loss", values.get("loss/current"))
        return {
            **({} if loss is None else {"loss": loss}),
            **({} if pace is None else {"seconds_per_step": pace[0], "remaining_seconds": pace[1]}),
            **memory_in_use(self.device),
        }

    def saved(self, path: Path, kind: SavedKind) -> None:
        """Note that a model or a training state was saved."""
        self.events.emit("training.checkpoint", {"path": str(path), "bytes": size_of(path), "kind": kind})
        for listen in self.saving_listeners:
            listen(path, kind)

    def log_images(self, drawn: Mapping[str, DrawnImage], step: int, *, to_trackers: bool = True) -> None:
        """Log images to the trackers, if there are any, each under its name. Without `to_trackers` they are events."""
        for name, each in drawn.items():
            request = each.request
            size = {"width": each.image.width, "height": each.image.height}
            data: dict[str, object] = {
                "name": name,
                "path": str(each.path),
                "prompt": request.prompt,
                "seed": request.seed,
            }
            self.events.emit("validation.image", {**data, **size, **each.about})
        import numpy

        for tracker in self.accelerator.trackers if to_trackers and self.is_tracked else ():
            # arrays are (1, height, width, 3); TensorBoard expects channels first by default
            arguments = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            arrays = {name: numpy.asarray(each.image)[None] for name, each in drawn.items()}
            with self._tracking():
                tracker.log_images(arrays, step=step, **arguments)


@contextmanager
def without_variable(name: str) -> Iterator[None]:
    """While this is open, the environment lacks a variable."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


@contextmanager
def open_run(
    options: TrainOptions,
    run_trackers: Trackers,
    mixed_precision: str,
    seed: int,
    open_events: Callable[[Say], Events],
    agreeing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Run]:
    """Open the accelerator, the events and the trackers, and seed the global generators. Events and trackers are always
    closed at the end, and there on the writing process only, on which `open_events(say)` is called. What is raised goes
    through `agreeing`, where several processes agree on one error (Meeting.agreeing).

    Raises UserError if a tracker cannot be started.
    """
    with large_imports():
        import torch
        from accelerate import Accelerator
        from accelerate.utils import set_seed

    processes = Processes.current()
    folder = trackers.run_folder(run_trackers, options.run.log_prefix) if processes.is_writer else None
    names = list(run_trackers.names) if processes.is_writer else []
    # the plan has read them: sharding/
    with without_variable("ACCELERATE_USE_FSDP"), without_variable("ACCELERATE_USE_DEEPSPEED"):
        accelerator = Accelerator(
            # accelerate takes several processes without a GPU for single ones, unless it is told so
            cpu=processes.world > 1 and not torch.cuda.is_available(),
            mixed_precision=mixed_precision,
            log_with=names or None,
            project_dir=folder,
        )
    set_seed(seed % 2**32)
    console = Console(options.run, is_writer=processes.is_writer)
    events = open_events(console.say) if processes.is_writer else Events()
    with lifecycle(events), trackers.quiet_threads(), agreeing():
        if names:
            trackers.start(accelerator, run_trackers, folder, options)
        run = Run(accelerator, console, bool(names), processes, events)
        try:
            yield run
        finally:
            run.end()
