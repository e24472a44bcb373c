"""The runs at full size, as tables: what is trained, with which flags, and the bar that it has to meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Flags = Mapping[str, Any]

GB = 1e9


@dataclass(frozen=True)
class Case:
    """A run of full size. `trains` all weights or an adapter of `model` (hollow.MODELS) at `side` px.

    Bars: `seconds` a step at batch 1, `share` of the measured bf16 matrix rate at the best batch, `peak` of allocated
    memory at batch 1 in bytes; None: no bar. `trains_text`: the text encoder too, for the count of the arithmetic.
    """

    name: str
    model: Literal["sd15", "sdxl"]
    trains: Literal["weights", "adapter"]
    side: int
    flags: Flags
    seconds: float | None = None
    share: float | None = None
    peak: float | None = None
    trains_text: bool = False


_BF16: Flags = MappingProxyType({"mixed_precision": "bf16", "cache_latents": True})
_QUICK: Flags = {"lowram": True}  # weights straight to the device, which is the quickest way to draw them there
_LORA: Flags = _BF16 | {
    "network_module": "networks.lora", "network_dim": 16, "network_train_unet_only": True,
    "cache_text_encoder_outputs": True,
}  # fmt: skip
_UNET_ONLY: Flags = _BF16 | {"stop_text_encoder_training": -1}
_SDXL_FULL: Flags = _BF16 | {"cache_text_encoder_outputs": True}
_CHECKPOINTED: Flags = {"gradient_checkpointing": True}
_SMALL: Flags = _CHECKPOINTED | {"full_bf16": True, "fused_backward_pass": True, "max_grad_norm": 0}

SPEED: tuple[Case, ...] = (
    Case("SD1.5 LoRA, 512 px", "sd15", "adapter", 512, _LORA | _QUICK, seconds=0.035, share=0.40),
    Case("SDXL LoRA, 1024 px", "sdxl", "adapter", 1024, _LORA | _QUICK, seconds=0.15, share=0.40),
    Case("SDXL all weights, 1024 px", "sdxl", "weights", 1024, _SDXL_FULL | _QUICK, share=0.35),
    Case("SD1.5 all weights with text encoder, 512 px", "sd15", "weights", 512, _BF16 | _QUICK, trains_text=True),
)
"""Seconds a step at batch 1, then the best batch. Bars: an H200 or H100, bf16, latents and captions cached."""

MEMORY: tuple[Case, ...] = (
    Case("SD1.5 LoRA rank 16", "sd15", "adapter", 512, _LORA, peak=2.6 * GB),
    Case("SD1.5 LoRA rank 16, checkpointing", "sd15", "adapter", 512, _LORA | _CHECKPOINTED, peak=1.8 * GB),
    Case("SDXL LoRA", "sdxl", "adapter", 1024, _LORA, peak=12 * GB),
    Case("SDXL LoRA, checkpointing", "sdxl", "adapter", 1024, _LORA | _CHECKPOINTED, peak=6 * GB),
    Case(
        "SDXL LoRA, checkpointing, base int8", "sdxl", "adapter", 1024,
        _LORA | _CHECKPOINTED | {"base_model_precision": "int8"}, peak=4.2 * GB,
    ),
    Case("SDXL LoRA, 36 blocks swapped", "sdxl", "adapter", 1024, _LORA | _CHECKPOINTED | {"blocks_to_swap": 36}),
    Case(
        "SD1.5 all weights with text encoder, AdamW8bit, fused backward", "sd15", "weights", 512,
        _BF16 | _SMALL | {"optimizer_type": "AdamW8bit"}, peak=6 * GB, trains_text=True,
    ),
    Case(
        "SD1.5 U-Net, AdamW8bit, fused backward", "sd15", "weights", 512,
        _UNET_ONLY | _SMALL | {"optimizer_type": "AdamW8bit"}, peak=4.5 * GB,
    ),
    Case(
        "SDXL U-Net, AdamW, optimiser on the CPU, fused backward", "sdxl", "weights", 1024,
        _SDXL_FULL | _SMALL | {"offload_optimizer": True}, peak=9 * GB,
    ),
    Case(
        "SDXL U-Net, the same, activations on the CPU", "sdxl", "weights", 1024,
        _SDXL_FULL | _SMALL | {"offload_optimizer": True, "cpu_offload_checkpointing": True}, peak=7 * GB,
    ),
    Case(
        "SDXL U-Net, Adafactor, fused backward", "sdxl", "weights", 1024,
        _SDXL_FULL | _SMALL | {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]}, peak=10 * GB,
    ),
    # last, as compiling takes long
    Case("SDXL LoRA, torch_compile", "sdxl", "adapter", 1024, _LORA | {"torch_compile": True}),
)  # fmt: skip
"""Peaks at batch 1, with the options for little memory. The bars of the issue, in units of 10^9 bytes."""


def case_of(name: str) -> Case:
    """A case by its name. Raises KeyError."""
    return {case.name: case for case in (*SPEED, *MEMORY)}[name]


def arithmetic(case: Case, flops: Mapping[str, float]) -> float:
    """Multiplications and additions of a step and sample, from those of a forward pass of each module: a backward pass
    takes as many for the inputs, and for all weights as many again. An adapter's own are left out, as is what
    checkpointing computes twice."""
    passes = 2 if case.trains == "adapter" else 3
    total = passes * flops["unet"]
    if case.trains_text:
        total += 3 * flops["text_encoder"]
    return total
