"""The training objective: random draws, the noisy input, the target, and the loss of the output.

These are separate methods, so that a step can replace the input (by one that the model itself generated), the target
(by a frozen model's prediction), or both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from library.objective.huber import SQUARED, ElementLoss
from library.objective.loss import per_sample_loss
from library.objective.masking import UNCHANGED_MASKS, MaskSettings
from library.objective.noise import WHITE, NoiseShaping, draw_white
from library.objective.process import ForwardProcess, HasSnr, Prediction, require_snr, resolve_process
from library.objective.random_streams import Streams
from library.objective.timesteps import TimestepBias, draw_timesteps
from library.objective.weighting import Weighting
from library.runtime.transfers import upload

if TYPE_CHECKING:
    from library.options.groups.objective import ObjectiveOptions

Conditioning = TypeVar("Conditioning")
Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t (B,C,h,w) float32, t (B,) int64, conditioning) -> output (B,C,h,w) of any float dtype."""


@dataclass(frozen=True)
class Draws:
    """The random draws of a batch, drawn on the CPU: `timesteps` (B,) int64, `noise` (B,C,h,w) float32.

    `perturbation`, if any, has the shape of the noise and is added to it in the model's input only.
    """

    timesteps: Tensor
    noise: Tensor
    perturbation: Tensor | None = None

    def on(self, device: torch.device) -> Draws:
        """The draws on a device, to which each is copied once without waiting for it."""
        perturbation = None if self.perturbation is None else upload(self.perturbation, device)
        return Draws(upload(self.timesteps, device), upload(self.noise, device), perturbation)


