"""Read and write how a checkpoint declares its prediction type and noise schedule.

Original files declare them with the empty tensors `v_pred` and `ztsnr` (SDXL fine-tunes; read by ComfyUI, Forge and
others), with modelspec.prediction_type in the metadata (Stability-AI/ModelSpec), or with `parameterization` in the
.yaml of the same name that WebUIs read; diffusers folders in the scheduler's configuration. No torch at module level.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from library.bounded import read_bytes
from library.checkpoints.header import Header, TensorInfo
from library.checkpoints.lazy import LazyTensor
from library.limits import CONFIG_FILE

if TYPE_CHECKING:
    from torch import Tensor

V_PRED, ZTSNR = "v_pred", "ztsnr"
MARKS = (V_PRED, ZTSNR)
_METADATA = "modelspec.prediction_type"
_RESCALED = "rescale_betas_zero_snr"
_SPELLINGS: Mapping[str, Literal["epsilon", "v"]] = {
    "epsilon": "epsilon", "eps": "epsilon", "v": "v", "v_prediction": "v", "v_pred": "v", "vpred": "v",
}  # fmt: skip
_NOT_SAID = ("", "none", "null")
# Schedulers of diffusers for other processes than a discrete variance-preserving one.
_OTHER_SCHEDULERS = ("FlowMatch", "EDM", "CosineDPM", "ScoreSde", "CMStochastic", "KarrasVe")
_SCHEDULE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "trained_betas")


@dataclass(frozen=True)
class DeclaredPrediction:
    """What a checkpoint declares; None if it declares nothing. `where` says where, for messages ("": nowhere).

    `unknown`: quotes of what it declares that has no meaning here ("prediction_type = flow_prediction").
    """

    prediction: Literal["epsilon", "v"] | None = None
    zero_terminal_snr: bool | None = None
    where: str = ""
    unknown: tuple[str, ...] = ()


def declared_prediction(header: Header) -> DeclaredPrediction:
    """Read what a checkpoint declares. A file's keys override its metadata, as in inference programs; both override
    the .yaml beside it."""
    return _of_folder(header) if header.kind == "diffusers" else _of_file(header)


def _of_folder(header: Header) -> DeclaredPrediction:
    scheduler = header.configs.get("scheduler", {})
    prediction, unknown = _read("prediction_type", scheduler.get("prediction_type"))
    rescaled = scheduler.get(_RESCALED)
    zero = rescaled if isinstance(rescaled, bool) else None
    if zero is None and rescaled is not None:
        unknown += (_quote(_RESCALED, rescaled),)
    name = str(scheduler.get("_class_name", ""))
    if name.startswith(_OTHER_SCHEDULERS):
        unknown = (_quote("_class_name", name), *unknown)
    if scheduler.get("use_flow_sigmas"):
        unknown += (_quote("use_flow_sigmas", scheduler["use_flow_sigmas"]),)
    is_silent = prediction is None and zero is None and not unknown
    return DeclaredPrediction(prediction, zero, "" if is_silent else "its scheduler_config.json", unknown)


def _of_file(header: Header) -> DeclaredPrediction:
    keys = [mark for mark in MARKS if mark in header.tensors]
    places = [f"its key{'s' if len(keys) > 1 else ''} {' and '.join(keys)}"] if keys else []
    prediction: Literal["epsilon", "v"] | None = "v" if V_PRED in keys else None
    unknown: tuple[str, ...] = ()
    if prediction is None:
        prediction, unknown = _read(_METADATA, header.metadata.get(_METADATA))
        if prediction or unknown:
            places.append(f"{_METADATA} in its metadata" if prediction else "its metadata")
    if prediction is None and not unknown and (said := _in_yaml(header)) is not None:
        prediction, unknown = _read("parameterization", said)
        if prediction or unknown:
            places.append(header.path.with_suffix(".yaml").name)
    return DeclaredPrediction(prediction, True if ZTSNR in keys else None, " and ".join(places), unknown)


def _in_yaml(header: Header) -> str | None:
    """Return `parameterization` of the .yaml beside a file, such as "v"; None if there is none."""
    try:
        text = read_bytes(header.path.with_suffix(".yaml"), CONFIG_FILE).decode("utf-8")
    except (OSError, ValueError):
        return None
    found = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
    return found[1] if found else None


def _read(name: str, said: Any) -> tuple[Literal["epsilon", "v"] | None, tuple[str, ...]]:
    """Return (prediction, ()) for a known spelling, (None, a quote) for an unknown one, (None, ()) if nothing is
    said."""
    word = "" if said is None else str(said).strip().lower().replace("-", "_").replace(" ", "_")
    prediction = _SPELLINGS.get(word)
    return prediction, () if prediction or word in _NOT_SAID else (_quote(name, said),)


def declaring(header: Header, prediction: str) -> Header:
    """Return the header of a checkpoint that declares this prediction type, of a folder without its scheduler. What it
    says of zero terminal SNR stays."""
    scheduler = header.configs.get("scheduler", {})
    said = {name: value for name, value in scheduler.items() if name == _RESCALED and isinstance(value, bool)}
    metadata = {**header.metadata, _METADATA: prediction}
    return replace(header, configs={**header.configs, "scheduler": said}, metadata=metadata)


def other_schedule(header: Header, arguments: Mapping[str, Any]) -> list[str]:
    """Return quotes of what a folder's scheduler says of its betas and timesteps that differs from the `arguments` of
    diffusers' schedulers for the family's process."""
    return list(_differences(header.configs.get("scheduler", {}), arguments))


def _differences(scheduler: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[str]:
    for name in _SCHEDULE:
        said, expected = scheduler.get(name), arguments.get(name)
        if said is None or said == expected:
            continue
        numbers = all(isinstance(value, int | float) for value in (said, expected))
        if not (numbers and math.isclose(said, expected or 0, rel_tol=1e-5)):
            yield _quote(name, said)


def _quote(name: str, said: Any) -> str:
    text = said if isinstance(said, str) else json.dumps(said)
    return f"{name} = {text if len(text) <= 60 else text[:60] + '...'}"


def marks(prediction: str, *, zero_terminal_snr: bool) -> dict[str, LazyTensor]:
    """Return the empty tensors, (0,) float32, to write into an original file: `v_pred` for "v", `ztsnr` for zero
    terminal SNR. They replace any marks of the source file (MARKS)."""
    names = [name for name, is_set in ((V_PRED, prediction == "v"), (ZTSNR, zero_terminal_snr)) if is_set]
    return {name: LazyTensor(TensorInfo("F32", (0,)), _empty) for name in names}


def _empty() -> Tensor:
    import torch

    return torch.empty(0)
