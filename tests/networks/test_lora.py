"""LoRA on single layers against its formula written out: y = W x + mult * alpha / r * B A x (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from library.families.sd.sd_adapters import SD_ADAPTERS
from networks import lora
from networks.adapted_layer import AdaptedLayer
from networks.adapter import LayerSettings
from networks.fused import lora_linear
from networks.registry import kind_by_name
from networks.targets import Target
from tests.networks import layers

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


def create(module: Any, dim: int = 3, alpha: float = 2.0, **more: Any) -> lora.Lora:
    torch.manual_seed(3)
    made = lora.create(layers.layer(module), LayerSettings(dim, alpha, **more), module.weight)
    return made.to(module.weight.dtype)


def attached(module: Any, adapter: Any) -> AdaptedLayer:
    target = Target(module, SD_ADAPTERS[1], "mid_block", module, layers.layer(module))
    layer = AdaptedLayer(target, adapter, kind_by_name("lora"))
    layer.attach()
    return layer


def test_how_it_is_drawn() -> None:
    """Kaiming uniform with a = sqrt(5) is U(-1/sqrt(in), 1/sqrt(in)), whose std is 1/sqrt(3 in)."""
    adapter = create(nn.Linear(320, 640), dim=64)
    down = adapter.lora_down.weight.detach()
    assert float(down.abs().max()) <= 1 / math.sqrt(320) and float(down.std()) == pytest.approx(0.0323, rel=0.02)
    assert not adapter.lora_up.weight.any()
    kernel = create(nn.Conv2d(32, 16, 3), dim=64).lora_down.weight.detach()
    assert float(kernel.abs().max()) <= 1 / math.sqrt(288) and float(kernel.std()) == pytest.approx(
        1 / math.sqrt(864), rel=0.02
    )


@pytest.mark.parametrize(("shape", "down", "up"), [
    ("linear", (3, 24), (40, 3)), ("conv1", (3, 16, 1, 1), (24, 3, 1, 1)), ("conv3", (3, 24, 3, 3), (16, 3, 1, 1)),
])  # fmt: skip
def test_what_files_hold(shape: str, down: tuple[int, ...], up: tuple[int, ...]) -> None:
    tensors = create(layers.base(shape)).file_tensors()
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "lora_down.weight": down, "lora_up.weight": up, "alpha": (),
    }  # fmt: skip
    assert float(tensors["alpha"]) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32"])
@pytest.mark.parametrize("multiplier", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("shape", layers.SHAPES)
def test_output_and_delta_by_the_formula(shape: str, multiplier: float, dtype: torch.dtype) -> None:
    module = layers.base(shape, dtype)
    adapter = layers.nudge(create(module))
    down, up = adapter.lora_down.weight.double(), adapter.lora_up.weight.double()
    delta = torch.einsum("or,r...->o...", up.flatten(1), down) * (2.0 / 3)
    assert torch.allclose(adapter.delta(module.weight).double(), delta, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    x = layers.example(module)
    expected = layers.changed(module.double(), x.double(), multiplier * delta)
    module.to(dtype)
    attached(module, adapter).multiplier = multiplier
    assert torch.allclose(module(x).double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("shape", layers.SHAPES)
def test_gradients_are_those_of_the_plain_arithmetic(shape: str) -> None:
    module = layers.base(shape)
    adapter = layers.nudge(create(module))
    attached(module, adapter)
    x = layers.example(module).requires_grad_(True)
    wanted = [x, adapter.lora_down.weight, adapter.lora_up.weight]
    ours = torch.autograd.grad(module(x).square().sum(), wanted)
    plain = layers.changed(module, x, adapter.delta(module.weight))
    theirs = torch.autograd.grad(plain.square().sum(), wanted)
    assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-10) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_layers_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))]
    x, weight, offset, down, up = tensors
    for tensor in (x, down, up):
        tensor.requires_grad_(True)

    def run(x: Tensor, down: Tensor, up: Tensor) -> Any:
        return lora_linear(x, weight, offset if bias else None, down, up, 0.7)

    assert torch.autograd.gradcheck(run, (x, down, up))


def saved_by(run: Callable[[], Any]) -> dict[int, int]:
    """Where what a calculation keeps for its gradients lies -> bytes of it."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_layer_keeps_its_input_once_and_a_half_base_in_half(dtype: torch.dtype) -> None:
    x = torch.randn(64, 32, requires_grad=True)
    down, up = torch.randn(2, 32, requires_grad=True), torch.randn(48, 2, requires_grad=True)
    weight = torch.randn(48, 32).to(dtype)
    out: Any = lora_linear(x, weight, None, down, up, 0.5)
    assert torch.allclose(out, functional.linear(x, weight.float() + 0.5 * up @ down), rtol=1e-5, atol=1e-4)
    kept = saved_by(lambda: lora_linear(x, weight, None, down, up, 0.5))
    assert sum(kept.values()) == x.nbytes + weight.nbytes + down.nbytes + up.nbytes + 64 * 2 * 4