@dataclass(frozen=True)
class Objective(Generic[Conditioning]):
    """Denoising at random timesteps, for a forward process and a prediction type.

    Timesteps are in [low, high); `bias` draws some of them more often. `noise` shapes the noise, `element` is the
    element-wise loss, `weightings` are the timestep weightings, which multiply, `mask` is how masks are used. Raises
    ValueError for noise prediction with zero terminal SNR, where the last timestep teaches nothing, and if a weighting
    or the loss needs an SNR that the process does not have.
    """

    process: ForwardProcess
    prediction: Prediction
    low: int
    high: int
    bias: TimestepBias | None = None
    noise: NoiseShaping = WHITE
    element: ElementLoss = SQUARED
    weightings: tuple[Weighting, ...] = ()
    mask: MaskSettings = UNCHANGED_MASKS

    def __post_init__(self) -> None:
        for weighting in self.weightings:
            require_snr(self.process, f"the weighting {weighting.kind}")
        if self.element.needs_snr:
            require_snr(self.process, f"the loss {self.element.kind} with the threshold schedule snr")
        if self.prediction == "epsilon" and isinstance(self.process, HasSnr):
            if self.process.snr(torch.tensor([self.process.timesteps - 1])).item() == 0.0:
                raise ValueError("zero terminal SNR needs v-prediction")

    @classmethod
    def from_options(
        cls,
        options: ObjectiveOptions,
        process: ForwardProcess,
        prediction: Prediction,
        mask: MaskSettings = UNCHANGED_MASKS,
    ) -> Objective[Conditioning]:
        """The objective of the options; `process` is the family's, unchanged.

        Raises ValueError for options that check_options.py or the rules between flags reject.
        """
        low = options.min_timestep or 0
        high = options.max_timestep or process.timesteps
        return cls(
            process=resolve_process(options, process),
            prediction=prediction,
            low=low,
            high=high,
            bias=TimestepBias.from_options(options, low, high),
            noise=NoiseShaping.from_options(options),
            element=ElementLoss.from_options(options),
            weightings=Weighting.from_options(options),
            mask=mask,
        )

    def draw(self, shape: Sequence[int], generators: Sequence[torch.Generator], latents: Tensor | None = None) -> Draws:
        """Draw timesteps and noise for latents of `shape` (B,C,h,w), each sample from its own CPU generator.

        Pass a new generator for each sample, seeded by the run's seed and the sample's global index. Each one draws,
        in this order: a uniform timestep, white noise, a shift per channel, and a seed for the streams of options that
        need more. The shift is drawn for an offset or before a seed, the seed only if needed. So no option changes the
        draws of another. `latents` (scaled, on any device) are needed by an adaptive noise scale only.

        Raises ValueError if there are not B generators, or if latents are needed but missing.
        """
        if len(generators) != shape[0]:
            raise ValueError(f"{shape[0]} samples need as many generators, not {len(generators)}")
        timesteps = draw_timesteps(generators, self.low, self.high)
        white = draw_white(shape[1:], generators)
        needs_streams = self.bias is not None or self.noise.needs_streams
        shifts = torch.zeros(())
        if self.noise.offset or needs_streams:
            shifts = draw_white((shape[1], *(1,) * (len(shape) - 2)), generators)
        streams = Streams.drawn_from(generators) if needs_streams else Streams(())
        if self.bias is not None:
            timesteps = self.bias.draw(streams.generators("timestep bias"), self.low, self.high)
        noise = self.noise.shape(white, shifts, streams, latents)
        return Draws(timesteps, noise, self.noise.perturb(shape[1:], streams))

    def loss(
        self,
        predict: Predict[Conditioning],
        latents: Tensor,
        conditioning: Conditioning,
        draws: Draws,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The plain denoising loss of each sample: (B,) float32, for validation and for programs without terms of their
        own; a training calls `noisy`, `target` and `compare` itself (library/training/training_loss.py).

        `conditioning` is passed to `predict`. Deterministic: nothing is drawn here.
        """
        output = predict(self.noisy(latents, draws), draws.timesteps.to(latents.device), conditioning)
        return self.compare(output, self.target(latents, draws), draws.timesteps, mask)

    def noisy(self, latents: Tensor, draws: Draws) -> Tensor:
        """The model's input: (B,C,h,w) float32, perturbation included.

        `latents` (B,C,h,w) are scaled clean samples on the model's device.
        """
        noise = upload(draws.noise, latents.device)
        if draws.perturbation is not None:
            noise = noise + upload(draws.perturbation, latents.device)
        return self.process.add_noise(latents, noise, draws.timesteps)

    def target(self, latents: Tensor, draws: Draws) -> Tensor:
        """The target of the model's prediction, (B,C,h,w) float32, from the noise without perturbation."""
        return self.process.target(latents, upload(draws.noise, latents.device), draws.timesteps, self.prediction)

    def compare(self, output: Tensor, target: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of each sample times its timestep weight: (B,) float32.

        `output` and `target` (B,C,h,w) on one device, `timesteps` (B,) int64; `mask` (B,1,h,w) float32 in [0, 1], on
        any device, filled with MaskSettings.missing for samples without a mask.
        """
        mask = None if mask is None else upload(mask, output.device)
        rho = self.element.at(self.process, timesteps, output.device)
        return per_sample_loss(output, target, mask, self.mask, rho) * self.weight(timesteps, output.device)

    def distance(self, output: Tensor, other: Tensor, timesteps: Tensor, where: Tensor | None = None) -> Tensor:
        """The mean squared difference from another model's output, times the timestep weight: (B,) float32.

        Always squared, since outputs of a model have no outliers. `where` (B,1,h,w) weights the squares before the
        mean; `output` and `other` as those of `compare`.
        """
        where = None if where is None else upload(where, output.device)
        return per_sample_loss(output, other, where) * self.weight(timesteps, output.device)

    def weight(self, timesteps: Tensor, device: torch.device) -> Tensor:
        """w(t), the timestep weight: (B,) float32 on `device`. Without a weighting no SNR is needed."""
        product = torch.ones(timesteps.shape, dtype=torch.float32, device=device)
        for weighting in self.weightings:
            snr = require_snr(self.process, f"the weighting {weighting.kind}").snr(timesteps, device)
            product *= weighting(snr, self.prediction)
        return product
