"""How numbers are stored and memory is saved."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import flag


@dataclass(frozen=True)
class MemoryOptions:
    """Precision, memory and speed."""

    mixed_precision: str = flag(
        "no",
        "Compute in half precision while the weights stay in fp32: fp16, or bf16 on cards that have it.",
        choices=("no", "fp16", "bf16"),
        metadata="ss_mixed_precision",
        may_change_on_resume=True,
    )
    full_fp16: bool = flag(
        False,
        "Keep weights and gradients in fp16 too. Saves memory and costs accuracy; needs mixed_precision fp16.",
        metadata="ss_full_fp16",
        may_change_on_resume=True,
    )
    full_bf16: bool = flag(
        False,
        "Keep weights and gradients in bf16 too. Saves memory and costs accuracy; needs mixed_precision bf16.",
        may_change_on_resume=True,
    )
    gradient_checkpointing: bool = flag(
        False,
        "Compute activations again on the way back instead of keeping them: much less memory, about a third slower.",
        metadata="ss_gradient_checkpointing",
        may_change_on_resume=True,
    )
    gradient_accumulation_steps: int = flag(
        1,
        "Batches whose gradients are summed up before the weights change, as if they were one large batch.",
        at_least=1,
        zero_is_off=True,
        metadata="ss_gradient_accumulation_steps",
    )
    xformers: bool = flag(False, "Use the attention of the xformers package.", may_change_on_resume=True)
    diffusers_xformers: bool = flag(
        False, "Known from sd-scripts: the same as xformers.", script="train_db.py", may_change_on_resume=True
    )
    sdpa: bool = flag(False, "Use PyTorch's own fast attention.", may_change_on_resume=True)
    mem_eff_attn: bool = flag(
        False, "Use the attention of PyTorch that needs the least memory.", may_change_on_resume=True
    )
    lowram: bool = flag(
        False,
        "Load the model straight to the device, for machines with little main memory.",
        metadata="ss_lowram",
        may_change_on_resume=True,
    )
    highvram: bool = flag(
        False,
        "Do not empty the device's memory cache between steps of preparation, for cards with much memory.",
        may_change_on_resume=True,
    )
    no_half_vae: bool = flag(False, "Run the VAE in fp32 even in half precision.")
    base_precision: str = flag(
        "fp32",
        "Format of the frozen weights under an adapter; half of the memory in fp16 or bf16, of which the trained "
        "weights know nothing. With mixed_precision the frozen weights have its format anyway.",
        choices=("fp32", "fp16", "bf16"),
        script="train_network.py",
    )
