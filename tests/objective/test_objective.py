"""The objective as a whole: laws of composition, and a plain-Python reference of one sample's loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from library.objective.loss import Term, per_sample_loss, sum_terms, window_share
from library.objective.masking import MaskSettings
from library.objective.noise import NoiseShaping
from library.objective.objective import Draws, Objective
from library.objective.process import Prediction, VariancePreserving
from library.objective.weighting import Weighting
from library.options.groups.objective import ObjectiveOptions

PROCESS = VariancePreserving.scaled_linear()
SHAPE = (7, 4, 6, 5)
WEIGHTS = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.5, 1.0, 2.0])


def objective(prediction: str = "epsilon", gamma: float | None = 5.0, offset: float = 0.0) -> Objective[torch.Tensor]:
    weightings = (Weighting("min_snr", gamma),) if gamma else ()
    return Objective(PROCESS, prediction, 0, 1000, noise=NoiseShaping(offset), weightings=weightings)  # type: ignore[arg-type]


def everything(prediction: str = "epsilon") -> Objective[torch.Tensor]:
    """All kinds of options that go together."""
    options = ObjectiveOptions(
        debiased_estimation_loss=True,
        loss_type="huber",
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.2,
        multires_noise_iterations=3,
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=True,
        timestep_bias_strategy="later",
        timestep_bias_multiplier=2.0,
        min_timestep=10,
        zero_terminal_snr=prediction == "v",
    )
    return Objective.from_options(options, PROCESS, prediction, MaskSettings(0.1, normalise="sample"))  # type: ignore[arg-type]


def masks() -> torch.Tensor:
    """Soft masks, and one of zeros, one of ones."""
    mask = torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=torch.Generator().manual_seed(8))
    mask[2], mask[4] = 0.0, 1.0
    return mask


def keyed(indices: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(50 + index) for index in indices]


def world() -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module, torch.nn.Module]:
    """Latents, token features, a small "text encoder" and a small "U-Net"."""
    torch.manual_seed(11)
    latents, tokens = torch.randn(SHAPE), torch.randn(SHAPE[0], 3)
    return latents, tokens, torch.nn.Linear(3, 4), torch.nn.Conv2d(4, 4, 3, padding=1)


def predictor(encoder: torch.nn.Module, unet: torch.nn.Module):
    def predict(noisy: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        hidden = noisy + encoder(tokens)[:, :, None, None] + t.float()[:, None, None, None] / 1000
        return unet(hidden)

    return predict


def gradient(splits: list[int], rule: Objective[torch.Tensor], mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The gradient of a window of seven samples, cut into micro-batches of the given sizes."""
    latents, tokens, encoder, unet = world()
    start = 0
    for size in splits:
        chosen = slice(start, start + size)
        draws = rule.draw((size, *SHAPE[1:]), keyed(range(start, start + size)), latents[chosen])
        places = None if mask is None else mask[chosen]
        losses = rule.loss(predictor(encoder, unet), latents[chosen], tokens[chosen], draws, places)
        window_share(losses, WEIGHTS[chosen], SHAPE[0]).backward()
        start += size
    parameters = [*encoder.named_parameters(prefix="encoder"), *unet.named_parameters(prefix="unet")]
    return {name: parameter.grad for name, parameter in parameters}


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("splits", [[3, 1, 3], [1, 6], [5, 2], [1] * 7])
def test_a_window_has_one_gradient_however_it_is_cut(splits: list[int], prediction: str) -> None:
    """Both models, prior-loss weights, min-SNR and noise offset together; and all other options, with masks."""
    for rule, mask in ((objective(prediction, offset=0.1), None), (everything(prediction), masks())):
        whole, cut = gradient([7], rule, mask), gradient(splits, rule, mask)
        for name, expected in whole.items():
            scale = expected.abs().max()
            assert scale > 0 and (cut[name] - expected).abs().max() < 1e-6 * max(1.0, scale.item()), name


