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
    zeroed = {name: tensor.clone() for name, tensor in outputs.items()}
    for tensor in zeroed.values():
        for row in empty:
            tensor[row] = 0  # row by row: a list of rows would be uploaded
    return zeroed
