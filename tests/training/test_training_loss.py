"""Where data, family and objective meet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from library.families.family import LatentSpace
from library.objective.objective import Objective
from library.objective.process import VariancePreserving
from library.options.groups.objective import ObjectiveOptions
from library.training.training_loss import TrainingLoss

PROCESS = VariancePreserving.scaled_linear()
SPACE = LatentSpace(channels=4, stride=8, scale=0.5, cache_suffix="_x.npz")


def losses_with(options: ObjectiveOptions, latents: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """Of a "network" that answers half of its input."""
    family = SimpleNamespace(latent=SPACE, predict=lambda backbone, noisy, t, context: 0.5 * noisy)
    model: Any = SimpleNamespace(family=family, backbone=None)
    empty = torch.zeros(len(latents))
    batch: Any = SimpleNamespace(latents=latents, mask=None, sample_index=torch.tensor(indices), pixels=None)
    objective: Objective[torch.Tensor] = Objective.from_options(options, PROCESS, "epsilon")
    (term,) = TrainingLoss(model, lambda batch: empty, None, objective, 7, torch.device("cpu"))(batch, 0)
    assert term.name == "denoising"
    return term.losses


def test_an_adaptive_noise_scale_sees_the_scaled_latents() -> None:
    """A channel's mean of 4, scaled by 0.5, times 0.25, is an offset of 0.5 more."""
    latents = torch.full((2, 4, 8, 8), 4.0)
    adaptive = losses_with(ObjectiveOptions(noise_offset=0.1, adaptive_noise_scale=0.25), latents, [3, 4])
    fixed = losses_with(ObjectiveOptions(noise_offset=0.6), latents, [3, 4])
    torch.testing.assert_close(adaptive, fixed)


def test_a_sample_has_the_same_loss_wherever_it_stands() -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = ObjectiveOptions(noise_offset=0.1, adaptive_noise_scale=0.25, multires_noise_iterations=4)
    together = losses_with(options, latents, [5, 6, 7])
    torch.testing.assert_close(losses_with(options, latents[[2, 0]], [7, 5]), together[[2, 0]])