def test_permuting_samples_permutes_losses_and_keeps_the_sum() -> None:
    latents, tokens, encoder, unet = world()
    rule, mask = everything(), masks()
    draws = rule.draw(SHAPE, keyed(range(7)), latents)
    assert draws.perturbation is not None
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    reordered = Draws(draws.timesteps[order], draws.noise[order], draws.perturbation[order])
    losses = rule.loss(predictor(encoder, unet), latents, tokens, draws, mask)
    moved = rule.loss(predictor(encoder, unet), latents[order], tokens[order], reordered, mask[order])
    torch.testing.assert_close(moved, losses[order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        window_share(moved, WEIGHTS[order], 7), window_share(losses, WEIGHTS, 7), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_loss_of_a_sample_by_plain_python(prediction: str) -> None:
    """Formulas in Python floats: x_t, target, squared error, mean, min-SNR weight."""
    rule = objective(prediction, gamma=5.0)
    latents = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    draws = Draws(torch.tensor([100]), torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(2)))
    result = rule.loss(lambda noisy, t, extra: 0.3 * noisy + extra, latents, torch.tensor(0.05), draws)

    a, s, snr = 0.945634, 0.325233, 8.45389  # of t = 100, from the reference table
    squares = []
    for x0, n in zip(latents.flatten().tolist(), draws.noise.flatten().tolist(), strict=True):
        output = 0.3 * (a * x0 + s * n) + 0.05
        squares.append((output - (n if prediction == "epsilon" else a * n - s * x0)) ** 2)
    weight = 5.0 / snr if prediction == "epsilon" else 5.0 / (snr + 1.0)
    assert result.shape == (1,) and result.dtype == torch.float32
    assert result.item() == pytest.approx(weight * math.fsum(squares) / len(squares), rel=1e-5)


def test_the_number_of_samples_divides_not_the_sum_of_weights() -> None:
    losses = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert window_share(losses, torch.tensor([1.0, 1.0, 1.0, 0.0]), 4).item() == pytest.approx(0.75)
    assert window_share(losses, torch.tensor([1.0, 1.0, 0.5, 0.5]), 8).item() == pytest.approx(0.375)


def test_batches_of_one_kind_are_finite() -> None:
    losses = torch.tensor([0.5, 2.0])
    for weights in (torch.zeros(2), torch.ones(2), torch.full((2,), 0.3)):
        assert window_share(losses, weights, 2).isfinite()


@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
def test_masks_of_zeros_and_of_ones_are_finite(kind) -> None:
    latents, tokens, encoder, unet = world()
    options = ObjectiveOptions(loss_type=kind, min_snr_gamma=5.0)
    for settings in (MaskSettings(), MaskSettings(normalise="sample"), MaskSettings(0.1, True, "sample")):
        rule: Objective[torch.Tensor] = Objective.from_options(options, PROCESS, "epsilon", settings)
        draws = rule.draw(SHAPE, keyed(range(7)))
        for mask in (torch.zeros(7, 1, 6, 5), torch.ones(7, 1, 6, 5)):
            unet.zero_grad()
            losses = rule.loss(predictor(encoder, unet), latents, tokens, draws, mask)
            losses.sum().backward()
            assert losses.isfinite().all() and all(one.grad.isfinite().all() for one in unet.parameters())


def test_losses_are_computed_in_float32_whatever_the_output_is() -> None:
    output = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16)
    # 300^2 overflows float16
    assert per_sample_loss(output, torch.zeros(1, 1, 64, 64)).item() == 90000.0


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        per_sample_loss(torch.zeros(2, 6, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="losses, but"):
        window_share(torch.zeros(3), torch.zeros(3, 1), 3)
    with pytest.raises(ValueError, match="cannot contain"):
        window_share(torch.zeros(3), torch.zeros(3), 2)
    with pytest.raises(ValueError, match="generators"):
        objective().draw((3, 4, 2, 2), keyed(range(2)))


def test_objective_of_options_reads_zero_as_off() -> None:
    on: Objective[None] = Objective.from_options(ObjectiveOptions(min_snr_gamma=5.0, noise_offset=0.1), PROCESS, "v")
    assert (on.weightings, on.noise) == ((Weighting("min_snr", 5.0),), NoiseShaping(0.1))
    assert (on.low, on.high, on.prediction) == (0, 1000, "v")
    for options in (
        ObjectiveOptions(),
        ObjectiveOptions(min_snr_gamma=0.0, noise_offset=0.0, max_timestep=0, min_timestep=0),
    ):
        assert Objective.from_options(options, PROCESS, "epsilon") == Objective(PROCESS, "epsilon", 0, 1000)


def test_the_range_of_timesteps_is_half_open() -> None:
    options = ObjectiveOptions(min_timestep=20, max_timestep=23)
    rule: Objective[None] = Objective.from_options(options, PROCESS, "epsilon")
    steps = rule.draw((200, 4, 1, 1), keyed(range(200))).timesteps
    assert set(steps.tolist()) == {20, 21, 22}


def test_a_zero_terminal_snr_is_applied_before_everything_else() -> None:
    """Weights, thresholds and noise levels all read the new table."""
    options = ObjectiveOptions(zero_terminal_snr=True, min_snr_gamma=5.0, snr_floor=0.05)
    rule: Objective[None] = Objective.from_options(options, PROCESS, "v")
    assert rule.process == PROCESS.zero_terminal()
    last = torch.tensor([999])
    assert rule.weight(last, torch.device("cpu")).item() == pytest.approx(0.05)
    latents = torch.randn(1, 4, 2, 2)
    draws = Draws(last, torch.randn(1, 4, 2, 2))
    # what goes in is noise alone, and v = -x0
    assert rule.loss(lambda noisy, t, extra: noisy - draws.noise - latents, latents, None, draws).item() == 0.0
    with pytest.raises(ValueError, match="needs v-prediction"):
        Objective.from_options(ObjectiveOptions(zero_terminal_snr=True), PROCESS, "epsilon")


def test_the_offset_is_part_of_the_target() -> None:
    rule = objective(gamma=None, offset=0.5)
    draws = rule.draw((2, 4, 6, 5), keyed(range(2)))
    assert draws.noise.mean(dim=(2, 3)).std() > 0.2
    latents = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(9))
    perfect = rule.loss(lambda noisy, t, noise: noise, latents, draws.noise, draws)
    assert perfect.tolist() == [0.0, 0.0]


