"""The anchors in a step, with a real model and its adapter: each term, and what it costs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from library.checkpoints.files import read_header
from library.data.batch import Batch
from library.families.clip.text_inputs import ClipTokenizers
from library.families.clip.tokenizer import ClipTokenizer
from library.families.family import AS_TRAINED, Conditioning, Model
from library.families.registry import load_model
from library.objective.loss import sum_terms, window_share
from library.objective.masking import UNCHANGED_MASKS, MaskSettings
from library.objective.objective import Objective
from library.objective.weighting import Weighting
from library.options.train_options import TrainOptions
from library.training.conditioning import Conditioner
from library.training.preservation.class_prompts import ClassPrompts
from library.training.preservation.plan import Anchor, PreservationPlan
from library.training.preservation.preservation import build_preservation
from library.training.trainable import Part, Trainable
from library.training.training_loss import TrainingLoss
from networks import network
from networks.settings import read_settings
from networks.third_party.create import create_third_party
from tests import tiny

TOKENIZER = ClipTokenizers({"text_encoder": ClipTokenizer(49407)})
CPU = torch.device("cpu")
# 5 samples: two regularisation images, one training image without the identifier, two with
CAPTIONS = ("sks dog on a beach", "dog", "a photo of a cat", "a sks, grass", "dog, night")
IS_REG = (False, True, False, False, True)
PRIOR = 0.3  # prior_loss_weight
ANCHORS = (
    Anchor("reg_images", 0.7),
    Anchor("base_prediction", 0.5),
    Anchor("class_prompt", 2.0),
    Anchor("blank_prompt", 0.25),
    Anchor("outside_mask", 4.0),
)
PROMPTS = ClassPrompts((("sks", "dog"),))


@dataclass
class World:
    """A model, its adapter, and the modules to count the rows of."""

    model: Model
    adapter: Any

    def losses(self, *anchors: Anchor, masks: MaskSettings = UNCHANGED_MASKS, reg: bool = True) -> TrainingLoss:
        conditioner = Conditioner(self.model.family, self.model.text_encoders, TOKENIZER, AS_TRAINED, CPU)
        plan = PreservationPlan(anchors, PROMPTS, samples=3, reg_samples=2 if reg else 0)
        options = TrainOptions()
        options = replace(options, mask=replace(options.mask, mask_floor=masks.floor, mask_invert=masks.invert))
        facts: Any = SimpleNamespace(preservation=plan, options=options)
        trainable = Trainable(
            (Part("network", getattr(self.adapter, "module", self.adapter), 1.0),),
            frozenset({"unet", "text_encoder"}),
            whole_model=False,
            switched_off=self.adapter.switched_off,
        )
        objective: Objective[Conditioning] = Objective(
            self.model.family.process, "epsilon", 0, 1000, weightings=(Weighting("min_snr", 5.0),), mask=masks
        )
        loss = TrainingLoss(self.model, conditioner, None, objective, 5, CPU)
        unused: Any = None
        loss.preservation = build_preservation(facts, None, loss, trainable, unused, unused)
        return loss

    def predict(self, noisy: Tensor, timestep: int, caption: str) -> Tensor:
        """Of one sample with one caption, by the modules themselves."""
        ids = TOKENIZER([caption])["text_encoder"].ids[:, 0]
        states = self.model.text_encoders["text_encoder"](ids).last_hidden_state
        output: Tensor = self.model.backbone(noisy[None], torch.tensor([timestep]), states).sample[0]
        return output


def fresh_world(model_file: Path, *, moved: bool) -> World:
    """With `moved`, the adapter has learnt something in every layer, those of the text encoder too."""
    model = load_model(read_header(model_file))
    for module in model.modules().values():
        module.requires_grad_(False).eval()
    settings, problems = read_settings("networks.lora", dim=2, alpha=2, dropout=None, arguments=("conv_dim=2",))
    assert settings is not None and not problems
    modules = {part.module: model.modules()[part.module] for part in model.family.adapters}
    adapter = network.create(modules, model.family.adapters, settings, generator=torch.Generator().manual_seed(1))
    adapter.attach()
    adapter.groups({"unet": 1.0, "text_encoder1": 1.0})
    if moved:
        move(adapter)
    return World(model, adapter)


def move(adapter: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_single_file(tmp_path_factory.mktemp("model") / "sd1.safetensors", "sd1")


@pytest.fixture(scope="module")
def moved(model_file: Path) -> World:
    return fresh_world(model_file, moved=True)


def batch_of(places: Sequence[int] = (0, 1, 2, 3, 4)) -> Batch:
    """These of the five samples: 128 x 128 pixels, masks on the first and the fourth."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(5, 4, 16, 16, generator=generator)
    mask = torch.ones(5, 1, 16, 16)
    mask[0, :, :8], mask[3, :, :, :4] = 0.0, 0.5
    chosen, captions = [*places], tuple(CAPTIONS[place] for place in places)
    is_reg = torch.tensor(IS_REG)[chosen]
    return Batch(
        pixels=None,
        latents=latents[chosen],
        mask=mask[chosen],
        text_inputs=TOKENIZER(captions),
        sizes=torch.zeros(len(chosen), 6),
        score=torch.zeros(len(chosen)),
        weights=torch.where(is_reg, PRIOR, 1.0),
        is_reg=is_reg,
        sample_index=torch.tensor(chosen),
        paths=captions,
        captions=captions,
    )


