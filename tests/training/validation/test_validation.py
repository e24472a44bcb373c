"""The validation loss: a pure function of the weights and of the images' names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from library.data.buckets import Placement
from library.data.cache.latent_cache import CachedLatents
from library.data.reading import ImageReader
from library.data.retries import Unreadable
from library.families.family import Conditioning
from library.objective.masking import MaskSettings
from library.objective.objective import Objective
from library.objective.process import VariancePreserving
from library.options.groups.objective import ObjectiveOptions
from library.options.mistakes import Mistake
from library.runtime.processes import Processes
from library.runtime.seeds import torch_generator
from library.training.saving.state import Progress
from library.training.validation.losses import Losses
from library.training.validation.plan import TIMESTEPS, ValidationPlan
from library.training.validation.table import Table
from library.training.validation.validation import Validation
from tests.data.image_files import dataset, record, subset

SIZES = [(64, 64), (64, 64), (128, 64), (64, 64), (64, 64), (128, 64)]  # three to train, three held out
PAIRS = ((3, 0), (4, 1), (5, 2))
STATES = {"zero": 0.0, "one": 1.0}


@dataclass
class Toy:
    """A validation of numbers that can be followed by hand, and what it did."""

    batch_size: int = 2
    objective: Objective[Conditioning] = field(default_factory=lambda: objective())
    plan: ValidationPlan | None = field(default_factory=lambda: ValidationPlan(PAIRS, None, 1))
    padded: bool = True
    latents: Callable[[int], Tensor] = lambda number: noise(number, SIZES[number])
    masks: Mapping[int, Tensor] = field(default_factory=dict)
    asked: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # noisy latents, timesteps
    logged: list[tuple[dict[str, float], int]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    module: nn.Module = field(default_factory=lambda: nn.Sequential(nn.Dropout(0.5)).train())
    weight: float = 0.5

    def predict(self, noisy: Tensor, timesteps: Tensor, given: Conditioning) -> Tensor:
        assert not self.module.training and not torch.is_grad_enabled()
        self.asked.append((noisy, timesteps))
        torch.randn(1)  # as careless parts of a model do
        return self.module(noisy) * self.weight + (given["states"] + timesteps / 1000).view(-1, 1, 1, 1)

    @contextmanager
    def weights(self) -> Iterator[None]:
        self.taken.append("averaged")
        yield

    def make(self, **values: Any) -> Validation:
        records = [
            record(Path("x") / f"{number}.png", size, subset=0, caption="one" if number % 2 else "zero")
            for number, size in enumerate(SIZES)
        ]
        spec = subset(Path("x"))
        reader = ImageReader(
            records, [Placement(size, size) for size in SIZES], (spec,), (dataset(spec, batch_size=self.batch_size),)
        )
        validation = Validation(
            plan=self.plan,
            reader=reader,
            objective=self.objective,
            predict=self.predict,
            conditioning=self.encode,
            sizes_and_scores=lambda numbers: (torch.tensor(numbers)[:, None].expand(-1, 6), torch.tensor(numbers)),
            padded=self.padded,
            encoded=self.encoded,
            keys={number: f"content {number}" for number in range(len(SIZES))},
            table=Table(None, "run", self.said.append),
            scaled=lambda latents: 0.5 * latents,
            versions={"": self.weights},
            device=torch.device("cpu"),
            modules=[self.module],
            steps=10,
            steps_per_epoch=4,
            log=lambda values, step: self.logged.append((values, step)),
            say=self.said.append,
            warn=self.said.append,
        )
        return replace(validation, **values)

    def encoded(self, number: int) -> CachedLatents:
        return CachedLatents(self.latents(number), self.masks.get(number))

    def encode(self, texts: Sequence[str], sizes: Tensor, scores: Tensor) -> Conditioning:
        assert self.padded or len(texts) == 1
        states = torch.tensor([STATES[text] for text in texts])
        assert torch.equal(sizes[:, 0], scores) and len(scores) == len(texts)
        return {"states": states}

    def measure(self) -> Losses:
        assert self.plan is not None
        return self.make().measure(self.plan, self.weights)


def objective(**values: Any) -> Objective[Conditioning]:
    return Objective.from_options(replace(ObjectiveOptions(), **values), VariancePreserving.scaled_linear(), "epsilon")


def noise(seed: int, size: tuple[int, int]) -> Tensor:
    return torch.randn((4, size[1] // 8, size[0] // 8), generator=torch.Generator().manual_seed(seed))


def plain_loss(number: int, name: str, weight: float = 0.5, mask: Tensor | None = None) -> list[float]:
    """The formulas of library/training/validation/validation.py and of DDPM, written out for one record."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    found = []
    for b in range(8):
        u = int.from_bytes(hashlib.blake2b(f"{name}|{b}".encode(), digest_size=8).digest(), "big") / 2**64
        t = int(np.floor((b + u) / 8 * 1000))
        shape = (4, SIZES[number][1] // 8, SIZES[number][0] // 8)
        n = torch.randn(shape, generator=torch_generator("validation noise", name, b)).double().numpy()
        x = noise(number, SIZES[number]).double().numpy() * 0.5
        output = (np.sqrt(kept[t]) * x + np.sqrt(1 - kept[t]) * n) * weight + number % 2 + t / 1000
        m = np.ones((1, *shape[1:])) if mask is None else mask.double().numpy()
        found.append(float((m * (output - n) ** 2).sum() / (4 * m.sum())))
    return found


def test_the_loss_is_that_of_the_formula() -> None:
    losses = Toy().measure()
    for place, (held_out, trained) in enumerate(PAIRS):
        name = f"content {held_out}"
        assert losses.held_out[place].tolist() == pytest.approx(plain_loss(held_out, name), rel=1e-5)
        assert losses.trained[place].tolist() == pytest.approx(plain_loss(trained, name), rel=1e-5)
    average = losses.means["held_out"][0].value
    assert average == pytest.approx(np.mean([plain_loss(h, f"content {h}") for h, _ in PAIRS]), rel=1e-5)


def test_the_loss_within_masks_is_that_of_the_formula() -> None:
    """Of the images that have a mask in which something counts; the loss of whole images is not changed by masks."""
    ramp, black = torch.linspace(0, 1, 64).view(1, 8, 8), torch.zeros(1, 8, 8)
    toy = Toy(masks={3: ramp, 4: black, 0: torch.full((1, 8, 8), 0.25)})
    found = toy.measure()
    assert torch.equal(found.held_out, Toy().measure().held_out)
    within = found.within_masks
    assert {name: (tuple(each.losses.shape), each.images) for name, each in within.items()} == {
        "held_out": ((1, 8), 1), "training": ((1, 8), 1)
    }  # fmt: skip
    assert within["held_out"].losses[0].tolist() == pytest.approx(plain_loss(3, "content 3", mask=ramp), rel=1e-5)
    assert within["training"].losses[0].tolist() == pytest.approx(found.trained[0].tolist(), rel=1e-5)  # even
    inverted = Toy(masks={3: 1 - ramp}, objective=replace(objective(), mask=MaskSettings(invert=True))).measure()
    assert torch.allclose(inverted.within_masks["held_out"].losses, within["held_out"].losses)


def test_losses_within_masks_have_names_of_their_own() -> None:
    """In logs, table and state; another mask is measured anew."""
    mask = torch.linspace(0, 1, 64).view(1, 8, 8)
    toy = Toy(masks={3: mask, 0: mask})
    validation, progress = toy.make(base=nullcontext), Progress()
    validation.begin(progress)
    play(validation)
    assert "; within masks " in toy.said[0] and toy.said[0].endswith(" on 1 training image")
    names = {name for values, _ in toy.logged for name in values}
    expected = {f"loss/validation/epoch_{kind}_mask{end}" for kind in ("average", "training") for end in ("", "_base")}
    assert expected <= names and "loss/validation/epoch_average_mask_t000_124" in names
    assert {row.set for row in validation.table.rows} == {"held_out", "training", "held_out_mask", "training_mask"}
    asked = len(toy.asked)
    toy.make().begin(progress)
    assert len(toy.asked) == asked, "the base model's are in the state"
    other = Toy(masks={3: mask.flip(-1), 0: mask})
    other.make(base=nullcontext).begin(progress)
    assert other.asked


def test_each_part_of_the_range_has_one_timestep() -> None:
    toy = Toy(batch_size=1, objective=objective(min_timestep=200, max_timestep=600))
    toy.measure()
    asked = [int(timesteps) for _, timesteps in toy.asked]
    for start in range(0, len(asked), TIMESTEPS):
        parts = [(t - 200) // 50 for t in asked[start : start + TIMESTEPS]]
        assert parts == list(range(TIMESTEPS))


def test_settings_of_the_training_loss_do_not_matter() -> None:
    shaped = objective(min_snr_gamma=5.0, noise_offset=0.1)
    assert torch.equal(Toy(objective=shaped).measure().held_out, Toy().measure().held_out)


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"batch_size": 7}, {"padded": False}])
def test_the_batch_does_not_matter(change: dict[str, Any]) -> None:
    torch.testing.assert_close(Toy(**change).measure().held_out, Toy().measure().held_out)


