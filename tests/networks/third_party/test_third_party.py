"""The real lycoris.kohya, unmodified, and modules of the user's own, behind one surface."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.families.sd.sd_adapters import SD_ADAPTERS
from networks.adapter import AdapterError
from networks.third_party.create import ThirdPartyNetwork, create_third_party, merge_third_party
from tests import tiny

# --network_args -> what files hold of each layer (LyCORIS's file format), and how near the base the start is.
ALGOS = {
    "algo=lora": {"lora_down.weight", "lora_up.weight", "alpha"},
    "algo=locon conv_dim=2 conv_alpha=1": {"lora_down.weight", "lora_up.weight", "alpha"},
    "algo=lora dora_wd=True": {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"},
    "algo=loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    "algo=lokr factor=4": {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"},
    "algo=full": {"diff", "diff_b"},
    "algo=glora": {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"},
    "algo=boft": {"oft_blocks", "alpha"},
    "algo=diag-oft": {"oft_blocks", "alpha"},
}
RATES = {"unet": 1e-2, "text_encoder1": 5e-3}


# A quarter of a miniature, with the same names and kinds of layers.
SMALL = {
    "block_out_channels": (64, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


class Base:
    """A miniature with its outputs."""

    def __init__(self, family: str, *, small: bool = False) -> None:
        made = tiny.diffusers_modules(family)
        self.modules: dict[str, Any] = {"unet": made.unet, "text_encoder": made.text_encoder}
        if small:
            torch.manual_seed(0)
            self.modules["unet"] = type(made.unet)(**tiny.unet_config(family) | SMALL).eval()
        for module in self.modules.values():
            module.requires_grad_(False)
        self.state = {key: value.clone() for key, value in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, m in self.modules.items() for key, value in m.state_dict().items()}

    def output(self) -> tuple[Tensor, Tensor]:
        ids = (torch.arange(77) * 631 % 49000)[None]
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        states = self.modules["text_encoder"](ids)[0]
        return states, self.modules["unet"](noise, torch.tensor([500]), states).sample

    def layers(self, module: str) -> list[str]:
        found = self.modules[module].named_modules()
        return [name for name, layer in found if isinstance(layer, nn.Linear | nn.Conv2d)]

    def names(self) -> set[str]:
        """Names of all layers in files, as kohya's LoRAs have them."""
        unet = {"lora_unet_" + name.replace(".", "_") for name in self.layers("unet")}
        return unet | {"lora_te_text_model_" + name.replace(".", "_") for name in self.layers("text_encoder")}

    def has_its_state(self) -> bool:
        now = self.tensors()
        return now.keys() == self.state.keys() and all(self.state[key].equal(value) for key, value in now.items())

    def is_untouched(self) -> bool:
        patched = [m for module in self.modules.values() for m in module.modules() if "forward" in m.__dict__]
        return not patched and self.has_its_state()


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    return {family: Base(family) for family in tiny.FAMILIES}


@pytest.fixture(scope="module")
def sd1() -> Base:
    return Base("sd1", small=True)


