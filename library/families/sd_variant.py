"""What tells Stable Diffusion 1.x from 2.x, and what both loading and the plan read from a checkpoint. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.checkpoints import sd_layout
from library.checkpoints.header import Header
from library.checkpoints.lazy import LazyTensor
from library.objective.process import Prediction


@dataclass(frozen=True)
class Variant:
    """Where SD1 and SD2 differ.

    `text_keys`: a single file of the variant has one of these. `linear`: the U-Net's projections in a diffusers folder
    are Linear (SD2) and not 1x1 convolutions. Heads: `heads` at every level, else width / `head_size`.
    """

    layout: sd_layout.Layout
    text_keys: tuple[str, ...]
    linear: bool
    activation: str
    heads: int | None
    head_size: int | None
    tokenizer_id: str
    pad_id: int
    scale: float = 0.18215
    channels: int = 4


def noted_prediction(header: Header) -> Prediction | None:
    """What the checkpoint itself says its U-Net predicts: a diffusers folder's scheduler, or modelspec metadata."""
    noted = header.configs.get("scheduler", {}).get("prediction_type")
    noted = noted or header.metadata.get("modelspec.prediction_type")
    if noted in ("v", "v_prediction"):
        return "v"
    return "epsilon" if noted == "epsilon" else None


def without_text_model(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A text encoder's tensors as transformers 5 names them, from the names of files."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
