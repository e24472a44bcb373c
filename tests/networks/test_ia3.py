"""(IA)³: factors on activations (arXiv 2205.05638, section 3.3)."""

from __future__ import annotations

import pytest
import torch

from networks import ia3
from networks.adapter import LayerSettings
from networks.settings import read_settings
from tests.networks import layers


@pytest.mark.parametrize("shape", layers.SHAPES)
@pytest.mark.parametrize("on_input", [True, False])
def test_it_scales_activations(shape: str, on_input: bool) -> None:
    """l ∘ x before the layer, or l ∘ (W x) behind it, the bias aside; in files l - 1."""
    module = layers.base(shape)
    torch.manual_seed(1)
    settings = LayerSettings(dim=4, alpha=1.0, own={"train_on_input": on_input})
    adapter = layers.nudge(ia3.create(layers.layer(module), settings, module.weight).double())
    x = layers.example(module)
    spread = (-1, 1, 1) if x.ndim == 4 else (-1,)
    factors = (1 + layers.file_of(adapter)["weight"].flatten()).reshape(spread)
    assert module.bias is not None
    bias = module.bias.reshape(spread)
    expected = module(x * factors) if on_input else (module(x) - bias) * factors + bias
    found = layers.changed(module, x, adapter.delta(module.weight))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "on_input"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v", False),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2", True),
        ("lora_te_text_model_encoder_layers_0_self_attn_k_proj", False),
        ("lora_te_text_model_encoder_layers_0_mlp_fc2", True),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", None),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q", None),
    ],
)
def test_where_it_sits(name: str, on_input: bool | None) -> None:
    module = layers.base("linear")
    layer = layers.layer(module, name)
    adapter = ia3.create(layer, LayerSettings(dim=4, alpha=1.0), module.weight)
    assert (adapter is None) == (on_input is None)
    if adapter is not None:
        assert adapter.scales_input == on_input
    everywhere = ia3.create(layer, LayerSettings(dim=4, alpha=1.0, own={"enable_all": True}), module.weight)
    assert everywhere is not None and everywhere.scales_input == bool(on_input)


def test_loading_weights_updates_the_scale() -> None:
    module = torch.nn.Linear(24, 24).requires_grad_(False)
    one, other = (
        ia3.create(layers.layer(module), LayerSettings(4, 1.0, own={"train_on_input": on}), module.weight)
        for on in (True, False)
    )
    assert one is not None and other is not None
    other.load_state_dict(layers.nudge(one).state_dict())
    assert torch.equal(other.delta(module.weight), one.delta(module.weight))


def test_a_file_in_half_precision() -> None:
    """Writers cast on_input with everything else."""
    module = layers.base("linear", torch.float32)
    held = {"weight": torch.ones(24).half(), "on_input": torch.tensor(1.0).half()}
    assert torch.equal(ia3.load(layers.layer(module), held).delta(module.weight), module.weight)


@pytest.mark.parametrize("argument", ["conv_dim=4", "use_dora=True", "dropout=0.1", "use_rslora=True"])
def test_what_has_no_meaning_is_refused(argument: str) -> None:
    _, mistakes = read_settings("networks.ia3", arguments=[argument])
    assert len(mistakes) == 1 and "networks.ia3 does not support" in mistakes[0][0]
