"""The flag, what it means without it, and every mistake at once before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train_network
from library.options.mistakes import Mistakes
from library.training.preservation.plan import Anchor, read_anchors
from tests import tiny
from tests.training.running import Outcome, World, make_world, run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def plan(world: World, capsys: pytest.CaptureFixture[str], **flags: object) -> Outcome:
    chosen = {"network_module": "networks.lora", "dry_run": True, "use_safetensors": None, **flags}
    return run(world.arguments(world.root / "out", **chosen), capsys, train_network.RECIPE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reg_images", Anchor("reg_images")),
        ("base_prediction=0.5", Anchor("base_prediction", 0.5)),
        ("class_prompt=1e-1@100-800", Anchor("class_prompt", 0.1, 100, 800)),
        ("blank_prompt@-800", Anchor("blank_prompt", 1.0, 1, 800)),
        ("outside_mask=2@100-", Anchor("outside_mask", 2.0, 100, None)),
    ],
)
def test_an_anchor_is_a_name_a_weight_and_steps(text: str, expected: Anchor) -> None:
    mistakes = Mistakes()
    assert read_anchors([text], "command line", mistakes) == (expected,) and not mistakes


def test_steps_are_counted_from_1_and_both_ends_belong_to_them() -> None:
    anchor = Anchor("class_prompt", 1.0, 2, 3)
    assert [anchor.is_on(finished) for finished in range(5)] == [False, True, True, False, False]


def test_a_weight_of_0_leaves_the_anchor_out() -> None:
    mistakes = Mistakes()
    assert read_anchors(["reg_images=0", "blank_prompt=0.0@3-"], "command line", mistakes) == () and not mistakes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prior=1", "there is no anchor 'prior'"),
        ("=1", "there is no anchor ''"),
        ("reg_images=much", "not a number of at least 0"),
        ("reg_images=-1", "not a number of at least 0"),
        ("reg_images=inf", "not a number of at least 0"),
        ("reg_images=nan", "not a number of at least 0"),
        ("reg_images=", "not a number of at least 0"),
        ("reg_images@0-5", "no steps"),
        ("reg_images@5-4", "no steps"),
        ("reg_images@5", "cannot be read"),
        ("reg_images=1@x-y", "cannot be read"),
    ],
)
def test_what_is_no_anchor_is_named_with_its_place(text: str, told: str) -> None:
    mistakes = Mistakes()
    read_anchors([text], "dog.toml", mistakes)
    (mistake,) = mistakes
    assert f"--preservation {text} (dog.toml)" in mistake.what and told in mistake.what and mistake.remedy


def test_a_run_that_says_nothing_has_regularisation_images_or_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ({}, {"reg_data_dir": world.root / "reg"}):
        outcome = plan(world, capsys, **flags)
        assert outcome.code == 0 and "preservation" not in outcome.out, outcome.err


def test_regularisation_data_of_simpletuner_means_the_base_prediction(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, spelling in (("reg", "is_regularisation_data"), ("reg2", "is_regularization_data")):
        tiny.write_images(tmp_path / name, 2)
        entries = [
            {"id": "dogs", "instance_data_dir": str(world.root / "train" / "2_sks dog"), "caption_strategy":
             "instanceprompt", "instance_prompt": "sks dog", "resolution": 64, "resolution_type": "pixel"},
            {"id": name, "instance_data_dir": str(tmp_path / name), "caption_strategy": "instanceprompt",
             "instance_prompt": "dog", "resolution": 64, "resolution_type": "pixel", spelling: True},
        ]  # fmt: skip
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(entries), encoding="utf-8")
        flags = {"data_backend_config": file, "train_data_dir": None, "resolution": None}
        outcome = plan(world, capsys, **flags)
        assert outcome.code == 0 and "preservation: base_prediction, weight 1" in outcome.out, outcome.err
        whole = run(world.arguments(world.root / "out", **flags, dry_run=True), capsys)
        assert "preservation: base_prediction, weight 1" in whole.out, whole.err
        assert "a second set of weights of the U-Net, text encoder" in whole.out
        outcome = plan(world, capsys, **flags, preservation="reg_images")
        assert "preservation: reg_images, weight 1" in outcome.out, outcome.err


def test_the_plan_says_what_becomes_what_and_what_it_costs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """8 training samples of two folders and 8 of regularisation: 3 images of sks dog in 2 repeats, one of them with a
    caption without it, and 2 of zwx cat."""
    (world.root / "train" / "2_sks dog" / "image_01.txt").write_text("a dog, grass", encoding="utf-8")
    flags = {"reg_data_dir": world.root / "reg", "preservation": ["base_prediction=0.5", "class_prompt@3-"]}
    outcome = plan(world, capsys, **flags)
    (world.root / "train" / "2_sks dog" / "image_01.txt").unlink()
    assert "preservation: base_prediction, weight 0.5; class_prompt, weight 1 from step 3" in outcome.out
    assert '"zwx" becomes "cat" and "sks" becomes "dog" in the captions of 4 training images' in outcome.out
    assert "1 image whose captions lack it" in outcome.out
    # of 16 samples 8 are compared as they are (a third each), and 2 x 2 + 2 get a further row (4/3 each)
    assert f"adds about {(8 / 3 + 6 * 4 / 3) / 16:.0%} to the time of a step" in outcome.out
    own = plan(
        world, capsys, preservation="class_prompt", preservation_identifier="photo", preservation_class="picture"
    )
    assert '"photo" becomes "picture" in the captions of 1 training image; skipped: 4 images' in own.out


MISTAKES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "no regularisation images": (
        {"preservation": ["reg_images", "base_prediction"]},
        ("--preservation reg_images", "--preservation base_prediction", "no regularisation images", "--reg_data_dir"),
    ),
    "no masks": ({"preservation": "outside_mask"}, ("no image has a mask", "--alpha_mask")),
    "commas": (
        {"preservation": ["blank_prompt,class_prompt", "outside_mask=0,5"]},
        ("blank_prompt,class_prompt (command line) has a comma", "outside_mask=0,5 (command line) has a comma"),
    ),
    "no transparency": ({"preservation": "outside_mask", "alpha_mask": True}, ("no image has a mask",)),
    "no such word": (
        {"preservation": "class_prompt", "preservation_identifier": "xyz"},
        ('no caption has the identifier "xyz"', "--preservation_identifier"),
    ),
    "no change": (
        {"preservation": "class_prompt", "preservation_identifier": "Dog", "preservation_class": "dog"},
        ('"dog" is the identifier and the class too', "--preservation_identifier"),
    ),
    "twice": ({"preservation": ["blank_prompt", "blank_prompt=2"]}, ("given twice",)),
    "several": ({"preservation": ["prior", "class_prompt=x"]}, ("no anchor 'prior'", "class_prompt=x")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    flags, told = MISTAKES[case]
    outcome = plan(world, capsys, **flags)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    for text in told:
        assert text in outcome.err


def test_a_folder_without_identifier_needs_the_flags(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_images(tmp_path / "train" / "1_dog", 2)
    outcome = plan(world, capsys, train_data_dir=tmp_path / "train", preservation="class_prompt")
    assert outcome.code == 2 and "identifier and class of the subject are not known" in outcome.err
    assert "--preservation_identifier and --preservation_class" in outcome.err


def test_regularisation_images_without_their_anchor_are_noted(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = plan(world, capsys, reg_data_dir=world.root / "reg", preservation="blank_prompt", preservation_class="x")
    assert "nothing is learnt from them" in outcome.out
    assert "class_prompt is not among the anchors" in outcome.out
