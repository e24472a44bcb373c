"""Names and times of the files and folders that a run writes, and which of them it removes again.

Names and removal rules are those of kohya's scripts, which users' tools expect: six digits in the names of epoch files,
eight in those of step files, and `save_last_n_steps` is a range of steps, not a number of files. Everything is a pure
function of the options and the length of the run: the plan lists the files, and the saver follows the same list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.options.groups.saving import SaveModelAs, SavingOptions
from library.options.mistakes import Mistakes
from library.training.averaging.plan import AveragesPlan


@dataclass(frozen=True)
class SaveEvent:
    """One save, after `step` optimizer steps and at the end of `epoch` (None: a save by steps).

    `expired_model` and `expired_state`: stems of the older files to remove afterwards.
    """

    step: int
    epoch: int | None
    expired_model: str | None
    expired_state: str | None


@dataclass(frozen=True)
class Outputs:
    """Names and times of everything that a run writes into `directory`. `suffixes`: the versions of the weights that
    are saved (see averaging/weights.py), each in a model of its own. `snapshots`: of post-hoc EMA, in a folder.
    `keeps_best`: whether the best models are kept too."""

    directory: Path
    name: str | None
    save_as: SaveModelAs
    every_epochs: int | None
    every_steps: int | None
    keep_epochs: int | None
    keep_epoch_states: int | None
    keep_steps: int | None
    keep_step_states: int | None
    states: bool
    final_state: bool
    suffixes: tuple[str, ...] = ("",)
    snapshots: bool = False
    keeps_best: bool = False

    @property
    def extension(self) -> str:
        """`.ckpt`, `.pt` or `.safetensors`; empty for diffusers folders."""
        return "" if self.save_as.startswith("diffusers") else f".{self.save_as}"

    @property
    def snapshot_folder(self) -> Path | None:
        """The folder of --posthoc_ema_snapshots: `NAME-posthoc_ema`, or `last-posthoc_ema`."""
        return self.directory / f"{self.final_stem()}-posthoc_ema" if self.snapshots else None

    @property
    def record(self) -> Path:
        """The record of the run's events: `NAME-run.jsonl`, or `last-run.jsonl`."""
        return self.directory / f"{self.final_stem()}-run.jsonl"

    def model(self, stem: str, suffix: str) -> Path:
        """The model of a save by its stem, in one version: `STEM.ext`, `STEM_ema.ext`."""
        return self.directory / (stem + suffix + self.extension)

    def models(self, stem: str) -> list[Path]:
        """The models of a save by its stem, one for each version of the weights."""
        return [self.model(stem, suffix) for suffix in self.suffixes]

    def final_stem(self) -> str:
        """The stem of the last models: `NAME`, or `last` without --output_name."""
        return self.name or "last"

    def final_state_folder(self) -> Path:
        """The final training state: `NAME-state`, or `last-state`."""
        return self.directory / f"{self.final_stem()}-state"

    def best_stem(self) -> str:
        """The stem of the best models of --keep_best: `NAME_best`, or `last_best`."""
        return f"{self.final_stem()}_best"

    @property
    def best_models(self) -> int:
        """The best models on the disk at once: while one is replaced, the old one is there too."""
        return len(self.suffixes) + 1 if self.keeps_best else 0

    def epoch_stem(self, epoch: int) -> str:
        """`NAME-000012`, or `epoch-000012`."""
        return f"{self.name or 'epoch'}-{epoch:06d}"

    def step_stem(self, step: int) -> str:
        """`NAME-step00001200`, or `at-step00001200`."""
        return f"{self.name or 'at'}-step{step:08d}"

    def stem(self, event: SaveEvent) -> str:
        """The file name of a save, without extension."""
        return self.step_stem(event.step) if event.epoch is None else self.epoch_stem(event.epoch)

    def at_step(self, step: int) -> SaveEvent | None:
        """The save that --save_every_n_steps asks for after `step` optimizer steps, if any."""
        if not self.every_steps or step % self.every_steps:
            return None
        return SaveEvent(
            step, None, self._expired_step(step, self.keep_steps), self._expired_step(step, self.keep_step_states)
        )

    def at_epoch_end(self, epoch: int, epochs: int, step: int) -> SaveEvent | None:
        """The save at the end of `epoch`, if any; the last epoch only has the final file."""
        if not self.every_epochs or epoch % self.every_epochs or epoch >= epochs:
            return None
        return SaveEvent(
            step,
            epoch,
            self._expired_epoch(epoch, self.keep_epochs),
            self._expired_epoch(epoch, self.keep_epoch_states),
        )

    def events(self, steps: int, epochs: int, steps_per_epoch: int) -> Iterator[SaveEvent]:
        """All saves of a run except the final one, in order."""
        due = set(range(self.every_steps, steps + 1, self.every_steps)) if self.every_steps else set()
        ends = (
            {min(epoch * steps_per_epoch, steps): epoch for epoch in range(1, epochs + 1)} if self.every_epochs else {}
        )
        for step in sorted(due | set(ends)):
            if (event := self.at_step(step)) is not None:
                yield event
            if step in ends and (event := self.at_epoch_end(ends[step], epochs, step)) is not None:
                yield event

    def _expired_epoch(self, epoch: int, keep: int | None) -> str | None:
        old = epoch - (self.every_epochs or 1) * keep if keep else 0
        return self.epoch_stem(old) if old > 0 else None

    def _expired_step(self, step: int, keep: int | None) -> str | None:
        if not keep or not self.every_steps:
            return None
        old = step - keep - 1
        old -= old % self.every_steps
        return self.step_stem(old) if old > 0 else None


