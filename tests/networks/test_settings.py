"""--network_dim, --network_alpha and --network_args as kohya's users write them (formats.md 7.3), and their errors."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from networks.adapter import AdapterError
from networks.registry import KINDS, detect_kind, find_kind, load_kind
from networks.settings import NetworkSettings, known_arguments, read_settings


def read(*arguments: str, module: str = "networks.lora", **more: Any) -> NetworkSettings:
    settings, mistakes = read_settings(module, arguments=arguments, **more)
    assert mistakes == ()
    return settings


def mistakes(*arguments: str, module: str = "networks.lora", **more: Any) -> list[str]:
    return [" ".join(mistake) for mistake in read_settings(module, arguments=arguments, **more)[1]]


def test_defaults_are_kohyas() -> None:
    settings = read(alpha=1)
    assert (settings.dim, settings.alpha, settings.conv_dim, settings.conv_alpha) == (4, 1, None, 1)
    assert settings.rank(conv=False, block=None) == (4, 1)
    assert not settings.convolutions
    assert read("conv_dim=8", alpha=1).rank(conv=True, block=1) == (8, 1)


def test_lists_by_block_are_not_judged_without_a_model() -> None:
    lists = ("down_lr_weight=1,0.5", "block_lr_zero_threshold=0.1", "block_dims=4,4")
    assert mistakes(*lists, blocks=None) == []
    assert len(mistakes(*lists, blocks=0)) == 2


@pytest.mark.parametrize("alpha", [0, None])
def test_a_missing_alpha_is_the_rank(alpha: float | None) -> None:
    assert read(dim=16, alpha=alpha).rank(conv=False, block=None) == (16, 16)
    assert read("conv_dim=8", "conv_alpha=0").rank(conv=True, block=3) == (8, 8)


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "1", "yes"])
def test_true_in_any_case(text: str) -> None:
    assert read(f"use_dora={text}").use_dora


@pytest.mark.parametrize("text", ["False", "false", "0", "", "None"])
def test_false_is_false(text: str) -> None:
    assert not read(f"use_dora={text}").use_dora


def test_curves_are_kohyas() -> None:
    """lora.py get_list: sin(π i / 11 / 2), i from 0 to 11, backwards for cosine; i / 11; + base."""
    sine = [math.sin(math.pi * i / 11 / 2) for i in range(12)]
    linear = [i / 11 for i in range(12)]
    for name, curve in (("sine", sine), ("cosine", sine[::-1]), ("linear", linear), ("reverse_linear", linear[::-1])):
        weights = read(f"down_lr_weight={name}+0.5", f"up_lr_weight={name}").block_weights
        assert weights is not None
        assert weights[:12] == pytest.approx([value + 0.5 for value in curve])
        assert weights[12] == 1
        assert weights[13:] == pytest.approx(curve)
    assert read("down_lr_weight=zeros+.25").block_weights == (*[0.25] * 12, *[1.0] * 13)


def test_kohyas_rules_for_short_and_long_lists() -> None:
    weights = read("down_lr_weight=0.5,,2", "mid_lr_weight=0.3", "up_lr_weight=" + ",".join(["2"] * 14)).block_weights
    assert weights == (0.5, 0, 2, *[1.0] * 9, 0.3, *[2.0] * 12)
    weights = read("mid_lr_weight=0.3", "up_lr_weight=0.1,0.2,", "block_lr_zero_threshold=0.2").block_weights
    assert weights == (*[1.0] * 12, 0.3, 0, 0, 0, *[1.0] * 9)


def test_blocks_of_sdxl() -> None:
    weights = read("down_lr_weight=zeros+2", "mid_lr_weight=1,2,3", blocks=23).block_weights
    assert weights == (1, *[2.0] * 9, 1, 2, 3, *[1.0] * 9, 1)


def test_a_loraplus_ratio_of_a_module_overrides_the_common_one() -> None:
    settings = read("loraplus_lr_ratio=4", "loraplus_unet_lr_ratio=16")
    assert (settings.ratio("unet"), settings.ratio("text_encoder")) == (16, 4)
    assert read().ratio("unet") is None


def test_all_mistakes_are_reported_together() -> None:
    found = mistakes(
        "conv_dm=4", "rank_dropout=1.5", "block_dims=1,2", "unit=4", "algo=lokr", "use_dora=perhaps", "dim"
    )
    assert len(found) == 7
    for text, words in zip(
        found,
        (["conv_dm", "did you mean conv_dim?"], ["rank_dropout", "1.5"], ["unit", "networks.dylora"],
         ["algo", "lycoris.kohya"], ["perhaps", "True"], ["dim", "key=value"], ["block_dims", "2 items", "25"]),
        strict=True,
    ):  # fmt: skip
        assert all(word in text for word in words), text


def test_arguments_of_newer_modules_of_sd_scripts() -> None:
    """Names of its docs/loha_lokr.md: refused when on, accepted when off or without effect on the weights."""
    names = ("exclude_patterns", "include_patterns", "network_reg_dims", "network_reg_lrs", "train_llm_adapter")
    assert not mistakes("verbose=True", *(f"{name}=" for name in names), "train_llm_adapter=False")
    for name in names:
        (text,) = mistakes(f"{name}=x")
        assert f"{name} is not supported in this version" in text and "would change the trained weights" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv_alpha=2"], "conv_dim"),
        (["conv_block_alphas=" + ",".join("1" * 25)], "conv_block_dims"),
        (["block_lr_zero_threshold=0.1"], "no effect without block weights"),
        (["down_lr_weight=zeros", "mid_lr_weight=0", "up_lr_weight=zeros"], "every block is 0"),
        (["loraplus_unet_lr_ratio=0"], "ratio of 0"),
        (["down_lr_weight=0.5"], "not a comma-separated list"),
        (["block_dims=1,2,x"], "is not a number"),
        (["conv_dim=2.5"], "not a whole number"),
    ],
)
def test_invalid_arguments_are_rejected(arguments: list[str], message: str) -> None:
    assert any(message in text for text in mistakes(*arguments)), mistakes(*arguments)


def test_arguments_that_a_kind_does_not_support_are_rejected() -> None:
    assert "networks.lora_fa does not support" in mistakes("loraplus_lr_ratio=4", module="networks.lora_fa")[0]
    assert "networks.oft does not support" in mistakes("use_dora=1", module="networks.oft")[0]
    assert "divide" in mistakes("unit=3", module="networks.dylora", dim=8)[0]
    assert "differs" in mistakes("conv_dim=4", module="networks.dylora", dim=8)[0]


def test_keys_without_values_count_as_not_set() -> None:
    assert read("conv_dim=", "rank_dropout=", "dropout=None") == read()
    assert read("conv_dim=8.0").conv_dim == 8


def test_every_kind_is_found_by_its_module() -> None:
    for kind in KINDS:
        assert find_kind(kind.module) is kind
        assert callable(load_kind(kind).load)
        assert len({item.name for item in known_arguments(kind)}) == len(known_arguments(kind))
    assert find_kind("lycoris.kohya") is None


def test_kinds_are_detected_by_their_keys() -> None:
    for suffixes, name in (
        (["lora_down.weight", "lora_up.weight", "alpha"], "lora"),
        (["lora_down.weight", "lora_up.weight", "alpha", "dora_scale"], "lora"),
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"], "loha"),
        (["lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"], "lokr"),
        (["oft_blocks", "alpha"], "oft"),
        (["weight", "on_input"], "ia3"),
    ):
        assert detect_kind([f"lora_unet_x.{suffix}" for suffix in suffixes]).name == name
    with pytest.raises(AdapterError, match="kind of adapter is not supported"):
        detect_kind(["lora_unet_x.strange"])


def test_reading_settings_needs_no_torch() -> None:
    program = "import sys, networks.settings, networks.registry, networks.adapter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
