"""Weights by timestep against the reference's literal values."""

from __future__ import annotations

import pytest
import torch

from library.objective.process import VariancePreserving
from library.objective.weighting import Weighting
from library.options.groups.objective import ObjectiveOptions

PROCESS = VariancePreserving.scaled_linear()

# weighting, prediction
COLUMNS = [
    (Weighting("min_snr", 5.0), "epsilon"),
    (Weighting("min_snr", 5.0), "v"),
    (Weighting("debiased"), "epsilon"),
    (Weighting("debiased", reading="equivalent"), "v"),
    (Weighting("debiased", reading="amplification"), "v"),
    (Weighting("debiased", reading="kohya"), "v"),
    (Weighting("noise_like"), "v"),
]
# t: the columns
ROWS = {
    0: (0.004254, 0.004250, 0.031623, 0.029142, 0.031607, 0.000999, 0.999001),
    10: (0.048306, 0.047843, 0.098291, 0.097351, 0.097820, 0.009569, 0.990431),
    100: (0.591443, 0.528883, 0.343931, 0.307551, 0.325233, 0.105777, 0.894223),
    250: (1.0, 0.673793, 0.695799, 0.468824, 0.571146, 0.326207, 0.673793),
    500: (1.0, 0.276333, 1.618279, 0.447183, 0.850686, 0.723667, 0.276333),
    750: (1.0, 0.056170, 4.099164, 0.230249, 0.971509, 0.943830, 0.056170),
    999: (1.0, 0.004660, 14.614641, 0.068106, 0.997667, 0.995340, 0.004660),
}
MEANS = (0.916571, 0.294330, 3.021311, 0.322083, 0.747623, 0.626623, 0.373377)


@pytest.mark.parametrize("t", ROWS)
def test_weights_have_the_published_values(t: int) -> None:
    snr = PROCESS.snr(torch.tensor([t]))
    for (weighting, prediction), expected in zip(COLUMNS, ROWS[t], strict=True):
        found = weighting(snr, prediction)  # type: ignore[arg-type]
        assert found.dtype == torch.float32 and found.shape == (1,)
        # 1e-5 of the value, or what the six decimals of the table leave open
        assert found.item() == pytest.approx(expected, rel=1e-5, abs=6e-7), weighting


def test_weights_have_the_published_means_over_all_timesteps() -> None:
    snr = PROCESS.snr(torch.arange(1000))
    for (weighting, prediction), expected in zip(COLUMNS, MEANS, strict=True):
        assert weighting(snr, prediction).mean().item() == pytest.approx(expected, rel=1e-5), weighting  # type: ignore[arg-type]


def test_the_loss_of_v_beside_that_of_noise_has_its_published_factor() -> None:
    """1 + lambda (S + 1) / S: 215.6 at t = 999 for lambda = 1; with S of 1000 at most 2.001 at t = 0."""
    weighting = Weighting("v_like", 1.0)
    first, last = weighting(PROCESS.snr(torch.tensor([0, 999])), "epsilon").tolist()
    assert first == pytest.approx(2.001, rel=1e-5)
    assert last == pytest.approx(215.6, abs=0.05)
    half = Weighting("v_like", 0.5)(PROCESS.snr(torch.tensor([999])), "epsilon").item()
    assert half - 1.0 == pytest.approx((last - 1.0) / 2, rel=1e-5)


@pytest.mark.parametrize("weighting", [Weighting("min_snr", 5.0), Weighting("debiased")])
def test_both_predictions_weight_the_error_of_x0_alike(weighting: Weighting) -> None:
    """|error of epsilon|^2 = S |error of x0|^2 and |error of v|^2 = (S + 1) |error of x0|^2."""
    snr = PROCESS.snr(torch.arange(1, 1000))  # S of timestep 0 counts as 1000 in one of the two
    one, other = weighting(snr, "epsilon").double(), weighting(snr, "v").double()
    torch.testing.assert_close(one * snr, other * (snr.double() + 1), rtol=1e-5, atol=0)


def test_noise_like_makes_the_loss_of_v_that_of_noise() -> None:
    snr = PROCESS.snr(torch.arange(1, 1000)).double()
    torch.testing.assert_close(Weighting("noise_like")(snr, "v") * (snr + 1) / snr, torch.ones(999).double())


@pytest.mark.parametrize("weighting", [weighting for weighting, prediction in COLUMNS if prediction == "v"])
def test_weights_are_finite_with_a_zero_terminal_snr(weighting: Weighting) -> None:
    weights = weighting(PROCESS.zero_terminal().snr(torch.arange(1000)), "v")
    assert weights.isfinite().all() and (weights[:999] > 0).all()
    bounded = weighting.kind == "debiased" and weighting.reading != "equivalent"
    assert weights[999].item() == (1.0 if bounded else 0.0)


@pytest.mark.parametrize(
    ("weighting", "at_0"),
    [
        (Weighting("min_snr", 5.0, floor=0.05), 0.05),
        (Weighting("min_snr", 0.03, floor=0.05), 0.03),
        (Weighting("noise_like", floor=0.05), 0.05),
        (Weighting("debiased", floor=0.05), 0.05**0.5),
        (Weighting("debiased", reading="kohya", floor=0.05), 1.0),
        (Weighting("debiased", reading="amplification", floor=0.05), 1.05**0.5),
    ],
)
def test_a_floor_of_the_snr_trains_the_last_timestep_and_leaves_the_first_ones(weighting, at_0) -> None:
    """min(max(S, floor), gamma) / (S + 1) and its like."""
    snr = PROCESS.zero_terminal().snr(torch.tensor([999, 500, 100, 0]))
    found = weighting(snr, "v")
    assert found[0].item() == pytest.approx(at_0, rel=1e-6)
    without = Weighting(weighting.kind, weighting.strength, weighting.reading)(snr, "v")
    assert torch.equal(found[1:], without[1:])


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        Weighting("min_snr", 5.0)(torch.ones(1), "x0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise_like"):
        Weighting("noise_like")(torch.ones(1), "epsilon")
    with pytest.raises(ValueError, match="v_like"):
        Weighting("v_like", 1.0)(torch.ones(1), "v")


def test_of_the_options() -> None:
    assert Weighting.from_options(ObjectiveOptions()) == ()
    assert Weighting.from_options(ObjectiveOptions(min_snr_gamma=0.0, v_pred_like_loss=0.0)) == ()
    assert Weighting.from_options(ObjectiveOptions(min_snr_gamma=3.0, snr_floor=0.1)) == (
        Weighting("min_snr", 3.0, floor=0.1),
    )
    assert Weighting.from_options(ObjectiveOptions(v_pred_like_loss=0.5)) == (Weighting("v_like", 0.5),)
    both = ObjectiveOptions(scale_v_pred_loss_like_noise_pred=True, min_snr_gamma=5.0)
    assert Weighting.from_options(both) == (Weighting("min_snr", 5.0), Weighting("noise_like"))
    for reading in ("equivalent", "amplification", "kohya"):
        options = ObjectiveOptions(debiased_estimation_loss=True, debiased_v_weight=reading)
        assert Weighting.from_options(options) == (Weighting("debiased", reading=reading),)  # type: ignore[arg-type]
