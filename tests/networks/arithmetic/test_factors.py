"""networks/arithmetic/factors.py: what a LoRA file holds, what is refused, what is written."""

from __future__ import annotations

import pytest
import torch

from networks.adapter import AdapterError
from networks.arithmetic.factors import file_tensors, read_factors
from tests.networks.random_loras import KERNEL, LINEAR, POINT, delta, layer, relative


@pytest.mark.parametrize("shape", [LINEAR, POINT, KERNEL])
def test_delta_is_the_sum_over_ranks(shape: tuple[int, ...]) -> None:
    made = layer(shape, 4, alpha=6.0)
    tensors = file_tensors({"lora_unet_a": made}, torch.float32)
    assert made.delta().shape == shape
    assert relative(made.delta(), delta(tensors, "lora_unet_a")) < 1e-6
    assert made.is_kernel is (shape == KERNEL)


def test_what_is_written_is_read() -> None:
    layers = {"lora_unet_a": layer(LINEAR, 4, 2.0), "lora_te_b": layer(KERNEL, 3, 1.0, seed=1)}
    back = read_factors(file_tensors(layers, torch.float32), "a.safetensors")
    assert list(back) == list(layers)
    for name, found in back.items():
        assert torch.equal(found.down, layers[name].down) and torch.equal(found.up, layers[name].up)
        assert found.alpha == layers[name].alpha


def test_alpha_that_is_missing_or_zero_is_the_rank() -> None:
    tensors = file_tensors({"lora_unet_a": layer(LINEAR, 4, 2.0)}, torch.float32)
    tensors["lora_unet_a.alpha"] = torch.tensor(0)
    assert read_factors(tensors, "a")["lora_unet_a"].scale == 1.0
    del tensors["lora_unet_a.alpha"]
    assert read_factors(tensors, "a")["lora_unet_a"].scale == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_alpha_that_a_format_would_round_stays_exact(dtype: torch.dtype) -> None:
    tensors = file_tensors({"a": layer(LINEAR, 3, 8 / 7), "b": layer(LINEAR, 3, 2.0)}, dtype)
    assert float(tensors["a.alpha"]) == pytest.approx(8 / 7, rel=1e-7)
    assert tensors["b.alpha"].dtype == tensors["a.lora_up.weight"].dtype == tensors["a.lora_down.weight"].dtype == dtype


def test_a_core_between_the_factors_becomes_part_of_them() -> None:
    draw = torch.Generator().manual_seed(5)
    down, core, up = (torch.randn(shape, generator=draw) for shape in ((4, 12, 1, 1), (4, 4, 3, 3), (16, 4, 1, 1)))
    tensors = {
        "a.lora_down.weight": down,
        "a.lora_mid.weight": core,
        "a.lora_up.weight": up,
        "a.alpha": torch.tensor(2.0),
    }
    x = torch.randn(2, 12, 7, 7, generator=draw)
    conv = torch.nn.functional.conv2d
    expected = 2 / 4 * conv(conv(conv(x, down), core, padding=1), up)  # LyCORIS: three convolutions in turn
    found = read_factors(tensors, "a")["a"]
    assert relative(conv(x, found.delta(), padding=1), expected) < 1e-5


def test_layers_of_other_kinds_are_named_and_refused() -> None:
    tensors = file_tensors(
        {"lora_unet_a": layer(LINEAR, 4, 2.0), "lora_unet_dora": layer(LINEAR, 4, 2.0)}, torch.float32
    )
    tensors["lora_unet_dora.dora_scale"] = torch.ones(24, 1)
    tensors |= {f"lora_unet_loha.hada_w{n}_{letter}": torch.ones(2, 2) for n in (1, 2) for letter in "ab"}
    tensors["lora_unet_half.lora_down.weight"] = torch.ones(2, 2)
    with pytest.raises(AdapterError) as raised:
        read_factors(tensors, "mixed.safetensors")
    said = str(raised.value)
    assert "mixed.safetensors" in said and "3 of 4" in said and "lora_unet_a" not in said.split(": ", 1)[1]
    assert "lora_unet_dora (DoRA" in said and "lora_unet_loha (LoHa" in said
    assert "lora_unet_half (without lora_up.weight)" in said


@pytest.mark.parametrize("key", ["unet.mid_block.attentions.0.proj_in.lora_A.weight", "base_model.x.lora_B.weight"])
def test_layers_of_no_known_model_are_named(key: str) -> None:
    """Those of known ones have kohya's names by then (networks/formats/layer_names.py)."""
    with pytest.raises(AdapterError, match="1 key of no layer of a supported model") as raised:
        read_factors({key: torch.ones(2, 2)}, "peft.safetensors")
    assert key in str(raised.value)


def test_factors_that_do_not_fit_are_refused() -> None:
    tensors = {"a.lora_down.weight": torch.ones(4, 8), "a.lora_up.weight": torch.ones(8, 3)}
    with pytest.raises(AdapterError, match=r"a do not fit together: \(4, 8\) and \(8, 3\)"):
        read_factors(tensors, "x.safetensors")
