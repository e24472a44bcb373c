"""The forward process against the published schedule (the literal rows of the reference table) and its identities."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.objective.process import VariancePreserving, require_snr, resolve_process
from library.options.groups.objective import ObjectiveOptions

PROCESS = VariancePreserving.scaled_linear()

# t: abar, a, s, SNR
ROWS = {
    0: (0.999150, 0.999575, 0.029155, 1175.47),
    1: (0.998296, 0.999148, 0.041279, 585.864),
    10: (0.990431, 0.995204, 0.097820, 103.508),
    100: (0.894223, 0.945634, 0.325233, 8.45389),
    200: (0.753692, 0.868154, 0.496294, 3.05996),
    250: (0.673793, 0.820849, 0.571146, 2.06553),
    500: (0.276333, 0.525674, 0.850686, 0.381850),
    750: (0.056170, 0.237002, 0.971509, 0.0595127),
    900: (0.014151, 0.118959, 0.992899, 0.0143543),
    999: (0.004660, 0.068265, 0.997667, 0.00468192),
}


@pytest.mark.parametrize("t", ROWS)
def test_tables_have_the_published_values(t: int) -> None:
    product, signal, noise, snr = ROWS[t]
    step = torch.tensor([t])
    assert PROCESS.alphas_cumprod[t] == pytest.approx(product, abs=6e-7)
    assert PROCESS.signal(step).item() == pytest.approx(signal, abs=6e-7)
    assert PROCESS.noise(step).item() == pytest.approx(noise, abs=6e-7)
    assert PROCESS.snr(step).item() == pytest.approx(snr, rel=1e-5)


def test_the_snr_crosses_5_and_1_where_the_reference_says() -> None:
    snr = PROCESS.snr(torch.arange(1000))
    assert (snr > 5).sum() == 147
    assert (snr > 1).sum() == 354
    assert (snr > 1000).sum() == 1


def test_the_table_is_that_of_diffusers_to_float32() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert torch.tensor(PROCESS.alphas_cumprod).sub(theirs).abs().max() < 5e-7


def test_derived_values_are_rounded_only_once() -> None:
    for t in range(1000):
        product = PROCESS.alphas_cumprod[t]
        expected = torch.tensor(math.sqrt(1.0 - product), dtype=torch.float64).float()
        assert torch.equal(PROCESS.noise(torch.tensor([t]))[0], expected)


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(4, 2, 3, 5, generator=generator), torch.randn(4, 2, 3, 5, generator=generator)
    return x0, noise, torch.tensor([0, 250, 750, 999])


def test_add_noise_is_a_x0_plus_s_n_for_each_sample(sample) -> None:
    x0, noise, t = sample
    noisy = PROCESS.add_noise(x0, noise, t)
    for i, step in enumerate(t.tolist()):
        _, signal, level, _ = ROWS[step]
        torch.testing.assert_close(noisy[i], signal * x0[i] + level * noise[i], atol=5e-6, rtol=0)


def test_targets_are_the_noise_and_v(sample) -> None:
    x0, noise, t = sample
    assert torch.equal(PROCESS.target(x0, noise, t, "epsilon"), noise)
    v = PROCESS.target(x0, noise, t, "v")
    for i, step in enumerate(t.tolist()):
        _, signal, level, _ = ROWS[step]
        torch.testing.assert_close(v[i], signal * noise[i] - level * x0[i], atol=5e-6, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_answer_leads_back_to_the_clean_sample(sample, prediction) -> None:
    x0, noise, t = sample
    answer = PROCESS.target(x0, noise, t, prediction)
    back = PROCESS.to_x0(PROCESS.add_noise(x0, noise, t), answer, t, prediction)
    torch.testing.assert_close(back, x0, atol=2e-5, rtol=0)


def test_an_error_of_v_is_snr_plus_1_times_that_of_x0_and_that_of_the_noise_snr_times(sample) -> None:
    x0, noise, _ = sample
    t = torch.full((4,), 600)
    noisy = PROCESS.add_noise(x0, noise, t)
    wrong = x0 + 0.1
    # the outputs that would have led to `wrong`
    signal, level = PROCESS.signal(t[:1]), PROCESS.noise(t[:1])
    wrong_noise = (noisy - signal * wrong) / level
    wrong_v = (signal * noisy - wrong) / level
    error = 0.01
    assert (wrong_noise - noise).square().mean().item() == pytest.approx(0.19158631 * error, rel=1e-4)
    target = PROCESS.target(x0, noise, t, "v")
    assert (wrong_v - target).square().mean().item() == pytest.approx(1.19158631 * error, rel=1e-4)


def test_half_precision_inputs_are_noised_in_float32(sample) -> None:
    x0, noise, t = sample
    noisy = PROCESS.add_noise(x0.half(), noise, t)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, PROCESS.add_noise(x0.half().float(), noise, t))


def test_an_unknown_prediction_is_refused(sample) -> None:
    x0, noise, t = sample
    with pytest.raises(ValueError, match="epsilon"):
        PROCESS.target(x0, noise, t, "x0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epsilon"):
        PROCESS.to_x0(x0, noise, t, "x0")  # type: ignore[arg-type]


# t: abar, SNR
ZERO_TERMINAL_ROWS = {
    0: (0.999150, 1175.47),
    1: (0.998233, 565.074),
    10: (0.989794, 96.979),
    100: (0.886761, 7.8309),
    200: (0.737059, 2.80313),
    250: (0.652457, 1.87734),
    500: (0.241019, 0.317556),
    750: (0.032799, 0.0339114),
    900: (0.002960, 0.00296918),
    999: (0.0, 0.0),
}


@pytest.mark.parametrize("t", ZERO_TERMINAL_ROWS)
def test_the_zero_terminal_process_has_the_published_values(t: int) -> None:
    process, step = PROCESS.zero_terminal(), torch.tensor([t])
    product, snr = ZERO_TERMINAL_ROWS[t]
    assert process.alphas_cumprod[t] == pytest.approx(product, abs=6e-7)
    assert process.snr(step).item() == pytest.approx(snr, rel=1e-5)
    assert process.signal(step).item() == pytest.approx(math.sqrt(product), abs=6e-6)
    assert process.noise(step).item() == pytest.approx(math.sqrt(1 - product), abs=2e-5)


def test_the_zero_terminal_process_ends_in_noise_alone_and_begins_as_before() -> None:
    process, last = PROCESS.zero_terminal(), torch.tensor([999])
    assert process.alphas_cumprod[-1] == 0.0
    assert (process.signal(last).item(), process.noise(last).item(), process.snr(last).item()) == (0.0, 1.0, 0.0)
    assert process.alphas_cumprod[0] == pytest.approx(PROCESS.alphas_cumprod[0], rel=1e-15)
    assert all(a > b for a, b in zip(process.alphas_cumprod, process.alphas_cumprod[1:], strict=False))
    assert PROCESS.alphas_cumprod[-1] > 0.004  # a new one: the family's is as it was


def test_a_process_is_made_zero_terminal_once() -> None:
    process = PROCESS.zero_terminal()
    assert process.zero_terminal() == process


def test_the_zero_terminal_table_is_that_of_diffusers_to_float32() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod
    assert torch.tensor(PROCESS.zero_terminal().alphas_cumprod).sub(theirs).abs().max() < 2e-6


def test_the_process_of_the_options() -> None:
    assert resolve_process(ObjectiveOptions(), PROCESS) is PROCESS
    assert resolve_process(ObjectiveOptions(zero_terminal_snr=True), PROCESS) == PROCESS.zero_terminal()


def test_v_leads_back_to_the_clean_sample_from_noise_alone(sample) -> None:
    x0, noise, _ = sample
    process, t = PROCESS.zero_terminal(), torch.full((4,), 999)
    noisy = process.add_noise(x0, noise, t)
    assert torch.equal(noisy, noise)
    assert torch.equal(process.to_x0(noisy, process.target(x0, noise, t, "v"), t, "v"), x0)


def test_a_family_can_state_its_process_without_torch() -> None:
    program = (
        "import sys; from library.objective.process import VariancePreserving; VariancePreserving.scaled_linear(); "
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(("prediction", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_a_step_without_new_noise_is_that_of_ddim(sample, prediction, theirs) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=theirs,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(4)  # steps of 250
    x_t, output, _ = sample
    for t, t_next in ((999, 749), (500, 250), (300, 50), (200, -1)):  # it calls the clean sample any timestep below 0
        steps = torch.full((4,), t), torch.full((4,), t_next)
        expected = scheduler.step(output, t, x_t, eta=0.0).prev_sample
        torch.testing.assert_close(PROCESS.step(x_t, output, *steps, prediction), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_answer_steps_to_the_same_sample_with_less_noise(sample, prediction) -> None:
    x0, noise, _ = sample
    t, t_next = torch.tensor([100, 500, 900, 999]), torch.tensor([-1, 20, 899, 400])
    answer = PROCESS.target(x0, noise, t, prediction)
    found = PROCESS.step(PROCESS.add_noise(x0, noise, t), answer, t, t_next, prediction)
    torch.testing.assert_close(found, PROCESS.add_noise(x0, noise, t_next), atol=3e-5, rtol=0)
    torch.testing.assert_close(found[0], x0[0], atol=3e-5, rtol=0)


def test_a_missing_snr_names_the_feature_that_needs_it() -> None:
    assert require_snr(PROCESS, "min_snr") is PROCESS
    nothing = object()
    with pytest.raises(ValueError, match="min_snr needs a signal-to-noise ratio, which object does not have"):
        require_snr(nothing, "min_snr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variance-preserving"):
        resolve_process(ObjectiveOptions(zero_terminal_snr=True), nothing)  # type: ignore[arg-type]
