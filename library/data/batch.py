"""What the loader hands to the loop."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples of one bucket (width W, height H). Exactly one of pixels and latents is set."""

    pixels: torch.Tensor | None  # (B, 3, H, W) float32 in [-1, 1]
    latents: torch.Tensor | None  # (B, C, h, w) float32, a sample of the VAE's posterior, not scaled
    mask: torch.Tensor | None  # (B, 1, h, w) float32 in [0, 1]: what counts; None: everything
    input_ids: torch.Tensor  # (B, n, 77) int64; (B, 1, L) when padded to the longest of the batch
    token_weights: torch.Tensor | None  # (B, n, 77) float32 beside input_ids; None: all 1
    # (B, 6) float32: original height and width, crop top and left, target height and width; see size_conditioning
    sizes: torch.Tensor
    score: torch.Tensor  # (B,) float32: aesthetic score, 0 to 10
    weights: torch.Tensor  # (B,) float32: prior_loss_weight for a regularisation image, else 1
    sample_index: torch.Tensor  # (B,) int64: position of the sample in the whole run, the key of its noise
    is_reg: torch.Tensor  # (B,) bool
    paths: tuple[str, ...]
    captions: tuple[str, ...]  # as tokenised: after dropout and shuffling

    def __len__(self) -> int:
        return len(self.paths)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory (called by torch's DataLoader)."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {name: value.pin_memory() for name, value in tensors.items() if hasattr(value, "pin_memory")}
        return replace(self, **pinned)