def test_other_images_do_not_matter() -> None:
    alone = Toy(plan=ValidationPlan(PAIRS[1:2], None, 1)).measure()
    torch.testing.assert_close(alone.held_out[0], Toy().measure().held_out[1])
    torch.testing.assert_close(alone.trained[0], Toy().measure().trained[1])


def test_a_pair_has_the_same_timesteps_and_noise() -> None:
    """Where both images of a pair are one, and their captions, nothing diverges."""
    toy = Toy(latents=lambda number: noise(number % 3, SIZES[number]), plan=ValidationPlan(((3, 0), (5, 2)), None, 1))
    records = [replace(one, caption="one") for one in toy.make().reader.records]
    reader = replace(toy.make().reader, records=records)
    assert toy.plan is not None
    losses = toy.make(reader=reader).measure(toy.plan)
    assert losses.divergence == 0 and torch.equal(losses.held_out, losses.trained)


def test_each_set_has_its_own_points() -> None:
    """A partner those of its held-out image; images of the class, and training images alone, those of their content."""
    toy = Toy(plan=ValidationPlan(PAIRS[:1], None, 1, of_class=(1, 4)))
    losses = toy.measure()
    for found, number, key in ((losses.held_out[0], 3, 3), (losses.trained[0], 0, 3), (losses.of_class[1], 4, 4)):
        assert found.tolist() == pytest.approx(plain_loss(number, f"content {key}"), rel=1e-5)
    alone = Toy(plan=ValidationPlan((), None, 1, training=(0, 2))).measure()
    assert alone.trained[1].tolist() == pytest.approx(plain_loss(2, "content 2"), rel=1e-5) and not len(alone.held_out)


