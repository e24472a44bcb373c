"""Flags that a family does not support; prediction type and range of timesteps of a base model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from library.checkpoints.prediction_marks import DeclaredPrediction
from library.families.family import Family
from library.families.sd.refiner import REFINER
from library.families.sd.sd import SD1
from library.families.sd.sdxl import SDXL
from library.objective.objective import Objective
from library.options.groups.objective import ObjectiveOptions
from library.options.mistakes import Mistakes
from library.options.parse import parse
from library.runtime.seeds import torch_generator
from library.training.plan.base_model import check_capabilities, decide_objective, decide_prediction

NO_CAPABILITY = replace(SD1, capabilities=frozenset())


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("", 0),
        ("--clip_skip 1", 0),
        ("--clip_skip 2", 0),
        ("--clip_skip 3", 1),
        ("--max_token_length 75 --no_token_padding=false --v2=false", 0),
        ("--max_token_length 225 --v2", 2),
        ("--scheduled_sampling_max_step_offset 2 --scheduled_sampling_probability 0.5", 1),
        ("--scheduled_sampling_max_step_offset 0 --scheduled_sampling_probability 0.5", 0),
    ],
)
def test_flags_that_front_ends_always_write_are_accepted(flags: str, refused: int) -> None:
    """kohya_ss sends clip_skip 1, LoRA_Easy_Training_Scripts 2, whatever the model is."""
    mistakes = Mistakes()
    check_capabilities(NO_CAPABILITY, parse(flags.split()).options, mistakes)
    assert len(mistakes) == refused


SILENT = DeclaredPrediction(None, None, "")
SAYS_V = DeclaredPrediction("v", True, "its keys v_pred and ztsnr")
SAYS_EPSILON = DeclaredPrediction("epsilon", None, "modelspec.prediction_type")


@pytest.mark.parametrize(
    ("marks", "flags", "prediction", "reason"),
    [
        (
            SILENT,
            "",
            "epsilon",
            "assumed, the checkpoint does not say; use --v_parameterization if the model predicts v",
        ),
        (SILENT, "--v_parameterization", "v", "set by --v_parameterization"),
        (SAYS_V, "", "v", "according to the checkpoint (its keys v_pred and ztsnr)"),
        (SAYS_V, "--v_parameterization=false", "v", "according to the checkpoint (its keys v_pred and ztsnr)"),
        (SAYS_EPSILON, "--v_parameterization", "v", "although the checkpoint says epsilon"),
        (SAYS_EPSILON, "", "epsilon", "according to the checkpoint (modelspec.prediction_type)"),
    ],
)
def test_the_prediction_type_and_its_reason(
    marks: DeclaredPrediction, flags: str, prediction: str, reason: str
) -> None:
    decided, why = decide_prediction(parse(flags.split()).options.model, marks)
    assert decided == prediction and reason in why


def objective_of(
    family: Family, flags: str, marks: DeclaredPrediction = SILENT, prediction: str = "epsilon"
) -> ObjectiveOptions:
    mistakes, notes = Mistakes(), list[str]()
    options = parse(flags.split()).options.objective
    decided = decide_objective(options, family, marks, prediction, mistakes, notes)  # type: ignore[arg-type]
    assert not mistakes
    return decided


@pytest.mark.parametrize(
    ("family", "flags", "timesteps"),
    [
        (SDXL, "", (0, 1000)),
        (SDXL, "--min_timestep 100 --max_timestep 1000", (100, 1000)),
        # arXiv 2307.01952, section 2.5: the refiner is trained on the first 200 noise scales
        (REFINER, "", (0, 200)),
        (REFINER, "--max_timestep 1000", (0, 200)),  # as kohya_ss always writes
        (REFINER, "--refiner_training_strength 0.35", (0, 350)),
        (REFINER, "--min_timestep 50 --max_timestep 120", (50, 120)),
        (SDXL, "--refiner_training_invert_schedule", (200, 1000)),
        (SDXL, "--refiner_training_invert_schedule --refiner_training_strength 0.3 --max_timestep 900", (300, 900)),
    ],
)
def test_each_model_is_trained_in_its_own_range_of_timesteps(
    family: Family, flags: str, timesteps: tuple[int, int]
) -> None:
    """And so is every sample, in batches of one too."""
    options = objective_of(family, flags)
    objective: Objective[None] = Objective.from_options(options, family.process, "epsilon")
    assert (objective.low, objective.high) == timesteps
    drawn = [int(objective.draw((1, 4, 2, 2), [torch_generator(0, n)]).timesteps) for n in range(200)]
    low, high = timesteps
    assert min(drawn) >= low and max(drawn) < high
    assert min(drawn) < low + (high - low) / 10 and max(drawn) >= high - (high - low) / 10


def test_a_refiner_does_not_hand_over() -> None:
    mistakes = Mistakes()
    options = parse(["--refiner_training_invert_schedule"]).options.objective
    decide_objective(options, REFINER, SILENT, "epsilon", mistakes, [])
    assert [mistake.what.partition(":")[0] for mistake in mistakes] == ["--refiner_training_invert_schedule"]


def test_the_noise_schedule_is_that_of_the_checkpoint() -> None:
    """arXiv 2305.08891: a model made for zero terminal SNR is trained with it, where it predicts v."""
    assert objective_of(SDXL, "", SAYS_V, "v").zero_terminal_snr
    assert not objective_of(SDXL, "", SILENT, "v").zero_terminal_snr
    assert not objective_of(SDXL, "", DeclaredPrediction(None, True, "a key"), "epsilon").zero_terminal_snr


@pytest.mark.parametrize(
    ("family", "flags"),
    [(REFINER, "--min_timestep 300"), (SDXL, "--refiner_training_invert_schedule --max_timestep 150")],
)
def test_limits_outside_the_range_of_the_model_are_refused(family: Family, flags: str) -> None:
    mistakes = Mistakes()
    options = decide_objective(parse(flags.split()).options.objective, family, SILENT, "epsilon", mistakes, [])
    (mistake,) = mistakes
    assert "--refiner_training_strength = 0.2" in mistake.what
    assert (
        options == parse(flags.split()).options.objective
    )  # unchanged, so that the check of the two flags reports nothing more
