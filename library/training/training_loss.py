"""Compute the loss terms of a batch: encode, choose the input and its target, predict, compare.

`start` chooses the input, also where the model itself leads there (a rollout). Rows for other purposes than denoising
join the one forward pass as further rows of `Inputs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.objective.loss import Term
from library.objective.masking import MaskSettings
from library.objective.objective import Objective
from library.runtime.seeds import keyed_draws, torch_generator
from library.runtime.transfers import rows_at, upload
from library.training.preservation.preservation import Preservation

if TYPE_CHECKING:
    from library.families.family import Conditioning, Model
    from library.training.conditioning import Conditioner
    from library.training.plan.facts import RunFacts
    from library.training.rollout import Rollout
    from library.training.trainable import Trainable


@dataclass(frozen=True)
class Inputs:
    """What the backbone receives, N rows: `noisy` (N, C, h, w) float32 and `conditioning` on its device, `timesteps`
    (N,) int64 on the CPU."""

    noisy: Tensor
    timesteps: Tensor
    conditioning: Conditioning

    def rows(self, places: Sequence[int]) -> Inputs:
        """Some rows, in this order; a row may occur several times."""
        chosen = {name: rows_at(values, places) for name, values in self.conditioning.items()}
        return Inputs(rows_at(self.noisy, places), rows_at(self.timesteps, places), chosen)


@dataclass
class TrainingLoss:
    """Called with a batch and the number of finished steps, returns the terms of its loss: denoising, and those of the
    anchors.

    `vae` is the one to encode with: the model's own, or a copy in half precision; None: batches contain latents.
    `rollout`: None, or what replaces the noise of some samples. `timesteps`: those of the last batch.
    """

    model: Model
    conditioning: Conditioner
    vae: Any
    objective: Objective[Conditioning]
    seed: int
    device: torch.device
    preservation: Preservation = field(default_factory=Preservation)
    rollout: Rollout | None = None
    timesteps: Tensor | None = field(default=None, init=False)

    def __call__(self, batch: Batch, step: int) -> tuple[Term, ...]:
        """Terms of (B,) float32, with weights by timestep and mask, without prior_loss_weight. `step`: the number of
        finished optimizer steps."""
        latents = self.model.family.latent.scaled(self.latents(batch))
        # dropout draws from torch's own generator, whichever process computes the batch
        with keyed_draws(self.seed, "dropout", step, int(batch.sample_index[0])):
            conditioning = self.conditioning(batch)
            inputs, target = self.start(batch, latents, conditioning, step)
            self.timesteps = inputs.timesteps
            anchored = self.preservation.begin(batch, inputs, step)
            output = self.predict(anchored.inputs)
        denoising = self.objective.compare(output[: len(target)], target, inputs.timesteps, batch.mask)
        return anchored.terms(denoising, output, self.objective)

    def start(self, batch: Batch, latents: Tensor, conditioning: Conditioning, step: int) -> tuple[Inputs, Tensor]:
        """The input of the backbone for each sample, and the target of its output, (B, C, h, w) float32. `latents` are
        scaled."""
        draws = self.objective.draw(latents.shape, self.generators(batch, "noise"), latents)
        seen, wanted = draws, draws
        if self.rollout is not None:
            seen, wanted = self.rollout(draws, latents, conditioning, self.generators(batch, "rollout"), step)
        on_device = seen.on(latents.device)
        noisy = self.objective.noisy(latents, on_device)
        target = self.objective.target(latents, on_device if wanted is seen else wanted.on(latents.device))
        return Inputs(noisy, draws.timesteps, conditioning), target

    def predict(self, inputs: Inputs) -> Tensor:
        """The backbone's output, (N, C, h, w)."""
        timesteps = upload(inputs.timesteps, self.device)
        return self.model.family.predict(self.model.backbone, inputs.noisy, timesteps, inputs.conditioning)

    def measured(self) -> dict[str, Tensor]:
        """Values to log that are no loss, of all samples of this rank since the last call: sum and number, (2,)."""
        return {} if self.rollout is None else self.rollout.measured()

    def modules(self, trainable: Trainable) -> list[nn.Module]:
        """All modules of the forward pass, adapters included."""
        parts = (part.module for part in trainable.parts)
        return [self.model.backbone, *self.conditioning.text_encoders.values(), *parts]

    def latents(self, batch: Batch) -> Tensor:
        """(B, C, h, w) float32, unscaled: from the cache, or encoded now."""
        if batch.latents is not None:
            return upload(batch.latents, self.device)
        if batch.pixels is None:
            raise ValueError("a batch must contain pixels or latents")
        return self.model.family.encode_images(self.vae, batch.pixels, self.generators(batch, "posterior"))

    def generators(self, batch: Batch, purpose: str) -> list[torch.Generator]:
        """A generator per sample, seeded by its index in the run, so that batch size and processes do not matter."""
        return [torch_generator(self.seed, purpose, index) for index in batch.sample_index.tolist()]


def build_training_loss(
    facts: RunFacts, model: Model, wrapped: Mapping[Any, Any], conditioner: Conditioner, vae: Any
) -> TrainingLoss:
    """The loss of a run, computed with `wrapped` modules (see trainable.wrap). `vae`: see TrainingLoss."""
    base_model = facts.base_model
    conditioner.text_encoders = {
        name: wrapped.get(module, module) for name, module in conditioner.text_encoders.items()
    }
    return TrainingLoss(
        model=replace(model, backbone=wrapped.get(model.backbone, model.backbone)),
        conditioning=conditioner,
        vae=vae,
        objective=Objective.from_options(
            base_model.objective,
            model.family.process,
            base_model.prediction,
            MaskSettings.from_options(facts.options.mask),
        ),
        seed=facts.seed,
        device=conditioner.device,
    )
