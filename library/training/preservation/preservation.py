"""The anchors of a run in a step: further rows of its forward pass, one forward pass of the base, and their terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.objective.loss import Term
from library.objective.masking import UNCHANGED_MASKS, MaskSettings
from library.runtime.transfers import rows_at, upload
from library.training.preservation.anchors import Share, share_of
from library.training.preservation.base import Base, loaded_base, switched_off_base
from library.training.preservation.cached import CachedPredictions, predict_ahead
from library.training.preservation.plan import Anchor, PreservationPlan

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.data.dataset import TrainingDataset
    from library.objective.objective import Objective
    from library.training.conditioning import Conditioner
    from library.training.plan.facts import RunFacts
    from library.training.preservation.base_plan import BasePlan
    from library.training.run import Run
    from library.training.trainable import Trainable
    from library.training.training_loss import Inputs, TrainingLoss


@dataclass(frozen=True)
class Preservation:
    """The anchors of a run. The defaults have none, and change nothing. `conditioner` and `base` are only used by
    anchors that need the base model."""

    plan: PreservationPlan = field(default_factory=PreservationPlan)
    masks: MaskSettings = UNCHANGED_MASKS
    conditioner: Conditioner | None = None
    base: Base | CachedPredictions | None = None

    def begin(self, batch: Batch, inputs: Inputs, step: int) -> Anchored:
        """What the anchors of the optimizer step after `step` finished steps need of a batch, before the forward pass
        of the model in training. The base is called at most once, for the rows that are compared with it."""
        anchors = self.plan.at(step)
        begun = Anchored(inputs, anchors, batch.is_reg if self.plan.has_reg else None)
        shares = {
            anchor: share_of(anchor.name, batch, self.plan.class_prompts, self.masks)
            for anchor in anchors
            if anchor.needs_base
        }
        if not shares or self.base is None:
            return begun
        inputs, captions, rows = self._with_further_rows(batch, inputs, shares)
        compared = sorted({row for own in rows.values() for row in own})
        return replace(
            begun,
            inputs=inputs,
            shares=shares,
            rows=rows,
            base={row: place for place, row in enumerate(compared)},
            base_outputs=self.base(batch, inputs, captions, compared) if compared else None,
        )

    def _with_further_rows(
        self, batch: Batch, inputs: Inputs, shares: Mapping[Anchor, Share]
    ) -> tuple[Inputs, list[str], dict[Anchor, list[int]]]:
        """The inputs of a batch with the rows that anchors add, the captions of all rows, and the rows of each
        anchor."""
        places, captions, rows = [*range(len(inputs.noisy))], [*batch.captions], {}
        own = len(places)
        for anchor, share in shares.items():
            rows[anchor] = [*share.places]
            if share.captions is not None:
                rows[anchor] = [*range(len(places), len(places) + len(share.places))]
                places += share.places
                captions += share.captions
        if len(places) == own or self.conditioner is None:
            return inputs, captions, rows
        joined = inputs.rows(places)
        sizes, score = joined.conditioning["sizes"], joined.conditioning["score"]
        if self.conditioner.tokenize.padded:
            given, further = inputs.conditioning, self.conditioner.from_texts(captions[own:], sizes[own:], score[own:])
            conditioning = {name: torch.cat((given[name], further[name])) for name in given}
        else:  # all captions have the length of the longest
            conditioning = {**self.conditioner.from_texts(captions, sizes, score)}
        return replace(joined, conditioning=conditioning), captions, rows


@dataclass(frozen=True)
class Anchored:
    """A batch of B samples with what its anchors need.

    `inputs`: the rows of the samples, then those that anchors add. `is_reg` (B,) bool, None: the run has no
    regularisation images. `shares` and `rows`: the samples of each anchor that is compared with the base, and their
    rows in the inputs; `base`: the place of a row in `base_outputs`.
    """

    inputs: Inputs
    anchors: Sequence[Anchor]
    is_reg: Tensor | None
    shares: Mapping[Anchor, Share] = field(default_factory=dict)
    rows: Mapping[Anchor, Sequence[int]] = field(default_factory=dict)
    base: Mapping[int, int] = field(default_factory=dict)
    base_outputs: Tensor | None = None

    def terms(self, denoising: Tensor, output: Tensor, objective: Objective[Any]) -> tuple[Term, ...]:
        """The terms of the loss, from the denoising losses (B,) of the samples and the output (N, C, h, w) of all
        rows. Regularisation images have no denoising term but that of reg_images."""
        if self.is_reg is None:
            terms = [Term("denoising", denoising)]
        else:
            is_reg = upload(self.is_reg, denoising.device)
            terms = [Term("denoising", torch.where(is_reg, 0.0, denoising))]
            terms += [
                Term(anchor.name, torch.where(is_reg, denoising, 0.0), anchor.weight)
                for anchor in self.anchors
                if not anchor.needs_base
            ]
        return (*terms, *(self._compared(anchor, share, output, objective) for anchor, share in self.shares.items()))

    def _compared(self, anchor: Anchor, share: Share, output: Tensor, objective: Objective[Any]) -> Term:
        """The term of an anchor that compares with the base; 0 for the samples that it is not about."""
        samples = len(output) - sum(len(each.captions or ()) for each in self.shares.values())
        losses = torch.zeros(samples, dtype=torch.float32, device=output.device)
        members = torch.zeros(samples, dtype=torch.bool)
        if share.places and self.base_outputs is not None:
            rows = self.rows[anchor]
            base = rows_at(self.base_outputs, [self.base[row] for row in rows])
            distances = objective.distance(
                rows_at(output, rows), base, rows_at(self.inputs.timesteps, rows), share.where
            )
            places = torch.tensor(share.places)
            losses = losses.index_put((upload(places, output.device),), distances)
            members[places] = True
        return Term(anchor.name, losses, anchor.weight, members)


def build_preservation(
    facts: RunFacts,
    base: BasePlan | None,
    loss: TrainingLoss,
    trainable: Trainable,
    dataset: TrainingDataset,
    run: Run,
) -> Preservation:
    """The anchors of a run, to be built before a training state is restored. `base`: how the base is kept if the
    weights of the model are trained. `loss`: that of the run."""
    plan, masks = facts.preservation, MaskSettings.from_options(facts.options.mask)
    without = Preservation(plan, masks, loss.conditioning)
    if not plan.of_base:
        return without
    if base is None:
        return replace(without, base=switched_off_base(loss.model, trainable, loss.conditioning))
    if base.place == "cached":
        return replace(without, base=predict_ahead(facts, dataset, loss, trainable, run))
    return replace(without, base=loaded_base(base, facts, loss.model, trainable, loss.conditioning))