def terms_of(losses: TrainingLoss, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    return {term.name: term.weighted.detach() for term in losses(batch, step)}


@contextmanager
def counted_rows(module: nn.Module) -> Iterator[list[tuple[int, bool]]]:
    """The rows of each forward pass, and whether gradients were recorded."""
    seen: list[tuple[int, bool]] = []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append((len(given[0]), torch.is_grad_enabled())))
    try:
        yield seen
    finally:
        hook.remove()


def test_at_step_0_nothing_has_moved(model_file: Path) -> None:
    """The base computes with the same tensors in the same batch, so the difference is 0 and not almost 0; in a batch
    of which only some rows are compared, the order of sums may differ."""
    world = fresh_world(model_file, moved=False)
    losses = world.losses(Anchor("base_prediction"))
    found = terms_of(losses, batch_of([1, 4]))
    assert found["base_prediction"].tolist() == [0.0, 0.0] and found["denoising"].tolist() == [0.0, 0.0]
    whole = terms_of(world.losses(*ANCHORS), batch_of())
    for name in ("base_prediction", "class_prompt", "blank_prompt", "outside_mask"):
        assert float(whole[name].max()) < 1e-9, name
    assert float(whole["denoising"].max()) > 0.1


def expected_terms(world: World, losses: TrainingLoss, place: int, masks: MaskSettings) -> dict[str, float]:
    """Each term of one sample, weighted, by the formulas of plan.py."""
    batch = batch_of([place])
    draws = losses.objective.draw((1, 4, 16, 16), losses.generators(batch, "noise"))
    timestep = int(draws.timesteps)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = float(torch.cumprod(1 - betas, 0)[timestep])
    snr = alpha / (1 - alpha)
    weight = min(snr, 5.0) / snr
    assert batch.latents is not None and batch.mask is not None
    noisy = alpha**0.5 * batch.latents[0] * 0.18215 + (1 - alpha) ** 0.5 * draws.noise[0]
    mask = (1 - batch.mask[0] if masks.invert else batch.mask[0]).clamp(min=masks.floor)

    def both(caption: str) -> Tensor:
        """The squared difference between the model in training and the base."""
        student = world.predict(noisy, timestep, caption)
        world.adapter.detach()
        base = world.predict(noisy, timestep, caption)
        world.adapter.attach()
        return (student - base) ** 2

    caption = CAPTIONS[place]
    with torch.no_grad():
        denoising = float(((world.predict(noisy, timestep, caption) - draws.noise[0]) ** 2 * mask).mean())
        values = dict.fromkeys(("denoising", *(anchor.name for anchor in ANCHORS)), 0.0)
        if IS_REG[place]:
            values["reg_images"] = 0.7 * denoising
            values["base_prediction"] = 0.5 * float(both(caption).mean())
        else:
            values["denoising"] = denoising
            values["blank_prompt"] = 0.25 * float(both("").mean())
        of_class = {0: "dog on a beach", 3: "a dog, grass"}.get(place)
        if of_class is not None:
            values["class_prompt"] = 2.0 * float(both(of_class).mean())
        values["outside_mask"] = 4.0 * float((both(caption) * (1 - mask)).mean())
    return {name: weight * value for name, value in values.items()}


