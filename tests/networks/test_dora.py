"""DoRA against its equation written out, W' = m (W + ΔW) / ‖W + ΔW‖, and against PEFT and LyCORIS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.families.sd.sd_adapters import SD_ADAPTERS
from networks import dora, lora
from networks.adapted_layer import AdaptedLayer
from networks.adapter import AdapterError, Layer, LayerSettings
from networks.registry import kind_by_name
from networks.targets import Target
from tests.networks import layers

BY_OUTPUT = pytest.mark.parametrize("by_output", [True, False], ids=["by output", "by input"])


def attached(
    module: Any, scale: Tensor | None = None, multiplier: float = 1.0, *, by_output: bool = True
) -> AdaptedLayer:
    """The layer with a DoRA that has been trained for a while."""
    torch.manual_seed(3)
    adapter: Any = layers.nudge(lora.create(layers.layer(module), LayerSettings(3, 2.0), module.weight))
    adapter.to(module.weight.dtype)
    if scale is None:
        scale = dora.magnitude(module.weight, by_output=by_output)
        scale = scale * (1 + 0.2 * torch.rand(scale.shape))
    adapter.register_parameter("dora_scale", nn.Parameter(scale))
    target = Target(module, SD_ADAPTERS[1], "mid_block", module, layers.layer(module))
    layer = AdaptedLayer(target, adapter, kind_by_name("lora"))
    layer.multiplier = multiplier
    layer.attach()
    return layer


def by_hand(weight: Tensor, delta: Tensor, m: Tensor, multiplier: float, axis: int) -> Tensor:
    """W + u (W' - W) with W' = m (W + ΔW) / ‖W + ΔW‖, the norm of each slice along `axis`. So do ComfyUI
    (comfy/weight_adapter/base.py) and A1111 (extensions-builtin/Lora/network.py) with a multiplier u."""
    slices = (weight + delta).movedim(axis, 0).flatten(1)
    norms = torch.tensor([float((row * row).sum()) ** 0.5 for row in slices], dtype=weight.dtype)
    shape = [1] * weight.ndim
    shape[axis] = -1
    whole = (weight + delta) * (m.flatten() / norms).view(shape)
    return weight + multiplier * (whole - weight)


@pytest.mark.parametrize("multiplier", [1.0, 0.4])
@pytest.mark.parametrize("axis", [0, 1], ids=["by output", "by input"])
@pytest.mark.parametrize("shape", layers.SHAPES)
def test_the_equation(shape: str, axis: int, multiplier: float) -> None:
    module = layers.base(shape)
    size = module.weight.shape[axis]
    wide = [1] * module.weight.ndim
    wide[axis] = size
    layer = attached(module, torch.linspace(0.5, 2, size, dtype=torch.float64).view(wide), multiplier)
    adapter = layer.adapter
    expected = by_hand(module.weight, adapter.delta(module.weight), adapter.dora_scale, multiplier, axis).detach()
    x = layers.example(module)
    assert torch.allclose(module(x), layers.changed(module, x, expected - module.weight), rtol=1e-10, atol=1e-10)
    assert torch.allclose(module.weight + layer.weight_delta(torch.float64), expected, rtol=1e-10, atol=1e-10)


@BY_OUTPUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_rows_are_not_distorted_in_half_precision(dtype: torch.dtype, *, by_output: bool) -> None:
    """LyCORIS adds the weight type's eps to the norm: 12.7 % of a row of norm 0.057 in bfloat16 (formulas.md 12)."""
    weight = torch.full((16, 16), 0.057 / 4).to(dtype)
    adapter: Any = lora.create(Layer("x", (16, 16)), LayerSettings(2, 2.0), weight)
    adapter.register_parameter("dora_scale", nn.Parameter(dora.magnitude(weight, by_output=by_output)))
    factor = dora.factor(adapter, weight)
    assert factor.shape == ((16, 1) if by_output else (1, 16))
    assert torch.allclose(factor, torch.ones(1), rtol=1e-6)


@BY_OUTPUT
def test_a_row_of_zeros_stays_finite(*, by_output: bool) -> None:
    module = layers.base("linear", torch.float32)
    module.weight[1] = 0
    module.weight[:, 1] = 0
    adapter: Any = lora.create(layers.layer(module), LayerSettings(2, 2.0), module.weight)
    adapter.register_parameter("dora_scale", nn.Parameter(dora.magnitude(module.weight, by_output=by_output)))
    assert bool(dora.merged_weight(adapter, module.weight, 1.0).isfinite().all())


@BY_OUTPUT
@pytest.mark.parametrize("shape", ["linear", "conv3"])
def test_the_norm_is_detached(shape: str, *, by_output: bool) -> None:
    """Gradients are those of m V / c with c = ‖V‖ held (section 4.3 of the paper)."""
    module = layers.base(shape)
    layer = attached(module, by_output=by_output)
    adapter = layer.adapter
    x = layers.example(module).requires_grad_(True)
    wanted = [x, *adapter.parameters()]
    ours = torch.autograd.grad(module(x).square().sum(), wanted)
    changed = module.weight + adapter.delta(module.weight)
    rows = changed.detach() if by_output else changed.detach().transpose(0, 1)
    held = rows.flatten(1).norm(dim=1).view(-1, *[1] * (changed.ndim - 1))
    held = held if by_output else held.transpose(0, 1)
    plain = layers.changed(module, x, adapter.dora_scale * changed / held - module.weight)
    theirs = torch.autograd.grad(plain.square().sum(), wanted)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-9) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", ["linear", "conv3"])
