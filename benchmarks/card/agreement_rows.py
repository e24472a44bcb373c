"""What the card has to get right, as a table: runs on miniatures, and the CPU's run whose losses each must give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Flags = Mapping[str, Any]
STEPS = 20

# The largest difference of a loss from the CPU's, relative to it, over 20 steps. In float32 the order of sums differs:
# 6e-4 between the tests' pretend device and the CPU. Half precision keeps 8 (bf16) or 11 bits (fp16, TF32) of each
# factor: on a CPU, bf16 differs by 8e-3 from float32.
EXACT, ROUNDED, HALF, BRAIN = 2e-3, 1e-2, 1e-2, 3e-2


@dataclass(frozen=True)
class Row:
    """A run: `trains` all weights or an adapter of the miniature of a `family`, with these flags. `against`: the row
    whose losses on the CPU it must give; empty: its own. `tf32`: with 11 bits of float32 factors, which the flags of
    float32 rows otherwise exclude."""

    name: str
    trains: Literal["weights", "adapter"] = "weights"
    family: str = "sd1"
    flags: Flags = field(default_factory=dict)
    against: str = ""
    tolerance: float = EXACT
    tf32: bool = False
    files: tuple[str, ...] = ()


_LORA: Flags = {"network_module": "networks.lora", "network_dim": 4}
_CHECKPOINTED: Flags = {"gradient_checkpointing": True}
_BF16: Flags = {"mixed_precision": "bf16"}
_FP16: Flags = {"mixed_precision": "fp16"}
_CACHED: Flags = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
_ASIDE: Flags = {  # everything that happens beside the steps, and what the loss may be made of
    "validation_split": 0.34, "validate_every_n_steps": 5, "use_ema": True, "save_state": True,
    "save_every_n_steps": 10, "sample_every_n_steps": 10, "noise_offset": 0.05, "min_snr_gamma": 5, "flip_aug": True,
    "preservation": "class_prompt=0.3", "gradient_accumulation_steps": 2, "multires_noise_iterations": 3,
}  # fmt: skip

FULL, LORA, CACHED = "all weights, fp32", "LoRA, fp32", "LoRA, latents and captions cached"
UNCLIPPED = "all weights, not clipped"
ROWS: tuple[Row, ...] = (
    # in order of worth: a cut-off run keeps the first ones
    Row(FULL),
    Row(LORA, "adapter", flags=_LORA),
    Row("all weights, bf16", flags=_BF16, against=FULL, tolerance=BRAIN),
    Row("all weights, fp16 with gradient scaler", flags=_FP16, against=FULL, tolerance=HALF),
    Row("LoRA, bf16", "adapter", flags=_LORA | _BF16, against=LORA, tolerance=BRAIN),
    Row("LoRA SDXL, fp32", "adapter", "sdxl", _LORA),
    Row("all weights, SDXL, fp32", family="sdxl"),
    Row("all weights, everything beside the steps", flags=_ASIDE, files=("prompts",)),
    Row(CACHED, "adapter", flags=_LORA | _CACHED),
    Row("all weights, fp32 with TF32", against=FULL, tolerance=ROUNDED, tf32=True),
    Row("full_bf16", flags=_BF16 | {"full_bf16": True}, against=FULL, tolerance=BRAIN),
    Row(
        "full_fp16, AdamW8bit",
        flags=_FP16 | {"full_fp16": True, "optimizer_type": "AdamW8bit"}, against=FULL, tolerance=BRAIN,
    ),
    Row("gradient checkpointing", flags=_CHECKPOINTED, against=FULL),
    Row("xformers", flags={"xformers": True}, against=FULL),
    Row("mem_eff_attn", flags={"mem_eff_attn": True}, against=FULL),
    Row("AdamW8bit", flags={"optimizer_type": "AdamW8bit"}, tolerance=ROUNDED),
    Row("PagedAdamW8bit", flags={"optimizer_type": "PagedAdamW8bit"}, against="AdamW8bit", tolerance=ROUNDED),
    Row("Adafactor", flags={"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]}),
    Row("base int8 (optimum-quanto)", "adapter", flags=_LORA | {"base_model_precision": "int8"}),
    Row("base nf4 (bitsandbytes)", "adapter", flags=_LORA | {"base_model_precision": "nf4"}),
    Row("base fp8 (optimum-quanto)", "adapter", flags=_LORA | {"base_model_precision": "fp8"}),
    Row("base int8 (torchao)", "adapter", flags=_LORA | {"base_model_precision": "int8-torchao"}),
    Row("fused_backward_pass, clipped", flags={"fused_backward_pass": True}, against=FULL),
    Row("fused_backward_pass, not clipped", flags={"fused_backward_pass": True, "max_grad_norm": 0}, against=UNCLIPPED),
    Row(UNCLIPPED, flags={"max_grad_norm": 0}),
    Row("fused_optimizer_groups", flags={"fused_optimizer_groups": 4}, against=FULL),
    Row("offload_optimizer", flags={"offload_optimizer": True}, against=FULL),
    Row("offload_optimizer, fused", flags={"offload_optimizer": True, "fused_backward_pass": True}, against=FULL),
    Row(
        "full_bf16, Kahan", flags=_BF16 | {"full_bf16": True, "bf16_rounding": "kahan"}, against=FULL, tolerance=BRAIN,
    ),
    Row("blocks_to_swap", "adapter", flags=_LORA | {"blocks_to_swap": 2}, against=LORA),
    Row(
        "blocks_to_swap, checkpointing", "adapter",
        flags=_LORA | _CHECKPOINTED | {"blocks_to_swap": 2}, against=LORA,
    ),
    Row("cpu_offload_checkpointing", flags=_CHECKPOINTED | {"cpu_offload_checkpointing": True}, against=FULL),
    Row("recompute less", flags=_CHECKPOINTED | {"gradient_checkpointing_policy": "attention"}, against=FULL),
    Row("LoHa SD2", "adapter", "sd2", {"network_module": "networks.loha", "network_dim": 2}),
    Row("all weights, refiner", family="refiner"),
    Row("Prodigy", "adapter", flags=_LORA | {"optimizer_type": "Prodigy", "learning_rate": 1}, tolerance=ROUNDED),
    # last, as compiling takes long
    Row("torch_compile", "adapter", flags=_LORA | {"torch_compile": True}, against=LORA),
    Row(
        "compiled with CUDA graphs", "adapter",
        flags=_LORA | _CACHED | {"compile": True, "compile_mode": "reduce-overhead"}, against=CACHED,
    ),
)  # fmt: skip


def rows(*, tiny: bool) -> tuple[Row, ...]:
    """All rows; with `tiny` those that show whether the script works."""
    few = (FULL, LORA, "all weights, fp16 with gradient scaler", "base int8 (optimum-quanto)", "blocks_to_swap")
    return tuple(row for row in ROWS if row.name in few) if tiny else ROWS


def largest_difference(losses: Mapping[int, float], wanted: Mapping[int, float]) -> float | None:
    """The largest difference of a loss from the wanted one, relative to that; None if the steps are not the same."""
    if not wanted or losses.keys() != wanted.keys():
        return None
    return max(abs(losses[step] - wanted[step]) / abs(wanted[step]) for step in wanted)
