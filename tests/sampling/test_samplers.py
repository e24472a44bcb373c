"""Samplers over a process that ends in noise alone."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from library.objective.process import Prediction, VariancePreserving
from library.sampling.samplers import SAMPLERS, make_scheduler, set_path

# diffusers' and numpy's remarks about their own future
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

PROCESS = VariancePreserving.scaled_linear()
RESCALED = ("ddim", "euler", "euler_a", "dpmsolver", "dpmsolver++", "unipc", "k_euler", "k_euler_a")


AVAILABLE = [name for name, each in SAMPLERS.items() if each.package is None or importlib.util.find_spec(each.package)]


@pytest.mark.parametrize("name", AVAILABLE)
def test_sampling_begins_at_the_last_timestep(name: str) -> None:
    scheduler = make_scheduler(name, PROCESS, "v", zero_terminal_snr=True)
    scheduler.set_timesteps(4)
    assert round(float(scheduler.timesteps[0])) == 999
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = scheduler.scale_model_input(latents, timestep) * 0.1
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    assert latents.isfinite().all()


@pytest.mark.parametrize("name", RESCALED)
def test_the_process_is_the_rescaled_one(name: str) -> None:
    """Lin et al. 2023 (arXiv 2305.08891), algorithm 1: sqrt(abar) shifted to end at 0, scaled to begin where it did."""
    root = np.sqrt(np.array(PROCESS.alphas_cumprod))
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    table = make_scheduler(name, PROCESS, "v", zero_terminal_snr=True).alphas_cumprod.numpy()
    assert np.allclose(table, expected, rtol=2e-4, atol=1e-7) and table[-1] < 1e-7


@pytest.mark.parametrize("name", AVAILABLE)
def test_without_it_and_for_predicted_noise_the_process_is_the_published_one(name: str) -> None:
    expected = np.array(PROCESS.alphas_cumprod)
    for scheduler in (
        make_scheduler(name, PROCESS, "v"),
        make_scheduler(name, PROCESS, "epsilon", zero_terminal_snr=True),
    ):
        assert np.allclose(scheduler.alphas_cumprod.numpy(), expected, rtol=2e-4)


@pytest.mark.parametrize("name", AVAILABLE)
def test_of_stable_diffusion_every_bit_is_that_of_the_published_configuration(name: str) -> None:
    """scheduler_config.json of runwayml/stable-diffusion-v1-5."""
    import diffusers

    published = getattr(diffusers, SAMPLERS[name].scheduler)(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    assert torch.equal(make_scheduler(name, PROCESS, "epsilon").alphas_cumprod, published.alphas_cumprod)


@pytest.mark.parametrize("name", AVAILABLE)
def test_another_process_is_drawn_with_its_own_table(name: str) -> None:
    """DDPM's: betas from 0.0001 to 0.02, over half as many timesteps (arXiv 2006.11239, section 4)."""
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 500))
    scheduler = make_scheduler(name, VariancePreserving(tuple(table.tolist())), "epsilon")
    assert np.allclose(scheduler.alphas_cumprod.numpy(), table, rtol=1e-4)
    scheduler.set_timesteps(4)
    assert float(scheduler.timesteps[0]) < 500


@pytest.mark.parametrize("name", ["dpmsolver++", "unipc"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_path_is_a_piece_of_an_image(name: str, prediction: Prediction) -> None:
    """diffusers' own steps from the middle of an image, with nothing remembered, go the same way."""
    whole = make_scheduler(name, PROCESS, prediction)
    whole.set_timesteps(10)
    whole.set_begin_index(4)
    timesteps = whole.timesteps[4:8].tolist()
    piece = set_path(make_scheduler(name, PROCESS, prediction), timesteps)
    theirs = ours = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for timestep in timesteps[:-1]:
        theirs = whole.step(theirs.sin(), timestep, theirs, return_dict=False)[0]
        ours = piece.step(ours.sin(), timestep, ours, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["dpmsolver++", "unipc"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("timesteps", [(40, 0), (500, 464), (999, 963)])
def test_the_first_step_of_a_path_is_ddims(name: str, prediction: Prediction, timesteps: tuple[int, int]) -> None:
    """arXiv 2211.01095 (DPM-Solver++, section 4) and 2302.04867 (UniPC): the first order is DDIM."""
    x, output = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    scheduler = set_path(make_scheduler(name, PROCESS, prediction), timesteps)
    t, t_next = (torch.tensor([timestep]) for timestep in timesteps)
    expected = PROCESS.step(x, output, t, t_next, prediction)
    step = scheduler.step(output, timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)
