"""Laws of every kind of adapter on a whole model in miniature, through networks/network.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from library.families.sd.sd_adapters import SD_ADAPTERS
from networks import network
from networks.settings import read_settings
from tests import tiny
from tests.networks import layers, small_model
from tests.networks.small_model import Model, outputs

# module and arguments; conv_dim where the kind has it
KINDS: dict[str, tuple[str, list[str]]] = {
    "lora_fa": ("networks.lora_fa", ["conv_dim=2"]),
    "dylora": ("networks.dylora", ["conv_dim=4", "unit=2"]),
    "oft": ("networks.oft", ["enable_all_linear=True", "enable_conv=True"]),
    "loha": ("networks.loha", ["conv_dim=2"]),
    "loha tucker": ("networks.loha", ["conv_dim=2", "use_tucker=True"]),
    "lokr": ("networks.lokr", ["conv_dim=1"]),
    "lokr both": ("networks.lokr", ["conv_dim=1", "decompose_both=True", "factor=16"]),
    "ia3": ("networks.ia3", []),
    "loha dora": ("networks.loha", ["use_dora=True"]),
    "lokr dora": ("networks.lokr", ["use_dora=True", "conv_dim=1"]),
}


@pytest.fixture
def model() -> Model:
    """A model in a few layers, in double precision."""
    return small_model.model()


@pytest.fixture(scope="module")
def sd1() -> Model:
    """Stable Diffusion 1 in miniature."""
    made = tiny.diffusers_modules("sd1")
    return {"unet": made.unet, "text_encoder": made.text_encoder}


def settings(name: str, dim: int = 4) -> Any:
    module, arguments = KINDS[name]
    found, mistakes = read_settings(module, dim=dim, alpha=1, arguments=arguments)
    assert not mistakes
    return found


def create(name: str, model: Model, *, nudged: bool = True) -> network.Network:
    generator = torch.Generator().manual_seed(11)
    torch.manual_seed(12)
    made = network.create(model, SD_ADAPTERS, settings(name), generator=generator).double().eval()
    return layers.nudge(made, 0.1) if nudged else made


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], close: float = 1e-10) -> bool:
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True)]
    return all(float((a - b).norm()) <= close * float(b.norm()) for a, b in pairs)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_laws_of_outputs(name: str, model: Model) -> None:
    base = outputs(model)
    adapters = create(name, model, nudged=False)
    adapters.attach()
    begin = 1e-6 if "dora" in name else 1e-10  # DoRA's lengths are in float32
    assert same(outputs(model), base, begin), "at the start nothing is changed"
    layers.nudge(adapters, 0.1)
    changed = outputs(model)
    assert not same(changed, base, 1e-4)
    adapters.set_multiplier(0)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), base, strict=True)), "multiplier 0 is the base"
    adapters.set_multiplier(0.5)
    half = outputs(model)
    adapters.detach()
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), base, strict=True)), "detached is the base"

    loaded = network.from_tensors(model, SD_ADAPTERS, adapters.tensors()).eval()
    loaded.attach()
    assert same(outputs(model), changed), "a file holds all of it"
    loaded.detach()
    assert loaded.tensors().keys() == adapters.tensors().keys()

    for ratio, expected in ((1.0, changed), (0.5, half)):
        twin = copy.deepcopy(model)
        network.from_tensors(twin, SD_ADAPTERS, adapters.tensors()).merge(ratio)
        assert same(outputs(twin), expected), f"merged at {ratio} it is as attached"


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_in_single_precision_merged_is_as_attached(name: str, model: Model) -> None:
    single = {key: module.float() for key, module in model.items()}
    adapters = create(name, single).float()
    adapters.attach()
    attached = outputs(single)
    adapters.merge()
    assert same(outputs(single), attached, 1e-5)


@pytest.mark.parametrize("way", ["base in half precision", "autocast"])
@pytest.mark.parametrize("name", KINDS)
def test_in_half_precision_it_computes_about_the_same(name: str, way: str, model: Model) -> None:
    """The adapter stays in float32, and so do its gradients."""
    model = {key: module.float() for key, module in model.items()}
    adapters = create(name, model).float()
    adapters.attach()
    expected = outputs(model)
    gradients = []
    for halved in (False, True):
        if halved and way != "autocast":
            for module in model.values():
                module.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=halved and way == "autocast"):
            image, text = outputs(model)
        adapters.zero_grad()
        (image.float().square().mean() + text.float().square().mean()).backward()
        gradients.append(torch.cat([one.grad.flatten() for one in adapters.parameters() if one.grad is not None]))
    assert image.dtype is text.dtype is torch.bfloat16
    assert same((image.float(), text.float()), expected, 0.03)
    assert gradients[1].dtype is torch.float32
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.99


@pytest.mark.parametrize("argument", ["rank_dropout=0.5", "module_dropout=0.5", "unit=2"])
@pytest.mark.parametrize("module", ["networks.lora_fa", "networks.dylora", "networks.loha", "networks.lokr"])
def test_activation_checkpointing_changes_nothing(module: str, argument: str, model: Model) -> None:
    """What is drawn at random is drawn again."""
    if (argument == "unit=2") != (module == "networks.dylora") and argument != "module_dropout=0.5":
        return  # no argument of this kind
    asked, mistakes = read_settings(module, dim=4, alpha=1, arguments=["conv_dim=4", argument])
    assert not mistakes
    adapters = layers.nudge(network.create(model, SD_ADAPTERS, asked).double().train())
    adapters.attach()
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(7)
        adapters.zero_grad()
        image = checkpoint(lambda: outputs(model)[0], use_reentrant=False) if checkpointed else outputs(model)[0]
        image.square().mean().backward()
        found.append({key: one.grad for key, one in adapters.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][key], gradient) for key, gradient in found[0].items())


@pytest.mark.parametrize("name", KINDS)
def test_nothing_but_the_adapter_is_trained_and_all_of_it(name: str, model: Model) -> None:
    adapters = create(name, model)
    if name != "dylora":  # which trains a part of itself at a time
        adapters.train()
    adapters.attach()
    image, text = outputs(model)
    (image.square().mean() + text.square().mean()).backward()
    adapters.detach()
    for layer in adapters.layers:
        assert all(parameter.grad is None for parameter in layer.module.parameters())
    for key, parameter in adapters.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None and bool(parameter.grad.any())), key
        assert parameter.requires_grad == (name != "lora_fa" or "lora_down" not in key), key
    rates = {"unet": 1e-4, "text_encoder1": 1e-4}
    grouped = [id(parameter) for group in adapters.groups(rates) for parameter in group.parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in adapters.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("module", "faster"),
    [  # kohya's choice for each kind
        ("networks.dylora", ("lora_up",)),
        ("networks.loha", ("hada_w2_a",)),
        ("networks.lokr", ("lokr_w1",)),
    ],
)
def test_parameters_with_the_loraplus_rate(module: str, faster: tuple[str, ...], model: Model) -> None:
    asked, mistakes = read_settings(module, dim=2, alpha=1, arguments=["loraplus_unet_lr_ratio=4"])
    assert not mistakes
    adapters = network.create(model, SD_ADAPTERS, asked)
    names = {id(parameter): key for key, parameter in adapters.named_parameters()}
    for group in adapters.groups({"unet": 1e-3, "text_encoder1": 1e-4}):
        rate = {"textencoder": 1e-4, "unet": 1e-3, "unet plus": 4e-3}[group.description]
        assert group.learning_rate == pytest.approx(rate)
        for parameter in group.parameters if group.name == "unet" else ():
            role = names[id(parameter)].partition(".")[2]
            assert role.startswith(faster) == (group.description == "unet plus"), role


@torch.no_grad()
def test_two_kinds_add(model: Model) -> None:
    first, second = create("loha", model), create("lokr", model)
    twin = copy.deepcopy(model)
    for adapters in (first, second):
        adapters.attach()
    attached = outputs(model)
    for adapters in (second, first):
        adapters.detach()
        network.from_tensors(twin, SD_ADAPTERS, adapters.tensors()).merge()
    assert same(outputs(twin), attached)


@pytest.mark.parametrize(
    ("arguments", "count"),
    # SD1 has 16 transformers: 8 layers of attention each and 4 others; and 86 layers in residual and sampling blocks
    [("", 128), ("enable_all_linear=True", 192), ("enable_conv=True", 214), ("enable_conv=1 enable_all_linear=1", 278)],
)
def test_where_oft_sits(sd1: Model, arguments: str, count: int) -> None:
    asked, mistakes = read_settings("networks.oft", dim=4, alpha=1e-3, arguments=arguments.split())
    assert not mistakes
    adapters = network.create(sd1, SD_ADAPTERS, asked)
    assert adapters.counts == {"unet": count}
    tensors = adapters.tensors()
    assert len(tensors) == 2 * count
    assert all(key.startswith("lora_unet_") for key in tensors)
    assert not any(float(value) for key, value in tensors.items() if key.endswith(".alpha"))
    assert all(value.shape[0] == 4 for key, value in tensors.items() if key.endswith(".oft_blocks"))


def test_where_ia3_sits(sd1: Model) -> None:
    tensors = network.create(sd1, SD_ADAPTERS, settings("ia3")).tensors()
    on_input = {key.partition(".")[0]: bool(value) for key, value in tensors.items() if key.endswith("on_input")}
    # LyCORIS' preset: to_k, to_v, ff.net.2; k_proj, v_proj, mlp.fc2. The miniature's text encoder has 3 layers.
    assert len(on_input) == 16 * (2 + 2 + 1) + 3 * 3
    assert all(scaled == name.endswith(("_ff_net_2", "_mlp_fc2")) for name, scaled in on_input.items())


def test_a_network_in_half_precision_keeps_its_alphas(model: Model) -> None:
    asked, _ = read_settings("networks.loha", dim=3, alpha=1, arguments=["use_rslora=True"])
    adapters = network.create(model, SD_ADAPTERS, asked)
    exact = {key: value for key, value in adapters.tensors().items() if key.endswith(".alpha")}
    assert len({float(value) for value in exact.values()}) == 1
    adapters.bfloat16()
    for key, value in exact.items():
        assert torch.equal(adapters.tensors()[key], value)


@pytest.mark.parametrize("name", ["lora_fa", "dylora", "loha", "loha tucker", "lokr", "lokr both", "ia3"])
@torch.no_grad()
def test_long_changes_are_scaled_down(name: str, model: Model) -> None:
    adapters = create(name, model)
    before = [float(layer.adapter.delta(layer.module.weight).norm()) for layer in adapters.layers]
    limit = sum(sorted(before)[len(before) // 2 :][:2]) / 2
    report = adapters.scale_norms(limit)
    after = [float(layer.adapter.delta(layer.module.weight).norm()) for layer in adapters.layers]
    assert after == pytest.approx([min(norm, limit) for norm in before], rel=1e-5)
    assert report.scaled == sum(norm > limit for norm in before) and report.largest == pytest.approx(limit)
