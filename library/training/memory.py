"""How a model lies in memory: number formats, attention kernels, checkpointed activations, fp16 gradients."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.runtime.half_weights import compute_as_stored
from library.runtime.precision import Attention, FloatName, Precision, torch_dtype

if TYPE_CHECKING:
    from library.families.family import Model
    from library.options.groups.memory import MemoryOptions
    from library.training.trainable import Trainable


def prepare(model: Model, trainable: Trainable, precision: Precision, options: MemoryOptions) -> None:
    """Put a loaded model into the state that training needs.

    The model is frozen and in evaluation mode; then the trained parts get their own format and training mode, where
    they are the model's own also gradients, and what gradients go through gets, if asked for, checkpointed activations.
    """
    modules = model.modules()
    for module in modules.values():
        module.requires_grad_(False).eval()
    for part in trainable.parts:
        part.module.to(torch_dtype(precision.trained)).train()
        for group in part.learning_groups() if trainable.whole_model else ():
            for parameter in part.parameters(group):
                parameter.requires_grad_(True)
    for name in sorted(trainable.active) if options.gradient_checkpointing else ():
        checkpoint_activations(modules[name].train())  # neither package checkpoints in evaluation mode
    set_attention(model.backbone, precision.attention)


def compute_module(module: Any, trainable: Trainable, active: bool, precision: Precision, device: torch.device) -> Any:
    """The module that computes, on the device: itself where gradients go through it (`active`), else in the
    computation's format, and as a copy where its exact weights are to be written."""
    if active or precision.frozen == "fp32":
        return module.to(device)
    if trainable.whole_model:
        return working_copy(module, precision.frozen, device)
    compute_as_stored(module)
    return module.to(device=device, dtype=torch_dtype(precision.frozen))


def working_copy(module: Any, dtype: FloatName, device: torch.device) -> Any:
    """A frozen module to compute with. The original keeps its exact weights, which the saved file gets."""
    if dtype == "fp32":
        return module.to(device)
    return copy.deepcopy(module).to(device=device, dtype=torch_dtype(dtype))


def encoding_vae(vae: Any, precision: Precision, device: torch.device) -> Any:
    """The VAE that turns images into latents, made ready for that.

    On a CPU its convolutions like the channels last, which changes the last bits of what they compute; and their
    weights too, or they would be reordered for every image (benchmarks/RESULTS.md).
    """
    copied = working_copy(vae, precision.vae, device)
    set_attention(copied, precision.attention)
    if device.type == "cpu":
        copied.encoder.to(memory_format=torch.channels_last)
    return copied


def offload_vae(model: Model, options: MemoryOptions, *, keep: bool) -> None:
    """Take the VAE off the device once every image is encoded. `keep`: it is still needed, to be saved or to decode."""
    if keep:
        model.vae.to("cpu")
    else:
        model.vae = None
    release_memory(options)


def offload_text_encoders(model: Model, options: MemoryOptions, *, keep: bool) -> None:
    """Take the text encoders off the device once every caption is encoded. `keep`: their weights are saved."""
    if keep:
        for module in model.text_encoders.values():
            module.to("cpu")
    else:
        model.text_encoders = {}
    release_memory(options)


def loading_device(options: MemoryOptions, device: torch.device) -> torch.device:
    """Where weights are read to: main memory, or with --lowram straight the device."""
    return device if options.lowram else torch.device("cpu")


def release_memory(options: MemoryOptions) -> None:
    """Give what the device no longer uses back to the system; with --highvram it stays reserved."""
    if torch.cuda.is_available() and not options.highvram:
        torch.cuda.empty_cache()


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute activations on the way back instead of keeping them, in a diffusers or transformers model.

    Non-reentrant: gradients also reach a block whose inputs need none (a text encoder behind frozen embeddings), and
    each parameter's gradient is finished once. transformers checkpoints in training mode only. Raises TypeError
    for a module that knows no checkpointing.
    """
    for name, arguments in (
        ("enable_gradient_checkpointing", {}),  # diffusers, non-reentrant by itself
        ("activation_checkpointing_enable", {"activation_checkpointing_kwargs": {"use_reentrant": False}}),
    ):
        switch: Callable[..., None] | None = getattr(module, name, None)
        if switch is not None:
            switch(**arguments)
            return
    raise TypeError(f"{type(module).__name__} cannot recompute its activations")


def set_attention(module: Any, attention: Attention) -> None:
    """Choose the attention kernels of a diffusers model (U-Net, VAE).

    CLIP is left as it is: over 77 tokens there is nothing to save.
    """
    from diffusers.models import attention_processor

    processors: Any = attention_processor
    if attention == "xformers":
        module.enable_xformers_memory_efficient_attention()
    elif attention == "mem_eff":
        module.set_attn_processor(MemoryEfficientAttention(processors.AttnProcessor2_0()))
    else:
        module.set_attn_processor(processors.AttnProcessor2_0())


class MemoryEfficientAttention:
    """An attention processor of diffusers that prefers torch's kernel with the least memory to the fastest.

    The kernel that keeps all scores in memory comes last, for shapes that no other one takes.
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
        """The attention of `attn`, as the inner processor computes it."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(order, set_priority=True):
            result: torch.Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return result


_UNSCALE_ARGUMENTS = ("optimizer", "inv_scale", "found_inf", "allow_fp16")


@contextmanager
def fp16_gradients(scaler: Any | None) -> Iterator[None]:
    """Let a gradient scaler unscale fp16 gradients (full_fp16), which torch's refuses; afterwards it is as before.

    torch.amp.GradScaler calls its private `_unscale_grads_` with allow_fp16=False, since unscaling in fp16 loses
    gradients below 6e-8. Whoever asks for full_fp16 accepts that; on this one scaler the argument is set to True.
    `scaler` None (no scaler in use) does nothing. Raises RuntimeError when this torch's method has other arguments than
    those known here.
    """
    if scaler is None:
        yield
        return
    original = getattr(scaler, "_unscale_grads_", None)
    known = None if original is None else tuple(inspect.signature(original).parameters)
    if original is None or known != _UNSCALE_ARGUMENTS:
        raise RuntimeError(
            f"--full_fp16 does not fit torch {torch.__version__}: its GradScaler._unscale_grads_ takes {known}, not "
            f"{_UNSCALE_ARGUMENTS}; use --mixed_precision bf16 --full_bf16, or the torch of requirements.txt"
        )
    scaler._unscale_grads_ = partial(_unscale_fp16_too, original)
    try:
        yield
    finally:
        del scaler._unscale_grads_  # the class's own method shows again


def _unscale_fp16_too(
    original: Callable[..., Any], optimizer: Any, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
) -> Any:
    return original(optimizer, inv_scale, found_inf, True)
