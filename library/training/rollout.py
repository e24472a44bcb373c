"""Scheduled sampling: let the model itself denoise some samples of a batch, and train on what it arrives at.

Nothing of it is differentiated, and nothing is drawn but coins and lengths, keyed by sample. The formulas are in
library/objective/rollout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.objective.objective import Draws, Objective
from library.objective.rollout import RolloutSettings
from library.runtime.processes import Processes
from library.sampling.samplers import make_scheduler, set_path
from library.training.isolated_eval import isolated_eval
from library.training.training_loss import Inputs, TrainingLoss

if TYPE_CHECKING:
    from library.families.family import Conditioning

_SCHEDULERS = {"unipc": "unipc", "dpm": "dpmsolver++"}  # by name of --scheduled_sampling_sampler


@dataclass
class Rollout:
    """Gives rolled samples the noise with which they arrive.

    `predict` is the training's forward pass, and `modules` are all modules of it. `scheduler` makes one of diffusers',
    for a sampler that uses the step before; None: DDIM.
    """

    settings: RolloutSettings
    objective: Objective[Conditioning]
    predict: Callable[[Inputs], Tensor]
    modules: Sequence[nn.Module]
    processes: Processes
    scheduler: Callable[[], Any] | None = None
    _longest: Tensor = field(init=False)
    _drift: Tensor = field(init=False)  # sum and number

    def __post_init__(self) -> None:
        objective = self.objective
        self._drift = torch.zeros(2)
        self._longest = self.settings.longest_from(objective.process, objective.prediction, objective.high)

    def __call__(
        self,
        draws: Draws,
        latents: Tensor,
        conditioning: Conditioning,
        generators: Sequence[torch.Generator],
        step: int,
    ) -> tuple[Draws, Draws]:
        """The draws of the input, and those of the target. Rolled samples have the noise with which they arrive, and no
        perturbation.

        `latents` (B, C, h, w) are scaled; `generators` are the samples' own; `step`: finished optimizer steps.
        """
        lengths = self.settings.draw(step, generators).minimum(self._longest[draws.timesteps])
        rolled = lengths.nonzero()[:, 0]
        if not len(rolled):
            return draws, draws
        process, noise = self.objective.process, draws.noise.to(latents.device)
        clean, own_noise, timesteps = latents[rolled], noise[rolled], draws.timesteps[rolled]
        with isolated_eval(self.modules):
            x = self._descend(clean, own_noise, timesteps, lengths[rolled], _rows(conditioning, rolled))
        x_t = process.add_noise(clean, own_noise, timesteps)
        drift = (x - x_t).flatten(1).norm(dim=1) / x_t.flatten(1).norm(dim=1)
        self._drift = self._drift.to(drift.device) + torch.stack([drift.sum(), drift.new_tensor(len(drift))])
        rows = rolled.to(noise.device)
        perturbation = None if draws.perturbation is None else draws.perturbation.index_fill(0, rolled, 0.0)
        arrived = noise.index_copy(0, rows, process.implied_noise(clean, x, timesteps))
        seen = replace(draws, noise=arrived, perturbation=perturbation)
        return seen, seen if self.settings.corrected else draws

    def _descend(
        self, clean: Tensor, noise: Tensor, timesteps: Tensor, lengths: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """x' (N, C, h, w): each row goes from `lengths` strides above its timestep down to it. Rows that are as many
        steps from their timesteps share a forward pass."""
        process, stride = self.objective.process, self.settings.stride
        x = process.add_noise(clean, noise, timesteps + lengths * stride)
        ends = list(zip(timesteps.tolist(), lengths.tolist(), strict=True))
        # each row has its own timesteps, and so its own scheduler
        paths = [range(t + length * stride, t - 1, -stride) for t, length in ends]
        schedulers = [] if self.scheduler is None else [set_path(self.scheduler(), path) for path in paths]
        for left in range(int(lengths.max()), 0, -1):
            rows = (lengths >= left).nonzero()[:, 0]
            now, here = timesteps[rows] + left * stride, x[rows]
            output = self.predict(Inputs(here, now, _rows(conditioning, rows))).float()
            if not schedulers:
                x[rows] = process.step(here, output, now, now - stride, self.objective.prediction)
            for place, row in enumerate(rows.tolist() if schedulers else ()):
                step = schedulers[row].step(output[place], int(now[place]), here[place], return_dict=False)
                x[row] = step[0]
        return x

    def measured(self) -> dict[str, float]:
        """The drift |x' - x_t| / |x_t|, the mean of all samples that were rolled since the last call on all ranks, if
        there are any. All ranks must call this."""
        total, count = self.processes.sum(self._drift).tolist()
        self._drift = torch.zeros_like(self._drift)
        return {"rollout/drift": total / count} if count else {}


def _rows(conditioning: Conditioning, rows: Tensor) -> Mapping[str, Tensor]:
    """The conditioning of some samples."""
    return {name: tensor[rows.to(tensor.device)] for name, tensor in conditioning.items()}


def build_rollout(
    settings: RolloutSettings | None, loss: TrainingLoss, modules: Sequence[nn.Module], processes: Processes
) -> Rollout | None:
    """The rollout of a run, or None. `modules` are those of the forward pass of `loss`."""
    if settings is None:
        return None
    model, scheduler = loss.model, None
    if settings.sampler in _SCHEDULERS:
        # a scheduler rescales the family's process itself
        scheduler = partial(
            make_scheduler,
            _SCHEDULERS[settings.sampler],
            model.family.process,
            model.prediction,
            zero_terminal_snr=model.zero_terminal_snr,
        )
    return Rollout(settings, loss.objective, loss.predict, modules, processes, scheduler)
