"""Bootstrap intervals over prompts: how much a mean would change with other prompts of the same kind.

Efron 1979 (doi 10.1214/aos/1176344552), percentile intervals. Prompts are drawn with replacement, each with all its
images, as images of one prompt are no independent observations. The draws depend only on the number of prompts, so
that two models are compared with the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from library.runtime.seeds import torch_generator

RESAMPLES = 2000
COVERAGE = 0.95


def interval(by_prompt: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of the prompts' values; None for a single prompt."""
    if len(by_prompt) < 2:
        return None
    values = torch.tensor(by_prompt, dtype=torch.float64)
    means = values[_draws(len(values))].mean(1)
    low, high = torch.quantile(means, torch.tensor([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], dtype=torch.float64))
    return float(low), float(high)


def _draws(count: int) -> torch.Tensor:
    """Indices of the drawn prompts, (RESAMPLES, count)."""
    return torch.randint(count, (RESAMPLES, count), generator=torch_generator("evaluation bootstrap", count))