class Counting(TorchDispatchMode):
    """Names of the operations that run, without those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("view", "_unsafe_view", "t", "transpose", "detach", "expand", "alias"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_few_passes_over_memory(autocast: bool) -> None:
    """Forward: the base's product, A x, scale, + B A x. Backward: for B, A x, A, the base's and the adapter's x."""
    module = nn.Linear(24, 40).requires_grad_(False)
    adapter = layers.nudge(create(module))
    if autocast:  # as a base that stays in half precision is used
        module.bfloat16()
        adapter.bfloat16()
    x = torch.randn(2, 5, 24, dtype=module.weight.dtype, requires_grad=True)
    attached(module, adapter)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Counting() as forward:
            out = module(x)
        grad = torch.ones_like(out)
        with Counting() as backward:
            out.backward(grad)
    assert sorted(forward.names) == ["addmm", "addmm_", "mm", "mul_"]
    laid_out = {"clone", "copy_", "new_empty_strided"}  # B's small gradient, in the order that parameters have
    names = [name for name in sorted(backward.names) if name not in laid_out]
    assert names == ["addmm_", "mm", "mm", "mm", "mm", "mul_"]


def test_a_frozen_down_keeps_no_input() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    down, up = torch.randn(2, 32), torch.randn(48, 2, requires_grad=True)
    kept = saved_by(lambda: lora_linear(x, torch.randn(48, 32), None, down, up, 0.5))
    assert x.untyped_storage().data_ptr() not in kept


def test_a_base_in_training_computes_by_itself() -> None:
    module = layers.base("linear")
    adapter = layers.nudge(create(module))
    attached(module, adapter)
    module.weight.requires_grad_(True)
    module(layers.example(module)).sum().backward()
    assert module.weight.grad is not None


@pytest.mark.parametrize("shape", ["linear", "conv3"])
def test_dropouts_by_kohyas_rules(shape: str) -> None:
    """dropout: on A x, scaled by 1/(1-p); rank_dropout: one mask over ranks for each sample, the same for all
    positions, scaled by 1/(1-p). Seen through an A and B that let each rank through alone."""
    size = 16
    module: Any = nn.Linear(size, size) if shape == "linear" else nn.Conv2d(size, size, 1)
    x = torch.ones(3, 5, size) if shape == "linear" else torch.ones(3, size, 4, 5)
    ranks = -1 if shape == "linear" else 1
    for name in ("dropout", "rank_dropout"):
        adapter = create(module, dim=size, alpha=size, **{name: 0.25})
        with torch.no_grad():
            for factor in (adapter.lora_down, adapter.lora_up):
                factor.weight.copy_(torch.eye(size).view_as(factor.weight))
        out = adapter.train().bypass(x).movedim(ranks, -1).flatten(1, -2)
        assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        by_sample = (out == out[:, :1]).all()
        assert bool(by_sample) == (name == "rank_dropout")
        assert not (out[0] == out[1]).all()
        assert torch.equal(adapter.eval().bypass(x), x)


def test_tuckers_core_is_read() -> None:
    """LyCORIS: up (out, r), mid (r, r', k, k), down (r', in): the kernel between two changes of channels."""
    torch.manual_seed(0)
    module = layers.base("conv3")
    tensors = {
        "lora_down.weight": torch.randn(3, 24, 1, 1).double(), "lora_up.weight": torch.randn(16, 4, 1, 1).double(),
        "lora_mid.weight": torch.randn(4, 3, 3, 3).double(), "alpha": torch.tensor(2.0),
    }  # fmt: skip
    adapter = lora.load(layers.layer(module), dict(tensors))
    up, mid, down = (tensors[f"lora_{name}.weight"] for name in ("up", "mid", "down"))
    delta = torch.zeros_like(module.weight)
    for r in range(4):
        for s in range(3):
            delta += up[:, r, 0, 0][:, None, None, None] * down[s, :, 0, 0][None, :, None, None] * mid[r, s]
    assert torch.allclose(adapter.delta(module.weight), delta / 2)
    x = layers.example(module)
    attached(module, adapter)
    assert torch.allclose(module(x), layers.changed(module, x, delta / 2))
    assert float(adapter.norm()) == pytest.approx(float((delta / 2).norm()), rel=1e-6)


@pytest.mark.parametrize("shape", layers.SHAPES)
def test_norm_without_delta(shape: str) -> None:
    module = layers.base(shape)
    adapter = layers.nudge(create(module))
    assert float(adapter.norm()) == pytest.approx(float(adapter.delta(module.weight).detach().norm()), rel=1e-12)
    before = adapter.delta(module.weight)
    adapter.rescale(0.25)
    assert torch.allclose(adapter.delta(module.weight), before / 4)
