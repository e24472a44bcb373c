"""Memory and precision of a model: number formats, attention kernels, gradient checkpointing, fp16 gradients.

The flags are in options/groups/memory.py, the formats that a machine supports in runtime/precision.py, and the bytes
that the plan counts in training/plan/costs.py.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from library.runtime.accelerator import release_cached
from library.runtime.precision import Attention, FloatName, Precision, torch_dtype
from library.runtime.stored_weights import compute_in_stored_dtype
from library.training.blocks.checkpoints import checkpoint_activations
from library.training.plan.memory.tiles import TILE

if TYPE_CHECKING:
    from library.families.family import Model
    from library.options.groups.memory import MemoryOptions
    from library.training.blocks.checkpoints import Checkpoints
    from library.training.trainable import Trainable


def prepare(
    model: Model,
    trainable: Trainable,
    precision: Precision,
    options: MemoryOptions,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Prepare a loaded model for training.

    Freezes the model and sets evaluation mode; converts the trained parts to their number format and sets training
    mode, with gradients if they are the model's own modules; sets up gradient checkpointing (`checkpoints`: that of the
    backbone) and attention.
    """
    modules = model.modules()
    for module in modules.values():
        module.requires_grad_(requires_grad=False).eval()
    for part in trainable.parts:
        part.module.to(torch_dtype(precision.trained)).train()
        for group in part.learning_groups() if trainable.whole_model else ():
            for parameter in part.parameters(group):
                parameter.requires_grad = True
    for name in sorted(trainable.active) if options.gradient_checkpointing else ():
        checkpoint_activations(modules[name].train(), checkpoints)  # transformers does so in training mode only
    set_attention(model.backbone, precision.attention)


def compute_module(
    module: Any, trainable: Trainable, precision: Precision, device: torch.device, *, active: bool
) -> Any:
    """The module to compute with, on the device. If gradients pass through it (`active`), the module itself; else in
    half precision where the run uses it, as a copy if its exact weights are saved with the model."""
    if active or precision.frozen == "fp32":
        return module.to(device)
    if trainable.whole_model:
        return working_copy(module, precision.frozen, device)
    compute_in_stored_dtype(module)
    return module.to(device=device, dtype=torch_dtype(precision.frozen))


def working_copy(module: Any, dtype: FloatName, device: torch.device) -> Any:
    """A copy of a frozen module in half precision, or the module itself in fp32. The original keeps its exact weights,
    which are saved."""
    if dtype == "fp32":
        return module.to(device)
    return copy.deepcopy(module).to(device=device, dtype=torch_dtype(dtype))


def encoding_vae(vae: Any, precision: Precision, device: torch.device) -> Any:
    """The VAE to encode images with.

    On a CPU convolutions are faster with channels last, which changes the last bits of their results. Their weights are
    converted too, or they would be reordered for every image (benchmarks/RESULTS.md).
    """
    encoding = working_copy(vae, precision.vae, device)
    set_attention(encoding, precision.attention)
    if device.type == "cpu":
        encoding.encoder.to(memory_format=torch.channels_last)
    return encoding


def tile_vae(vae: Any, stride: int) -> None:
    """Let a VAE encode and decode larger images in tiles of 512 pixels that overlap by a quarter and are blended
    (diffusers' tiling). The memory of its activations is then that of one tile: a quarter, at 1024x1024.

    Each tile has its own mean and variance in the norms, and attends to itself, so latents differ from those of the
    whole image. Smaller images are the same. `stride`: pixels of a latent.
    """
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // stride


@contextmanager
def visiting(modules: Iterable[Any], device: torch.device) -> Iterator[None]:
    """While this is open, modules are on a device; then they go back to where they were."""
    homes = [(module, module.device) for module in modules if module.device != device]
    try:
        for module, _ in homes:
            module.to(device)
        yield
    finally:
        for module, home in homes:
            module.to(home)


def offload_vae(model: Model, options: MemoryOptions, *, keep: bool) -> None:
    """Free the VAE after all images are encoded, or with `keep` move it to the CPU, to be saved or to decode later."""
    if keep:
        model.vae.to("cpu")
    else:
        model.vae = None
    release_memory(options)


def offload_text_encoders(model: Model, options: MemoryOptions, *, keep: bool) -> None:
    """Free the text encoders after all captions are encoded, or with `keep` move them to the CPU, to be saved."""
    if keep:
        for module in model.text_encoders.values():
            module.to("cpu")
    else:
        model.text_encoders = {}
    release_memory(options)


def loading_device(options: MemoryOptions, device: torch.device) -> torch.device:
    """The device that weights are loaded to: the CPU, or with --lowram directly the GPU."""
    return device if options.lowram else torch.device("cpu")


def release_memory(options: MemoryOptions) -> None:
    """Free cached GPU memory; with --highvram it stays reserved."""
    if not options.highvram:
        release_cached()


def set_attention(module: Any, attention: Attention) -> None:
    """Set the attention kernels of a diffusers model (U-Net, VAE). CLIP keeps its own: 77 tokens need little."""
    from diffusers.models import attention_processor

    processors: Any = attention_processor
    if attention == "xformers":
        module.enable_xformers_memory_efficient_attention()
    elif attention == "mem_eff":
        module.set_attn_processor(MemoryEfficientAttention(processors.AttnProcessor2_0()))
    else:
        module.set_attn_processor(processors.AttnProcessor2_0())


class MemoryEfficientAttention:
    """An attention processor for diffusers that uses torch's memory-efficient kernel first.

    The MATH kernel, which stores all attention scores, is the last resort for shapes that no other kernel supports.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention of `attn`, computed by the inner processor."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            result: torch.Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return result


_UNSCALE_ARGUMENTS = ("optimizer", "inv_scale", "found_inf", "allow_fp16")


@contextmanager
def fp16_gradients(scaler: Any | None) -> Iterator[None]:
    """Let a gradient scaler unscale fp16 gradients (--full_fp16) while this is open.

    torch.amp.GradScaler calls its private `_unscale_grads_` with allow_fp16=False, since unscaling in fp16 loses
    gradients below 6e-8. --full_fp16 accepts that: here the argument is True, for this scaler only. `scaler` None (no
    scaler in use) does nothing. Raises RuntimeError if torch's method has unexpected arguments.
    """
    if scaler is None:
        yield
        return
    original = getattr(scaler, "_unscale_grads_", None)
    arguments = None if original is None else tuple(inspect.signature(original).parameters)
    if original is None or arguments != _UNSCALE_ARGUMENTS:
        raise RuntimeError(
            f"--full_fp16 does not work with torch {torch.__version__}: GradScaler._unscale_grads_ has the arguments "
            f"{arguments} instead of {_UNSCALE_ARGUMENTS}; use --mixed_precision bf16 --full_bf16, or the torch "
            "version of requirements.txt"
        )
    scaler._unscale_grads_ = partial(_unscale_fp16_too, original)
    try:
        yield
    finally:
        del scaler._unscale_grads_  # uncovers the method of the class


def _unscale_fp16_too(
    original: Callable[..., Any],
    optimizer: Any,
    inv_scale: torch.Tensor,
    found_inf: torch.Tensor,
    allow_fp16: bool,  # noqa: FBT001 - as torch calls it
) -> Any:
    return original(optimizer, inv_scale, found_inf, True)  # noqa: FBT003 - as torch declares it
