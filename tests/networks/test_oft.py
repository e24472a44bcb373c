"""OFT and BOFT: turning, as the papers and kohya's program have it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import oft
from networks.adapter import AdapterError, LayerSettings
from networks.settings import read_settings
from tests.networks import layers


def made(shape: str = "linear", dim: int = 4, alpha: float = 1.0, size: float = 0.3) -> tuple[Tensor, oft.Oft]:
    module = layers.base(shape)
    torch.manual_seed(1)
    adapter = oft.create(layers.layer(module), LayerSettings(dim=dim, alpha=alpha), module.weight)
    assert adapter is not None
    return module.weight.detach(), layers.nudge(adapter.double(), size)


@pytest.mark.parametrize("alpha", [1.0, 2**-10])
@pytest.mark.parametrize("shape", ["linear", "conv3"])
def test_it_is_kohyas_formula(shape: str, alpha: float) -> None:
    """Cayley: R = (I + Q)(I - Q)⁻¹, with ‖Q‖ held to alpha · out; kohya applies Rᵀ to the blocks of W's rows."""
    weight, adapter = made(shape, alpha=alpha)
    blocks = adapter.oft_blocks.detach()
    skew = blocks - blocks.transpose(1, 2)
    norm = skew.flatten().norm()
    skew = skew * (norm.clamp(max=alpha * weight.shape[0]) / norm)
    assert (norm > alpha * weight.shape[0]) == (alpha < 1)
    turned = []
    for number, rows in enumerate(weight.flatten(1).chunk(4)):
        one = torch.eye(len(rows), dtype=torch.float64)
        rotation = (one + skew[number]) @ torch.inverse(one - skew[number])
        turned.append(rotation.T @ rows)
    expected = torch.cat(turned).reshape(weight.shape) - weight
    assert torch.allclose(adapter.delta(weight), expected, rtol=1e-10, atol=1e-12)


