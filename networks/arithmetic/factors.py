"""The layers of a LoRA or LoCon file as pairs of factors, for the tools that resize, sum and split them.

Format: `<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha` (sd-scripts, networks/lora.py). What else a file
holds is named and refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
        """What the product is multiplied with."""
        return self.alpha / self.rank

    @property
    def is_kernel(self) -> bool:
        """Whether it sits on a convolution larger than 1x1, which has the rank `conv_dim`."""
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
        """Other matrices (out, r), (r, in * kh * kw) in the shapes that files have of this layer."""
        rank = down.shape[0]
        ones = (1,) * (self.down.ndim - 2)
        return Factors(down.reshape(rank, *self.down.shape[1:]), up.reshape(up.shape[0], rank, *ones), alpha)

    def to(self, device: torch.device | str) -> Factors:
        """On another device."""
        return replace(self, down=self.down.to(device), up=self.up.to(device))


def read_factors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Factors]:
    """The layers of a file's tensors by name, in their dtype. AdapterError that names each layer that is no LoRA.

    Layers with a core (`lora_mid`, LyCORIS' use_tucker) become plain ones of the same ΔW.
    """
    if any(mark in key for key in tensors for mark in _FOREIGN):
        raise AdapterError(
            f"{where}: has the key names of diffusers or PEFT",
            "convert it first: python tools/convert_lora.py --help",
        )
    layers = by_layer(tensors)
    wrong = {name: why for name, parts in layers.items() if (why := _what_else(parts))}
    if wrong:
        shown = "; ".join(f"{name} ({why})" for name, why in list(wrong.items())[:5])
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise AdapterError(
            f"{where}: {len(wrong)} of its {len(layers)} layers are no LoRA: {shown}{more}",
            "only LoRA and LoCon have ranks; merge_lora.py --sd_model merges any kind into a model",
        )
    if not layers:
        raise AdapterError(f"{where}: holds no layer", "give a LoRA")
    return {name: _factors(name, parts, where) for name, parts in layers.items()}


def _what_else(parts: Mapping[str, Tensor]) -> str:
    """What a layer is that is no plain LoRA; empty for one that is."""
    if "dora_scale" in parts:
        return "DoRA, whose change depends on the model's weight"
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
        core = torch.einsum("rskl,si->rikl", parts[MID].float(), down.flatten(1).float())
        down = core.to(down.dtype)
    ranks = (down.shape[0], up.shape[1] if up.ndim > 1 else 0)
    if down.ndim not in (2, 4) or up.ndim != down.ndim or ranks[0] != ranks[1] or up.shape[2:].numel() != 1:
        raise AdapterError(
            f"{where}: the factors of {name} do not fit together: {tuple(down.shape)} and {tuple(up.shape)}",
            "the file is damaged: get it again",
        )
    alpha = float(parts[ALPHA]) if ALPHA in parts else 0.0
    return Factors(down, up, alpha or float(ranks[0]))


def file_tensors(layers: Mapping[str, Factors], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file holds of these layers, in `dtype` on the CPU; an alpha that `dtype` would round stays in float32."""
    tensors = {}
    for name, layer in layers.items():
        alpha = torch.tensor(layer.alpha, dtype=torch.float32)
        held = alpha.to(dtype)
        tensors[f"{name}.{DOWN}"] = layer.down.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.{UP}"] = layer.up.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.{ALPHA}"] = held if float(held) == float(alpha) else alpha
    return tensors
