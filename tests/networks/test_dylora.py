"""DyLoRA: what a step trains, and with which ranks it computes (arXiv 2210.07558)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from networks import dylora
from networks.adapter import AdapterError, LayerSettings
from networks.settings import read_settings
from tests.networks import layers


def made(shape: str = "linear", dim: int = 6, unit: int = 2, dropout: float = 0.0) -> tuple[Any, Any]:
    module = layers.base(shape)
    torch.manual_seed(1)
    settings = LayerSettings(dim=dim, alpha=3.0, dropout=dropout, own={"unit": unit})
    return module, layers.nudge(dylora.create(layers.layer(module), settings, module.weight).double())


@pytest.mark.parametrize("shape", ["linear", "strided"])
def test_a_step_computes_with_the_first_ranks_and_trains_the_last_of_them(shape: str) -> None:
    module, adapter = made(shape)
    x = layers.example(module)
    tensors = layers.file_of(adapter)
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    seen = set()
    for _ in range(40):
        adapter.zero_grad(set_to_none=True)
        found = adapter.train().bypass(x)
        found.square().sum().backward()
        trained = {key for key, parameter in adapter.named_parameters() if parameter.grad is not None}
        assert len(trained) == 2, "one window of each factor, and no other has a gradient at all"
        window = int(trained.pop().rpartition(".")[2])
        seen.add(window)
        ranks = 2 * (window + 1)
        # ΔW of the first `ranks`, times alpha / dim · √(dim / ranks)
        part = torch.einsum("or,r...->o...", up[:, :ranks].flatten(1), down[:ranks])
        expected = layers.changed(module, x, part * (3.0 / 6) * math.sqrt(6 / ranks)) - module(x)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert seen == {0, 1, 2}


def test_after_training_all_ranks_count() -> None:
    module, adapter = made()
    x = layers.example(module)
    tensors = layers.file_of(adapter)
    expected = functional.linear(x, tensors["lora_up.weight"] @ tensors["lora_down.weight"] * (3.0 / 6))
    for _ in range(3):
        assert torch.allclose(adapter.eval().bypass(x), expected, rtol=1e-10, atol=1e-10)


def test_the_window_is_drawn_from_torchs_numbers() -> None:
    """So that activation checkpointing, which sets them back, draws the same one again."""
    module, adapter = made()
    x = layers.example(module)
    for seed in range(8):
        torch.manual_seed(seed)
        first = adapter.train().bypass(x)
        torch.manual_seed(seed)
        assert torch.equal(adapter.bypass(x), first)


def test_an_optimizer_does_not_touch_unused_windows() -> None:
    """Momentum and weight decay would move ranks that the step did not use."""
    module, adapter = made()
    x = layers.example(module)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(12):
        before = {key: value.detach().clone() for key, value in adapter.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        adapter.train().bypass(x).square().sum().backward()
        optimizer.step()
        for key, parameter in adapter.named_parameters():
            assert torch.equal(parameter, before[key]) == (parameter.grad is None), key


def test_dropout_is_for_training_alone() -> None:
    module, adapter = made(dropout=0.5)
    x = layers.example(module)
    torch.manual_seed(4)
    assert (adapter.train().bypass(torch.ones_like(x)) != adapter.bypass(torch.ones_like(x))).any()
    assert torch.equal(adapter.eval().bypass(x), adapter.bypass(x))


def test_a_lora_file_is_loaded_as_a_dylora_with_the_unit() -> None:
    module, adapter = made()
    tensors = layers.file_of(adapter)
    loaded = dylora.load(layers.layer(module), dict(tensors), unit=3)
    assert [tuple(window.shape) for window in loaded.lora_down.parameters()] == [(3, 24), (3, 24)]
    assert torch.equal(loaded.delta(module.weight), adapter.delta(module.weight))
    with pytest.raises(AdapterError, match="unit=4 does not divide the rank 6"):
        dylora.load(layers.layer(module), tensors, unit=4)


def test_state_of_another_size_is_not_taken() -> None:
    _, adapter = made()
    _, smaller = made(dim=4)
    with pytest.raises(RuntimeError, match="size mismatch for lora_down.weight"):
        adapter.load_state_dict(smaller.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*lora_up.weight"):
        adapter.load_state_dict({key: value for key, value in adapter.state_dict().items() if "up" not in key})


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["unit=3"], "unit=3 does not divide the rank 8"),
        (["unit=0"], "less than 1"),
        (["unit=2", "conv_dim=4"], "conv_dim=4 differs from network_dim 8"),
        (["unit=4", "block_dims=" + ",".join(["8"] * 24 + ["6"])], "unit=4 does not divide the rank 6"),
        (["rank_dropout=0.1"], "does not support rank_dropout"),
        (["use_dora=True"], "does not support use_dora"),
    ],
)
def test_mistakes(arguments: list[str], what: str) -> None:
    _, mistakes = read_settings("networks.dylora", dim=8, alpha=1, arguments=arguments)
    assert len(mistakes) == 1 and what in mistakes[0][0]
