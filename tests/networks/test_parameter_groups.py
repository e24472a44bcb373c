"""What the optimizer gets, in kohya's order and under kohya's names (formats.md 7.3); scale_weight_norms (7.2)."""

from __future__ import annotations

import pytest
import torch

from networks.adapter import AdapterError
from networks.network import Group
from tests.networks import models

RATES = {"unet": 1e-3, "text_encoder1": 1e-4}


def groups(*arguments: str, module: str = "networks.lora", dim: int = 1, **rates: float) -> list[Group]:
    net = models.create(models.full_size("sd1"), *arguments, module=module, dim=dim)
    return net.groups({**RATES, **rates})


def told(found: list[Group]) -> list[tuple[str, str, float, int]]:
    return [(group.name, group.description, group.learning_rate, len(group.parameters)) for group in found]


def test_text_encoder_then_unet() -> None:
    assert told(groups()) == [("text_encoder1", "textencoder", 1e-4, 144), ("unet", "unet", 1e-3, 384)]


def test_a_rate_of_0_is_not_trained() -> None:
    assert told(groups(text_encoder1=0.0)) == [("unet", "unet", 1e-3, 384)]
    with pytest.raises(AdapterError, match="learning rate"):
        groups(text_encoder1=0.0, unet=0.0)


def test_parameters_without_a_group_get_no_gradients() -> None:
    net = models.trained(models.create(models.toy(), "down_lr_weight=zeros", "conv_dim=1"))
    half = models.create(models.tiny(), dim=1)
    half.groups({"unet": 1.0})
    assert {name[:7] for name, parameter in half.named_parameters() if parameter.requires_grad} == {"lora_un"}
    net.groups({"unet": 1.0})
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_loraplus() -> None:
    found = groups("loraplus_lr_ratio=4", "loraplus_unet_lr_ratio=16")
    assert told(found) == [
        ("text_encoder1", "textencoder", 1e-4, 72), ("text_encoder1", "textencoder plus", pytest.approx(4e-4), 72),
        ("unet", "unet", 1e-3, 192), ("unet", "unet plus", pytest.approx(1.6e-2), 192),
    ]  # fmt: skip
    assert all(parameter.shape[1] == 1 and not parameter.any() for parameter in found[1].parameters)  # lora_up


def test_loraplus_of_a_dora_leaves_the_magnitude_slow() -> None:
    found = groups("loraplus_unet_lr_ratio=16", "use_dora=1")
    assert [len(group.parameters) for group in found] == [72 * 3, 192 * 2, 192]


def test_blocks_have_groups_of_their_own() -> None:
    down = ",".join(["0", "0.5", "2", *["0"] * 9])
    found = groups(f"down_lr_weight={down}", "mid_lr_weight=0.25", "up_lr_weight=zeros", "loraplus_unet_lr_ratio=2")
    assert [group.description for group in found] == [
        "textencoder", "unet_block1", "unet_block1 plus", "unet_block2", "unet_block2 plus", "unet_block12",
        "unet_block12 plus",
    ]  # fmt: skip
    assert [group.learning_rate for group in found[1:]] == pytest.approx([5e-4, 1e-3, 2e-3, 4e-3, 2.5e-4, 5e-4])


@pytest.mark.parametrize("kind", ["lora", "lora_fa", "dylora", "loha", "lokr"])
def test_every_parameter_that_learns_is_in_one_group(kind: str) -> None:
    net = models.create(models.tiny(), "conv_dim=4", module=f"networks.{kind}")
    grouped = [id(parameter) for group in net.groups(RATES) for parameter in group.parameters]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in net.parameters() if parameter.requires_grad}


def test_dylora_has_loraplus_too() -> None:
    net = models.create(models.toy(), "loraplus_lr_ratio=4", module="networks.dylora")
    assert [group.description for group in net.groups({"unet": 1.0})] == ["unet", "unet plus"]


def test_norms_by_kohyas_rule() -> None:
    """n = max(‖ΔW‖, M/2), ratio = min(n, M) / n, both factors times √ratio."""
    net = models.trained(models.create(models.toy(), "conv_dim=2"), 0.5)
    deltas = [layer.adapter.delta(layer.module.weight).detach() for layer in net.layers]
    norms = [float(delta.norm()) for delta in deltas]
    limit = sorted(norms)[3]
    factors = [layer.adapter.lora_up.weight.detach().clone() for layer in net.layers]
    report = net.scale_norms(limit * 1.0001)
    assert report.scaled == len(norms) - 4
    for layer, delta, up, norm in zip(net.layers, deltas, factors, norms, strict=True):
        n = max(norm, limit / 2)
        ratio = min(n, limit * 1.0001) / n
        assert torch.allclose(layer.adapter.delta(layer.module.weight), delta * ratio, rtol=1e-5, atol=1e-6)
        assert torch.allclose(layer.adapter.lora_up.weight, up * ratio**0.5, rtol=1e-5, atol=1e-6)
    after = [float(layer.adapter.delta(layer.module.weight).detach().norm()) for layer in net.layers]
    assert report.largest == pytest.approx(max(after), rel=1e-5)
    assert report.mean == pytest.approx(sum(after) / len(after), rel=1e-5)
    assert net.scale_norms(limit * 1.01).scaled == 0


def test_norms_of_a_dora_leave_its_magnitude() -> None:
    net = models.trained(models.create(models.toy(), "use_dora=1"), 0.5)
    before = [layer.adapter.dora_scale.detach().clone() for layer in net.layers]
    assert net.scale_norms(0.01).scaled == len(net.layers)
    assert all(torch.equal(layer.adapter.dora_scale, m) for layer, m in zip(net.layers, before, strict=True))


def test_scaling_norms_of_pissa_is_refused() -> None:
    net = models.trained(models.create(models.toy(), "init=pissa"))
    with pytest.raises(AdapterError, match="pissa"):
        net.scale_norms(0.01)
