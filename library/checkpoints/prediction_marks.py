"""What a checkpoint itself says of its U-Net's prediction and noise schedule, and the marks that say so in a file.

An original file may say it by empty tensors, `v_pred` and `ztsnr` (SDXL fine-tunes; ComfyUI, Forge and others go by
them), or by modelspec.prediction_type in its metadata (Stability-AI/ModelSpec); a diffusers folder by its scheduler's
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
class Noted:
    """What a checkpoint says; None where it does not say. `where` names the places for the user ("": nowhere)."""

    prediction: Literal["epsilon", "v"] | None = None
    zero_terminal_snr: bool | None = None
    where: str = ""


def noted(header: Header) -> Noted:
    """Read what a checkpoint says. The keys of a file outweigh its metadata: the programs that draw go by them."""
    if header.kind == "diffusers":
        scheduler = header.configs.get("scheduler", {})
        prediction = _SPELLINGS.get(str(scheduler.get("prediction_type")))
        rescaled = scheduler.get("rescale_betas_zero_snr")
        zero = rescaled if isinstance(rescaled, bool) else None
        return Noted(prediction, zero, "" if prediction is None and zero is None else "its scheduler_config.json")
    keys = [mark for mark in MARKS if mark in header.tensors]
    places = [f"its key{'s' if len(keys) > 1 else ''} {' and '.join(keys)}"] if keys else []
    said = _SPELLINGS.get(header.metadata.get(_METADATA, ""))
    if V_PRED in keys:
        said = "v"
    elif said is not None:
        places.append(f"{_METADATA} in its metadata")
    return Noted(said, True if ZTSNR in keys else None, " and ".join(places))


def marks(prediction: str, *, zero_terminal_snr: bool) -> dict[str, LazyTensor]:
    """The empty tensors, (0,) float32, to write into an original file: `v_pred` for "v", `ztsnr` for a schedule that
    ends in pure noise. Whatever marks the source had are to be left out (MARKS)."""
    names = [name for name, meant in ((V_PRED, prediction == "v"), (ZTSNR, zero_terminal_snr)) if meant]
    return {name: LazyTensor(TensorInfo("F32", (0,)), _empty) for name in names}


def _empty() -> Tensor:
    import torch

    return torch.empty(0)
