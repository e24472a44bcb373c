"""Zero the text encoder outputs of empty texts. No torch at module level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def zero_empty(outputs: Mapping[str, Tensor], texts: Sequence[str]) -> dict[str, Tensor]:
    """Return the outputs with the rows of empty texts set to zero; outputs have one row per text.

    SDXL was trained this way with dropped captions (generative-models, the embedders' ucg_rate), and diffusers'
    pipelines do it without a negative prompt (force_zeros_for_empty_prompt).
    """
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if not empty:
        return dict(outputs)
    import torch

    zeroed = {}
    for name, tensor in outputs.items():
        kept = torch.ones(len(texts), dtype=tensor.dtype)
        kept[empty] = 0
        kept = kept.to(tensor.device, non_blocking=True)
        zeroed[name] = tensor * kept.reshape(-1, *(1 for _ in tensor.shape[1:]))
    return zeroed