@dataclass(frozen=True)
class Flow:
    """A straight path to the noise: x_t = (1 - sigma) x0 + sigma n with sigma = (t + 1) / T, and the velocity n - x0
    (arXiv 2209.03003). It has no table of DDPM and is asked for no SNR."""

    timesteps: int = 10

    def _sigma(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return ((t.to(like.device) + 1) / self.timesteps).view(-1, *(1,) * (like.dim() - 1))

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = self._sigma(t, x0)
        return (1 - sigma) * x0 + sigma * noise

    def implied_noise(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = self._sigma(t, x0)
        return (x_t - (1 - sigma) * x0) / sigma

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, prediction: Prediction) -> torch.Tensor:
        return noise - x0

    def to_x0(self, x_t: torch.Tensor, output: torch.Tensor, t: torch.Tensor, prediction: Prediction) -> torch.Tensor:
        return x_t - self._sigma(t, x_t) * output

    def step(
        self, x_t: torch.Tensor, output: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, prediction: Prediction
    ) -> torch.Tensor:
        return x_t + (self._sigma(t_next, x_t) - self._sigma(t, x_t)) * output


@pytest.mark.parametrize(
    "chosen", [{}, {"noise_offset": 0.1, "timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0}]
)
def test_a_flow_is_trained_without_an_snr(chosen) -> None:
    """x0 = 2 and n = 4 everywhere at sigma = 0.5: 3 goes in, 2 is wanted; an answer of 0.5 * 3 is 0.5 away."""
    rule: Objective[None] = Objective.from_options(ObjectiveOptions(**chosen), Flow(), "v")
    draws = Draws(torch.tensor([4]), torch.full((1, 1, 2, 2), 4.0))
    scale = torch.tensor(0.5, requires_grad=True)
    loss = rule.loss(lambda noisy, t, extra: scale * noisy, torch.full((1, 1, 2, 2), 2.0), None, draws)
    loss.sum().backward()
    assert loss.tolist() == [0.25]
    assert scale.grad is not None and scale.grad.item() == -3.0  # 2 (1.5 - 2) 3
    assert rule.draw((3, 1, 2, 2), keyed(range(3))).timesteps.max() < 10


@pytest.mark.parametrize("chosen", [{"min_snr_gamma": 5.0}, {"debiased_estimation_loss": True}, {"loss_type": "huber"}])
def test_a_flow_is_refused_what_needs_an_snr(chosen) -> None:
    with pytest.raises(ValueError, match="signal-to-noise ratio, which Flow does not have"):
        Objective.from_options(ObjectiveOptions(**chosen), Flow(), "v")


def test_input_and_target_can_be_replaced() -> None:
    """What another model made goes in, and what it says is wanted; weights and masks stay those of the timestep."""
    rule, mask = everything(), masks()
    latents, tokens, encoder, unet = world()
    draws = rule.draw(SHAPE, keyed(range(7)), latents)
    noisy, target = rule.noisy(latents, draws), rule.target(latents, draws)
    output = predictor(encoder, unet)(noisy, draws.timesteps, tokens)
    whole = rule.loss(predictor(encoder, unet), latents, tokens, draws, mask)
    assert torch.equal(rule.compare(output, target, draws.timesteps, mask), whole)
    assert rule.compare(output, output.detach(), draws.timesteps, mask).tolist() == [0.0] * 7
    plain: Objective[None] = Objective(PROCESS, "epsilon", 0, 1000)
    shifted = plain.compare(output, output.detach() + 0.5, draws.timesteps)
    assert shifted.tolist() == pytest.approx([0.25] * 7, rel=1e-5)


def test_terms_add_up_and_one_alone_is_left_as_it_is() -> None:
    losses = torch.tensor([0.1, 0.2])
    assert sum_terms((Term("denoising", losses),)) is losses
    assert sum_terms((Term("denoising", losses), Term("anchor", torch.tensor([1.0, 2.0])))).tolist() == pytest.approx(
        [1.1, 2.2]
    )
    with pytest.raises(ValueError, match="one shape"):
        sum_terms((Term("denoising", losses), Term("anchor", torch.ones(1))))
    with pytest.raises(ValueError, match="one shape"):
        sum_terms(())
