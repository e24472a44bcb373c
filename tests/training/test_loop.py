"""The one rule of accumulation, with the two real models: however a step's samples are split, it is the same step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from library.checkpoints.files import read_header
from library.data.batch import Batch
from library.data.buckets import make_table
from library.data.dataset import Tokenize, TrainingDataset
from library.data.order import BatchRequest
from library.data.reading import ImageReader
from library.data.scan.scan import ImageRecord
from library.families.clip.tokenizer import ClipTokenizer
from library.families.family import AS_TRAINED, Conditioning
from library.families.registry import load_model
from library.objective.objective import Objective
from library.objective.weighting import Weighting
from library.options.datasets import BucketSettings, DatasetSpec, SubsetSpec
from library.options.mistakes import UserError
from library.training.conditioning import Conditioner
from library.training.loop import Loop
from library.training.saving.state import Progress
from library.training.trainable import Part, Trainable, parameter_groups
from library.training.training_loss import TrainingLoss
from tests import tiny

# smaller images leave one pixel to the deepest level, whose normalisation then magnifies rounding a thousandfold
SIZE = (128, 128)
SAMPLES = tuple((index, 0) for index in range(7))


@dataclass
class FixedOrder:
    """One epoch of one window: the seven samples, split as told."""

    sizes: Sequence[int]
    steps_per_epoch: int = 1

    def requests(self, epoch: int, skip_windows: int = 0) -> Iterator[BatchRequest]:
        start = 0
        for size in self.sizes:
            last = start + size == len(SAMPLES)
            yield BatchRequest(epoch, 0, SIZE, SAMPLES[start : start + size], start, len(SAMPLES), last)
            start += size


class Bar:
    def update(self, count: int) -> None: ...

    def set_postfix(self, **values: float) -> None: ...


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TrainingDataset:
    folder = tmp_path_factory.mktemp("images")
    spec = SubsetSpec(folder, "here")
    whole = DatasetSpec("here", BucketSettings(SIZE), (spec,))
    records = tuple(
        ImageRecord(folder, path.name, 0, 0, SIZE, f"image {index}", True, 1, index % 3 == 2)
        for index, path in enumerate(tiny.write_images(folder, 7, SIZE))
    )
    reader = ImageReader(records, make_table(records, [whole]).placements, (spec,), (whole,))
    return TrainingDataset(reader, Tokenize(ClipTokenizer(49407)), seed=5, steps=1, prior_loss_weight=0.3)


def losses_of(model: Any, objective: Objective[Conditioning]) -> TrainingLoss:
    cpu = torch.device("cpu")
    context = Conditioner(model.family, model.text_encoders, Tokenize(ClipTokenizer(49407)), AS_TRAINED, cpu)
    return TrainingLoss(model, context, model.vae, objective, 5, cpu)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_single_file(tmp_path_factory.mktemp("model") / "sd1.safetensors", "sd1")


def one_step(
    sizes: Sequence[int], dataset: TrainingDataset, model_file: Path, spoil: bool = False
) -> tuple[Any, float]:
    """Model and loss after one step of plain gradient descent, clipped, on the samples split into micro-batches."""
    from accelerate import Accelerator

    model = load_model(read_header(model_file))
    encoder = model.text_encoders["text_encoder"]
    parts = (Part("unet", model.unet.train(), 1.0), Part("text_encoder1", encoder.train(), 0.5))
    optimizer = torch.optim.SGD(parameter_groups(parts), lr=1.0)
    accelerator = Accelerator(cpu=True)
    *_, prepared = accelerator.prepare(model.unet, encoder, optimizer)
    objective: Objective[Conditioning] = Objective(
        model.family.process, "epsilon", 0, 1000, weighting=Weighting("min_snr", 5.0)
    )
    losses = losses_of(model, objective)
    seen: list[float] = []

    def spoiled(batch: Batch) -> torch.Tensor:
        found = losses(batch)
        return torch.where(batch.sample_index == 4, torch.nan, found) if spoil else found

    loop = Loop(
        accelerator=accelerator,
        trained=Trainable(parts, frozenset({"unet", "text_encoder"}), write=lambda path, step, epoch: None),
        optimizer=prepared,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        order=FixedOrder(sizes),  # type: ignore[arg-type]
        losses=spoiled,
        batches=lambda requests: ((request, dataset[request]) for request in requests),
        log=lambda values, step: seen.append(values["loss"]) if "loss" in values else None,
        due=(),
        say=lambda text: None,
        progress_bar=Bar(),
        steps=1,
        epochs=1,
        max_grad_norm=0.1,
    )
    loop.run(Progress())
    return model, seen[0]


def flat(module: torch.nn.Module) -> torch.Tensor:
    """All weights of a module in one row, float64."""
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


def test_a_step_does_not_depend_on_how_its_samples_are_split(dataset: TrainingDataset, model_file: Path) -> None:
    before = load_model(read_header(model_file))
    whole, loss = one_step([7], dataset, model_file)
    for sizes in ([1, 6], [2, 2, 2, 1]):
        split, split_loss = one_step(sizes, dataset, model_file)
        assert split_loss == pytest.approx(loss, rel=1e-6)
        for module in ("unet", "text_encoder"):
            start, one, other = (flat(model.modules()[module]) for model in (before, whole, split))
            step = (one - start).norm()
            assert step > 1e-3
            # float32 sums in another order; dividing each micro-batch by its own size is off by more than a tenth
            assert (other - one).norm() / step < 2e-5, (sizes, module)


def test_the_loss_is_the_weighted_sum_over_the_number_of_samples(dataset: TrainingDataset, model_file: Path) -> None:
    """Written out sample by sample: (1/Z) sum of c_i w(t_i) l_i, with c = 0.3 for regularisation images."""
    model = load_model(read_header(model_file))
    objective: Objective[Conditioning] = Objective(
        model.family.process, "epsilon", 0, 1000, weighting=Weighting("min_snr", 5.0)
    )
    losses = losses_of(model, objective)
    total = 0.0
    model.unet.requires_grad_(False)
    encoder = model.text_encoders["text_encoder"].requires_grad_(False)
    model.vae.requires_grad_(False)
    for index in range(7):
        batch = dataset[BatchRequest(1, 0, SIZE, (SAMPLES[index],), index, 7, index == 6)]
        draws = objective.draw((1, 4, 16, 16), losses.generators(batch, "noise"))
        alpha = model.family.process.alphas_cumprod[int(draws.timesteps[0])]
        posterior = model.vae.encode(batch.pixels).latent_dist
        noise = torch.randn(4, 16, 16, generator=losses.generators(batch, "posterior")[0])
        x0 = (posterior.mean + posterior.std * noise) * 0.18215
        noisy = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * draws.noise
        states = encoder(batch.input_ids[:, 0]).last_hidden_state
        error = (model.unet(noisy, draws.timesteps, states).sample - draws.noise).square().mean()
        snr = alpha / (1 - alpha)
        total += (0.3 if index % 3 == 2 else 1.0) * min(snr, 5.0) / snr * float(error)
    _, loss = one_step([3, 4], dataset, model_file)
    assert loss == pytest.approx(total / 7, rel=1e-5)


def test_a_loss_that_is_not_finite_names_step_and_image(dataset: TrainingDataset, model_file: Path) -> None:
    with pytest.raises(UserError) as raised:
        one_step([4, 3], dataset, model_file, spoil=True)
    (mistake,) = raised.value.mistakes
    assert "step 1 (epoch 1)" in mistake.what and "image_04.png" in mistake.what and "image_03" not in mistake.what
    assert "--learning_rate" in mistake.remedy
