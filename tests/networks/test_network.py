"""Laws of whole networks of LoRA, over its variants and dtypes: begin, merge, save and load, freeze, switch off, give
back, add."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from library.families.sd.sd_adapters import SD_ADAPTERS
from library.runtime.stored_weights import compute_in_fp32
from networks import adapter_files, network
from networks.adapter import AdapterError
from networks.network import Network
from networks.settings import read_settings
from tests.networks import models

VARIANTS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "lora conv": ("conv_dim=3", "conv_alpha=2"),
    "lora dora": ("use_dora=True", "conv_dim=3"),
    "lora dora by output": ("use_dora=True", "wd_on_output=True", "conv_dim=3"),
    "lora rslora": ("use_rslora=True", "conv_dim=3"),
    "lora pissa": ("init=pissa", "conv_dim=3"),
    "lora pissa dora": ("init=pissa", "use_dora=True", "conv_dim=3"),
    "lora_fa": ("conv_dim=3", "use_dora=True"),
    "dylora": ("unit=2", "conv_dim=4"),
    "oft": ("enable_all_linear=1", "enable_conv=1"),
    "loha": ("conv_dim=2",),
    "loha dora": ("conv_dim=2", "use_dora=1"),
    "loha dora by output": ("conv_dim=2", "use_dora=1", "wd_on_output=1"),
    "lokr": ("conv_dim=2", "factor=4"),
    "lokr dora": ("use_dora=1",),
    "ia3": (),
}
LORA = [name for name in VARIANTS if name.startswith("lora ") or name == "lora"]
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}
variants = pytest.mark.parametrize("variant", VARIANTS)
dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=["fp64", "fp32"])


def create(model: models.Model, variant: str, *more: str, **given: Any) -> Network:
    """A network of one of VARIANTS, in evaluation mode, in the base's dtype."""
    net = models.create(model, *VARIANTS[variant], *more, module=f"networks.{variant.split()[0]}", **given)
    return net.to(next(model["unet"].parameters()).dtype).eval()


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@dtypes
@variants
@torch.no_grad()
def test_laws_of_a_network(variant: str, dtype: torch.dtype) -> None:
    model, close = models.toy(dtype), CLOSE[dtype]
    before = {key: value.clone() for key, value in model["unet"].state_dict().items()}
    tree, bare = [name for name, _ in model["unet"].named_modules()], models.toy_output(model)
    net = create(model, variant)
    net.attach()
    assert apart(models.toy_output(model), bare) < close, "at the start"
    models.trained(net)
    changed = models.toy_output(model)
    assert apart(changed, bare) > 1e-3
    net.set_multiplier(0)
    assert torch.equal(models.toy_output(model), bare), "multiplier 0"
    net.set_multiplier(1)
    assert [name for name, _ in model["unet"].named_modules()] == tree
    net.detach()
    assert torch.equal(models.toy_output(model), bare), "detached"
    assert not [module for module in model["unet"].modules() if "forward" in module.__dict__]
    assert all(torch.equal(value, before[key]) for key, value in model["unet"].state_dict().items())

    tensors = net.tensors()
    loaded = network.from_tensors(model, SD_ADAPTERS, tensors).eval()
    loaded.attach()
    assert apart(models.toy_output(model), changed) < close, "loaded"
    loaded.detach()
    again = loaded.tensors()
    assert again.keys() == tensors.keys() and all(torch.equal(value, tensors[key]) for key, value in again.items())

    net.set_multiplier(0.6)
    net.attach()
    partly = models.toy_output(model)
    net.merge(0.6)
    assert apart(models.toy_output(model), partly) < close, "merged in part"
    model["unet"].load_state_dict(before)
    net.merge(0)
    assert torch.equal(models.toy_output(model), bare), "merged with 0"