def test_peft_computes_the_same(shape: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    module = layers.base(shape, torch.float32)
    x = layers.example(module)
    layer = attached(module)
    ours = module(x)
    layer.detach()
    model = nn.ModuleDict({"layer": module})
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=2, target_modules=["layer"], use_dora=True), model)
    theirs: Any = model["layer"]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.adapter.lora_down.weight)
        theirs.lora_B["default"].weight.copy_(layer.adapter.lora_up.weight)
        magnitude = theirs.lora_magnitude_vector["default"].weight
        magnitude.copy_(layer.adapter.dora_scale.view_as(magnitude))
    assert torch.allclose(theirs(x), ours, rtol=1e-5, atol=1e-5)


@BY_OUTPUT
@pytest.mark.parametrize("shape", layers.SHAPES)
def test_lycoris_computes_the_same(shape: str, *, by_output: bool) -> None:
    """Its wd_on_output is our argument of the same name, with the shapes of its dora_scale."""
    lycoris = pytest.importorskip("lycoris.modules")
    module = layers.base(shape)
    layer = attached(module, by_output=by_output)
    with torch.no_grad():
        theirs = lycoris.LoConModule(
            layers.NAME, module, lora_dim=3, alpha=2.0, weight_decompose=True, wd_on_out=by_output
        )
        theirs.load_state_dict(layer.adapter.state_dict())
        ours = module.weight + layer.weight_delta(torch.float64)
        assert torch.allclose(theirs.double().get_merged_weight()[0], ours, rtol=1e-6, atol=1e-6)


def test_dora_scales_are_recognised_by_their_shape() -> None:
    linear, kernel = Layer("l", (5, 7)), Layer("k", (5, 7, 3, 3))
    assert dora.reshape_scale(linear, torch.ones(5, 1)).shape == (5, 1)
    assert dora.reshape_scale(linear, torch.ones(1, 7)).shape == (1, 7)
    assert dora.reshape_scale(linear, torch.ones(5)).shape == (5, 1)
    assert dora.reshape_scale(kernel, torch.ones(1, 7, 1, 1)).shape == (1, 7, 1, 1)
    assert dora.reshape_scale(kernel, torch.ones(5, 1)).shape == (5, 1, 1, 1)
    square = Layer("s", (6, 6))  # of which only a vector could be either: PEFT has vectors, per output
    assert dora.reshape_scale(square, torch.ones(1, 6)).shape == (1, 6)
    assert dora.reshape_scale(square, torch.ones(6, 1)).shape == (6, 1)
    assert dora.reshape_scale(square, torch.ones(6)).shape == (6, 1)
    with pytest.raises(AdapterError, match="dora_scale"):
        dora.reshape_scale(linear, torch.ones(6, 1))