def test_angles_and_lengths_stay() -> None:
    """The paper's promise: within a block RᵀR = I, so all inner products of W's columns are what they were."""
    weight, adapter = made()
    changed = weight + adapter.delta(weight)
    for before, after in zip(weight.chunk(4), changed.chunk(4), strict=True):
        assert torch.allclose(after.T @ after, before.T @ before, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(changed, weight, atol=0.01)


@pytest.mark.parametrize("alpha", [1e-5, 1.0])
def test_gradients(alpha: float) -> None:
    """At the start, where the norm is 0, and beyond the constraint."""
    weight, adapter = made(dim=8, alpha=alpha, size=0.0)
    adapter.delta(weight).sum().backward()
    assert adapter.oft_blocks.grad is not None and adapter.oft_blocks.grad.isfinite().all()
    assert adapter.oft_blocks.grad.any()
    weight, adapter = made(dim=20, alpha=alpha)

    def turned(blocks: Tensor) -> Tensor:
        return torch.func.functional_call(adapter, {"oft_blocks": blocks}, (weight,))

    adapter.forward = adapter.delta  # type: ignore[method-assign]
    assert torch.autograd.gradcheck(turned, (adapter.oft_blocks.detach().requires_grad_(),))


def test_small_turns_are_exact_in_single_precision() -> None:
    """R - I from one solve: nothing is rounded off against I."""
    weight, adapter = made(size=1e-7)
    exact = adapter.requires_grad_(False).delta(weight)
    assert float((adapter.float().delta(weight.float()) - exact).norm() / exact.norm()) < 1e-5


def test_outputs_that_cannot_be_divided_are_refused() -> None:
    module = layers.base("linear")
    with pytest.raises(AdapterError, match="40 outputs cannot be divided into 7 blocks") as caught:
        oft.create(layers.layer(module), LayerSettings(dim=7, alpha=1.0), module.weight)
    assert "divisor of 40" in caught.value.remedy


@pytest.mark.parametrize("text", ["False", "0", "no"])
def test_the_switches_select_the_layers(text: str) -> None:
    """kohya takes any text that is not empty for True."""
    settings, mistakes = read_settings("networks.oft", arguments=[f"enable_conv={text}", f"enable_all_linear={text}"])
    assert not mistakes and not settings.convolutions
    assert not any(settings.own.values())


@pytest.mark.parametrize(
    "argument", ["conv_dim=4", "dropout=0.1", "rank_dropout=0.1", "use_dora=True", "loraplus_lr_ratio=4"]
)
def test_what_has_no_meaning_is_refused(argument: str) -> None:
    _, mistakes = read_settings("networks.oft", arguments=[argument])
    assert len(mistakes) == 1 and "networks.oft does not support" in mistakes[0][0]
    assert len(read_settings("networks.oft", dropout=0.1)[1]) == 1


def test_a_boft_that_does_not_fit_is_refused() -> None:
    module = layers.base("linear")
    for shape in ((5, 4, 10, 10), (2, 8, 5, 5), (2, 4, 10, 8), (2, 5, 10, 10)):
        with pytest.raises(AdapterError, match="attn1_to_k"):
            oft.load(layers.layer(module), {"oft_blocks": torch.zeros(shape)})
    assert not oft.load(layers.layer(module), {"oft_blocks": torch.zeros(2, 4, 10, 10)}).delta(module.weight).any()


@pytest.mark.parametrize("shape", ["linear", "conv1", "conv3"])
@pytest.mark.parametrize("shared", [False, True])
def test_pefts_oft_turns_the_inputs(shape: str, *, shared: bool) -> None:
    """OFTv2: what PEFT merges into the weight, from the tensor that it saves."""
    from peft import OFTConfig, inject_adapter_in_model

    module = layers.base(shape, torch.float32)
    before = module.weight.clone()
    model = nn.ModuleDict({"layer": copy.deepcopy(module)})
    size = {"linear": 4, "conv1": 4}.get(shape, 36)
    inject_adapter_in_model(OFTConfig(oft_block_size=size, r=0, target_modules=["layer"], block_share=shared), model)
    theirs: Any = model["layer"]
    rotation = theirs.oft_R["default"].weight
    torch.manual_seed(0)
    with torch.no_grad():
        rotation.normal_(std=0.05)
    tensors = {"oft_R.weight": rotation.detach().clone()}
    ours = oft.load(layers.layer(module), tensors)
    assert not tensors and ours.file_tensors().keys() == {"oft_R.weight"}
    theirs.merge()
    expected = theirs.base_layer.weight.detach() - before
    assert float(expected.norm()) > 0.01
    found = ours.requires_grad_(requires_grad=False).delta(before)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["linear", "conv3"])
def test_rotations_of_earlier_lycoris(shape: str) -> None:
    """oft_diag holds R itself (A1111's network_oft.py, is_R): rows become Rᵀ times what they were, then the factors."""
    module = layers.base(shape)
    weight, out = module.weight, module.weight.shape[0]
    rotations = torch.linalg.qr(torch.randn(out // 4, 4, 4, dtype=torch.float64))[0]
    factors = torch.rand(out, dtype=torch.float64)
    tensors = {"oft_diag": rotations, "rescale": factors.reshape(-1, 4, 1)}
    ours = oft.load(layers.layer(module), dict(tensors)).requires_grad_(requires_grad=False)
    whole = torch.block_diag(*rotations)
    expected = ((whole.T @ weight.flatten(1)) * factors[:, None]).reshape(weight.shape)
    assert torch.allclose(weight + ours.delta(weight), expected, rtol=1e-10, atol=1e-12)
    for wrong in (rotations[:3], rotations[..., :2]):
        with pytest.raises(AdapterError, match="oft_diag"):
            oft.load(layers.layer(module), {"oft_diag": wrong})


def test_blocks_without_the_constraint_turn_as_before() -> None:
    weight, adapter = made(alpha=1e-3)
    blocks = oft.without_constraint(adapter.oft_blocks.detach(), float(adapter.alpha))
    assert torch.allclose(oft.Oft(blocks, 0.0).delta(weight), adapter.delta(weight), rtol=1e-10, atol=1e-12)
    tensors = adapter.file_tensors()
    assert float(tensors["alpha"]) == 0 and torch.equal(tensors["oft_blocks"], blocks)
