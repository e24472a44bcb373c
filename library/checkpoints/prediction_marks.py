"""Read and write how a checkpoint declares its prediction type and noise schedule.

Original files declare them with the empty tensors `v_pred` and `ztsnr` (SDXL fine-tunes; read by ComfyUI, Forge and
others) or with modelspec.prediction_type in the metadata (Stability-AI/ModelSpec); diffusers folders in the scheduler's
configuration. No torch at module level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from library.checkpoints.header import Header, TensorInfo
from library.checkpoints.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

V_PRED, ZTSNR = "v_pred", "ztsnr"
MARKS = (V_PRED, ZTSNR)
_METADATA = "modelspec.prediction_type"
_SPELLINGS: Mapping[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v": "v", "v_prediction": "v"}


@dataclass(frozen=True)
class DeclaredPrediction:
    """What a checkpoint declares; None if it declares nothing. `where` says where, for messages ("": nowhere)."""

    prediction: Literal["epsilon", "v"] | None = None
    zero_terminal_snr: bool | None = None
    where: str = ""


def declared_prediction(header: Header) -> DeclaredPrediction:
    """Read what a checkpoint declares. A file's keys override its metadata, as in inference programs."""
    if header.kind == "diffusers":
        scheduler = header.configs.get("scheduler", {})
        prediction = _SPELLINGS.get(str(scheduler.get("prediction_type")))
        rescaled = scheduler.get("rescale_betas_zero_snr")
        zero = rescaled if isinstance(rescaled, bool) else None
        where = "" if prediction is None and zero is None else "its scheduler_config.json"
        return DeclaredPrediction(prediction, zero, where)
    keys = [mark for mark in MARKS if mark in header.tensors]
    places = [f"its key{'s' if len(keys) > 1 else ''} {' and '.join(keys)}"] if keys else []
    prediction = _SPELLINGS.get(header.metadata.get(_METADATA, ""))
    if V_PRED in keys:
        prediction = "v"
    elif prediction is not None:
        places.append(f"{_METADATA} in its metadata")
    return DeclaredPrediction(prediction, True if ZTSNR in keys else None, " and ".join(places))


def marks(prediction: str, *, zero_terminal_snr: bool) -> dict[str, LazyTensor]:
    """Return the empty tensors, (0,) float32, to write into an original file: `v_pred` for "v", `ztsnr` for zero
    terminal SNR. They replace any marks of the source file (MARKS)."""
    names = [name for name, is_set in ((V_PRED, prediction == "v"), (ZTSNR, zero_terminal_snr)) if is_set]
    return {name: LazyTensor(TensorInfo("F32", (0,)), _empty) for name in names}


def _empty() -> Tensor:
    import torch

    return torch.empty(0)
