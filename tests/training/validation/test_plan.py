"""Which images are validated on, with which partners, and how often."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from library.data.order import Place
from library.options.datasets import CaptionSettings
from library.options.groups.validation import ValidationOptions
from library.options.mistakes import Mistakes
from library.options.parse import parse
from library.training.plan.images import Images, decide_images
from library.training.plan.plan import decide
from library.training.plan.text import describe
from library.training.saving.dataset_metadata import dataset_metadata
from library.training.validation.plan import (
    MOST,
    TIMESTEPS,
    ValidationPlan,
    decide_validation,
    group_into_batches,
    validation_caption,
)
from tests import tiny
from tests.data.image_files import record
from tests.training.running import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    world = make_world(root)
    tiny.write_images(root / "many" / "2_dog", 12, size=(96, 64))
    tiny.write_images(root / "many" / "1_cat", 4, size=(64, 64), seed=5)
    for seed, folder in enumerate(("2_dog", "1_cat"), 50):
        for path in tiny.write_images(root / "tall" / folder, 4, size=(64, 128), seed=seed):
            path.rename(root / "many" / folder / f"tall_{path.name}")
    tiny.write_images(root / "reg" / "1_animal", 2, seed=77)
    return world


def images_of(world: World, out: Path, **flags: object) -> Images:
    flags = {"train_data_dir": world.root / "many", "enable_bucket": True, "min_bucket_reso": 64, **flags}
    found = decide_images(parse(world.arguments(out, **flags)).options, None, Mistakes(), seed=1)
    assert found is not None
    return found


def chosen(images: Images, **flags: int | None) -> ValidationPlan:
    plan = decide_validation(replace(ValidationOptions(), **flags), images)
    assert plan is not None
    return plan


def test_without_held_out_images_validation_must_be_asked_for(world: World, tmp_path: Path) -> None:
    """Then it measures training images, and images of the class if there are any."""
    images = images_of(world, tmp_path)
    assert decide_validation(ValidationOptions(), images) is None
    assert decide_validation(ValidationOptions(max_validation_steps=3), images) is None
    alone = chosen(images, validate_every_n_steps=1)
    (training,) = alone.sets
    assert training.name == "training" and training.numbers == training.points and len(training.numbers) == MOST
    assert (alone.every_n_steps, alone.every_n_epochs) == (1, None) and alone.passes == TIMESTEPS * MOST
    of_class = chosen(images_of(world, tmp_path, reg_data_dir=world.root / "reg"), validate_every_n_epochs=2)
    assert [(each.name, len(each.numbers)) for each in of_class.sets] == [("training", MOST), ("class", 5)]
    assert len(chosen(images, validate_every_n_steps=1, max_validation_steps=2).training) == 2


def test_partners_have_the_points_of_held_out_images_and_the_class_its_own(world: World, tmp_path: Path) -> None:
    plan = chosen(images_of(world, tmp_path, validation_split=0.25, reg_data_dir=world.root / "reg"))
    held_out, training, of_class = plan.sets
    assert held_out.points == held_out.numbers == training.points and of_class.points == of_class.numbers
    assert (len(held_out.numbers), len(of_class.numbers)) == (6, 5)
    assert plan.passes == TIMESTEPS * (6 + 6 + 5)


def test_each_held_out_image_has_a_partner_of_its_own_that_is_trained_on(world: World, tmp_path: Path) -> None:
    images = images_of(world, tmp_path, validation_split=0.25, reg_data_dir=world.root / "reg")
    held_out, partners = zip(*chosen(images).pairs, strict=True)
    records, placements = images.all_records, images.all_placements
    assert len(held_out) == 6 and {records[number] for number in held_out} == set(images.scan.held_out)
    assert len(set(partners)) == 6
    for one, other in zip(held_out, partners, strict=True):
        assert not records[other].held_out and not records[other].is_reg
        assert records[one].subset == records[other].subset
        assert placements[one].bucket == placements[other].bucket


def test_partners_are_taken_again_when_there_are_too_few(world: World, tmp_path: Path) -> None:
    images = images_of(world, tmp_path, validation_split=0.75)
    pairs = chosen(images).pairs
    assert len(pairs) == 18 and len({other for _, other in pairs}) == 6
    assert all(not images.all_records[other].held_out for _, other in pairs)


def test_a_bound_takes_some_whole_batches_and_always_the_same(world: World, tmp_path: Path) -> None:
    images = images_of(world, tmp_path, validation_split=0.5, train_batch_size=2)
    every = chosen(images).pairs
    two = chosen(images, max_validation_steps=2).pairs
    assert two == every[: len(two)] and 2 <= len(two) <= 4
    assert chosen(images, max_validation_steps=100).pairs == every


def test_another_image_leaves_the_order_of_the_others(world: World, tmp_path: Path) -> None:
    """Batches of one: the order is that of the images."""

    def names(images: Images) -> list[str]:
        return [images.all_records[held_out].name for held_out, _ in chosen(images).pairs]

    images = images_of(world, tmp_path, validation_split=0.5)
    less = replace(
        images,
        scan=replace(images.scan, held_out=images.scan.held_out[1:]),
        held_out=replace(images.held_out, placements=images.held_out.placements[1:]),
    )
    gone = images.scan.held_out[0].name
    assert names(less) == [name for name in names(images) if name != gone]


def test_batches_hold_one_bucket_of_one_dataset() -> None:
    one: Place = (0, (64, 64))
    other: Place = (1, (64, 64))
    places = [one, other, one, other, one]
    assert group_into_batches([0, 1, 2, 3, 4], places, [2, 3]) == [[0, 2], [1, 3], [4]]
    assert group_into_batches([], places, [2, 3]) == []


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(None, None, (None, 1)), (10, None, (10, None)), (None, 3, (None, 3)), (10, 3, (10, 3))],
)
def test_cadence(
    steps: int | None, epochs: int | None, expected: tuple[int | None, int | None], world: World, tmp_path: Path
) -> None:
    images = images_of(world, tmp_path, validation_split=0.25)
    plan = chosen(images, validate_every_n_steps=steps, validate_every_n_epochs=epochs)
    assert (plan.every_n_steps, plan.every_n_epochs) == expected


def test_captions_are_whole(tmp_path: Path) -> None:
    settings = CaptionSettings(
        shuffle=True, dropout_rate=1.0, dropout_every_n_epochs=1, tag_dropout_rate=1.0, warmup_step=100.0, prefix="my"
    )
    one = record(tmp_path / "a.png", (64, 64), caption="dog, grass, sky")
    assert validation_caption(one, settings) == "my dog, grass, sky"
    drawn = {validation_caption(replace(one, caption="{dog|cat}"), CaptionSettings(wildcard=True)) for _ in range(9)}
    assert drawn in ({"dog"}, {"cat"})


def test_the_plan_names_the_held_out_images(world: World, tmp_path: Path) -> None:
    flags = {"train_data_dir": world.root / "many", "validation_split": 0.25, "max_train_steps": 2}
    plan = decide(parse(world.arguments(tmp_path, **flags)))
    text = describe(plan)
    assert "2_dog: 16 images, 4 held out for validation, 12 x 2 = 24 samples, training" in text
    assert plan.facts.order.samples_per_epoch == 12 * 2 + 6


def test_a_training_image_that_is_paired_several_times_is_counted_once(world: World, tmp_path: Path) -> None:
    """Of 16 + 8 images, 12 + 6 are held out, so that only 6 are trained on."""
    flags = {"train_data_dir": world.root / "many", "validation_split": 0.75, "max_train_steps": 2}
    text = describe(decide(parse(world.arguments(tmp_path, **flags))))
    assert "18 held-out and 6 training images, each at" in text


def test_the_cost_counts_forward_passes(world: World, tmp_path: Path) -> None:
    """12 images x 2 + 6 = 30 samples an epoch, there and back: three passes each. 6 pairs at K timesteps: 12 K, and
    once for the base model: of 2 steps in 30, that is 15 times an epoch."""
    flags = {"train_data_dir": world.root / "many", "validation_split": 0.25, "max_train_steps": 2}
    plan = decide(parse(world.arguments(tmp_path, **flags)))
    every_epoch = chosen(plan.facts.images)
    assert every_epoch.passes == 12 * TIMESTEPS
    assert every_epoch.share_of_training(plan.facts.duration, 30) == pytest.approx(16 * 12 * TIMESTEPS / 90)
    by_steps = chosen(plan.facts.images, validate_every_n_steps=15)
    assert by_steps.share_of_training(plan.facts.duration, 30) == pytest.approx(17 * 12 * TIMESTEPS / 90)
    assert by_steps.share_of_training(plan.facts.duration, 30, versions=2) == pytest.approx(19 * 12 * TIMESTEPS / 90)


def test_a_dataset_may_be_held_out_whole(world: World, tmp_path: Path) -> None:
    toml = tmp_path / "data.toml"
    toml.write_text(
        "[general]\nresolution = 64\n"
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{world.root / 'many' / '2_dog'}'\nclass_tokens = 'dog'\n"
        "[[datasets]]\nvalidation_split = 1.0\n"
        f"[[datasets.subsets]]\nimage_dir = '{world.root / 'many' / '1_cat'}'\n",
        encoding="utf-8",
    )
    plan = decide(parse(world.arguments(tmp_path, train_data_dir=None, dataset_config=toml, max_train_steps=2)))
    assert "1_cat: 8 images, all held out, validation" in describe(plan)
    assert len(plan.facts.images.records) == 16 and len(chosen(plan.facts.images).pairs) == 8


def test_a_subset_may_be_only_validated_on(world: World, tmp_path: Path) -> None:
    """Of the class, too. Plan, debug page and metadata count these images."""
    toml = tmp_path / "data.toml"
    toml.write_text(
        "[general]\nresolution = 64\n[[datasets]]\n"
        f"[[datasets.subsets]]\nimage_dir = '{world.root / 'many' / '2_dog'}'\nclass_tokens = 'dog'\n"
        f"[[datasets.subsets]]\nimage_dir = '{world.root / 'many' / '1_cat'}'\nvalidation = true\n"
        f"[[datasets.subsets]]\nimage_dir = '{world.root / 'reg' / '1_animal'}'\nvalidation = true\nis_reg = true\n",
        encoding="utf-8",
    )
    plan = decide(parse(world.arguments(tmp_path, train_data_dir=None, dataset_config=toml, max_train_steps=2)))
    text = describe(plan)
    assert "1_cat: 8 images, all held out, validation," in text
    assert "1_animal: 2 images, all held out, validation of the class," in text
    assert not plan.facts.preservation.has_reg and len(plan.facts.images.records) == 16
    assert len(chosen(plan.facts.images).pairs) == 8
    (data,) = json.loads(dataset_metadata(plan.facts.options, plan.facts.images)["ss_datasets"])
    assert [(each["img_count"], each.get("num_validation_images")) for each in data["subsets"]] == [
        (16, None), (0, 8), (0, 2),
    ]  # fmt: skip