@pytest.fixture(autouse=True)
def fresh_lycoris(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS keeps what a preset says in class attributes for the rest of the process."""
    import lycoris.kohya

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    kind = lycoris.kohya.LycorisNetworkKohya
    for name in [name for name in vars(kind) if name.isupper()]:
        monkeypatch.setattr(kind, name, copy.deepcopy(getattr(kind, name)))


def lycoris_network(base: Base, arguments: str, **named: Any) -> ThirdPartyNetwork:
    torch.manual_seed(0)
    named = {"dim": 4, "alpha": 2.0} | named
    return create_third_party("lycoris.kohya", base.modules, SD_ADAPTERS, arguments=arguments.split(), **named)


def train(base: Base, network: ThirdPartyNetwork, steps: int = 1) -> None:
    groups = network.groups(RATES)
    optimizer = torch.optim.AdamW([{"params": g.parameters, "lr": g.learning_rate} for g in groups])
    network.start()
    network.on_epoch_start()
    for _ in range(steps):
        network.on_step_start()
        states, image = base.output()
        (states.square().mean() + image.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.module.eval()


def equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def near(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> bool:
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("family", "arguments"), [*(("sd1", arguments) for arguments in ALGOS), ("sd2", "algo=full")])
def test_lycoris_trains_is_written_and_read(
    bases: dict[str, Base], family: str, arguments: str, tmp_path: Path
) -> None:
    base = bases[family]
    with torch.no_grad():
        before = base.output()
        network = lycoris_network(base, arguments)
        assert near(base.output(), before, 1e-5)  # LyCORIS's DoRA divides by a norm: not to the last bit

    train(base, network)
    assert base.has_its_state()
    assert not any(p.grad is not None for module in base.modules.values() for p in module.parameters())
    network.write(tmp_path / "a.safetensors", None, {"ss_note": "да"})
    written = load_file(tmp_path / "a.safetensors")
    assert {key.partition(".")[0] for key in written} == base.names()
    assert {key.partition(".")[2] for key in written} <= ALGOS[arguments]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["ss_note"] == "да"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]

    with torch.no_grad():
        trained = base.output()
        assert not near(trained, before, 1e-4)
        network.set_multiplier(0.0)
        assert equal(base.output(), before)
        network.set_multiplier(1.0)
        assert equal(base.output(), trained)
        network.detach()
        assert base.is_untouched() and equal(base.output(), before)

        again = lycoris_network(base, arguments)
        again.load(tmp_path / "a.safetensors")
        again.module.eval()
        assert near(base.output(), trained, 1e-5)
        again.detach()


def test_a_file_under_another_programs_names_is_loaded(sd1: Base, tmp_path: Path) -> None:
    """SimpleTuner's, which LyCORIS' wrapper writes."""
    network = lycoris_network(sd1, "algo=lokr")
    network.write(tmp_path / "a.safetensors", None, {})
    network.detach()
    tensors = {key: value + 0.1 for key, value in load_file(tmp_path / "a.safetensors").items()}
    save_file({key.replace("lora_unet_", "lycoris_"): value for key, value in tensors.items()},
              tmp_path / "b.safetensors")  # fmt: skip
    again = lycoris_network(sd1, "algo=lokr")
    again.load(tmp_path / "b.safetensors")
    again.detach()
    assert all(torch.equal(value, tensors[key]) for key, value in again.tensors().items())


def test_counts_of_lycoris_default_preset(bases: dict[str, Base]) -> None:
    """Preset `full` is 278 layers as with a rank for convolutions, conv_in, conv_out and two of the time embedding."""
    network = lycoris_network(bases["sd1"], "algo=lora")
    assert {part.module: number for part, number in network.counts().items()} == {"text_encoder": 18, "unet": 282}
    assert "text_encoder 18, unet 282" in network.describe()[0] and network.notes == ()
    network.detach()


@pytest.mark.parametrize("preset", ["attn-only", "full-lin", "unet-convblock-only"])
def test_lycoris_presets_reach_the_same_layers_as_in_kohyas_model(sd1: Base, preset: str) -> None:
    kinds = {
        "attn-only": ("_attn1_", "_attn2_", "_self_attn_"),
        "full-lin": ("attentions", "time_emb", "text_model"),
        "unet-convblock-only": ("resnets", "samplers", "conv_in", "conv_out"),
    }
    convolutions = {"lora_unet_" + name.replace(".", "_") for name, m in sd1.modules["unet"].named_modules()
                    if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}  # fmt: skip
    expected = {name for name in sd1.names() if any(kind in name for kind in kinds[preset])}
    if preset == "full-lin":  # the shortcuts are 1x1
        expected -= convolutions
        expected |= {name for name in sd1.names() if name.endswith("conv_shortcut")}
    network = lycoris_network(sd1, f"preset={preset}")
    found = {name for name, _ in network.network.named_children()}
    network.detach()
    assert found == expected


def test_a_preset_file_of_the_users_own(sd1: Base, tmp_path: Path) -> None:
    preset = tmp_path / "ia3.toml"
    preset.write_text(
        'enable_conv = false\nunet_target_module = []\nunet_target_name = [".*to_k", ".*to_v", ".*ff.net.2"]\n'
        'text_encoder_target_module = []\ntext_encoder_target_name = [".*k_proj", ".*v_proj", ".*mlp.fc2"]\n',
        encoding="utf-8",
    )
    with torch.no_grad():
        before = sd1.output()
        network = lycoris_network(sd1, f"algo=ia3 preset={preset}")
        assert near(sd1.output(), before, 1e-6)
        assert {key.partition(".")[2] for key in network.tensors()} == {"weight", "on_input"}
        network.detach()


def test_targets_that_match_no_layer_are_reported(sd1: Base) -> None:
    """LyCORIS matches the names of its preset ia3 against whole paths, where they never stand first."""
    with pytest.raises(AdapterError, match="nothing to train"):
        lycoris_network(sd1, "algo=ia3 preset=ia3")
    assert sd1.is_untouched()


def test_only_one_part_is_trained(sd1: Base) -> None:
    network = lycoris_network(sd1, "algo=lora", train=["unet"])
    assert {group.description for group in network.groups(RATES)} == {"unet"}
    assert all(key.startswith("lora_unet_") for key in network.tensors())
    network.detach()


def test_groups_in_kohyas_order_with_loraplus(sd1: Base) -> None:
    network = lycoris_network(sd1, "algo=lora loraplus_unet_lr_ratio=4")
    told = [(group.name, group.description, group.learning_rate) for group in network.groups(RATES)]
    assert told == [("text_encoder1", "textencoder", 5e-3), ("unet", "unet", 1e-2), ("unet", "unet plus", 4e-2)]
    assert [g.description for g in network.groups({"unet": 1e-3, "text_encoder1": 0.0})] == ["unet", "unet plus"]
    with pytest.raises(AdapterError, match="nothing to train"):
        network.groups({"unet": 0.0, "text_encoder1": 0.0})
    network.detach()


def test_norms_are_scaled_by_the_module(sd1: Base) -> None:
    network = lycoris_network(sd1, "algo=lora")
    with torch.no_grad():
        for name, parameter in network.network.named_parameters():
            if name.endswith("lora_up.weight"):
                parameter.fill_(0.1)
    report = network.scale_norms(0.01)
    assert report.scaled == len(sd1.names()) and report.largest == pytest.approx(0.01, rel=1e-4)
    assert network.scale_norms(1.0).scaled == 0
    network.detach()


@pytest.mark.parametrize("arguments", ["algo=lora", "algo=full"])
def test_the_state_for_a_resume_is_exact(sd1: Base, arguments: str) -> None:
    """What LyCORIS writes into files is not: `full` subtracts the base, norm scales are left out."""
    network = lycoris_network(sd1, arguments)
    train(sd1, network)
    network.scale_norms(0.02)
    with torch.no_grad():
        trained = sd1.output()
    state = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    network.detach()
    again = lycoris_network(sd1, arguments)
    again.module.load_state_dict(state)
    again.module.eval()
    with torch.no_grad():
        assert equal(sd1.output(), trained)
    with pytest.raises(AdapterError, match="another network"):
        again.module.load_state_dict(dict(list(state.items())[1:]))
    again.detach()


def test_ranks_from_a_file(sd1: Base, tmp_path: Path) -> None:
    network = lycoris_network(sd1, "algo=lora", dim=3)
    train(sd1, network)
    network.write(tmp_path / "a.safetensors", None, {})
    with torch.no_grad():
        trained = sd1.output()
    network.detach()
    again = lycoris_network(sd1, "", weights=tmp_path / "a.safetensors")
    again.load(tmp_path / "a.safetensors")
    again.module.eval()
    with torch.no_grad():
        assert near(sd1.output(), trained, 1e-5)
    again.detach()


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_files_are_merged_into_the_base_at_a_ratio(ratio: float, tmp_path: Path) -> None:
    """LyCORIS's own merge_to is blind to the multiplier."""
    base = Base("sd1", small=True)
    network = lycoris_network(base, "algo=lora")
    train(base, network)
    network.set_multiplier(ratio)
    with torch.no_grad():
        expected = base.output()
    network.write(tmp_path / "a.safetensors", None, {})
    network.detach()
    merge_third_party("lycoris.kohya", tmp_path / "a.safetensors", base.modules, SD_ADAPTERS, ratio=ratio)
    with torch.no_grad():
        assert near(base.output(), expected, 1e-4)
    assert base.tensors().keys() == base.state.keys()
    assert base.is_untouched() == (ratio == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_another_precision(sd1: Base, dtype: torch.dtype, tmp_path: Path) -> None:
    network = lycoris_network(sd1, "algo=lokr")
    network.write(tmp_path / "a.safetensors", dtype, {})
    network.detach()
    assert {tensor.dtype for tensor in load_file(tmp_path / "a.safetensors").values()} == {dtype}


def test_a_file_that_does_not_fit_is_refused_with_its_keys(sd1: Base, tmp_path: Path) -> None:
    network = lycoris_network(sd1, "algo=lora")
    tensors = network.tensors()
    missing = next(iter(tensors))
    save_file({"lora_unet_other.alpha": torch.ones(())} | {k: v for k, v in tensors.items() if k != missing},
              tmp_path / "a.safetensors")  # fmt: skip
    with pytest.raises(AdapterError, match=rf"1 unknown key \(lora_unet_other.alpha\); 1 missing key \({missing}\)"):
        network.load(tmp_path / "a.safetensors")
    network.detach()


def test_a_failed_write_leaves_the_file_that_was_there(sd1: Base, tmp_path: Path) -> None:
    network = lycoris_network(sd1, "algo=lora")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")
    with torch.no_grad():
        next(network.network.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        network.write(path, None, {})
    network.detach()
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("algo=lorra", "no such algo"),
        ("algo=lora preset=nowhere.toml", "no such preset"),
        ("algo=lora conv_dim=four", "conv_dim|four"),
        ("algo", "not of the form key=value"),
        ("algo=lora conv_dimm=4", "does not use conv_dimm"),
        ("algo=lora anchor=0.3", "does not use anchor"),
        ("algo=lokr factor=some", "create_network of lycoris.kohya failed"),
    ],
)
def test_wrong_arguments_are_mistakes(sd1: Base, arguments: str, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        lycoris_network(sd1, arguments)
    assert sd1.is_untouched()


def test_unused_arguments_are_noted(sd1: Base) -> None:
    network = lycoris_network(sd1, "algo=lora anchor=0")
    network.detach()
    assert network.notes == ("--network_args anchor=0 has no effect: lycoris.kohya does not use it",)


# --- modules of the user's own ---------------------------------------------------------------------------------------

PROTOCOL = '''
import torch
CALLS = []

def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    CALLS.append(("create_network", multiplier, network_dim, network_alpha, neuron_dropout, kwargs))
    return Network(text_encoder, unet) if kwargs.get("kind", "some") == "some" else None

class Network(torch.nn.Module):
    """A bias on the q of attentions: shares nothing with LyCORIS."""
    def __init__(self, text_encoder, unet):
        super().__init__()
        self.layers = {}
        for prefix, root in (("lora_te", text_encoder), ("lora_unet", unet)):
            for path, module in root.named_modules():
                if path.endswith("to_q" if prefix == "lora_unet" else "q_proj"):
                    self.layers[f"{prefix}_{path}".replace(".", "_")] = module
                    assert not sum(p.numel() for p in root.parameters()) == 0
    def prepare_network(self, args):
        CALLS.append(("prepare_network", args.seed))
    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        CALLS.append(("apply_to", apply_text_encoder, apply_unet))
        for name, module in self.layers.items():
            child = torch.nn.Module()
            child.shift = torch.nn.Parameter(torch.zeros(module.out_features))
            old = module.forward
            module.forward = lambda x, old=old, child=child: old(x) + child.shift
            self.add_module(name, child)
    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        CALLS.append(("prepare_optimizer_params", text_encoder_lr, unet_lr))
        return [{"params": self.parameters(), "lr": unet_lr}]
    def prepare_grad_etc(self, text_encoder, unet):
        CALLS.append(("prepare_grad_etc", type(text_encoder).__name__, type(unet).__name__))
    def on_epoch_start(self, text_encoder, unet):
        CALLS.append(("on_epoch_start",))
    def get_trainable_params(self):
        return self.parameters()
    def save_weights(self, file, dtype, metadata):
        from safetensors.torch import save_file
        save_file({k: v if dtype is None else v.to(dtype) for k, v in self.state_dict().items()}, file, metadata)
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_network.py").write_text(PROTOCOL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_network"
    sys.modules.pop("my_network", None)


def test_a_module_in_the_current_folder_is_called_as_kohya_calls_it(sd1: Base, own_module: str, tmp_path: Path) -> None:
    network = create_third_party(
        own_module, sd1.modules, SD_ADAPTERS, dim=None, alpha=1.0, dropout=0.1, arguments=["kind=some", "a=b=c"],
        train=["unet", "text_encoder"], settings=SimpleNamespace(seed=7),
    )  # fmt: skip
    train(sd1, network)
    calls = sys.modules[own_module].CALLS
    assert calls == [
        ("create_network", 1.0, None, 1, 0.1, {"dropout": 0.1, "kind": "some", "a": "b=c"}),
        ("prepare_network", 7),
        ("apply_to", True, True),
        ("prepare_optimizer_params", 5e-3, 1e-2),  # tried with three rates first, then with two
        ("prepare_grad_etc", "Level", "UNet2DConditionModel"),
        ("on_epoch_start",),
    ]
    assert not network.notes  # it passes its arguments on, so it may use every one
    assert [(g.description, g.learning_rate) for g in network.groups(RATES)] == [("group0", 1e-2)]
    network.write(tmp_path / "a.safetensors", torch.bfloat16, {})
    names = {name for name in sd1.names() if name.endswith(("to_q", "q_proj"))}
    assert set(load_file(tmp_path / "a.safetensors")) == {f"{name}.shift" for name in names}
    with pytest.raises(AdapterError, match="no set_multiplier"):
        network.set_multiplier(0.5)
    with pytest.raises(AdapterError, match="apply_max_norm_regularization"):
        network.scale_norms(1.0)
    network.set_multiplier(0.0)
    assert sd1.is_untouched()


def test_a_module_that_makes_no_network(sd1: Base, own_module: str) -> None:
    with pytest.raises(AdapterError, match="returned no network"):
        create_third_party(own_module, sd1.modules, SD_ADAPTERS, dim=4, alpha=1, arguments=["kind=none"])


@pytest.mark.parametrize(
    ("name", "text", "said", "remedy"),
    [
        ("nowhere", None, "there is no module nowhere", "nowhere.py"),
        ("lycoris.nowhere", None, "lycoris has no module lycoris.nowhere", "lycoris-lora==4.1.3"),
        ("my_empty", "", "has no create_network", "lycoris.kohya"),
        ("my_needy", "import not_there", "needs the package not_there", "pip install not_there"),
        ("my_broken", "raise RuntimeError('ouch')", "RuntimeError: ouch", "correct"),
    ],
)
def test_modules_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, said: str, remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=said) as told:
        create_third_party(name, {}, SD_ADAPTERS, dim=4, alpha=1)
    assert remedy in told.value.remedy


def test_lycoris_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lycoris"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(AdapterError, match="lycoris is not installed") as told:
        create_third_party("lycoris.kohya", {}, SD_ADAPTERS, dim=4, alpha=1)
    assert told.value.remedy.endswith(" -m pip install lycoris-lora==4.1.3")
