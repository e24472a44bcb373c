"""What is asked for at a step or epoch that the run never reaches is noted in the plan, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.parse import ADAPTERS, parse
from library.training.plan.never_reached import Moment
from library.training.plan.plan import decide
from tests.training.running import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    (world.root / "p.txt").write_text("a dog", encoding="utf-8")
    return world


def notes_of(world: World, out: Path, **flags: object) -> list[str]:
    """The notes of a run of 8 steps in each of 2 epochs, unless the flags say otherwise."""
    chosen = {"max_train_steps": 16, **flags}
    return [note for note in decide(parse(world.arguments(out, **chosen))).notes if "never" in note or "effect" in note]


# 3 images x 2 + 2 images x 1 = 8 samples, in batches of 1: 8 steps per epoch
PROMPTS = {"sample_prompts": "p.txt"}
ROLLOUT = {"scheduled_sampling_max_step_offset": 1, "scheduled_sampling_probability": 0.5}
CHANGES = {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": "step_rules=1:16,0.1:17,0.01"}
CASES: list[tuple[dict[str, object], str | None]] = [
    ({"save_every_n_steps": 16}, None),
    ({"save_every_n_steps": 17}, "--save_every_n_steps 17 is never reached: the run has 16 steps"),
    ({"save_every_n_epochs": 2}, None),  # the final model is that of epoch 2
    ({"save_every_n_epochs": 3}, "--save_every_n_epochs 3 is never reached: the run has 2 epochs"),
    ({"sample_every_n_steps": 16, **PROMPTS}, None),
    ({"sample_every_n_steps": 100, **PROMPTS}, "--sample_every_n_steps 100 is never reached: the run has 16 steps"),
    ({"sample_every_n_epochs": 2, "max_train_steps": 9, **PROMPTS}, None),  # an incomplete epoch counts
    ({"sample_every_n_epochs": 3, **PROMPTS}, "--sample_every_n_epochs 3 is never reached: the run has 2 epochs"),
    ({"sample_at_first": True, **PROMPTS}, None),
    (PROMPTS, "has no effect, as nothing says when to draw images"),
    ({"sample_prompts": "a photo of sks dog"}, "has no effect, as nothing says when to draw images"),
    ({"validation_split": 0.4, "validate_every_n_epochs": 5}, "--validate_every_n_epochs 5 is never reached"),
    ({"validation_split": 0.4, "validate_every_n_steps": 99}, "--validate_every_n_steps 99 is never reached"),
    ({"validation_split": 0.4}, None),
    ({"validate_every_n_steps": 2}, None),
    ({"max_validation_steps": 2}, "--max_validation_steps has no effect: no images are held out"),
    ({"stop_text_encoder_training": 16}, None),
    ({"stop_text_encoder_training": 17}, "--stop_text_encoder_training 17 is never reached: the run has 16 steps"),
    ({"caption_dropout_every_n_epochs": 2}, None),
    ({"caption_dropout_every_n_epochs": 3}, "caption_dropout_every_n_epochs 3 is never reached: the run has 2 epochs"),
    ({"token_warmup_step": 0.9}, None),
    ({"token_warmup_step": 500}, "token_warmup_step 500 is never reached: the run has 16 steps"),
    ({**ROLLOUT, "scheduled_sampling_start_step": 15}, None),
    (
        {**ROLLOUT, "scheduled_sampling_start_step": 16},  # samples would be rolled from step 17 on
        "--scheduled_sampling_start_step 16: step 17 is never reached: the run has 16 steps, so no sample is rolled",
    ),
    ({"preservation": "blank_prompt@16-"}, None),
    (
        {"preservation": "blank_prompt@17-"},
        "the first step of --preservation blank_prompt 17 is never reached: the run has 16 steps",
    ),
    (CHANGES, "the step of --lr_scheduler_args step_rules 17 is never reached: the run has 16 steps"),
]


@pytest.mark.parametrize(("flags", "expected"), CASES)
def test_a_note_says_what_never_happens(
    flags: dict[str, object], expected: str | None, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    notes = notes_of(world, tmp_path, **flags)
    if expected is None:
        assert notes == []
    else:
        (note,) = notes
        assert expected in note


def test_a_dataset_file_that_holds_nothing_out_is_no_exception(world: World, tmp_path: Path) -> None:
    file = tmp_path / "data.toml"
    folder = world.root / "train" / "2_sks dog"
    file.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\nclass_tokens = 'dog'\n", "utf-8")
    flags = {"dataset_config": file, "train_data_dir": None, "max_validation_steps": 2}
    (note,) = notes_of(world, tmp_path / "out", **flags)
    assert note.startswith("--max_validation_steps has no effect: no images are held out")


def test_a_run_that_begins_later_may_miss_what_a_whole_run_reaches(world: World, tmp_path: Path) -> None:
    later = {"network_module": "networks.lora", "use_safetensors": None, "initial_step": 8, "sample_prompts": "a dog"}
    words = world.arguments(tmp_path, **later, max_train_steps=14, save_every_n_steps=7, sample_at_first=True)
    notes = " ".join(decide(parse(words, ADAPTERS)).notes)
    assert "--sample_at_first has no effect: the run begins after step 8" in notes and "is never reached" not in notes
    words = world.arguments(tmp_path, **later, max_train_steps=14, sample_every_n_steps=8)
    notes = " ".join(decide(parse(words, ADAPTERS)).notes)
    assert "--sample_every_n_steps 8 is never reached: the run has 14 steps and begins after step 8" in notes


@pytest.mark.parametrize(
    ("at", "before", "last", "repeats", "reached"),
    [
        (5, 0, 5, True, True),
        (5, 5, 9, True, False),
        (5, 5, 10, True, True),
        (5, 5, 9, False, True),  # it has happened before
        (6, 0, 5, False, False),
        (None, 0, 5, True, True),
    ],
)
def test_multiples_count_from_the_first_step(
    at: float | None, before: int, last: int, repeats: bool, reached: bool
) -> None:
    assert Moment("--x", at, "step", "", repeats).is_reached(before, last) is reached
