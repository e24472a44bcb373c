"""The base model's predictions, made before the first step for a fixed set of draws and used again and again.

Each regularisation image has K draws: K timesteps, noises, crops, flips and captions, keyed by (seed, image, k), which
its samples go through in turn (data/dataset.py). They are predicted by the model that was just loaded, before a
training state is restored: so a resumed run makes the same predictions, and no second set of weights is needed.
Nothing is kept on disk that could be out of date.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.data.order import BatchRequest
from library.options.mistakes import Mistake, UserError
from library.runtime.progress import ProgressBar
from library.runtime.transfers import upload
from library.training.isolated_eval import isolated_eval

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.data.dataset import TrainingDataset
    from library.training.plan.facts import RunFacts
    from library.training.run import Run
    from library.training.trainable import Trainable
    from library.training.training_loss import Inputs, TrainingLoss


@dataclass(frozen=True)
class CachedPredictions:
    """The base's predictions (C, h, w) float16 on the CPU, by the key of a sample's noise (Batch.sample_index)."""

    outputs: Mapping[int, Tensor]

    def __call__(self, batch: Batch, inputs: Inputs, captions: Sequence[str], rows: Sequence[int]) -> Tensor:
        """The base's output for some rows of the inputs, which are samples of the batch: (len(rows), C, h, w)."""
        keys = batch.sample_index[[*rows]].tolist()
        # float32 first: autocast to bfloat16 refuses to stack float16
        return upload(torch.stack([self.outputs[key].float() for key in keys]), inputs.noisy.device)


def predict_ahead(
    facts: RunFacts,
    dataset: TrainingDataset,
    loss: TrainingLoss,
    trainable: Trainable,
    run: Run,
) -> CachedPredictions:
    """The predictions of the model as it is now, for all draws of all regularisation images. Leaves no trace in the
    run, whose processes share the work. Raises UserError for an image that cannot be read."""
    outputs: dict[int, Tensor] = {}
    requests = run.processes.own([*requests_of(facts)])
    bar = ProgressBar("predictions of the base model", sum(len(request.samples) for request in requests))
    with (
        run.processes.failing_together(),
        bar,
        isolated_eval(loss.modules(trainable)),
        run.accelerator.autocast(),
    ):
        for request in requests:
            batch = dataset[request]
            for _, path, reason in batch.unread:
                raise UserError((Mistake(f"{path} cannot be read: {reason}", "repair or remove it"),))
            latents = loss.model.family.latent.scaled(loss.latents(batch))
            inputs, _ = loss.start(batch, latents, loss.conditioning(batch), 0)
            predicted = loss.predict(inputs).to("cpu", torch.float16)
            outputs.update(zip(batch.sample_index.tolist(), predicted, strict=True))
            bar.update(len(batch))
    return CachedPredictions(run.processes.merge(outputs))


def requests_of(facts: RunFacts) -> Iterator[BatchRequest]:
    """Batches of all draws that the run uses, one draw of each image after the other."""
    places: dict[tuple[int, tuple[int, int], int], list[tuple[int, int]]] = {}
    draws = facts.preservation.fixed_draws
    for index, (record, placement) in enumerate(zip(facts.images.records, facts.images.table.placements, strict=True)):
        for draw in range(min(draws, record.repeats * facts.duration.epochs) if record.is_reg else 0):
            places.setdefault((draw, placement.bucket, record.dataset), []).append((index, draw))
    for (_, bucket, number), samples in sorted(places.items()):
        size = facts.images.scan.datasets[number].batch_size
        for start in range(0, len(samples), size):
            some = tuple(samples[start : start + size])
            yield BatchRequest(1, 0, bucket, some, 0, len(some), last_of_window=True)
