"""Options of precision, memory and speed."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import flag


@dataclass(frozen=True)
class MemoryOptions:
    """Precision of weights and computation, attention, and what trades time for memory."""

    mixed_precision: str = flag(
        "no",
        "Compute in half precision while the weights stay fp32: fp16, or bf16 on GPUs that support it.",
        choices=("no", "fp16", "bf16"),
        metadata="ss_mixed_precision",
        may_change_on_resume=True,
    )
    full_fp16: bool = flag(
        False,
        "Keep weights and gradients in fp16 too: less memory, less accuracy; requires mixed_precision fp16.",
        metadata="ss_full_fp16",
        may_change_on_resume=True,
    )
    full_bf16: bool = flag(
        False,
        "Keep weights and gradients in bf16 too: less memory, less accuracy; requires mixed_precision bf16.",
        may_change_on_resume=True,
    )
    bf16_rounding: str = flag(
        "stochastic",
        "How full_bf16 rounds updated weights: stochastic keeps small updates on average, kahan exactly (2 bytes more "
        "per weight), both with fp32 optimizer state; nearest loses them, as sd-scripts does.",
        choices=("stochastic", "kahan", "nearest"),
        may_change_on_resume=True,
    )
    fused_backward_pass: bool = flag(
        False,
        "Update each weight during the backward pass and free its gradient: gradients take almost no memory. With "
        "max_grad_norm one more backward pass measures them first.",
        may_change_on_resume=True,
    )
    fused_optimizer_groups: int | None = flag(
        None,
        "Like fused_backward_pass, but update the weights in this many groups; more groups take less memory.",
        at_least=1,
        zero_is_off=True,
        may_change_on_resume=True,
    )
    fused_backward_clipping: str = flag(
        "global",
        "How max_grad_norm clips in a fused backward pass: by the global norm, or each tensor by its own, as "
        "sd-scripts does, without a second pass.",
        choices=("global", "tensor"),
        may_change_on_resume=True,
    )
    offload_optimizer: bool = flag(
        False,
        "Keep the optimizer state in main memory; each step moves it to the device and back, a part at a time.",
        may_change_on_resume=True,
    )
    gradient_checkpointing: bool = flag(
        False,
        "Recompute activations in the backward pass instead of storing them: much less memory, about a third slower.",
        metadata="ss_gradient_checkpointing",
        may_change_on_resume=True,
    )
    gradient_checkpointing_policy: str = flag(
        "all",
        "What gradient_checkpointing recomputes: all = every block of the U-Net; attention = the same, but results of"
        " attention are stored; half = every second block.",
        choices=("all", "attention", "half"),
        may_change_on_resume=True,
    )
    cpu_offload_checkpointing: bool = flag(
        False,
        "With gradient_checkpointing, keep what is stored of each block in main memory until the backward pass.",
        may_change_on_resume=True,
    )
    blocks_to_swap: int | None = flag(
        None,
        "Keep this many of the frozen blocks of the U-Net in main memory, and copy each to the device before it"
        " computes: less memory on the device, slower.",
        at_least=1,
        zero_is_off=True,
        may_change_on_resume=True,
    )
    gradient_accumulation_steps: int = flag(
        1,
        "Batches per optimizer step: their gradients are accumulated as if they were one large batch.",
        at_least=1,
        zero_is_off=True,
        metadata="ss_gradient_accumulation_steps",
    )
    vram: int | None = flag(
        None,
        "The memory of the graphics card in GB, such as 8: choose the fastest of the options of memory and precision"
        " that fit, by predicted memory. What you set yourself stays.",
        at_least=4,
        zero_is_off=True,
        may_change_on_resume=True,
    )
    xformers: bool = flag(False, "Use the attention of the xformers package.", may_change_on_resume=True)
    diffusers_xformers: bool = flag(
        False, "Same as xformers, as in sd-scripts.", script="train_db.py", may_change_on_resume=True
    )
    sdpa: bool = flag(False, "Use PyTorch's scaled dot-product attention.", may_change_on_resume=True)
    mem_eff_attn: bool = flag(False, "Use PyTorch's memory-efficient attention.", may_change_on_resume=True)
    lowram: bool = flag(
        False,
        "Load the model straight to the device, for machines with little RAM.",
        metadata="ss_lowram",
        may_change_on_resume=True,
    )
    highvram: bool = flag(
        False,
        "Do not empty the device's memory cache between preparation steps, for GPUs with much memory.",
        may_change_on_resume=True,
    )
    vae_tiling: bool = flag(
        False,
        "Encode and decode images of more than 512 pixels in overlapping tiles: less memory; latents are close to"
        " those of the whole image, not the same.",
    )
    no_half_vae: bool = flag(False, "Run the VAE in fp32 even with mixed precision.")
    base_precision: str = flag(
        "fp32",
        "Precision of the frozen base model under an adapter: fp16 and bf16 halve its memory, trained weights stay"
        " fp32; has no effect with mixed_precision, whose precision is used.",
        choices=("fp32", "fp16", "bf16"),
        script="train_network.py",
    )
