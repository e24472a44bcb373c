"""Scheduled sampling: let the model itself denoise some samples of a batch, and train on what it arrives at.

Nothing of it is differentiated, and nothing is drawn but coins and lengths, keyed by sample. The formulas are in
library/objective/rollout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.objective.objective import Draws, Objective
from library.objective.rollout import RolloutSettings
from library.runtime.transfers import upload
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
        process, noise = self.objective.process, upload(draws.noise, latents.device)
        begin = draws.timesteps + lengths * self.settings.stride
        inputs = Inputs(process.add_noise(latents, noise, begin), begin, conditioning).rows(rolled.tolist())
        with isolated_eval(self.modules):
            x = self._descend(inputs, lengths[rolled])
        places = upload(rolled, latents.device)
        clean, timesteps = latents[places], draws.timesteps[rolled]
        self._count_drift(x, process.add_noise(clean, noise[places], timesteps))
        arrived = noise.index_copy(0, places, process.implied_noise(clean, x, timesteps))
        perturbation = None if draws.perturbation is None else draws.perturbation.index_fill(0, rolled, 0.0)
        seen = replace(draws, noise=arrived, perturbation=perturbation)
        return seen, seen if self.settings.corrected else draws

    @property
    def has_room(self) -> bool:
        """Whether a sample can be rolled at any timestep that is trained."""
        return bool(self._longest[self.objective.low :].any())

    def _descend(self, inputs: Inputs, lengths: Tensor) -> Tensor:
        """x' (N, C, h, w): each row goes down from its timestep in `lengths` (N,) steps. Rows with as many steps left
        share a forward pass."""
        x, stride = inputs.noisy, self.settings.stride
        ends = inputs.timesteps - lengths * stride
        schedulers = []  # one for each row, as each has its own timesteps; none for DDIM
        for begin, end in zip(inputs.timesteps.tolist(), ends.tolist(), strict=True):
            if self.scheduler is not None:
                schedulers.append(set_path(self.scheduler(), range(begin, end - 1, -stride)))
        for left in range(int(lengths.max()), 0, -1):
            places = (lengths >= left).nonzero()[:, 0].tolist()
            here = Inputs(x, ends + left * stride, inputs.conditioning).rows(places)
            output = self.predict(here).float()
            if not schedulers:
                x[upload(torch.tensor(places), x.device)] = self.objective.process.step(
                    here.noisy, output, here.timesteps, here.timesteps - stride, self.objective.prediction
                )
            for row, place in enumerate(places if schedulers else ()):
                timestep = int(here.timesteps[row])
                (x[place],) = schedulers[place].step(output[row], timestep, here.noisy[row], return_dict=False)
        return x

    def _count_drift(self, x: Tensor, x_t: Tensor) -> None:
        drift = (x - x_t).flatten(1).norm(dim=1) / x_t.flatten(1).norm(dim=1)
        pair = torch.stack([drift.sum(), drift.new_full((), len(drift))])
        self._drift = self._drift.to(pair, non_blocking=True) + pair

    def measured(self) -> dict[str, Tensor]:
        """The drift |x' - x_t| / |x_t| of the samples that this rank rolled since the last call: sum and number,
        (2,)."""
        drift, self._drift = self._drift, torch.zeros_like(self._drift)
        return {"rollout/drift": drift}


def build_rollout(
    settings: RolloutSettings | None,
    loss: TrainingLoss,
    modules: Sequence[nn.Module],
    say: Callable[[str], None],
) -> Rollout | None:
    """The rollout of a run, or None. `modules` are those of the forward pass of `loss`. `say` is told if the trained
    timesteps leave no room for it."""
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
    rollout = Rollout(settings, loss.objective, loss.predict, modules, scheduler)
    if not rollout.has_room:
        trained = f"{loss.objective.low} to {loss.objective.high - 1}"
        say(
            f"no sample is rolled: of the timesteps that are trained ({trained}), none is noisy enough with another "
            f"{settings.stride} above it. Raise --max_timestep, or --scheduled_sampling_inference_steps"
        )
    return rollout
