"""What --vram may choose, in the order in which it is tried: what costs nothing first, then by time. Data.

`time` is the time of a step relative to one without it, and `source` where that comes from: "measured" in
benchmarks/RESULTS.md (on a CPU, no card has measured it yet), "counted" from passes, operations or bytes that are
copied, or "assumed".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from library.options.flag import Script


@dataclass(frozen=True)
class Choice:
    """One thing to save memory with: the flags that it sets, and what it costs. `always`: it is faster, or as fast, and
    is chosen wherever it can be. `script`: the only kind of training that has it. `unless`: other flags by which the
    user has decided the same. `cheaper_with`: flags of another choice by which this one takes less time."""

    values: Mapping[str, object]
    time: float
    source: Literal["measured", "counted", "assumed"]
    price: str
    always: bool = False
    script: Script | None = None
    unless: tuple[str, ...] = ()
    cheaper_with: frozenset[str] = frozenset()
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.values))

    def __str__(self) -> str:
        return " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in self.values.items())


def _one(name: str, value: str | int) -> Mapping[str, object]:
    return MappingProxyType({name: value})


def _on(name: str) -> Mapping[str, object]:
    return MappingProxyType({name: True})


_WHOLE: Script = "train_db.py"
_ADAPTERS: Script = "train_network.py"

CHOICES: tuple[Choice, ...] = (
    Choice(_one("mixed_precision", "bf16"), 0.5, "assumed", "faster", always=True),
    Choice(_on("cache_latents"), 0.9, "counted", "images are encoded once", always=True),
    Choice(_on("cache_text_encoder_outputs"), 1.0, "counted", "captions are encoded once", always=True),
    Choice(
        _one("optimizer_type", "AdamW8bit"),
        1.0,
        "assumed",
        "optimizer state in 8 bits",
        unless=("use_8bit_adam", "use_lion_optimizer", "optimizer_args"),
    ),
    Choice(_on("gradient_checkpointing"), 1.3, "measured", "a step takes 30 % longer"),
    Choice(
        _on("full_bf16"),
        1.0,
        "assumed",
        "weights in bf16, rounded stochastically: less exact",
        script=_WHOLE,
        unless=("full_fp16",),
    ),
    Choice(
        _on("fused_backward_pass"),
        1.67,
        "counted",
        "gradients are freed at once; with --max_grad_norm one more backward pass",
        script=_WHOLE,
        unless=("fused_optimizer_groups",),
    ),
    Choice(
        _one("base_model_precision", "int8"),
        1.1,
        "measured",
        "the base model in 8 bits, hardly less exact",
        script=_ADAPTERS,
        unless=("fp8_base", "fp8_base_unet"),
    ),
    Choice(
        _on("vae_tiling"),
        1.0,
        "assumed",
        "images of more than 512 pixels pass the VAE in tiles; latents are less exact",
    ),
    Choice(_on("cpu_offload_checkpointing"), 1.1, "assumed", "inputs of blocks wait in main memory"),
    Choice(
        _on("offload_optimizer"),
        1.5,
        "assumed",
        "optimizer state is copied to the device and back in each step",
        script=_WHOLE,
        cheaper_with=frozenset({"optimizer_type"}),
    ),
    *(
        Choice(
            _one("blocks_to_swap", count),
            1 + count / 60,
            "assumed",
            "blocks are copied to the device before they compute",
            script=_ADAPTERS,
        )
        for count in (12, 24, 36)
    ),
)
"""In the order in which they are tried; taken back, the slowest first, where the others suffice."""
