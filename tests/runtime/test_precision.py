"""The formats of a run, the replacements and their notes, and what --strict refuses."""

from __future__ import annotations

import pytest
import torch

from library.options.groups.memory import MemoryOptions
from library.runtime.device import Machine
from library.runtime.precision import BYTES, Precision, resolve, torch_dtype

CPU = Machine("cpu", "a processor")
CARD = Machine("cuda", "a card", 24 * 2**30)
CARD_WITH_XFORMERS = Machine("cuda", "a card", 24 * 2**30, has_xformers=True)


@pytest.mark.parametrize("machine", [CPU, CARD])
def test_nothing_asked_is_fp32_and_sdpa(machine: Machine) -> None:
    assert resolve(MemoryOptions(), machine) == Precision("no", "fp32", "fp32", "fp32", "fp32", "sdpa")


@pytest.mark.parametrize("mixed", ["fp16", "bf16"])
def test_mixed_precision_keeps_trained_weights_in_fp32(mixed: str) -> None:
    decided = resolve(MemoryOptions(mixed_precision=mixed), CARD)
    assert (decided.mixed_precision, decided.trained, decided.frozen, decided.vae) == (mixed, "fp32", mixed, mixed)
    assert decided.uses_scaler == (mixed == "fp16")
    assert not decided.has_fp16_gradients
    assert not decided.notes


def test_full_half_precision_is_for_trained_weights_too() -> None:
    half = resolve(MemoryOptions(mixed_precision="fp16", full_fp16=True), CARD)
    assert half.trained == "fp16" and half.uses_scaler and half.has_fp16_gradients
    brain = resolve(MemoryOptions(mixed_precision="bf16", full_bf16=True), CPU)
    assert brain.trained == "bf16" and not brain.uses_scaler and not brain.notes


def test_no_half_vae_keeps_the_vae_in_fp32() -> None:
    decided = resolve(MemoryOptions(mixed_precision="fp16", no_half_vae=True), CARD)
    assert (decided.frozen, decided.vae) == ("fp16", "fp32")


def test_fp16_on_a_cpu_becomes_fp32_and_full_fp16_with_it() -> None:
    options = MemoryOptions(mixed_precision="fp16", full_fp16=True)
    decided = resolve(options, CPU)
    assert (decided.mixed_precision, decided.trained, decided.frozen, decided.vae) == ("no", "fp32", "fp32", "fp32")
    assert len(decided.notes) == 1 and not decided.mistakes
    assert "fp16" in decided.notes[0] and "full_fp16" in decided.notes[0] and "CPU" in decided.notes[0]

    strict = resolve(options, CPU, strict=True)
    assert not strict.notes and len(strict.mistakes) == 1
    assert "fp16" in strict.mistakes[0].what and strict.mistakes[0].remedy


@pytest.mark.parametrize(("machine", "why"), [(CPU, "CUDA"), (CARD, "not installed")])
def test_absent_xformers_become_sdpa(machine: Machine, why: str) -> None:
    decided = resolve(MemoryOptions(xformers=True), machine)
    assert decided.attention == "sdpa"
    assert len(decided.notes) == 1 and why in decided.notes[0] and "sdpa" in decided.notes[0]
    strict = resolve(MemoryOptions(xformers=True), machine, strict=True)
    assert len(strict.mistakes) == 1 and why in strict.mistakes[0].what


def test_all_replacements_are_told_together() -> None:
    options = MemoryOptions(mixed_precision="fp16", xformers=True)
    assert len(resolve(options, CPU).notes) == 2
    assert len(resolve(options, CPU, strict=True).mistakes) == 2


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({"xformers": True}, "xformers"),
        ({"sdpa": True}, "sdpa"),
        ({"mem_eff_attn": True}, "mem_eff"),
        ({"mem_eff_attn": True, "xformers": True}, "xformers"),
        ({"mem_eff_attn": True, "sdpa": True}, "sdpa"),
        ({"xformers": True, "sdpa": True}, "xformers"),
    ],
)
def test_the_attention_asked_for_is_used_where_it_can_be(asked: dict[str, bool], got: str) -> None:
    decided = resolve(MemoryOptions(**asked), CARD_WITH_XFORMERS)
    assert decided.attention == got and not decided.notes


def test_names_and_sizes_of_formats() -> None:
    assert [torch_dtype(name) for name in ("float", "fp32", "fp16", "bf16")] == [
        torch.float32,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]
    assert all(torch_dtype(name).itemsize == size for name, size in BYTES.items())
    with pytest.raises(ValueError, match="fp8"):
        torch_dtype("fp8")