def decide_outputs(
    options: SavingOptions,
    source_kind: str,
    epochs: int,
    mistakes: Mistakes,
    averages: AveragesPlan = AveragesPlan(),  # noqa: B008 - frozen
    *,
    keeps_best: bool = False,
) -> Outputs:
    """The outputs of a run of `epochs` epochs. `source_kind`: the format of the base model (`safetensors`, `ckpt` or
    `diffusers`), or `adapter` for a run that trains one. `averages`: what is saved besides
    the weights in training.

    Without --save_model_as, a base model in a file is saved as a file (`.ckpt` unless --use_safetensors), a diffusers
    folder as a folder, and an adapter as a `.safetensors` file.
    """
    save_as = options.save_model_as
    if source_kind == "adapter":
        if save_as is not None and save_as.startswith("diffusers"):
            remedy = "use safetensors, and convert the file with tools/convert_lora.py"
            mistakes.add(f"--save_model_as {save_as}: an adapter is one file", remedy)
        save_as = save_as or "safetensors"
    elif save_as == "pt":
        mistakes.add("--save_model_as pt is for adapters", "use safetensors or ckpt")
    if save_as is None and source_kind == "diffusers":
        save_as = "diffusers_safetensors" if options.use_safetensors else "diffusers"
    elif save_as is None:
        save_as = "safetensors" if options.use_safetensors else "ckpt"
    every_epochs = options.save_every_n_epochs
    if every_epochs is None and options.save_n_epoch_ratio:
        every_epochs = max(1, epochs // options.save_n_epoch_ratio)
    return Outputs(
        directory=Path(options.output_dir or "."),
        name=options.output_name,
        save_as=save_as,
        every_epochs=every_epochs,
        every_steps=options.save_every_n_steps,
        keep_epochs=options.save_last_n_epochs,
        keep_epoch_states=options.save_last_n_epochs_state or options.save_last_n_epochs,
        keep_steps=options.save_last_n_steps,
        keep_step_states=options.save_last_n_steps_state or options.save_last_n_steps,
        states=options.save_state,
        final_state=options.save_state or options.save_state_on_train_end,
        suffixes=averages.saved,
        snapshots=averages.posthoc is not None,
        keeps_best=keeps_best,
    )


def count_peak_files(outputs: Outputs, steps: int, epochs: int, steps_per_epoch: int) -> tuple[int, int]:
    """The largest number of models and of state folders on the disk at once, including the final ones.

    A new file is complete before an old one is removed, so both count for a moment.
    """
    models: set[str] = set()
    states: set[str] = set()
    most_models = most_states = 0
    for event in outputs.events(steps, epochs, steps_per_epoch):
        models.add(outputs.stem(event))
        most_models = max(most_models, len(models))
        models.discard(event.expired_model or "")
        if outputs.states:
            states.add(outputs.stem(event))
            most_states = max(most_states, len(states))
            states.discard(event.expired_state or "")
    most_models = max(most_models, len(models) + 1) * len(outputs.suffixes) + outputs.best_models
    return most_models, max(most_states, len(states) + int(outputs.final_state))
