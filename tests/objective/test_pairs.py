"""Every pair of options of the objective: refused by name, or trained as the whole of the formulas says."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations

import numpy as np
import pytest
import torch

from library.objective.check_options import check
from library.objective.objective import Draws, Objective
from library.objective.process import VariancePreserving
from library.options.groups.objective import ObjectiveOptions

PROCESS = VariancePreserving.scaled_linear()
SHAPE = (5, 4, 8, 6)

SETTINGS: dict[str, dict[str, object]] = {
    "min_snr": {"min_snr_gamma": 5.0},
    "debiased": {"debiased_estimation_loss": True},
    "debiased amplification": {"debiased_estimation_loss": True, "debiased_v_weight": "amplification"},
    "debiased kohya": {"debiased_estimation_loss": True, "debiased_v_weight": "kohya"},
    "scale_v": {"scale_v_pred_loss_like_noise_pred": True},
    "v_like": {"v_pred_like_loss": 0.5},
    "zero terminal": {"zero_terminal_snr": True},
    "floor": {"snr_floor": 0.05},
    "l1": {"loss_type": "l1"},
    "huber constant": {"loss_type": "huber", "huber_schedule": "constant"},
    "huber exponential": {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.2},
    "huber snr": {"loss_type": "huber", "huber_schedule": "snr", "huber_scale": 2.0},
    "smooth_l1": {"loss_type": "smooth_l1"},
    "offset": {"noise_offset": 0.1},
    "random offset": {"noise_offset": 0.1, "noise_offset_random_strength": True},
    "adaptive": {"noise_offset": 0.1, "adaptive_noise_scale": 0.2},
    "pyramid": {"multires_noise_iterations": 4, "multires_noise_discount": 0.5},
    "pyramid by batch": {"multires_noise_iterations": 4, "multires_noise_scaling": "batch"},
    "input noise": {"ip_noise_gamma": 0.1},
    "random input noise": {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True},
    "lowest": {"min_timestep": 900},
    "highest": {"max_timestep": 950},
    "earlier": {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 3.0, "timestep_bias_portion": 0.5},
    "later": {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0},
    "range": {
        "timestep_bias_strategy": "range",
        "timestep_bias_multiplier": 0.5,
        "timestep_bias_begin": 910,
        "timestep_bias_end": 940,
    },
    "prior": {"prior_loss_weight": 0.5},
}


def pairs() -> list[tuple[str, str]]:
    """All pairs that do not give one flag two values."""
    return [
        (one, other)
        for one, other in combinations(SETTINGS, 2)
        if all(SETTINGS[one].get(flag, value) == value for flag, value in SETTINGS[other].items())
    ]


def refused(one: str, other: str, prediction: str) -> bool:
    """What has no meaning, in words of this test."""
    chosen = {one, other}
    if prediction == "epsilon" and chosen & {"scale_v", "zero terminal"}:
        return True
    return prediction == "v" and "v_like" in chosen


def by_numpy(options: ObjectiveOptions, prediction: str, x0: np.ndarray, draws: Draws) -> np.ndarray:
    """The loss of each sample in float64 for the network that answers 0.3 x_t + 0.05."""
    roots = np.sqrt(np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    if options.zero_terminal_snr:
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    t = draws.timesteps.numpy()
    a = roots[t].reshape(-1, 1, 1, 1)
    s = np.sqrt(1 - a**2)
    n = draws.noise.numpy().astype(np.float64)
    entering = n if draws.perturbation is None else n + draws.perturbation.numpy()
    d = 0.3 * (a * x0 + s * entering) + 0.05 - (n if prediction == "epsilon" else a * n - s * x0)

    h = options.huber_c
    with np.errstate(divide="ignore"):
        c = {"constant": h + 0 * a, "exponential": h ** (t.reshape(a.shape) / 1000)}.get(
            options.huber_schedule, (1 - h) / (1 + s / a) ** 2 + h
        )
    c = c * options.huber_scale
    root = np.sqrt(d**2 + c**2) - c
    errors = {"l1": np.abs(d), "l2": d**2, "huber": 2 * c * root, "smooth_l1": 2 * root}[options.loss_type]

    snr = (a**2 / (1 - a**2)).reshape(-1)
    least, capped = np.maximum(snr, options.snr_floor), np.minimum(snr, 1000)
    least_capped = np.maximum(capped, options.snr_floor)
    weight = np.ones(len(t))
    divisor = snr if prediction == "epsilon" else snr + 1
    if options.min_snr_gamma:
        weight *= np.minimum(least, options.min_snr_gamma) / divisor
    if options.debiased_estimation_loss and prediction == "epsilon":
        weight *= np.sqrt(least_capped) / capped
    elif options.debiased_estimation_loss:
        weight *= {
            "equivalent": np.sqrt(least) / (snr + 1),
            "amplification": np.sqrt(least_capped + 1) / (capped + 1),
            "kohya": 1 / (capped + 1),
        }[options.debiased_v_weight]
    if options.scale_v_pred_loss_like_noise_pred:
        weight *= least_capped / (capped + 1)
    if options.v_pred_like_loss:
        weight *= (least_capped + options.v_pred_like_loss * (least_capped + 1)) / capped
    return errors.mean(axis=(1, 2, 3)) * weight


def test_the_settings_cover_every_option() -> None:
    covered = {flag for setting in SETTINGS.values() for flag in setting}
    # what a family makes of these is a range of timesteps: tests/training/plan/test_base_model.py
    of_families = {"refiner_training_strength", "refiner_training_invert_schedule"}
    assert covered | of_families == {field.name for field in fields(ObjectiveOptions)}


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_every_pair_is_refused_by_name_or_trains_by_the_formulas(prediction) -> None:
    latents = 0.5 + torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    trained = 0
    for one, other in pairs():
        options = ObjectiveOptions(**{**SETTINGS[one], **SETTINGS[other]})  # type: ignore[arg-type]
        mistakes, _ = check(options, prediction)
        assert bool(mistakes) == refused(one, other, prediction), (one, other)
        if mistakes:
            assert any(flag in str(m) for m in mistakes for flag in {**SETTINGS[one], **SETTINGS[other]}), (one, other)
        if refused(one, other, prediction):
            continue
        rule: Objective[torch.Tensor] = Objective.from_options(options, PROCESS, prediction)
        generators = [torch.Generator().manual_seed(40 + seed) for seed in range(SHAPE[0])]
        draws = rule.draw(SHAPE, generators, latents)
        factor = torch.tensor(0.3, requires_grad=True)
        losses = rule.loss(lambda x, t, extra, k=factor: k * x + extra, latents, torch.tensor(0.05), draws)
        losses.sum().backward()
        assert factor.grad is not None and factor.grad.isfinite(), (one, other)
        expected = by_numpy(options, prediction, latents.numpy().astype(np.float64), draws)
        np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-4, err_msg=f"{one}, {other}")
        trained += 1
    assert trained > 200


@pytest.mark.parametrize("chosen", [{}, *SETTINGS.values()])
def test_with_a_zero_terminal_snr_the_last_timestep_is_finite(chosen: dict[str, object]) -> None:
    """Section 1: SNR 0, k-sigma infinite."""
    if "v_pred_like_loss" in chosen:
        return
    fixed = {"min_timestep": 999, "max_timestep": 1000, "timestep_bias_strategy": "none", "zero_terminal_snr": True}
    rule: Objective[None] = Objective.from_options(ObjectiveOptions(**{**chosen, **fixed}), PROCESS, "v")  # type: ignore[arg-type]
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    draws = rule.draw(SHAPE, [torch.Generator().manual_seed(seed) for seed in range(5)], latents)
    assert (draws.timesteps == 999).all()
    weight = torch.tensor(0.3, requires_grad=True)
    losses = rule.loss(lambda x, t, extra: weight * x, latents, None, draws)
    losses.sum().backward()
    assert losses.isfinite().all() and weight.grad is not None and weight.grad.isfinite()
