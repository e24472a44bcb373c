"""Weights by timestep against the reference's literal values."""

from __future__ import annotations

import pytest
import torch

from library.objective.process import ForwardProcess
from library.objective.weighting import min_snr_weight

PROCESS = ForwardProcess.scaled_linear()

# t: weight of min-SNR with gamma 5 for epsilon, for v
ROWS = {
    0: (0.004254, 0.004250),
    10: (0.048306, 0.047843),
    100: (0.591443, 0.528883),
    250: (1.0, 0.673793),
    500: (1.0, 0.276333),
    750: (1.0, 0.056170),
    999: (1.0, 0.004660),
}


@pytest.mark.parametrize("t", ROWS)
def test_min_snr_has_the_published_values(t: int) -> None:
    snr = PROCESS.snr(torch.tensor([t]))
    for prediction, expected in zip(("epsilon", "v"), ROWS[t], strict=True):
        assert min_snr_weight(snr, 5.0, prediction).item() == pytest.approx(expected, abs=6e-7)  # type: ignore[arg-type]


def test_min_snr_has_the_published_mean_over_all_timesteps() -> None:
    snr = PROCESS.snr(torch.arange(1000))
    assert min_snr_weight(snr, 5.0, "epsilon").mean().item() == pytest.approx(0.916571, abs=2e-6)
    assert min_snr_weight(snr, 5.0, "v").mean().item() == pytest.approx(0.294330, abs=2e-6)


def test_both_predictions_weight_the_error_of_x0_alike() -> None:
    """|error of epsilon|^2 = S |error of x0|^2 and |error of v|^2 = (S + 1) |error of x0|^2."""
    snr = PROCESS.snr(torch.arange(1000)).double()
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "epsilon") * snr, min_snr_weight(snr, 5.0, "v") * (snr + 1))


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        min_snr_weight(torch.ones(1), 5.0, "x0")  # type: ignore[arg-type]