@pytest.mark.parametrize("masks", [UNCHANGED_MASKS, MaskSettings(floor=0.25, invert=True)])
def test_every_term_is_that_of_the_sample_alone(moved: World, masks: MaskSettings) -> None:
    """Written out sample by sample: min-SNR, masks, the base's own text encoder, and all anchors in one batch."""
    losses = moved.losses(*ANCHORS, masks=masks)
    found = terms_of(losses, batch_of())
    assert list(found) == ["denoising", *(anchor.name for anchor in ANCHORS)]
    for place in range(5):
        expected = expected_terms(moved, losses, place, masks)
        for name, value in expected.items():
            # the difference of two nearly equal outputs has their rounding
            assert float(found[name][place]) == pytest.approx(value, rel=2e-3, abs=1e-9), (name, place)
        compared = {name: value for name, value in expected.items() if name not in ("denoising", "reg_images")}
        assert max(compared.values()) > 1e-6, place


def test_only_rows_that_need_it_go_through_the_base_and_all_at_once(moved: World) -> None:
    batch = batch_of()
    cases: dict[tuple[Anchor, ...], list[tuple[int, bool]]] = {
        (Anchor("reg_images"),): [(5, True)],
        (Anchor("base_prediction"),): [(2, False), (5, True)],
        (Anchor("class_prompt"),): [(2, False), (7, True)],
        (Anchor("blank_prompt"),): [(3, False), (8, True)],
        (Anchor("outside_mask"),): [(2, False), (5, True)],
        ANCHORS: [(9, False), (10, True)],  # 2 + 2 + 3 + 2 rows are compared; 5 samples and 2 + 3 further rows
    }
    for anchors, expected in cases.items():
        with counted_rows(moved.model.backbone) as seen:
            moved.losses(*anchors)(batch, 0)
        assert seen == expected, anchors
    with counted_rows(moved.model.backbone) as seen:
        moved.losses(Anchor("base_prediction"))(batch_of([0, 2]), 0)
    assert seen == [(2, True)]  # no regularisation image


def test_an_anchor_has_its_steps(moved: World) -> None:
    losses = moved.losses(Anchor("base_prediction", 0.5, first=3, last=4))
    for finished, expected in enumerate([1, 1, 2, 2, 1]):
        with counted_rows(moved.model.backbone) as seen:
            found = terms_of(losses, batch_of([1]), finished)
        assert len(seen) == expected and ("base_prediction" in found) is (expected == 2)


