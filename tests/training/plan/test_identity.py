"""The identity of a run: what must not change on resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.options.mistakes import Mistakes
from library.options.parse import parse
from library.training.plan.identity import DATA, PRESERVATION
from library.training.plan.plan import decide
from library.training.plan.resume import check_continuation
from library.training.saving.state import Description, Progress, SavedState
from tests import tiny
from tests.data.image_files import save
from tests.training.running import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_an_image_with_another_score_is_other_data(world: World, tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    seen = []
    for entry in ({}, {"aesthetic_score": 7}, {"aesthetic_score": 7.5}, {"aesthetic_score": "7.50"}):
        (tmp_path / "meta.json").write_text(json.dumps({"a.png": {"caption": "a", **entry}}), encoding="utf-8")
        flags: dict[str, object] = {"train_data_dir": tmp_path / "x", "in_json": tmp_path / "meta.json"}
        seen.append(decide(parse(world.arguments(tmp_path / "out", **flags))).identity[DATA])
    assert len(set(seen)) == 3 and seen[2] == seen[3]


def test_a_state_from_before_an_option_existed_resumes_at_its_default(world: World, tmp_path: Path) -> None:
    found = decide(parse(world.arguments(tmp_path / "out"))).identity
    older = {fact: value for fact, value in found.items() if fact != "--data_aesthetic_score"}
    saved = SavedState(tmp_path, Progress(step=1), older)
    for flags, refused in (({}, []), ({"data_aesthetic_score": 5.0}, ["--data_aesthetic_score was 7.0"])):
        mistakes = Mistakes()
        now = {**found, **{f"--{name}": str(value) for name, value in flags.items()}}
        check_continuation(saved, Description(now), 10, mistakes, [])
        assert [part in mistake.what for part, mistake in zip(refused, mistakes, strict=True)] == [True] * len(refused)


def test_the_way_on_is_that_of_the_program(tmp_path: Path) -> None:
    """A new run starts from a model as its base, from an adapter as its initial weights."""
    saved = SavedState(tmp_path, Progress(step=1), {"seed": "1"})
    for is_adapter, flag in ((False, "--pretrained_model_name_or_path"), (True, "--network_weights")):
        mistakes = Mistakes()
        check_continuation(saved, Description({"seed": "2"}), 10, mistakes, [], is_adapter=is_adapter)
        (mistake,) = mistakes
        assert f"as {flag} and remove --resume" in mistake.remedy


def test_the_prediction_type_is_part_of_the_identity(world: World, tmp_path: Path) -> None:
    plain = decide(parse(world.arguments(tmp_path / "out"))).identity
    marked = tiny.write_single_file(tmp_path / "v.safetensors", "sd1", metadata={"modelspec.prediction_type": "v"})
    by_file = decide(parse(world.arguments(tmp_path / "out", pretrained_model_name_or_path=marked))).identity
    by_flag = decide(parse(world.arguments(tmp_path / "out", v_parameterization=True))).identity
    assert by_file == by_flag != plain


def test_anchors_are_compared_by_what_they_mean(world: World, tmp_path: Path) -> None:
    def identity(*anchors: str) -> dict[str, str]:
        flags: dict[str, object] = {"reg_data_dir": world.root / "reg", "preservation": list(anchors) or None}
        return decide(parse(world.arguments(tmp_path / "out", **flags))).identity

    usual = identity()
    assert PRESERVATION not in usual, "a state from before there was a choice goes on"
    assert identity("reg_images=1.0") == identity("blank_prompt=0", "reg_images@1-") == usual
    assert identity("class_prompt=.5", "reg_images") == identity("reg_images=1", "class_prompt=0.50") != usual
    assert identity("blank_prompt=0")[PRESERVATION] == "no anchor"
    mistakes = Mistakes()
    now = Description(identity("base_prediction"))
    check_continuation(SavedState(tmp_path, Progress(step=1), usual), now, 10, mistakes, [])
    assert [mistake.what.partition(": ")[2] for mistake in mistakes][-1] == (
        "what --preservation chooses was not set when the state was saved and is base_prediction, weight 1 now"
    )
