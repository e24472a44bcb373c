"""What the events of a run come to: where it is, its curves, images and messages."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from library.training.events.events import Event
from library.watch.curves import Curve

PACE_AND_MEMORY = {
    "seconds_per_step": ("speed", "seconds per step"),
    "memory_bytes": ("memory", "memory"),
    "gpu_memory_bytes": ("memory", "GPU memory"),
}
"""Entries of a training.status that are curves: the chart and the name of each."""

SAME = {"loss/current": "loss", "loss/epoch_average": "loss/epoch"}
"""Names of the training loss in runs of adapters, and those in other runs: one curve, so that runs can be compared."""


@dataclass(frozen=True)
class Drawn:
    """An image of a step. `key` names it in addresses; `path` is as the run wrote it. `label`: how far it is, such as
    "5/20" steps of the sampler, if it is a picture of an image that is being drawn."""

    step: int
    key: str
    path: str
    label: str = ""


@dataclass
class Prompt:
    """The images of a prompt, in the order in which they were drawn. `name` is its place among the prompts, with the
    version of the weights. `so_far`: the last picture of the image that is being drawn."""

    name: str
    text: str
    images: list[Drawn] = field(default_factory=list)
    so_far: Drawn | None = None

    def __iter__(self) -> Iterator[Drawn]:
        """All that can be shown."""
        yield from self.images
        if self.so_far is not None:
            yield self.so_far


@dataclass(frozen=True)
class Message:
    """A line that the run said. `time`: seconds since 1970."""

    step: int
    time: float
    text: str
    is_warning: bool = False


@dataclass
class RunState:
    """A run as its events tell it.

    `stage`: started, resumed, finished, interrupted or failed; "" before the first event. `ending`: why it failed, or
    what it said when it was interrupted. `start`: data of the event that it began or was resumed with. `status`: data
    of the last training.status. `curves` by chart and name. Times are seconds since 1970.
    """

    stage: str = ""
    ending: str = ""
    step: int = 0
    began: float = 0.0
    last: float = 0.0
    start: Mapping[str, Any] = field(default_factory=dict)
    status: Mapping[str, Any] = field(default_factory=dict)
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    prompts: dict[tuple[str, str], Prompt] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    checkpoints: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Take in an event. What is not as docs/events.md says is passed over: a record may come from anywhere."""
        self.last = event.time.timestamp()
        if event.type == "lifecycle.stage":
            self._begin_or_end(event)
        elif event.type == "training.status":
            self._status(event)
        elif event.type == "evaluation":
            self._values(event)
        elif event.type == "validation.image":
            self._image(event)
        elif event.type == "training.checkpoint":
            self.checkpoints.append((event.step, event.data))
        elif event.type == "notification":
            is_warning = event.data.get("severity") == "warning"
            self.messages.append(Message(event.step, self.last, _text(event, "message"), is_warning))
        elif event.type == "error":
            self.stage, self.ending = "failed", _text(event, "message")
        self.step = max(self.step, event.step)

    def _begin_or_end(self, event: Event) -> None:
        self.stage, self.ending = _text(event, "stage"), _text(event, "message")
        if self.stage in ("started", "resumed"):
            self._rewind(event.step if self.stage == "resumed" else -1)
            self.start, self.began = event.data, self.last

    def _rewind(self, step: int) -> None:
        """Forget what was about steps after `step`, and how the run ended: it is done again."""
        for curve in self.curves.values():
            curve.rewind(step)
        self.curves = {name: curve for name, curve in self.curves.items() if curve.steps or curve.not_finite}
        for prompt in self.prompts.values():
            prompt.images = [image for image in prompt.images if image.step <= step]
            prompt.so_far = prompt.so_far if prompt.so_far and prompt.so_far.step <= step else None
        self.prompts = {name: prompt for name, prompt in self.prompts.items() if any(prompt)}
        self.messages = [message for message in self.messages if message.step <= step]
        self.checkpoints = [saved for saved in self.checkpoints if saved[0] <= step]
        self.step, self.status = max(step, 0), {}

    def _status(self, event: Event) -> None:
        self._values(event)
        self.status = {**self.status, **event.data}
        for name, (chart, label) in PACE_AND_MEMORY.items():
            if name in event.data:
                self._point(chart, label, event.step, event.data[name])

    def _values(self, event: Event) -> None:
        values = event.data.get("values")
        for name, value in values.items() if isinstance(values, dict) else ():
            chart = chart_of(name, is_status=event.type == "training.status")
            self._point(chart, SAME.get(str(name), str(name)), event.step, value)

    def _point(self, chart: str, name: str, step: int, value: object) -> None:
        if value is not None and not isinstance(value, (int, float)):
            return
        try:
            number = math.nan if value is None else float(value)  # records have null for NaN and infinite numbers
        except OverflowError:  # JSON has whole numbers of any length
            number = math.nan
        curve = self.curves.get((chart, name))
        if curve is None:
            curve = self.curves[chart, name] = Curve()
        curve.append(step, number)

    def _image(self, event: Event) -> None:
        name, path, text = (_text(event, key) for key in ("name", "path", "prompt"))
        label = _text(event, "step_label")
        if label:  # so_far/00_ema/05 will be sample/00_ema
            name = re.sub(r"^so_far/(.*)/.*", r"sample/\1", name)
        key = hashlib.sha256(path.encode("utf-8", "replace")).hexdigest()[:20]
        prompt = self.prompts.setdefault((name, text), Prompt(name, text))
        drawn = Drawn(event.step, key, path, label)
        prompt.so_far = drawn if label else None
        prompt.images += [] if label else [drawn]


def _text(event: Event, key: str) -> str:
    return str(event.data.get(key) or "")


@cache
def chart_of(name: str, *, is_status: bool) -> str:
    """The chart that a logged value belongs to, by its name: the curves of a chart share a scale."""
    head, _, rest = name.partition("/")
    if name.startswith("evaluation/clip_score"):
        return "CLIP score"  # a hundred times a cosine: beside it the other measures would be a level line
    if head != "loss":
        return {"lr": "learning rate"}.get(head, head)
    if is_status:
        return "loss"
    if "divergence" in rest:
        return "divergence"
    if found := re.fullmatch(r"(?:.*/)?(.*)_t\d+_\d+(.*)", rest):
        return f"{found[1]}{found[2]} by timestep"
    return "validation loss"