@pytest.mark.parametrize("variant", ["lora conv", "lora dora", "lora pissa"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
@torch.no_grad()
def test_laws_of_a_network_on_a_whole_model(family: str, variant: str) -> None:
    model = models.tiny(family, torch.float64)
    bare = models.outputs(model)
    net = create(model, variant)
    net.attach()
    assert max(map(apart, models.outputs(model), bare)) < 1e-10
    models.trained(net)
    changed = models.outputs(model)
    assert min(map(apart, changed, bare)) > 1e-3
    net.detach()
    assert all(map(torch.equal, models.outputs(model), bare))
    network.from_tensors(model, SD_ADAPTERS, net.tensors()).merge()
    assert max(map(apart, models.outputs(model), changed)) < 1e-10


@variants
def test_nothing_but_the_adapter_is_trained(variant: str) -> None:
    model = models.toy()
    model["unet"].requires_grad_(True)
    net = models.trained(create(model, variant))
    net.attach()
    assert not [layer for layer in net.layers for p in layer.module.parameters() if p.requires_grad]
    models.toy_output(model).square().sum().backward()
    for name, p in net.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    assert all(p.grad is None for layer in net.layers for p in layer.module.parameters())


@pytest.mark.parametrize(
    "pair", [("lora conv", "lora rslora"), ("lora", "lora pissa"), ("lora", "loha"), ("loha", "lora conv")]
)
@torch.no_grad()
def test_two_additive_networks_add(pair: tuple[str, str]) -> None:
    model = models.toy(torch.float64)
    first, second = (models.trained(create(model, variant)) for variant in pair)
    first.attach()
    second.attach()
    both = models.toy_output(model)
    with pytest.raises(AdapterError, match="attached later"):
        first.detach()
    second.detach()
    first.merge()
    second.merge()
    assert apart(models.toy_output(model), both) < 1e-10


@pytest.mark.parametrize("variant", LORA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_files_in_every_precision(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    model = models.toy()
    net = models.trained(create(model, variant, alpha=3.3))
    net.write(tmp_path / "a.safetensors", dtype, {"ss_network_module": "networks.lora"})
    read = adapter_files.read(tmp_path / "a.safetensors")
    assert {value.dtype for value in read.tensors.values() if value.ndim} == {dtype}
    loaded = network.from_tensors(model, SD_ADAPTERS, read.tensors)
    worst = 0.0
    factor = 8 if "pissa" in variant else 1  # a small difference of two larger products
    for ours, theirs in zip(net.layers, loaded.layers, strict=True):
        weight = ours.module.weight.double()
        exact = ours.adapter.delta(weight).detach()
        worst = max(worst, float((theirs.adapter.delta(weight).detach() - exact).norm() / exact.norm()))
    # two factors, each rounded; alpha adds nothing to that
    assert worst < factor * {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}[dtype]


def test_an_alpha_that_the_precision_holds_is_in_it() -> None:
    tensors = create(models.toy(), "lora conv", alpha=2).tensors(torch.float16)
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_alpha_is_what_was_asked_for() -> None:
    model = models.toy()

    def alphas(*given: str, alpha: float) -> set[float]:
        tensors = create(model, "lora", *given, dim=4, alpha=alpha).tensors()
        return {float(value) for key, value in tensors.items() if key.endswith("alpha")}

    assert alphas(alpha=3) == {3.0}
    assert alphas(alpha=0) == {4.0}
    assert alphas("conv_dim=2", alpha=3) == {3.0, 1.0}
    # rsLoRA divides by the root of the rank; files are read with alpha / rank
    assert {value / 4 for value in alphas("use_rslora=1", alpha=3)} == {3.0 / 2}


def test_files_of_others_shapes_are_read() -> None:
    """1x1 kernels for Linear layers (kohya's SD2) and matrices for 1x1 convolutions."""
    model = models.toy()
    tensors = models.trained(create(model, "lora")).tensors()
    other = {
        key: (value.flatten(1) if value.ndim == 4 else value[:, :, None, None]) if value.ndim else value
        for key, value in tensors.items()
    }
    loaded = network.from_tensors(model, SD_ADAPTERS, other)
    assert all(torch.equal(value, loaded.tensors()[key]) for key, value in tensors.items())


def test_names_without_the_text_models_level_are_read() -> None:
    """lycoris writes these with transformers 5."""
    model = models.tiny()
    tensors = models.create(model, train={"text_encoder"}).tensors()
    short = {key.replace("lora_te_text_model_", "lora_te_"): value for key, value in tensors.items()}
    assert network.from_tensors(model, SD_ADAPTERS, short).tensors().keys() == tensors.keys()


def test_a_file_goes_on_in_training() -> None:
    """--dim_from_weights: ranks and alphas from the file, the rest as asked for."""
    model = models.tiny()
    tensors = models.create(model, dim=2, alpha=1.5).tensors(torch.bfloat16)
    settings, _ = read_settings("networks.lora_fa", dim=8, dropout=0.3, arguments=["module_dropout=0.1"])
    net = network.from_tensors(model, SD_ADAPTERS, tensors, settings=settings, train={"unet"})
    assert net.counts == {"unet": 192} and net.describe()[-1] == "skipped: 18 layers that are not trained"
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    layer = net.layers[0]
    assert (layer.adapter.scale, layer.adapter.dropout, layer.module_dropout) == (0.75, 0.3, 0.1)
    assert [name for name, p in layer.adapter.named_parameters() if p.requires_grad] == ["lora_up.weight"]


def broken(tensors: dict[str, Tensor]) -> dict[str, tuple[dict[str, Tensor], str]]:
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    return {
        "unknown layer": (tensors | {"lora_unet_nowhere.alpha": torch.tensor(1.0)}, "lora_unet_nowhere"),
        "half a layer": ({k: v for k, v in tensors.items() if k != f"{name}.lora_up.weight"}, "lora_up.weight"),
        "unknown tensor": (tensors | {f"{name}.extra": torch.zeros(1)}, f"{name}.extra"),
        "shape": (tensors | {f"{name}.lora_up.weight": torch.zeros(3, 4)}, "3 x 4"),
        "ranks": (tensors | {f"{name}.lora_down.weight": torch.zeros(5, 64)}, "5 ranks"),
        "nothing": ({}, "no layers for the trained modules"),
    }


@pytest.mark.parametrize("case", ["unknown layer", "half a layer", "unknown tensor", "shape", "ranks", "nothing"])
def test_a_file_is_never_partly_loaded_in_silence(case: str) -> None:
    model = models.tiny()
    tensors, told = broken(models.create(model, train={"text_encoder"}).tensors())[case]
    with pytest.raises(AdapterError, match=told):
        network.from_tensors(model, SD_ADAPTERS, tensors)
    if tensors:
        partly = network.from_tensors(model, SD_ADAPTERS, tensors, strict=False)
        assert any(told in problem for problem in partly.problems)


def test_weights_are_taken_over_whole_or_not_at_all() -> None:
    model = models.toy()
    net = create(model, "lora conv", "use_rslora=1")
    other = models.trained(create(model, "lora conv", alpha=1)).tensors()
    start = net.tensors()
    less = dict(list(other.items())[3:])
    for wrong, told in ((less, "is not in the file"), (create(model, "lora conv", dim=2).tensors(), "in the network")):
        with pytest.raises(AdapterError, match=told):
            net.load(wrong)
        assert all(torch.equal(value, net.tensors()[key]) for key, value in start.items())
    net.load(other)
    assert all(torch.equal(value, net.tensors()[key]) for key, value in other.items())
    assert net.layers[0].adapter.scale == 1 / 4  # the file's alpha counts


def test_resuming_keeps_alpha_and_start() -> None:
    model = models.toy()
    net = models.trained(create(model, "lora pissa", alpha=3))
    other = create(model, "lora pissa", alpha=1)
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(value, other.tensors()[key]) for key, value in net.tensors().items())


def test_a_network_in_half_precision_keeps_alpha() -> None:
    net = create(models.toy(), "lora rslora", dim=8, alpha=1).to(torch.bfloat16)
    assert float(net.layers[0].adapter.alpha) == pytest.approx(8**0.5, rel=1e-6)


@pytest.mark.parametrize("argument", ["dropout=0.5", "rank_dropout=0.5", "module_dropout=0.5"])
@pytest.mark.parametrize("variant", ["lora conv", "lora pissa", "lora dora"])
@torch.no_grad()
def test_dropouts_are_for_training_alone(variant: str, argument: str) -> None:
    model = models.toy()
    bare = models.toy_output(model)
    net = create(model, variant, argument).train()
    net.attach()
    assert apart(models.toy_output(model), bare) < 1e-5, "a dropout took something from the base"
    models.trained(net)
    assert not torch.equal(models.toy_output(model), models.toy_output(model))
    net.eval()
    assert torch.equal(models.toy_output(model), models.toy_output(model))


def test_checkpointing_draws_the_same_again() -> None:
    model = models.toy()
    net = models.trained(create(model, "lora", "dropout=0.3", "rank_dropout=0.3", "module_dropout=0.3")).train()
    net.attach()
    module = net.layers[1].module
    x = torch.randn(3, 7, 16, requires_grad=True)

    def gradients(run: Callable[[Tensor], Any]) -> list[Tensor]:
        torch.manual_seed(4)
        return list(torch.autograd.grad(run(x).square().sum(), [x, *net.layers[1].adapter.parameters()]))

    def twice(x: Tensor) -> Tensor:
        return module(x) + module(x)

    again = gradients(lambda x: checkpoint(twice, x, use_reentrant=False))
    assert all(map(torch.equal, again, gradients(twice)))


@variants
def test_under_autocast(variant: str) -> None:
    model = models.toy()
    net = models.trained(create(model, variant))
    net.attach()
    exact = models.toy_output(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = models.toy_output(model)
        out.float().square().sum().backward()
    assert apart(out.float(), exact) < 0.05
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}


@variants
def test_on_a_base_in_half_precision(variant: str) -> None:
    model = models.toy()
    model["unet"].to(torch.bfloat16)
    exact = models.toy()
    exact["unet"].load_state_dict(model["unet"].state_dict())
    net, other = (models.trained(create(base, variant).float()) for base in (model, exact))
    net.attach()
    other.attach()
    out = models.toy_output(model)
    assert out.dtype is torch.bfloat16
    assert apart(out.float(), models.toy_output(exact)) < 0.05
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}


@variants
def test_on_a_half_base_that_computes_in_full(variant: str) -> None:
    """The rounding of the stored weights is all that differs: like a base in float32 with the rounded weights."""
    model, exact = models.toy(), models.toy()
    exact["unet"].to(torch.bfloat16).float()
    for module in model["unet"].modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.weight.data = module.weight.data.bfloat16()
            if module.bias is not None:
                module.bias.data = module.bias.data.bfloat16().float()
    compute_in_fp32(model["unet"])
    net, other = (models.trained(create(base, variant).float()) for base in (model, exact))
    other.load_state_dict(net.state_dict())
    net.attach()
    other.attach()
    ours, theirs = models.toy_output(model, torch.float32), models.toy_output(exact)
    assert ours.dtype is torch.float32
    assert apart(ours, theirs) < 1e-5
    for out, own in ((ours, net), (theirs, other)):
        out.square().sum().backward()
        assert all(p.grad is not None for p in own.parameters() if p.requires_grad)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        if one.grad is not None and two.grad is not None:
            assert torch.allclose(one.grad, two.grad, rtol=1e-3, atol=1e-4)


def test_what_it_says_of_itself() -> None:
    lines = models.create(models.full_size("sd1"), "use_dora=1", dim=8).describe()
    assert "264 layers (text_encoder1 72, unet 192)" in lines[0] and "DoRA" in lines[1]
