"""PiSSA: the start is the principal part of the base, and a file holds what changed, as a plain LoRA."""

from __future__ import annotations

import pytest
import torch

from networks import lora, pissa
from networks.adapter import AdapterError, LayerSettings
from tests.networks import layers


@pytest.mark.parametrize("shape", layers.SHAPES)
def test_the_start_is_the_principal_part(shape: str) -> None:
    torch.manual_seed(0)  # nearly equal third and fourth singular values would leave the third vector open
    module = layers.base(shape, torch.float32)
    down, up = pissa.principal_factors(layers.layer(module), module.weight, 3, 0.5)
    left, values, right = torch.linalg.svd(module.weight.flatten(1).double(), full_matrices=False)
    expected = (left[:, :3] * values[:3]) @ right[:3]
    assert torch.allclose(0.5 * (up.flatten(1) @ down.flatten(1)).double(), expected, atol=1e-5)
    # each factor has half of it: A = sqrt(S) Vᵀ and B = U sqrt(S), over sqrt(scale)
    assert torch.allclose(down.flatten(1).norm(dim=1).square().double(), values[:3] / 0.5, rtol=1e-4)
    assert torch.allclose(up.flatten(1).norm(dim=0).square().double(), values[:3] / 0.5, rtol=1e-4)


def test_large_layers_are_as_exact() -> None:
    """By subspace iteration; singular values fall as those of trained layers do, k^-0.5 or faster."""
    torch.manual_seed(0)
    module = torch.nn.Linear(300, 200).requires_grad_(False)
    assert 4 * (4 + 10) < 200  # not by the whole SVD
    left, _, right = torch.linalg.svd(module.weight, full_matrices=False)
    values = torch.arange(1, 201).float() ** -0.5
    module.weight.copy_((left * values) @ right)
    down, up = pissa.principal_factors(layers.layer(module), module.weight, 4, 1.0)
    assert torch.allclose(down.norm(dim=1).square(), values[:4], rtol=1e-4)
    assert torch.allclose(up @ down, (left[:, :4] * values[:4]) @ right[:4], atol=1e-4)


def test_it_trains_as_with_the_changed_base() -> None:
    """W_res = W - scale B0 A0 and an adapter that starts at B0 A0: same output, same gradients (section 3)."""
    module = layers.base("linear")
    adapter = lora.create(layers.layer(module), LayerSettings(3, 2.0, own={"init": "pissa"}), module.weight).double()
    scale, down, up = 2 / 3, adapter.lora_down.weight, adapter.lora_up.weight
    residual = module.weight - scale * (up @ down).detach()
    layers.nudge(adapter)
    x = layers.example(module)
    ours = module(x) + adapter.bypass(x)
    theirs = x @ (residual + scale * (up @ down)).mT + module.bias
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), [down, up]) for y in (ours, theirs)), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", layers.SHAPES)
def test_the_file_is_a_lora_of_twice_the_rank(shape: str) -> None:
    module = layers.base(shape)
    made = lora.create(layers.layer(module), LayerSettings(3, 2.0, own={"init": "pissa"}), module.weight)
    adapter = layers.nudge(made).double()
    tensors = adapter.file_tensors()
    assert tensors.keys() == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert tensors["lora_down.weight"].shape[0] == tensors["lora_up.weight"].shape[1] == 6
    assert float(tensors["alpha"]) == 4
    loaded = lora.load(layers.layer(module), dict(tensors))
    assert torch.allclose(loaded.delta(module.weight), adapter.delta(module.weight), rtol=1e-12, atol=1e-12)


def test_unsupported_settings_are_refused() -> None:
    module = layers.base("linear", torch.float32)
    settings = LayerSettings(25, 2.0, own={"init": "pissa"})
    with pytest.raises(AdapterError, match="24 singular values"):
        lora.create(layers.layer(module), settings, module.weight)
    with pytest.raises(AdapterError, match="weights of the base"):
        lora.create(layers.layer(module), settings, module.weight.to("meta"))
    with pytest.raises(AdapterError, match="scale_weight_norms"):
        lora.create(layers.layer(module), LayerSettings(2, 2.0, own={"init": "pissa"}), module.weight).rescale(0.5)