def test_regularisation_images_as_ever_bit_for_bit(moved: World) -> None:
    """The two terms of a mixed batch are the losses and the gradients of one."""
    gradients = []
    for losses in (moved.losses(Anchor("reg_images")), moved.losses(reg=False)):
        moved.adapter.zero_grad()
        terms = losses(batch_of(), 0)
        total = sum_terms(terms)
        window_share(total, batch_of().weights, 5).backward()
        gradients.append([total.detach(), *(p.grad.clone() for p in moved.adapter.parameters() if p.grad is not None)])
    assert len(terms) == 1 and len(gradients[0]) > 100
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_an_anchor_of_a_tiny_weight_only_measures(moved: World) -> None:
    """Gradients stay bit for bit those without it, as long as it adds no rows to the batch."""
    meters = (Anchor("base_prediction", 1e-20), Anchor("outside_mask", 1e-20))
    gradients = []
    for anchors in ((), meters):
        moved.adapter.zero_grad()
        terms = moved.losses(Anchor("reg_images"), *anchors)(batch_of(), 0)
        window_share(sum_terms(terms), batch_of().weights, 5).backward()
        gradients.append([p.grad.clone() for p in moved.adapter.parameters() if p.grad is not None])
    drifts = {term.name: float(term.losses.detach()[term.members].mean()) for term in terms if term.members is not None}
    assert drifts.keys() == {anchor.name for anchor in meters} and min(drifts.values()) > 1e-6
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def gradient(world: World, splits: Sequence[Sequence[int]]) -> Tensor:
    losses = world.losses(*ANCHORS)
    world.adapter.zero_grad()
    for places in splits:
        batch = batch_of(places)
        window_share(sum_terms(losses(batch, 0)), batch.weights, 5).backward()
    return torch.cat([p.grad.double().flatten() for p in world.adapter.parameters() if p.grad is not None])


def test_a_window_may_be_split_in_any_way(moved: World) -> None:
    """Also into batches that hold one kind of samples only."""
    whole = gradient(moved, [range(5)])
    for splits in ([[0, 2, 3], [1, 4]], [[4], [3, 2], [1, 0]]):
        other = gradient(moved, splits)
        assert float((other - whole).norm() / whole.norm()) < 2e-5, splits


@pytest.fixture(params=["own", "algo=lokr"])
def adapted(request: pytest.FixtureRequest, model_file: Path) -> World:
    """An adapter of this project, and one of LyCORIS, that have learnt something."""
    if request.param == "own":
        return fresh_world(model_file, moved=True)
    pytest.importorskip("lycoris")
    model = load_model(read_header(model_file))
    modules = {part.module: model.modules()[part.module].requires_grad_(False) for part in model.family.adapters}
    foreign = create_third_party(
        "lycoris.kohya", modules, model.family.adapters, dim=2, alpha=1, dropout=None, arguments=(request.param,),
        train=frozenset(modules),
    )  # fmt: skip
    foreign.attach()
    foreign.start()
    move(foreign.network)
    return World(model, foreign)


def test_switched_off_is_the_base_and_then_all_is_as_before(adapted: World, model_file: Path) -> None:
    plain = World(load_model(read_header(model_file)), None)
    noisy = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(4))
    module = getattr(adapted.adapter, "module", adapted.adapter)
    module.train()
    middle = adapted.model.backbone.mid_block.train()
    middle.resnets[0].dropout.p = 0.5  # the base has no dropout, whatever the model in training has
    adapted.adapter.set_multiplier(0.5)
    torch.manual_seed(0)
    before, modes = adapted.predict(noisy, 300, "sks dog"), [m.training for m in adapted.model.backbone.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    losses = adapted.losses(Anchor("base_prediction"))
    base, inputs = losses.preservation.base, None
    assert base is not None
    batch = batch_of([1])
    inputs, _ = losses.start(batch, noisy[None], losses.conditioning(batch), 0)
    with torch.no_grad():
        expected = plain.predict(inputs.noisy[0], int(inputs.timesteps), CAPTIONS[1])
    assert torch.equal(base(batch, inputs, batch.captions, [0])[0], expected)

    assert [m.training for m in adapted.model.backbone.modules()] == modes and module.training
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]
    assert adapted.adapter.multiplier == 0.5
    torch.manual_seed(0)
    after = adapted.predict(noisy, 300, "sks dog")
    assert torch.equal(after, before) and not torch.equal(before, plain.predict(noisy, 300, "sks dog"))
