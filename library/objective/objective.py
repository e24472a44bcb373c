"""The objective of a run: what is drawn for a sample, and the loss that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from library.objective.loss import per_sample_loss
from library.objective.masking import AS_THEY_ARE, MaskSettings
from library.objective.noise import draw_noise
from library.objective.process import ForwardProcess, Prediction
from library.objective.timesteps import draw_timesteps
from library.objective.weighting import min_snr_weight

if TYPE_CHECKING:
    from library.options.objective import ObjectiveOptions

Conditioning = TypeVar("Conditioning")
Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t (B,C,h,w) float32, t (B,) int64, conditioning) -> output (B,C,h,w) of any float dtype."""


@dataclass(frozen=True)
class Draws:
    """What chance decides for a batch: `timesteps` (B,) int64 and `noise` (B,C,h,w) float32, both on the CPU."""

    timesteps: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Objective(Generic[Conditioning]):
    """Denoising at random timesteps, for a forward process and a kind of prediction.

    `low` and `high` bound the timesteps, [low, high). `noise_offset` 0 and `min_snr_gamma` None switch these off;
    `mask` says how masks are read, where samples have any.
    """

    process: ForwardProcess
    prediction: Prediction
    low: int
    high: int
    noise_offset: float = 0.0
    min_snr_gamma: float | None = None
    mask: MaskSettings = AS_THEY_ARE

    @classmethod
    def of(
        cls,
        options: ObjectiveOptions,
        process: ForwardProcess,
        prediction: Prediction,
        mask: MaskSettings = AS_THEY_ARE,
    ) -> Objective[Conditioning]:
        """The objective that the options ask for, over all timesteps of the process."""
        return cls(
            process=process,
            prediction=prediction,
            low=0,
            high=process.timesteps,
            noise_offset=options.noise_offset or 0.0,
            min_snr_gamma=options.min_snr_gamma or None,
            mask=mask,
        )

    def draw(self, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Draws:
        """Timestep and noise for latents of `shape` (B,C,h,w), each sample from its own CPU generator.

        Make a fresh generator for each sample, keyed by the seed and the sample's global index. From it are drawn,
        in this order: timestep, noise, offset; what comes later never changes what came before. Raises
        ValueError when the number of generators is not B.
        """
        if len(generators) != shape[0]:
            raise ValueError(f"{shape[0]} samples need as many generators, not {len(generators)}")
        timesteps = draw_timesteps(generators, self.low, self.high)
        return Draws(timesteps, draw_noise(shape[1:], generators, self.noise_offset))

    def loss(
        self,
        predict: Predict[Conditioning],
        latents: Tensor,
        conditioning: Conditioning,
        draws: Draws,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample, weight by timestep included: (B,) float32.

        `latents` (B,C,h,w) are scaled clean samples on the device of the network; `conditioning` is handed to
        `predict` as it is; `mask` (B,1,h,w) float32 in [0, 1], on any device, says how much each place counts
        (a sample without one: MaskSettings.missing all over). Nothing is drawn here: equal arguments, equal losses.
        """
        timesteps = draws.timesteps
        noise = draws.noise.to(latents.device)
        noisy = self.process.add_noise(latents, noise, timesteps)
        output = predict(noisy, timesteps.to(latents.device), conditioning)
        target = self.process.target(latents, noise, timesteps, self.prediction)
        places = None if mask is None else mask.to(latents.device)
        return per_sample_loss(output, target, places, self.mask) * self.weight(timesteps, latents.device)

    def weight(self, timesteps: Tensor, device: torch.device) -> Tensor:
        """w(t), the weight by timestep: (B,) float32 on `device`."""
        if self.min_snr_gamma is None:
            return torch.ones(timesteps.shape, dtype=torch.float32, device=device)
        return min_snr_weight(self.process.snr(timesteps, device), self.min_snr_gamma, self.prediction)
