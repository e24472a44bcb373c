"""Mistakes and notes about the loss and noise options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library.objective.check_options import check
from library.objective.weighting import Weighting
from library.options.groups.objective import ObjectiveOptions


def mistakes(prediction: str = "epsilon", timesteps: int = 1000, **chosen) -> list[str]:
    return [str(mistake) for mistake in check(ObjectiveOptions(**chosen), prediction, timesteps)[0]]


def notes(prediction: str = "epsilon", **chosen) -> list[str]:
    found, told = check(ObjectiveOptions(**chosen), prediction)
    assert not found
    return list(told)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_defaults_give_no_mistakes_and_no_notes(prediction) -> None:
    assert mistakes(prediction) == notes(prediction) == []


@pytest.mark.parametrize(
    ("flag", "value", "wrong"),
    [
        ("scale_v_pred_loss_like_noise_pred", True, "epsilon"),
        ("zero_terminal_snr", True, "epsilon"),
        ("v_pred_like_loss", 1.0, "v"),
    ],
)
def test_flags_that_do_not_fit_the_prediction_are_refused_with_a_remedy(flag, value, wrong) -> None:
    (mistake,) = mistakes(wrong, **{flag: value})
    assert f"--{flag}" in mistake and "remove it" in mistake
    assert not mistakes("v" if wrong == "epsilon" else "epsilon", **{flag: value})


RANGE = {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2.0}


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, ["--min_timestep = 500", "--max_timestep = 500", "501"]),
        ({"min_timestep": 600, "max_timestep": 500}, ["--min_timestep = 600", "601"]),
        ({**RANGE, "timestep_bias_begin": 300, "timestep_bias_end": 300}, ["--timestep_bias_begin = 300"]),
        ({**RANGE, "timestep_bias_end": 1001}, ["--timestep_bias_end = 1001", "1000"]),
        ({**RANGE, "timestep_bias_end": 300, "min_timestep": 300}, ["--timestep_bias_end = 300", "300 to 999"]),
        ({**RANGE, "timestep_bias_begin": 300, "max_timestep": 300}, ["--timestep_bias_begin = 300", "0 to 299"]),
        (
            {"timestep_bias_strategy": "later", "timestep_bias_portion": 0.25, "min_timestep": 997},
            ["--timestep_bias_portion = 0.25", "3 timesteps"],
        ),
        ({"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 1.5}, ["--huber_c = 1.5", "exponential"]),
        ({"loss_type": "smooth_l1", "huber_schedule": "snr", "huber_c": 1.5}, ["--huber_c = 1.5", "snr"]),
    ],
)
def test_impossible_values_are_refused(chosen, names) -> None:
    (mistake,) = mistakes(**chosen)
    assert all(name in mistake for name in names), mistake


def test_numbers_at_their_limits_are_fine() -> None:
    assert not mistakes(min_timestep=999, max_timestep=1000)
    assert not mistakes(**RANGE, timestep_bias_begin=299, timestep_bias_end=1000, max_timestep=300)
    assert not mistakes(loss_type="huber", huber_schedule="exponential", huber_c=1.0)
    assert not mistakes(loss_type="huber", huber_schedule="constant", huber_c=5.0)
    assert not mistakes(loss_type="l2", huber_c=5.0)


def test_a_model_with_fewer_timesteps_has_its_own_limit() -> None:
    (mistake,) = mistakes(timesteps=500, max_timestep=600)
    assert "--max_timestep = 600" in mistake and "at most 500" in mistake


@pytest.mark.parametrize(
    ("prediction", "chosen", "names"),
    [
        ("epsilon", {"huber_c": 0.2}, ["--huber_c = 0.2", "--loss_type is l2"]),
        ("epsilon", {"huber_scale": 2.0, "loss_type": "l1"}, ["--huber_scale = 2.0", "--loss_type is l1"]),
        ("epsilon", {"multires_noise_discount": 0.8}, ["--multires_noise_discount = 0.8"]),
        ("epsilon", {"timestep_bias_multiplier": 2.0}, ["--timestep_bias_multiplier = 2.0"]),
        ("epsilon", {"timestep_bias_strategy": "later"}, ["--timestep_bias_strategy later", "no effect"]),
        ("epsilon", {**RANGE}, ["--timestep_bias_strategy range", "no effect"]),
        ("epsilon", {**RANGE, "timestep_bias_end": 9, "timestep_bias_portion": 0.5}, ["--timestep_bias_portion"]),
        ("v", {"debiased_v_weight": "kohya"}, ["--debiased_v_weight = kohya"]),
        (
            "epsilon",
            {"debiased_estimation_loss": True, "debiased_v_weight": "kohya"},
            ["--debiased_v_weight = kohya", "predicts noise"],
        ),
        ("epsilon", {"noise_offset": 0.1, "multires_noise_iterations": 6}, ["--noise_offset", "add up"]),
        ("epsilon", {"multires_noise_iterations": 6, "multires_noise_discount": 0.0}, ["no effect"]),
        (
            "epsilon",
            {"multires_noise_iterations": 6, "multires_noise_scaling": "batch"},
            ["other samples of its batch"],
        ),
        ("epsilon", {"loss_type": "huber", "min_snr_gamma": 5.0}, ["--loss_type huber with --min_snr_gamma"]),
        ("epsilon", {"v_pred_like_loss": 1.0}, ["--v_pred_like_loss = 1", "216 times"]),
    ],
)
def test_flags_with_no_effect_or_a_surprising_one_are_noted(prediction, chosen, names) -> None:
    (note,) = notes(prediction, **chosen)
    assert all(name in note for name in names), note


@pytest.mark.parametrize(
    "chosen",
    [
        {"min_snr_gamma": 5.0},
        {"scale_v_pred_loss_like_noise_pred": True},
        {"debiased_estimation_loss": True},
        {"debiased_estimation_loss": True, "debiased_v_weight": "amplification"},
        {"debiased_estimation_loss": True, "debiased_v_weight": "kohya"},
        {"debiased_estimation_loss": True, "debiased_v_weight": "kohya", "min_snr_gamma": 5.0},
        {},
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_an_untrained_last_timestep_is_noted(chosen, floor) -> None:
    import torch

    told = notes("v", zero_terminal_snr=True, snr_floor=floor, **chosen)
    weightings = Weighting.from_options(ObjectiveOptions(snr_floor=floor, **chosen))
    weights = [weighting(torch.zeros(1), "v").item() for weighting in weightings]
    assert bool([note for note in told if "--snr_floor" in note]) is (0.0 in weights)


def test_several_weightings_multiply_and_are_noted() -> None:
    (note,) = notes("epsilon", min_snr_gamma=5.0, debiased_estimation_loss=True)
    assert note.startswith("--min_snr_gamma with --debiased_estimation_loss: their weights multiply")
    assert notes("epsilon", min_snr_gamma=5.0) == notes("epsilon", debiased_estimation_loss=True) == []


def test_all_mistakes_are_reported_together() -> None:
    found = mistakes(
        scale_v_pred_loss_like_noise_pred=True, zero_terminal_snr=True, min_timestep=5, max_timestep=5, huber_c=2.0,
        loss_type="huber",
    )  # fmt: skip
    assert len(found) == 4


def test_the_checks_need_no_torch() -> None:
    program = "import sys; import library.objective.check_options; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def test_a_threshold_by_snr_needs_an_snr() -> None:
    for kind in ("huber", "smooth_l1"):
        (mistake,), _ = check(ObjectiveOptions(loss_type=kind), "v", 1000, has_snr=False)
        assert f"--loss_type {kind}" in mistake.what and "--huber_schedule exponential" in mistake.remedy
        assert check(ObjectiveOptions(loss_type=kind, huber_schedule="constant"), "v", 1000, has_snr=False)[0] == ()
    assert check(ObjectiveOptions(), "v", 1000, has_snr=False)[0] == ()
