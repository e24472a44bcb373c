"""The layers of a LoRA or LoCon file as pairs of factors, for the tools that resize, merge and split them.

Format: `<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha` (sd-scripts, networks/lora.py). Any other tensor is an
error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.messages import counted, listed
from networks import registry
from networks.adapter import AdapterError
from networks.loading import by_layer

DOWN, UP, ALPHA, MID = "lora_down.weight", "lora_up.weight", "alpha", "lora_mid.weight"
_FOREIGN = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.")


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW = alpha / rank * up @ down of one layer: down (r, in) or (r, in, kh, kw), up (out, r) or (out, r, 1, 1)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor of the product, alpha / rank."""
        return self.alpha / self.rank

    @property
    def is_kernel(self) -> bool:
        """Whether it is for a convolution larger than 1x1, whose rank is `conv_dim`."""
        return self.down.ndim == 4 and tuple(self.down.shape[2:]) != (1, 1)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Up (out, r) and down (r, in * kh * kw)."""
        return self.up.flatten(1), self.down.flatten(1)

    def delta(self) -> Tensor:
        """ΔW (out, in) or (out, in, kh, kw) in float32 (float64 for float64)."""
        dtype = torch.float64 if self.up.dtype == torch.float64 else torch.float32
        up, down = self.matrices()
        product: Tensor = self.scale * (up.to(dtype) @ down.to(dtype))
        return product.reshape(self.up.shape[0], *self.down.shape[1:])

    def shaped(self, up: Tensor, down: Tensor, alpha: float) -> Factors:
        """Other matrices (out, r), (r, in * kh * kw) in the shapes of this layer in files."""
        rank = down.shape[0]
        ones = (1,) * (self.down.ndim - 2)
        return Factors(down.reshape(rank, *self.down.shape[1:]), up.reshape(up.shape[0], rank, *ones), alpha)

    def to(self, device: torch.device | str) -> Factors:
        """A copy on another device."""
        return replace(self, down=self.down.to(device), up=self.up.to(device))


def read_factors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Factors]:
    """The layers of a file by name, in their dtype. AdapterError that names the layers that are not LoRA.

    A core (`lora_mid`, LyCORIS' use_tucker) is multiplied into `down`, with the same ΔW.
    """
    unknown = [key for key in tensors if any(mark in key for mark in _FOREIGN)]
    if unknown:  # all others have kohya's names by now
        raise AdapterError(
            f"{where}: {counted(len(unknown), 'key')} of no layer of a supported model: {listed(unknown, 3)}",
            "use a LoRA of Stable Diffusion",
        )
    layers = by_layer(tensors)
    wrong = [f"{name} ({why})" for name, parts in layers.items() if (why := _describe_other_kind(parts))]
    if wrong:
        raise AdapterError(
            f"{where} has layers that are not LoRA, {len(wrong)} of {len(layers)}: {listed(wrong, 5, separator='; ')}",
            "use a LoRA or LoCon file; merge_lora.py --sd_model merges other kinds into a model",
        )
    if not layers:
        raise AdapterError(f"{where}: has no layers", "use a LoRA file")
    return {name: _factors(name, parts, where) for name, parts in layers.items()}


def _describe_other_kind(parts: Mapping[str, Tensor]) -> str:
    """Why a layer is not a plain LoRA; empty if it is."""
    if "dora_scale" in parts:
        return "DoRA, whose ΔW depends on the model's weight"
    if {DOWN, UP} <= parts.keys() <= {DOWN, UP, ALPHA, MID}:
        return ""
    try:
        title = registry.detect_kind([f"layer.{suffix}" for suffix in parts]).title
    except AdapterError:
        title = ""
    if title and not (parts.keys() & {DOWN, UP}):
        return title
    missing = sorted({DOWN, UP} - parts.keys())
    return f"without {', '.join(missing)}" if missing else f"with {', '.join(sorted(parts.keys() - {DOWN, UP, ALPHA}))}"


def _factors(name: str, parts: Mapping[str, Tensor], where: str) -> Factors:
    down, up = parts[DOWN], parts[UP]
    if MID in parts:  # (r, r, kh, kw) between a 1x1 down and up
        if parts[MID].shape[:2] != (down.shape[0], down.shape[0]) or parts[MID].ndim != 4:
            what = (
                f"{where}: the core of {name} does not fit its factors: {tuple(parts[MID].shape)}, {tuple(down.shape)}"
            )
            raise AdapterError(what, "get the file again: it is damaged")
        core = torch.einsum("rskl,si->rikl", parts[MID].float(), down.flatten(1).float())
        down = core.to(down.dtype)
    ranks = (down.shape[0], up.shape[1] if up.ndim > 1 else 0)
    if down.ndim not in (2, 4) or up.ndim != down.ndim or ranks[0] != ranks[1] or up.shape[2:].numel() != 1:
        raise AdapterError(
            f"{where}: the factors of {name} do not fit together: {tuple(down.shape)} and {tuple(up.shape)}",
            "get the file again: it is damaged",
        )
    alpha = float(parts[ALPHA]) if ALPHA in parts else 0.0
    return Factors(down, up, alpha or float(ranks[0]))


def file_tensors(layers: Mapping[str, Factors], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file, in `dtype` on the CPU; an alpha that `dtype` would round stays in float32."""
    tensors = {}
    for name, layer in layers.items():
        alpha = torch.tensor(layer.alpha, dtype=torch.float32)
        rounded = alpha.to(dtype)
        tensors[f"{name}.{DOWN}"] = layer.down.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.{UP}"] = layer.up.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.{ALPHA}"] = rounded if float(rounded) == float(alpha) else alpha
    return tensors
