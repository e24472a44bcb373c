"""A rollout within a batch: where samples arrive, which of them, what it leaves as it was, and what is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor, nn

from library.objective.objective import Draws, Objective
from library.objective.process import Prediction, VariancePreserving
from library.objective.rollout import RolloutSettings, gain
from library.options.groups.objective import ObjectiveOptions
from library.options.groups.rollout import RolloutSampler
from library.runtime.seeds import torch_generator
from library.training.rollout import Rollout, build_rollout
from library.training.training_loss import Inputs, TrainingLoss
from tests.training.test_training_loss import SPACE

# diffusers' and numpy's remarks about their own future
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

PROCESS = VariancePreserving.scaled_linear()
SAMPLERS = cast("tuple[RolloutSampler, ...]", get_args(RolloutSampler))
SETTINGS = RolloutSettings(longest=2, last=1.0, stride=36, sampler="euler")
TIMESTEPS = torch.tensor([5, 80, 500, 940, 990])
LATENTS, NOISE = (torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
DRAWS = Draws(TIMESTEPS, NOISE)
CONDITIONING = {"place": torch.arange(5)}


def rollout_with(
    predict: Callable[[Inputs], Tensor],
    settings: RolloutSettings = SETTINGS,
    prediction: Prediction = "epsilon",
    *,
    zero_terminal: bool = False,
    module: nn.Module | None = None,
) -> Rollout:
    """A rollout of a "network" that is a function."""
    objective: Objective[Any] = Objective.from_options(
        ObjectiveOptions(zero_terminal_snr=zero_terminal), PROCESS, prediction
    )
    model = SimpleNamespace(
        family=SimpleNamespace(process=PROCESS), prediction=prediction, zero_terminal_snr=zero_terminal
    )
    loss: Any = SimpleNamespace(model=model, objective=objective, predict=predict)
    rollout = build_rollout(settings, loss, [module or nn.Identity()], print)
    assert rollout is not None
    return rollout


def mean_drift(measured: dict[str, Tensor]) -> float:
    """The mean of a sum and a number."""
    total, count = measured["rollout/drift"].tolist()
    return float(total / count)


def roll(rollout: Rollout, draws: Draws = DRAWS, places: tuple[int, ...] = (0, 1, 2, 3, 4)) -> tuple[Draws, Draws]:
    """The samples at these places, as one batch."""
    rows = torch.tensor(places)
    perturbation = None if draws.perturbation is None else draws.perturbation[rows]
    own = Draws(draws.timesteps[rows], draws.noise[rows], perturbation)
    generators = [torch_generator(3, "rollout", place) for place in places]
    return rollout(own, LATENTS[rows], {"place": CONDITIONING["place"][rows]}, generators, 0)


def perfect(inputs: Inputs, prediction: Prediction = "epsilon", process: VariancePreserving = PROCESS) -> Tensor:
    """The network that knows the noise."""
    rows = inputs.conditioning["place"]
    return process.target(LATENTS[rows], NOISE[rows], inputs.timesteps, prediction)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("stride", [1, 36])
def test_a_perfect_prediction_arrives_where_the_noise_puts_it(
    sampler: RolloutSampler, prediction: Prediction, stride: int
) -> None:
    settings = replace(SETTINGS, longest=3, stride=stride, sampler=sampler)
    rollout = rollout_with(partial(perfect, prediction=prediction), settings, prediction)
    seen, wanted = roll(rollout)
    assert seen is wanted
    torch.testing.assert_close(seen.noise, NOISE, rtol=1e-2, atol=2e-3)
    x, x_t = (PROCESS.add_noise(LATENTS, noise, TIMESTEPS) for noise in (seen.noise, NOISE))
    torch.testing.assert_close(x, x_t, rtol=1e-4, atol=2e-4)
    assert mean_drift(rollout.measured()) < 1e-4


def test_a_wrong_prediction_moves_the_target_by_the_gain() -> None:
    """One step, with an answer that is too large by 0.5 everywhere."""
    rollout = rollout_with(lambda inputs: perfect(inputs) + 0.5, replace(SETTINGS, longest=1))
    seen, _ = roll(rollout)
    moved = (seen.noise - NOISE).mean(dim=(1, 2, 3))
    expected = 0.5 * gain(PROCESS, "epsilon", TIMESTEPS[1:4], TIMESTEPS[1:4] + 36)
    torch.testing.assert_close(moved[1:4], expected, rtol=1e-3, atol=1e-4)
    # one step above them would be more error than noise, or no timestep
    assert torch.equal(seen.noise[[0, 4]], NOISE[[0, 4]])
    x = PROCESS.add_noise(LATENTS, seen.noise, TIMESTEPS)
    drift = ((x - PROCESS.add_noise(LATENTS, NOISE, TIMESTEPS)).flatten(1).norm(dim=1))[1:4]
    drift = drift / PROCESS.add_noise(LATENTS, NOISE, TIMESTEPS).flatten(1).norm(dim=1)[1:4]
    assert mean_drift(rollout.measured()) == pytest.approx(drift.mean().item(), rel=1e-4)
    assert rollout.measured()["rollout/drift"].tolist() == [0, 0]


def test_the_original_target_is_that_of_the_noise_drawn() -> None:
    seen, wanted = roll(rollout_with(lambda inputs: perfect(inputs) + 0.5, replace(SETTINGS, corrected=False)))
    assert wanted is not seen and torch.equal(wanted.noise, NOISE) and not torch.equal(seen.noise, NOISE)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_is_rolled_alike_whatever_shares_its_batch(sampler: RolloutSampler) -> None:
    rollout = rollout_with(lambda inputs: inputs.noisy.sin(), replace(SETTINGS, longest=3, sampler=sampler))
    together = roll(rollout)[0].noise
    for places in ((3, 1), (2,), (4, 0)):
        torch.testing.assert_close(roll(rollout, places=places)[0].noise, together[list(places)])


def test_each_pass_has_the_rows_that_are_as_far_from_their_timesteps() -> None:
    """Of coins that all come up, with the lengths of these samples; each row begins its length above its timestep."""
    asked: list[tuple[list[int], list[int]]] = []

    def predict(inputs: Inputs) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append((inputs.conditioning["place"].tolist(), inputs.timesteps.tolist()))
        return perfect(inputs)

    rollout = rollout_with(predict)
    roll(rollout)
    lengths = SETTINGS.draw(0, [torch_generator(3, "rollout", place) for place in range(5)])
    lengths = lengths.minimum(torch.tensor([0, 2, 2, 1, 0]))
    expected = []
    for left in (2, 1):
        rows = [place for place in range(5) if lengths[place] >= left]
        expected.append((rows, [int(TIMESTEPS[place]) + left * 36 for place in rows]))
    assert asked == [each for each in expected if each[0]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_may_begin_with_pure_noise(sampler: RolloutSampler) -> None:
    draws = Draws(torch.tensor([963, 963, 963, 963, 963]), NOISE)
    settings = replace(SETTINGS, longest=1, sampler=sampler)
    process = PROCESS.zero_terminal()
    predict = partial(perfect, prediction="v", process=process)
    seen, _ = roll(rollout_with(predict, settings, "v", zero_terminal=True), draws)
    torch.testing.assert_close(seen.noise, NOISE, rtol=1e-2, atol=2e-3)


def test_nothing_happens_where_no_sample_is_rolled() -> None:
    def never(inputs: Inputs) -> Tensor:
        raise AssertionError("a forward pass")

    seen, wanted = roll(rollout_with(never, replace(SETTINGS, start_step=1)))
    assert seen.noise.data_ptr() == wanted.noise.data_ptr() and torch.equal(seen.noise, NOISE)


def test_modes_and_random_states_stay_and_dropout_is_off() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    module[1].eval()

    def predict(inputs: Inputs) -> Tensor:
        torch.rand(3)
        return cast("Tensor", module(perfect(inputs)))

    before = torch.get_rng_state()
    seen, _ = roll(rollout_with(predict, module=module))
    assert torch.equal(torch.get_rng_state(), before)
    assert (module.training, module[0].training, module[1].training) == (True, True, False)
    torch.testing.assert_close(seen.noise, NOISE, rtol=1e-2, atol=2e-3)


def test_rolled_samples_have_no_input_perturbation() -> None:
    draws = replace(DRAWS, perturbation=torch.ones_like(NOISE))
    seen, _ = roll(rollout_with(perfect), draws)
    assert seen.perturbation is not None
    assert seen.perturbation.mean(dim=(1, 2, 3)).tolist() == [1, 0, 0, 0, 1]


def test_the_loss_trains_at_the_timestep_drawn_on_what_arrived() -> None:
    """A network that answers half of its input, and is compared with the noise with which its input was reached."""
    seen: list[Inputs] = []

    def predict(backbone: None, noisy: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        seen.append(Inputs(noisy, t, conditioning))
        return 0.5 * noisy

    family = SimpleNamespace(latent=SPACE, predict=predict, process=PROCESS)
    model: Any = SimpleNamespace(family=family, backbone=None, prediction="epsilon", zero_terminal_snr=False)
    objective: Objective[Any] = Objective.from_options(ObjectiveOptions(), PROCESS, "epsilon")
    index = torch.tensor([3, 4, 5, 6])
    batch: Any = SimpleNamespace(latents=LATENTS[:4], mask=None, sample_index=index, pixels=None)
    loss = TrainingLoss(model, lambda batch: CONDITIONING, None, objective, 7, torch.device("cpu"))
    loss(batch, 0)
    loss.rollout = build_rollout(replace(SETTINGS, longest=1), loss, [], print)
    (term,) = loss(batch, 0)
    plain, rolled, last = seen
    assert torch.equal(plain.timesteps, last.timesteps) and len(rolled.timesteps)
    assert set((rolled.timesteps - 36).tolist()) <= set(last.timesteps.tolist())
    latents = SPACE.scaled(LATENTS[:4])
    target = PROCESS.implied_noise(latents, last.noisy, last.timesteps)
    torch.testing.assert_close(term.losses, (0.5 * last.noisy - target).square().mean(dim=(1, 2, 3)))
    assert not torch.equal(plain.noisy, last.noisy) and mean_drift(loss.measured()) > 0


def test_without_settings_there_is_none() -> None:
    loss: Any = None
    assert build_rollout(None, loss, [], print) is None


@pytest.mark.parametrize(("high", "said"), [(40, True), (200, False)])
def test_timesteps_without_room_are_told(high: int, said: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples below timestep 14 are not rolled over 36 timesteps, so with 40 of them none is."""
    objective: Objective[Any] = Objective.from_options(ObjectiveOptions(max_timestep=high), PROCESS, "epsilon")
    model = SimpleNamespace(family=SimpleNamespace(process=PROCESS), prediction="epsilon", zero_terminal_snr=False)
    loss: Any = SimpleNamespace(model=model, objective=objective, predict=None)
    assert build_rollout(SETTINGS, loss, [], print) is not None
    assert ("no sample is rolled: of the timesteps that are trained (0 to 39)" in capsys.readouterr().out) == said
