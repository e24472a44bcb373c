"""Every kind of adapter over a base whose weights are packed: as over the same weights in full, which nothing keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from library.families.sd.sd_adapters import SD_ADAPTERS
from library.runtime.packed_weight import PackedWeight
from library.runtime.stored_weights import compute_in_fp32
from networks import network
from networks.settings import read_settings
from tests.networks import layers, small_model
from tests.networks.small_model import Model
from tests.packing import pack

KINDS: dict[str, tuple[str, list[str]]] = {
    "lora": ("networks.lora", ["conv_dim=2"]),
    "lora dora": ("networks.lora", ["conv_dim=2", "use_dora=True"]),
    "lora dora by output": ("networks.lora", ["conv_dim=2", "use_dora=True", "wd_on_output=True"]),
    "pissa": ("networks.lora", ["init=pissa"]),
    "lora_fa": ("networks.lora_fa", ["conv_dim=2"]),
    "dylora": ("networks.dylora", ["conv_dim=4", "unit=2"]),
    "oft": ("networks.oft", ["enable_all_linear=True", "enable_conv=True"]),
    "loha": ("networks.loha", ["conv_dim=2"]),
    "loha tucker": ("networks.loha", ["conv_dim=2", "use_tucker=True"]),
    "loha dora": ("networks.loha", ["use_dora=True"]),
    "lokr": ("networks.lokr", ["conv_dim=1"]),
    "lokr dora": ("networks.lokr", ["use_dora=True", "conv_dim=1"]),
    "ia3": ("networks.ia3", []),
}


def bases() -> tuple[Model, Model]:
    """A base with packed weights, and one with the same weights in full."""
    quantised = {key: module.float().requires_grad_(False) for key, module in small_model.model().items()}
    for module in quantised.values():
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                pack(layer)
    full = copy.deepcopy(quantised)
    for module in full.values():
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight = nn.Parameter(layer.weight.unpacked(), requires_grad=False)  # type: ignore[operator]
    for module in quantised.values():
        compute_in_fp32(module)
    return quantised, full


def adapted(base: Model, name: str) -> network.Network:
    module, arguments = KINDS[name]
    settings, mistakes = read_settings(module, dim=3 if name == "pissa" else 4, alpha=1, arguments=arguments)
    assert not mistakes
    torch.manual_seed(12)
    made = network.create(base, SD_ADAPTERS, settings, generator=torch.Generator().manual_seed(11)).eval()
    layers.nudge(made, 0.1)
    made.attach()
    return made


def loss(base: Model) -> Tensor:
    """Of three samples: no activation has the shape of a weight then."""
    generator = torch.Generator().manual_seed(1)
    x, time = (torch.randn(shape, generator=generator) for shape in ((3, 4, 8, 6), (3, 8)))
    text = base["text_encoder"](time)
    image: Tensor = base["unet"](x, text)
    return image.square().mean() + text.square().mean()


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_as_over_the_full_weights(name: str) -> None:
    results = []
    for base in bases():
        adapters = adapted(base, name)
        value = loss(base)
        value.backward()
        gradients = [one.grad.flatten() for one in adapters.parameters() if one.grad is not None]
        results.append((value.detach(), torch.cat(gradients)))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert float((our_gradients - their_gradients).norm()) < 1e-3 * float(their_gradients.norm())


@pytest.mark.parametrize("name", KINDS)
def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward_pass(name: str) -> None:
    """Neither a dense weight nor a ΔW: all layers together would take what quantising saves."""
    base, _ = bases()
    adapters = adapted(base, name)
    own = {one.untyped_storage().data_ptr() for one in adapters.parameters()}
    shapes = {layer.module.weight.shape for layer in adapters.layers}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(base)
    whole = [
        tensor
        for tensor in kept
        if not isinstance(tensor, PackedWeight)
        and tensor.shape in shapes
        and tensor.untyped_storage().data_ptr() not in own
    ]
    assert any(isinstance(tensor, PackedWeight) for tensor in kept)
    assert [tuple(tensor.shape) for tensor in whole] == []


def test_it_is_never_merged_into_packed_weights() -> None:
    """The tools merge into the full file."""
    base, _ = bases()
    with pytest.raises(RuntimeError, match="cannot be changed"):
        adapted(base, "lora").merge()
