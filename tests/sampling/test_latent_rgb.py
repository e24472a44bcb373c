"""The linear map from latents to colours: least squares, against what is known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from library.sampling.latent_rgb import fit_latent_rgb

GENERATOR = torch.Generator().manual_seed(1)
MATRIX = torch.rand(3, 4, generator=GENERATOR) / 10
SHIFT = torch.tensor([0.1, -0.2, 0.3])


def latents(seed: int, height: int = 6, width: int = 5) -> Tensor:
    return torch.randn(4, height, width, generator=torch.Generator().manual_seed(seed))


def linear_vae(z: Tensor) -> Tensor:
    """Colours that are linear in the latents, eight pixels a side for each."""
    colours = torch.einsum("oc,chw->ohw", MATRIX, z) + SHIFT[:, None, None]
    return colours.repeat_interleave(8, 1).repeat_interleave(8, 2)


def test_a_linear_vae_is_found_exactly() -> None:
    found = fit_latent_rgb([(latents(seed), linear_vae(latents(seed))) for seed in range(2)])
    assert found.error < 1e-6
    other = latents(9, 7, 3)
    assert torch.allclose(found.colours(other), linear_vae(other)[:, ::8, ::8], atol=1e-5)


def test_the_error_is_what_is_left_by_hand() -> None:
    """Latents that say nothing: the best map is the mean, 0. Colours -0.5 and 0.5 are 0.5 of 2 away."""
    pixels = torch.full((3, 8, 16), 0.5)
    pixels[:, :, :8] = -0.5
    found = fit_latent_rgb([(torch.zeros(4, 1, 2), pixels)])
    assert found.error == pytest.approx(0.25)
    assert found.colours(torch.zeros(4, 1, 1)).abs().max() < 1e-6


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="no latents"):
        fit_latent_rgb([])
    with pytest.raises(ValueError, match="NaN"):
        fit_latent_rgb([(latents(1), linear_vae(latents(1)) * torch.nan)])
