"""The base model beside the one in training: its predictions, without a trace in the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from library.runtime.transfers import upload
from library.training.isolated_eval import isolated_eval
from library.training.loading import load_model
from library.training.memory import set_attention

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.data.batch import Batch
    from library.families.family import Family, Model
    from library.training.conditioning import Conditioner
    from library.training.plan.facts import RunFacts
    from library.training.preservation.base_plan import BasePlan
    from library.training.trainable import Trainable
    from library.training.training_loss import Inputs


@dataclass(frozen=True)
class Base:
    """The model as it was before the run.

    `backbone` and the text encoders of `conditioner` are the base's while `switched_off` is open. `conditioner` None:
    text encoders are not trained, and the conditioning of the model in training is the base's too. `modules`: all that
    compute here.
    """

    family: Family
    backbone: Any
    conditioner: Conditioner | None
    switched_off: Callable[[], AbstractContextManager[None]]
    modules: Sequence[nn.Module]

    def __call__(self, batch: Batch, inputs: Inputs, captions: Sequence[str], rows: Sequence[int]) -> Tensor:
        """The base's output for some rows of the inputs, (len(rows), C, h, w), which begin with the samples of the
        batch. `captions`: of all rows."""
        with isolated_eval(self.modules), self.switched_off():
            if self.conditioner is not None:
                # of all rows: unpadded captions have the length of the longest
                given = inputs.conditioning
                own = self.conditioner.from_texts([*captions], given["sizes"], given["score"])
                inputs = replace(inputs, conditioning=own)
            chosen = inputs.rows(rows)
            timesteps = upload(chosen.timesteps, chosen.noisy.device)
            return self.family.predict(self.backbone, chosen.noisy, timesteps, chosen.conditioning)


def switched_off_base(model: Model, trainable: Trainable, conditioner: Conditioner) -> Base:
    """The base of a run that trains an adapter: the model while the adapter is switched off."""
    if trainable.switched_off is None:
        raise ValueError("the recipe has no way to switch off what it trains")
    trains_text = conditioner.store is None and not trainable.active.isdisjoint(model.family.text_encoders)
    return Base(
        family=model.family,
        backbone=model.backbone,
        conditioner=conditioner if trains_text else None,
        switched_off=trainable.switched_off,
        modules=[model.backbone, *conditioner.text_encoders.values(), *(part.module for part in trainable.parts)],
    )


def loaded_base(plan: BasePlan, facts: RunFacts, model: Model, trainable: Trainable, conditioner: Conditioner) -> Base:
    """The base of a run that trains the model: the modules that are trained, loaded once more from the base model's
    file, so that a resumed run compares with the same; the others are those of the model."""
    own = load_model(
        facts.options,
        facts.base_model,
        conditioner.device,
        lambda note: None,
        only=trainable.active,
        base=plan.format,
        quantisation=plan.quantisation,
    )
    modules = {name: module for name, module in own.modules().items() if name in trainable.active}
    for name, module in modules.items():
        module.requires_grad_(requires_grad=False).eval()
        if name == model.family.backbone:
            set_attention(module, facts.precision.attention)
        if plan.place == "cpu":
            compute_from_main_memory(module, conditioner.device)
        else:
            module.to(conditioner.device)
    trained_encoders = {name: module for name, module in modules.items() if name in model.family.text_encoders}
    backbone = modules.get(model.family.backbone, model.backbone)
    encoders = {**conditioner.text_encoders, **trained_encoders}
    return Base(
        family=model.family,
        backbone=backbone,
        conditioner=replace(conditioner, text_encoders=encoders) if trained_encoders else None,
        switched_off=nullcontext,
        modules=[*encoders.values(), backbone],
    )


def compute_from_main_memory(module: nn.Module, device: torch.device) -> None:
    """Keep the weights of a module in main memory; each layer's are copied to the device while it computes."""
    from accelerate import cpu_offload

    cpu_offload(module, device, offload_buffers=True)
