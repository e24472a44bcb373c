"""The plan of caches filled before training: images, captions and order are the training's; nothing else is checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.mistakes import Mistakes, UserError
from library.options.parse import Program, parse
from library.training.inputs import build_dataset, captions_to_encode, image_reader
from library.training.plan.plan import decide
from library.training.precache.command import OWN_FLAGS, UNNEEDED
from library.training.precache.plan import (
    CachePlan,
    Kind,
    WorkerGroup,
    decide_caching,
    decide_worker_group,
    describe_caching,
)
from tests.training.running import World, make_world, run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def plan(world: World, kind: Kind, **chosen: object) -> CachePlan:
    chosen = {"data_cache_dir": world.root / "remembered", "output_dir": None, **chosen}
    words = world.arguments(Path("unused"), **chosen)
    return decide_caching(parse(words, Program(flags=OWN_FLAGS, unneeded=UNNEEDED)), kind)


def test_the_cache_holds_what_the_training_uses(world: World, tmp_path: Path) -> None:
    chosen = {"shuffle_caption": True, "token_warmup_step": 5, "max_train_steps": 30, "flip_aug": True}
    chosen |= {"cache_text_encoder_outputs_to_disk": True, "data_cache_dir": world.root / "remembered"}
    ahead = plan(world, "captions", **chosen).facts
    training = decide(parse(world.arguments(tmp_path / "out", **chosen))).facts
    for name in ("precision", "duration", "seed", "options.dataset", "options.caption"):
        ours, theirs = ahead, training
        for part in name.split("."):
            ours, theirs = getattr(ours, part), getattr(theirs, part)
        assert ours == theirs, name
    texts = [captions_to_encode(each, build_dataset(each)) for each in (ahead, training)]
    assert texts[0] == texts[1] and len(texts[0][0]) > 5
    ours, theirs = image_reader(ahead.images), image_reader(training.images)
    indices = range(len(ahead.images.records))
    assert [ours.source(index) for index in indices] == [theirs.source(index) for index in indices]


def test_flags_that_only_the_training_needs_are_not_checked(world: World, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    chosen = {"optimizer_type": "no.such.Optimizer", "resume": tmp_path / "none", "logging_dir": file / "log"}
    caching = plan(world, "latents", **chosen, learning_rate=0, output_name="a/")
    assert caching.facts.options.saving.output_dir is None


def test_paths_that_caching_uses_are_checked(world: World, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError) as caught:
        plan(world, "latents", console_log_file=file / "log", train_data_dir=tmp_path / "none", vae="none.safetensors")
    message = str(caught.value)
    assert all(word in message for word in ("--console_log_file", str(tmp_path / "none"), "--vae"))
    with pytest.raises(UserError, match="--output_config"):
        plan(world, "latents", output_config=True, config_file=tmp_path / "new.toml")


@pytest.mark.parametrize(
    "varied",
    [
        {"shuffle_caption": True},
        {"enable_wildcard": True},
        {"caption_dropout_rate": 0.1},
        {"caption_tag_dropout_rate": 0.1},
        {"token_warmup_step": 10},
    ],
)
def test_captions_that_depend_on_the_seed_need_one(world: World, varied: dict[str, object]) -> None:
    with pytest.raises(UserError, match="no --seed"):
        plan(world, "captions", seed=None, **varied)
    assert plan(world, "captions", **varied).facts.seed == 1
    plan(world, "latents", seed=None, **varied)


def test_captions_that_do_not_vary_need_no_seed(world: World) -> None:
    plan(world, "captions", seed=None, caption_dropout_every_n_epochs=2, caption_prefix="x", secondary_separator=";")


def test_a_resumed_training_keeps_its_seed_and_its_captions(world: World, tmp_path: Path, capsys) -> None:
    chosen = {"max_train_steps": 1, "save_state": True, "shuffle_caption": True, "seed": 77}
    assert run(world.arguments(tmp_path / "out", **chosen), capsys).code == 0
    state = tmp_path / "out" / "dog-state"
    assert plan(world, "captions", seed=None, shuffle_caption=True, resume=state).facts.seed == 77
    with pytest.raises(UserError, match="--resume"):
        plan(world, "captions", seed=None, shuffle_caption=True, resume=tmp_path / "none")


def test_the_text_names_the_cache_and_the_flag_that_reads_it(world: World) -> None:
    latents = describe_caching(plan(world, "latents", processes=2, sdxl=True, debug_dataset=True, cache_format="npz"))
    for word in ("a .npz file next to each image", "2 processes", "--sdxl", "--debug_dataset", "64x64"):
        assert word in latents
    captions = describe_caching(plan(world, "captions"))
    assert str(world.root / "remembered" / "captions") in captions and "longest: " in captions
    assert "U-Net" not in latents + captions


@pytest.mark.parametrize(
    ("environment", "group"),
    [
        ({}, WorkerGroup()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, WorkerGroup()),
        ({"WORLD_SIZE": "", "RANK": ""}, WorkerGroup()),
        ({"WORLD_SIZE": "4", "RANK": "3"}, WorkerGroup(3, 4, 3)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, WorkerGroup(3, 4, 1)),
    ],
)
def test_the_worker_group_is_read_from_the_environment(environment: dict[str, str], group: WorkerGroup) -> None:
    mistakes = Mistakes()
    assert decide_worker_group(environment, 1, mistakes) == group and not mistakes


@pytest.mark.parametrize(
    ("environment", "processes", "named"),
    [
        ({"WORLD_SIZE": "2"}, 1, "no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, 1, "RANK = 2 with WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, 1, "WORLD_SIZE = two"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, 1, "RANK = -1"),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            3,
            "--processes 3 cannot be combined",
        ),
    ],
)
def test_an_impossible_worker_group_is_a_mistake(environment: dict[str, str], processes: int, named: str) -> None:
    mistakes = Mistakes()
    decide_worker_group(environment, processes, mistakes)
    (mistake,) = mistakes
    assert named in mistake.what and mistake.remedy
