"""Rounding to bfloat16, against numbers computed by hand: what is small is not lost."""

from __future__ import annotations

import math

import torch

from library.runtime.seeds import torch_generator
from library.training.update.plan import UpdatePlan
from library.training.update.rounding import Kahan, Stochastic, random_bits, stochastic_round
from library.training.update.stepping import Stepping, build_stepping

EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # all 65536 draws


def test_the_mean_over_all_draws_is_the_value_itself() -> None:
    """1.0009765625 = 1 + 2**-10 lies an eighth of the way from 1 to the next bfloat16, 1 + 2**-7."""
    for value in (1.0009765625, -1.0009765625, 3.1415927e-30, 2.0, -0.0, 1e-40):
        values = torch.full((2**16,), value)
        rounded = stochastic_round(values, EVERY)
        assert rounded.dtype == torch.bfloat16
        assert rounded.double().mean().item() == values[0].double().item()
        assert len(rounded.unique()) <= 2
    up = stochastic_round(torch.full((2**16,), 1.0009765625), EVERY) > 1
    assert up.sum() == 2**16 / 8


def test_what_is_no_number_stays_so() -> None:
    """The bits of the last NaN would wrap to -0."""
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    odd = torch.cat([odd, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    for bits in (0, 1, -1, 2**15 - 1):
        rounded = stochastic_round(odd, torch.full((4,), bits, dtype=torch.int16))
        assert rounded.tolist()[:2] == [math.inf, -math.inf] and bool(rounded[2:].isnan().all())


def test_draws_are_uniform_and_depend_on_seed_step_and_weight_alone() -> None:
    values = torch.full((500, 401), 1.0009765625)
    draws = {}
    for key in ((3, 0, 5), (4, 0, 5), (3, 1, 5), (3, 0, 6)):
        seed, step, number = key
        weight = torch.empty_like(values, dtype=torch.bfloat16)
        for _ in range(2):
            Stochastic(seed, step).write(number, values, weight)
        again = torch.empty_like(weight)
        Stochastic(seed, step).write(number, values, again)
        assert torch.equal(weight, again)
        draws[key] = weight
        share = (weight > 1).double().mean().item()
        assert abs(share - 1 / 8) < 5 * math.sqrt(1 / 8 * 7 / 8 / values.numel())
    kinds = list(draws.values())
    assert not any(torch.equal(one, other) for one in kinds for other in kinds if one is not other)
    bits = random_bits(torch.empty(2**18), torch_generator(1))
    assert len(bits.unique()) > 0.98 * (1 - math.exp(-4)) * 2**16  # 4 draws for each of 65536 values


def optimizer_of(weights: torch.Tensor, rounding: str | None, **arguments: float) -> tuple[torch.optim.AdamW, Stepping]:
    parameter = torch.nn.Parameter(weights)
    optimizer = torch.optim.AdamW([parameter], **{"lr": 1e-4, "weight_decay": 0.0, **arguments})
    return optimizer, build_stepping(optimizer, UpdatePlan(rounding=rounding), seed=1)  # type: ignore[arg-type]


def after(steps: int, gradient: float, rounding: str | None, **arguments: float) -> tuple[torch.Tensor, Stepping]:
    """10,000 weights of 1 after some steps with the same gradient."""
    optimizer, stepping = optimizer_of(torch.ones(100, 100, dtype=torch.bfloat16), rounding, **arguments)
    (parameter,) = stepping.parameters
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    return parameter.detach().float(), stepping


def test_adamws_small_steps_are_lost_by_rounding_to_the_nearest_only() -> None:
    """With a constant gradient each step is the learning rate: 100 of 1e-4 from 1 make 0.99. Next to 1 the bfloat16
    numbers lie 2**-8 apart, so a weight has 2 or 3 of them to choose from."""
    assert after(100, 0.5, None)[0].unique().tolist() == [1.0]
    stochastic, _ = after(100, 0.5, "stochastic")
    # one weight varies by less than 2**-8, their mean by a hundredth of that
    assert abs(stochastic.mean().item() - 0.99) < 5 * 2**-8 / 100
    kahan, stepping = after(100, 0.5, "kahan")
    assert isinstance(stepping.rounding, Kahan)
    whole = kahan + stepping.rounding.errors[0].float()
    assert torch.allclose(whole, torch.full_like(whole, 0.99), atol=100 * 2**-17)
    assert torch.allclose(kahan, torch.full_like(kahan, 0.99), atol=2**-9)


def test_weight_decay_and_moments_are_not_lost_either() -> None:
    """1 - lr * decay = 1 - 1e-5 is 1 in bfloat16, and so is beta2 * v = 0.999 v: after 200 steps 0.998 and 0.999**200
    times the first second moment are due."""
    arguments = {"lr": 1e-3, "weight_decay": 1e-2}
    nearest, old = after(200, 0.0, None, **arguments)
    stochastic, new = after(200, 0.0, "stochastic", **arguments)
    assert nearest.unique().tolist() == [1.0]
    assert abs(stochastic.mean().item() - (1 - 1e-5) ** 200) < 5 * 2**-8 / 100
    for stepping, dtype, kept in ((old, torch.bfloat16, 1.0), (new, torch.float32, 0.999**200)):
        (parameter,) = stepping.parameters
        state = stepping.optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
        state["exp_avg_sq"].fill_(1.0)
        for _ in range(200):
            parameter.grad = torch.zeros_like(parameter)
            stepping.optimizer.step()
        assert abs(state["exp_avg_sq"].float().mean().item() - kept) < 1e-4