def test_names_do_not_matter() -> None:
    toy = Toy()
    reader = toy.make().reader
    renamed = replace(reader, records=[replace(one, name=f"x{one.name}") for one in reader.records])
    assert toy.plan is not None
    assert torch.equal(toy.make(reader=renamed).measure(toy.plan).held_out, toy.measure().held_out)


def test_the_base_model_is_measured_once_and_kept_in_the_state() -> None:
    toy = Toy(plan=ValidationPlan(PAIRS, 1, None, of_class=(1,)))

    @contextmanager
    def switched_off() -> Iterator[None]:
        toy.weight, kept = 0.0, toy.weight
        yield
        toy.weight = kept

    progress = Progress()
    first = toy.make(base=switched_off)
    first.begin(progress)
    first.due(replace(progress, step=1), epoch_ended=False)
    expected = np.mean([plain_loss(h, f"content {h}", weight=0.0) for h, _ in PAIRS])
    values = toy.logged[0][0]
    assert values["loss/validation/step_average_base"] == pytest.approx(expected, rel=1e-5)
    assert toy.said[0].startswith("base model: validation loss ") and f"(base {expected:.4f})" in toy.said[1]
    assert values["loss/validation/step_class_t000_124_base"] == pytest.approx(
        plain_loss(1, "content 1", 0.0)[0], rel=1e-5
    )
    assert values["loss/validation/step_class"] == pytest.approx(np.mean(plain_loss(1, "content 1")), rel=1e-5)
    assert [(row.step, row.version) for row in first.table.rows[::27]] == [(0, "base"), (1, "model")]

    # a resumed run has the same values, as JSON keeps them, without the base model
    resumed = Progress(**json.loads(json.dumps(asdict(progress))))
    rest = toy.make(base=None)
    asked = len(toy.asked)
    rest.begin(resumed)
    assert len(toy.asked) == asked and resumed == progress
    assert rest.table.rows == first.table.rows[:27]

    # of other images it has none
    other = toy.make(base=None, plan=ValidationPlan(PAIRS[:2], 1, None))
    other.begin(resumed)
    assert "has none of these images" in toy.said[-1] and not other.table.rows
    again = toy.make(base=switched_off, plan=ValidationPlan(PAIRS[:2], 1, None))
    again.begin(resumed)
    assert len(toy.asked) > asked and again.table.rows


def test_means_have_their_standard_errors() -> None:
    losses = Losses(torch.tensor([[3.0, 5.0], [1.0, 1.0]]), torch.tensor([[2.0, 2.0]]))
    whole, low, high = losses.means["held_out"]
    assert (whole.value, whole.images) == (2.5, 2) and whole.error == pytest.approx(
        1.5
    )  # of 4 and 1: 1.5 sqrt 2 / sqrt 2
    assert (low.value, high.value) == (2.0, 3.0) and losses.means["training"][0].error is None
    assert "class" not in losses.means


