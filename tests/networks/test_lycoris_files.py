"""Files as LyCORIS has them: the real package makes of ours what we make of them, and we of its what it does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from library.families.sd.sd_adapters import SD_ADAPTERS
from networks import boft, full, glora, ia3, loha, lokr, lora, network, oft
from networks.adapter import AdapterError, LayerSettings
from networks.settings import read_settings
from tests.networks import layers, small_model

pytest.importorskip("lycoris")
from lycoris import kohya
from lycoris import modules as lycoris

OURS = {"loha": loha, "lokr": lokr, "ia3": ia3, "oft": oft, "full": full, "glora": glora, "boft": boft, "locon": lora}
THEIRS = {
    "loha": lycoris.LohaModule,
    "lokr": lycoris.LokrModule,
    "ia3": lycoris.IA3Module,
    "oft": lycoris.DiagOFTModule,
    "boft": lycoris.ButterflyOFTModule,
    "glora": lycoris.GLoRAModule,
    "full": lycoris.FullModule,
    "locon": lycoris.LoConModule,
}
LOKR: tuple[dict[str, Any], ...] = (
    {"lora_dim": 2},
    {"lora_dim": 1, "decompose_both": True},
    {"lora_dim": 2, "factor": 2},
    {"lora_dim": 2, "factor": 4, "unbalanced_factorization": True},
    {"lora_dim": 8},
    {"lora_dim": 2, "full_matrix": True},
    {"lora_dim": 3, "decompose_both": True, "factor": 8, "unbalanced_factorization": True},
)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("loha", {"lora_dim": 3}),
    ("loha", {"lora_dim": 3, "use_tucker": True}),
    ("ia3", {}),
    ("ia3", {"train_on_input": True}),
    ("oft", {"lora_dim": 4}),
    ("oft", {"lora_dim": 4, "constraint": 1e-3}),
    ("oft", {"lora_dim": 8, "rescaled": True}),
    *(("lokr", options) for options in LOKR),
    *(("lokr", options | {"use_tucker": True}) for options in LOKR),
    ("locon", {"lora_dim": 3}),
    ("locon", {"lora_dim": 3, "use_tucker": True}),
    ("locon", {"lora_dim": 4, "rs_lora": True}),
    ("glora", {"lora_dim": 3}),
    ("full", {}),
    ("boft", {"lora_dim": 10}),
    ("boft", {"lora_dim": 10, "constraint": 1e-3, "rescaled": True}),
]
WRITTEN = {"loha", "lokr", "ia3"}  # by both


def theirs(name: str, options: dict[str, Any], module: Any) -> Any:
    torch.manual_seed(5)
    module = copy.deepcopy(module)
    adapter = THEIRS[name](layers.NAME, module, alpha=2.0, **options).to(module.weight.dtype)
    if name == "full":
        adapter.apply_to()  # its state dict means nothing before
    return layers.nudge(adapter)


def described(case: Any) -> str | None:
    return " ".join([*case]) if isinstance(case, dict) else None


@pytest.mark.parametrize("shape", layers.SHAPES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=described)
def test_its_files_are_read(name: str, options: dict[str, Any], shape: str) -> None:
    turning = name in ("oft", "boft")  # LyCORIS does it in fp32 alone
    module = layers.base(shape, torch.float32 if turning else torch.float64)
    adapter = theirs(name, options, module)
    tensors = layers.file_of(adapter)
    loaded = OURS[name].load(layers.layer(module), tensors)
    assert not tensors
    x = layers.example(module)
    expected = adapter(x)
    found = layers.changed(module, x, loaded.delta(module.weight))
    if name == "full":
        assert module.bias is not None
        found = found + loaded.delta_bias().reshape(-1, *(1 for _ in x.shape[2:]) if x.ndim == 4 else ())
    assert not torch.allclose(expected, module(x))
    close = 1e-5 if turning else 1e-10
    assert torch.allclose(found, expected, rtol=close, atol=close)


@pytest.mark.parametrize("shape", layers.SHAPES)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in WRITTEN], ids=described)
def test_ours_are_as_it_writes_them(name: str, options: dict[str, Any], shape: str) -> None:
    module = layers.base(shape, torch.float32)
    settings = LayerSettings(dim=options.get("lora_dim", 4), alpha=2.0, own=options)
    ours = layers.file_of(OURS[name].create(layers.layer(module), settings, module.weight))
    its = layers.file_of(THEIRS[name](layers.NAME, module, alpha=2.0, **options))
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in its.items()
    }
    if "alpha" in its:
        assert ours["alpha"] == its["alpha"]


@pytest.mark.parametrize("shape", layers.SHAPES)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in WRITTEN], ids=described)
def test_it_reads_ours(name: str, options: dict[str, Any], shape: str) -> None:
    module = layers.base(shape)
    settings = LayerSettings(dim=options.get("lora_dim", 4), alpha=2.0, own=options)
    torch.manual_seed(5)
    ours = layers.nudge(OURS[name].create(layers.layer(module), settings, module.weight).double())
    x = layers.example(module)
    expected = layers.changed(module, x, ours.delta(module.weight))
    adapter = THEIRS[name](layers.NAME, module, alpha=2.0, **options).double()
    adapter.load_state_dict(layers.file_of(ours))
    assert torch.allclose(adapter(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    # LoKr on 3x3 convolutions only with w2 whole: of rank `dim` LyCORIS 4.1.3 cannot read its own either
    # where they have another number of inputs than of outputs.
    [
        ("loha", ["conv_dim=2"]),
        ("loha", ["conv_dim=2", "use_dora=True", "wd_on_output=True"]),  # the form of LyCORIS' own
        ("lokr", ["conv_dim=50"]),
        ("lokr", ["conv_dim=50", "use_dora=True", "wd_on_output=True"]),
    ],
)
@torch.no_grad()
def test_it_reads_our_whole_files(kind: str, arguments: list[str]) -> None:
    """Through what programs call: lycoris.kohya.create_network_from_weights."""
    model = small_model.model()
    settings, mistakes = read_settings(f"networks.{kind}", dim=2, alpha=1, arguments=arguments)
    assert not mistakes
    torch.manual_seed(3)
    ours = layers.nudge(network.create(model, SD_ADAPTERS, settings, train={"unet"}).double(), 0.1)
    base, _ = small_model.outputs(model)
    ours.attach()
    expected, _ = small_model.outputs(model)
    ours.detach()
    its, _ = kohya.create_network_from_weights(1.0, None, None, [], model["unet"], weights_sd=ours.tensors())
    assert len(its.unet_loras) == len(ours.layers)
    its.apply_to([], model["unet"], False, True)
    found, _ = small_model.outputs(model)
    assert float((expected - base).norm()) > 0.01 * float(base.norm())
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())


@torch.no_grad()
def test_layers_that_we_would_not_adapt_are_read() -> None:
    """Its preset "full" has conv_in, conv_out and the timestep's layers too."""
    model = small_model.model()
    first, last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 8)
    model["unet"].add_module("conv_in", first.double())
    model["unet"].add_module("time_embedding", nn.Sequential(last.double()))
    settings = LayerSettings(dim=2, alpha=1.0)
    torch.manual_seed(3)
    tensors = {}
    for name, module in (("lora_unet_conv_in", first), ("lora_unet_time_embedding_0", last)):
        adapter = layers.nudge(loha.create(layers.layer(module, name), settings, module.weight).double())
        tensors |= {f"{name}.{key}": value for key, value in layers.file_of(adapter).items()}
    before = first.weight.clone()
    ours = network.from_tensors(model, SD_ADAPTERS, tensors)
    assert ours.counts == {"unet": 2} and ours.tensors().keys() == tensors.keys()
    ours.merge()
    half = tensors["lora_unet_conv_in.hada_w1_a"] @ tensors["lora_unet_conv_in.hada_w1_b"]
    other = tensors["lora_unet_conv_in.hada_w2_a"] @ tensors["lora_unet_conv_in.hada_w2_b"]
    assert torch.allclose(first.weight - before, (half * other / 2).reshape(before.shape), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_its_normalisations_are_read() -> None:
    """train_norm=True."""
    model = small_model.model()
    torch.manual_seed(3)
    tensors, its = {}, {}
    for path in ("resnets.0.norm1", "attentions.0.norm"):
        module = model["unet"].get_submodule(f"down_blocks.0.{path}")
        name = f"lora_unet_down_blocks_0_{path}".replace(".", "_")
        its[name] = layers.nudge(lycoris.NormModule(name, module, 1.0).double())
        tensors |= {f"{name}.{key}": value for key, value in layers.file_of(its[name]).items()}
    base, _ = small_model.outputs(model)
    for one in its.values():
        one.apply_to()
    expected, _ = small_model.outputs(model)
    for one in its.values():
        one.restore()
    ours = network.from_tensors(model, SD_ADAPTERS, tensors)
    ours.attach()
    found, _ = small_model.outputs(model)
    assert float((expected - base).norm()) > 0.01 * float(base.norm())
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    ours.merge()
    assert torch.allclose(small_model.outputs(model)[0], expected, rtol=1e-10, atol=1e-10)
    wrong = {f"{name}.lora_{role}.weight": torch.zeros(24, 24) for role in ("up", "down")}
    with pytest.raises(AdapterError, match="is a normalisation, which LoRA"):
        network.from_tensors(model, SD_ADAPTERS, wrong)


def test_kinds_that_are_only_loaded_are_not_trained() -> None:
    for kind in ("full", "glora", "norm"):
        _, mistakes = read_settings(f"networks.{kind}")
        assert len(mistakes) == 1 and "lycoris.kohya" in mistakes[0][1]


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr", "diag-oft", "boft", "glora", "full", "ia3"])
@torch.no_grad()
def test_its_whole_files_are_read(algo: str) -> None:
    model = {name: module.float() for name, module in small_model.model().items()}
    torch.manual_seed(3)
    options = {"preset": "attn-mlp", "factor": "2", "rescaled": "True", "use_tucker": "True", "constraint": "0.01"}
    its = kohya.create_network(1.0, 8, 1.0, None, [], model["unet"], algo=algo, **options)
    its.apply_to([], model["unet"], False, True)
    layers.nudge(its, 0.1)
    expected, _ = small_model.outputs(model)
    tensors = {key: value.clone() for key, value in its.state_dict().items()}
    its.restore()
    base, _ = small_model.outputs(model)
    ours = network.from_tensors(model, SD_ADAPTERS, tensors).eval()
    ours.attach()
    found, _ = small_model.outputs(model)
    assert float((expected - base).norm()) > 0.01 * float(base.norm())
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())
    assert ours.tensors().keys() == tensors.keys()
