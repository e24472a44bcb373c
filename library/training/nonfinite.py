"""Steps whose loss or gradient is not finite: named, skipped if the user allows it, and told from fp16 overflow.

A skipped step counts, but leaves weights, optimizer and schedule as they are, like a step whose files cannot be read.
With a gradient scaler, gradients that overflow fp16 are normal: the scaler skips the step and halves its scale. Those
that are not finite at a scale of 1 or less are no overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch

from library.messages import counted, listed
from library.options.mistakes import Mistake, UserError

if TYPE_CHECKING:
    from library.runtime.processes import Processes
    from library.training.saving.state import Progress
    from library.training.trainable import Part

OVERFLOWS_TOLD = 10  # overflows of fp16 in a row that are told, and each as many more
REMEDY = (
    "lower --learning_rate or add a warm-up (--lr_warmup_steps), use --mixed_precision bf16 instead of fp16, "
    "--no_half_vae, or --max_grad_norm 1; --max_nonfinite_steps N skips up to N such steps in a row. Nothing was saved "
    "after this step; --resume continues from the last saved state"
)


class Samples(NamedTuple):
    """The samples of one batch: image files, losses (B,), and timesteps (B,), None if they are not known."""

    paths: tuple[str, ...]
    losses: torch.Tensor
    timesteps: torch.Tensor | None


@dataclass
class NonFinite:
    """Decides about steps that are not finite: up to `limit` in a row are skipped. Those in a row are part of the
    progress; `skipped` and `overflows` are those of this run."""

    limit: int
    processes: Processes
    warn: Callable[[str], None]
    parts: Sequence[Part] = ()
    skipped: int = 0
    overflows: int = 0
    _overflows_in_a_row: int = 0

    def skip(self, what: str, samples: Iterable[Samples], progress: Progress) -> None:
        """Count and name a step whose loss or gradient (`what`) is not finite. All ranks must call. Raises UserError if
        it is one too many in a row."""
        said = f"the {what} is not finite at step {progress.step + 1} (epoch {progress.epoch}): "
        said += self._named(samples)
        progress.nonfinite += 1
        if progress.nonfinite > self.limit:
            if progress.nonfinite > 1:
                said += (
                    f", as in the {counted(progress.nonfinite - 1, 'step')} before (--max_nonfinite_steps {self.limit})"
                )
            if broken := self._broken_weights():
                said += f"; weights that are not finite since an earlier step: {listed(broken, 5)}"
            raise UserError((Mistake(said, REMEDY),))
        self.skipped += 1
        self.warn(f"{said}; the step is skipped, {progress.nonfinite} in a row of at most {self.limit}")

    def cut_off(self, samples: Iterable[Samples], progress: Progress) -> NoReturn:
        """End a run whose gradient turned out not to be finite after some weights were updated. Raises UserError."""
        said = f"the gradient is not finite at step {progress.step + 1} (epoch {progress.epoch}): "
        raise UserError((Mistake(said + self._named(samples), REMEDY),))

    def _named(self, samples: Iterable[Samples]) -> str:
        """Images and timesteps of all ranks whose loss is not finite; all of them if every loss is finite."""
        every = [each for batch in samples for each in _each(batch)]
        own = [text for text, is_finite in every if not is_finite] or [text for text, _ in every]
        anywhere = self.processes.gather((own, any(not is_finite for _, is_finite in every)))
        chosen = [part for part, is_at_fault in anywhere if is_at_fault] or [part for part, _ in anywhere]
        return listed([text for part in chosen for text in part], 5) or "no image"

    def _broken_weights(self) -> list[str]:
        return [
            f"{part.name}.{name}"
            for part in self.parts
            for name, weight in part.module.named_parameters()
            if weight.is_floating_point() and weight.numel() and not bool(weight.detach().isfinite().all())
        ]

    def stepped(self, progress: Progress) -> None:
        """Note that a step was taken."""
        progress.nonfinite = 0
        self._overflows_in_a_row = 0

    def overflowed(self, scaler: Any, samples: Iterable[Samples], progress: Progress) -> None:
        """Count a step that the gradient scaler has skipped, and tell of many in a row. Raises UserError as `skip`
        does if that was no overflow of fp16."""
        scale = float(scaler.get_scale())  # halved already
        if scale < 1:
            self.skip(f"gradient (with loss scale {2 * scale:g})", samples, progress)
            return
        self.overflows += 1
        self._overflows_in_a_row += 1
        if self._overflows_in_a_row % OVERFLOWS_TOLD == 0:
            self.warn(
                f"step {progress.step + 1}: gradients overflowed fp16 in {self._overflows_in_a_row} steps in a row, "
                f"which were skipped; the loss scale is {scale:g} now. Consider --mixed_precision bf16"
            )

    def report(self) -> Iterator[str]:
        """Lines for the end of the run."""
        if self.skipped:
            yield f"skipped, as loss or gradient was not finite: {counted(self.skipped, 'step')}"
        if self.overflows:
            skipped = counted(self.overflows, "step")
            yield f"skipped by the loss scale of fp16, which is normal at the beginning: {skipped}"


def _each(batch: Samples) -> Iterator[tuple[str, bool]]:
    """Each sample of a batch as text, and whether its loss is finite."""
    losses = batch.losses.tolist()
    timesteps = [None] * len(losses) if batch.timesteps is None else batch.timesteps.tolist()
    for path, loss, timestep in zip(batch.paths, losses, timesteps, strict=True):
        at = "" if timestep is None else f", timestep {timestep:g}"
        yield f"{path} (loss {loss:g}{at})", math.isfinite(loss)