def test_the_divergence_is_how_much_worse_unknown_images_are() -> None:
    losses = Losses(torch.tensor([[0.5, 0.3], [0.4, 0.4]]), torch.tensor([[0.2, 0.2], [0.3, 0.1]]))
    assert losses.means["held_out"][0].value == pytest.approx(0.4) and losses.divergence == pytest.approx(0.2)
    assert losses.error == pytest.approx(0.0, abs=1e-7)
    assert Losses(torch.ones(1, 2), torch.zeros(1, 2)).error is None
    spread = Losses(torch.tensor([[3.0], [1.0]]), torch.zeros(2, 1))
    assert spread.error == pytest.approx(1.0)  # standard deviation sqrt(2), over sqrt(2)


def test_an_image_that_is_the_partner_of_several_is_one_image() -> None:
    """In the log and in the table."""
    toy = Toy(plan=ValidationPlan(((1, 0), (2, 0), (3, 0)), 1, None))
    validation = toy.make()
    play(validation)
    assert " on 3 held-out images" in toy.said[0] and " on 1 training image: divergence" in toy.said[0]
    images = {row.set: row.images for row in validation.table.rows}
    assert images == {"held_out": 3, "training": 1}


def test_a_loss_that_is_not_finite_ends_no_run() -> None:
    toy = Toy(weight=float("inf"))
    play(toy.make())
    assert len(toy.logged) == 3 and "nan" in toy.said[0]


def test_modes_and_random_states_are_left_as_they_were() -> None:
    toy = Toy()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    toy.measure()
    assert torch.equal(state, torch.get_rng_state()) and toy.module.training and toy.module[0].training
    assert toy.taken == ["averaged"]


def play(validation: Validation) -> None:
    """The loop's calls in ten steps, four an epoch."""
    progress = Progress()
    for step in range(1, 11):
        progress.step, progress.window = step, progress.window + 1
        validation.due(progress, epoch_ended=False)
        if progress.window == 4:
            validation.due(progress, epoch_ended=True)
            progress.epoch, progress.window = progress.epoch + 1, 0


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [
        (None, 1, [("epoch", 1), ("epoch", 2), ("epoch", 3)]),
        (None, 2, [("epoch", 2)]),
        (4, None, [("step", 4), ("step", 8)]),
        (4, 2, [("step", 4), ("step", 8), ("epoch", 2)]),
    ],
)
def test_when_it_is_due(steps: int | None, epochs: int | None, expected: list[tuple[str, int]]) -> None:
    toy = Toy(plan=ValidationPlan(PAIRS, steps, epochs))
    play(toy.make())
    kinds = [(next(iter(values)).split("/")[-1].partition("_")[0], at) for values, at in toy.logged]
    assert kinds == expected
    assert len(toy.taken) == len({at if kind == "step" else 4 * at for kind, at in expected})  # the same is taken once


def test_without_a_plan_nothing_happens() -> None:
    toy = Toy(plan=None)
    play(toy.make())
    assert not toy.logged and not toy.asked and not toy.said


def test_names_in_logs() -> None:
    toy = Toy()
    play(toy.make())
    values, at = toy.logged[0]
    assert at == 1
    assert values["loss/validation/epoch_average"] == toy.measure().means["held_out"][0].value
    assert values["loss/validation/epoch_divergence"] == toy.measure().divergence
    parts = [value for name, value in values.items() if name.startswith("loss/validation/epoch_average_t")]
    assert "loss/validation/epoch_average_t000_124" in values and len(parts) == 8
    assert values["loss/validation/epoch_training"] == toy.measure().means["training"][0].value
    assert np.mean(parts) == pytest.approx(values["loss/validation/epoch_average"])
    assert "validation loss" in toy.said[0] and "3 held-out images" in toy.said[0]


class OtherFails(Processes):
    """The first of two processes, of which the other one cannot read a file."""

    def gather(self, value: Any) -> list[Any]:
        return [value, (Unreadable, (Mistake("x.png is gone"),))]


def test_no_process_measures_the_base_model_if_one_cannot_read_its_images() -> None:
    """It would wait for the others, which train."""
    toy = Toy()
    toy.make(processes=OtherFails(0, 2), base=nullcontext).begin(Progress())
    assert toy.said == ["no validation losses of the base model: x.png is gone"] and not toy.asked
