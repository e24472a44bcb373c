"""The plan of an evaluation: words from folder names, what is drawn, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from library.options.mistakes import UserError
from library.options.parse import parse
from library.training.evaluation.plan import EvaluationPlan
from library.training.plan.plan import Plan, decide
from library.training.plan.text import sections
from tests.evaluation import tiny_encoders
from tests.training.running import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """With one subject, "sks dog"."""
    world = make_world(tmp_path_factory.mktemp("world"))
    shutil.move(world.root / "train" / "1_zwx cat", world.root / "cat" / "1_zwx cat")
    tiny_encoders.write_dino(world.root / "dino")
    tiny_encoders.write_clip(world.root / "clip")
    (world.root / "scenes.txt").write_text("a {subject} --w 64 --h 64 --s 5\na red sks dog --l 1\n", encoding="utf-8")
    return world


def plan_of(world: World, **flags: object) -> Plan:
    chosen = {"evaluation_dino": world.root / "dino", "evaluation_prompts": world.root / "scenes.txt", **flags}
    return decide(parse(world.arguments(world.root / "out", **{"max_train_steps": 12, **chosen})))


def evaluation_of(world: World, **flags: object) -> EvaluationPlan:
    evaluation = plan_of(world, **flags).evaluation
    assert evaluation is not None
    return evaluation


def told(world: World, **flags: object) -> str:
    with pytest.raises(UserError) as raised:
        plan_of(world, **flags)
    return " ".join(f"{mistake.what} {mistake.remedy}" for mistake in raised.value.mistakes)


def test_the_words_are_those_of_the_folder(world: World) -> None:
    evaluation = evaluation_of(world)
    drawn = [[(request.prompt, request.seed) for request in own] for own in evaluation.images]
    assert drawn == [[("a sks dog", 0), ("a sks dog", 1)], [("a red sks dog", 1000), ("a red sks dog", 1001)]]
    assert [[request.prompt for request in own] for own in evaluation.of_class] == [["a dog"], ["a red dog"]]
    assert sorted(path.name for path in evaluation.real) == ["image_00.png", "image_01.png", "image_02.png"]
    assert (evaluation.every_n_steps, evaluation.every_n_epochs) == (None, 1)
    given = evaluation_of(world, evaluation_subject="my pet", evaluation_class="pet", evaluate_every_n_steps=4)
    assert given.images[0][0].prompt == "a my pet" and given.of_class[0][0].prompt == "a pet"
    assert (given.every_n_steps, given.every_n_epochs) == (4, None)


def test_the_plan_says_what_it_costs(world: World) -> None:
    """Per evaluation 3 images of 5 steps with guidance and 3 of 30 without it; one before the first step, one after
    each of 2 epochs of 6 samples. A sample of training is 3 passes."""
    lines = list(sections(plan_of(world))["evaluation"])
    assert "2 prompts, 4 images of the subject and 2 of its class, against 3 training images by DINO" in lines[0]
    assert "before the first step and after every epoch" in lines[0]
    passes = 3 * (3 * 5 * 2 + 3 * 30)
    assert f"adds about {passes / (3 * 12):.0%}" in lines[1]


def test_images_without_a_size_have_that_of_training_and_larger_ones_take_longer(world: World) -> None:
    """Of 128x128 an image has four times the pixels of 64x64."""
    assert {(request.width, request.height) for request in evaluation_of(world).requests} == {(64, 64)}
    wide = evaluation_of(world, resolution="128,68")
    assert {(request.width, request.height) for request in wide.images[1]} == {(128, 64)}
    shares = []
    for side in (64, 128):
        prompts = world.root / f"{side}.txt"
        prompts.write_text(f"a {{subject}} --w {side} --h {side} --s 5\n", encoding="utf-8")
        plan = plan_of(world, evaluation_prompts=prompts)
        assert plan.evaluation is not None
        shares.append(plan.evaluation.share_of_training(plan.facts.duration, 6, 1))
    assert shares[1] == pytest.approx(4 * shares[0])


def test_what_is_refused(world: World) -> None:
    assert "neither --evaluation_dino nor --evaluation_clip" in told(world, evaluation_dino=None)
    assert "--evaluation_dino, but no --evaluation_prompts" in told(world, evaluation_prompts=None)
    assert "give it to --evaluation_clip" in told(world, evaluation_dino=world.root / "clip")
    birds, gone = world.root / "birds.txt", world.root / "gone.txt"
    birds.write_text("a bird", encoding="utf-8")
    assert "no prompt has {subject}" in told(world, evaluation_prompts=birds)
    both = told(world, evaluation_prompts=gone, evaluation_clip=world.root / "dino")
    assert "gone.txt" in both and "is a model of the type vit" in both


def test_several_subjects_need_words(world: World, tmp_path: Path) -> None:
    for folder in (world.root / "train" / "2_sks dog", world.root / "cat" / "1_zwx cat"):
        shutil.copytree(folder, tmp_path / folder.name)
    assert "several, sks dog, zwx cat" in told(world, train_data_dir=tmp_path)
    words = {"evaluation_subject": "sks dog", "evaluation_class": "dog"}
    assert len(evaluation_of(world, train_data_dir=tmp_path, **words).real) == 5


def test_an_evaluation_that_is_never_reached_is_noted(world: World) -> None:
    notes = " ".join(plan_of(world, evaluate_every_n_steps=13).notes)
    assert "--evaluate_every_n_steps 13 is never reached" in notes and "only the base model is evaluated" in notes


def test_the_best_checkpoint_by_a_measure(world: World) -> None:
    best = plan_of(world, keep_best="dino", early_stop="pres:3", max_train_steps=None, max_train_epochs=5).best
    assert best.keep is not None and best.keep.tags == ("evaluation/dino",) and best.keep.larger
    assert "never measures it" in told(world, keep_best="clip_t")
    assert evaluation_of(world).measures == ["dino", "pres", "div_dino"]
    assert evaluation_of(world, evaluation_images_per_prompt=1).measures == ["dino", "pres"]
