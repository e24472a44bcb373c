"""Merge checkpoints by a weighted sum of their tensors, computed while the new file is written.

Only headers are compared before. No torch at module level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from library.checkpoints.files import TensorReader
from library.checkpoints.header import CheckpointError, Header, TensorInfo
from library.checkpoints.keymap import flat_shape
from library.checkpoints.lazy import LazyTensor, torch_dtype
from library.checkpoints.position_ids import mended
from library.checkpoints.prediction_marks import MARKS, ZTSNR
from library.checkpoints.quantized import refuse as refuse_quantized
from library.checkpoints.sd_layout import SD1, with_text_model
from library.convert import ema_copies
from library.families.registry import declared_prediction, detect
from library.messages import counted, listed
from library.options.mistakes import Mistakes

if TYPE_CHECKING:
    from torch import Tensor

    from library.families.family import Family
    from library.objective.process import Prediction

_UNET = ("model.diffusion_model.", ema_copies.PREFIX)
_TEXT = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
# no weights: copied from the first model, as sums of schedules or causal masks have no meaning
_PASSED = re.compile(
    rf"{SD1.kept}|.*\.attn_mask|.*position_ids|{'|'.join(map(re.escape, ema_copies.NUMBERS))}|{'|'.join(MARKS)}"
)


@dataclass(frozen=True)
class MergeSource:
    """One of the models. `family` None: unsupported; `prediction` None: not declared. `noise`: what it declares, as
    text; models of another noise process than the family's can be merged with each other."""

    header: Header
    ratio: float
    family: Family | None
    prediction: Prediction | None
    noise: str = ""

    @property
    def tensors(self) -> dict[str, tuple[str, TensorInfo]]:
        """Its tensors by a common name: (name in the file, shape and dtype)."""
        return {_common(name): (name, info) for name, info in self.header.tensors.items()}


@dataclass(frozen=True)
class Merged:
    """The tensors of the new file, computed when read; `skipped`: tensors that the first model lacks."""

    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Arithmetic:
    """`dtype` and `device` of the computation, `saved`: dtype of the file ("F32", "F16", "BF16")."""

    dtype: str = "F32"
    saved: str = "F32"
    device: str = "cpu"


def open_source(header: Header, ratio: float) -> MergeSource:
    """Open a model to merge. Raises CheckpointError for a folder and for files that are not models."""
    if header.kind == "diffusers":
        raise CheckpointError(
            f"{header.path}: diffusers folders cannot be merged. Convert it to a file: "
            f"python tools/convert_checkpoint.py {header.path} {header.path.name}.safetensors"
        )
    refuse_quantized(header)
    try:
        family = detect(header)
    except CheckpointError:
        if not any(name.startswith(_UNET[0]) for name in header.tensors):
            raise
        family = None  # another model with a U-Net, such as one for inpainting: merged by names and shapes
    declared = declared_prediction(header)
    return MergeSource(
        header, ratio, family, declared.prediction, ", ".join(declared.unknown) or declared.prediction or ""
    )


def check(sources: Sequence[MergeSource], mistakes: Mistakes) -> None:
    """Add mistakes: different families, shapes or prediction types, or no weights in common."""
    first = sources[0]
    kinds = {source.header.path: source.family.title if source.family else "unknown" for source in sources}
    if len(set(kinds.values())) > 1:
        details = ", ".join(f"{path} is {kind}" for path, kind in kinds.items())
        mistakes.add(f"the models differ in kind: {details}", "merge models of the same kind")
        return
    if len({source.noise for source in sources} - {""}) > 1:
        details = ", ".join(f"{source.header.path}: {source.noise or 'not declared'}" for source in sources)
        mistakes.add(
            f"the models have different prediction types and cannot be merged ({details})",
            "merge models with the same prediction type; correct a wrong declaration with "
            "tools/convert_checkpoint.py --prediction_type",
        )
    known = first.tensors
    for other in sources[1:]:
        shared = {name: pair for name, pair in other.tensors.items() if name in known and is_weight(name, pair[1])}
        if not shared:
            mistakes.add(f"{other.header.path} and {first.header.path} have no weights of the same name")
        wrong = [
            f"{name} {known[name][1].shape} and {info.shape}"
            for name, (_, info) in shared.items()
            if flat_shape(info.shape) != flat_shape(known[name][1].shape)
        ]
        if wrong:
            mistakes.add(
                f"{first.header.path} and {other.header.path} differ in shape in "
                f"{counted(len(wrong), 'tensor')}: {listed(wrong, 5)}",
                "merge models of the same kind",
            )


def merge(sources: Sequence[MergeSource], arithmetic: Arithmetic, *, unet_only: bool = False) -> Merged:
    """Sum ratio times tensor, under the first model's names; `unet_only`: all else is copied from the first model.

    Tensors that a model lacks, integers, schedules and masks are taken from the first model. The sources must have
    passed `check`.
    """
    first, *others = sources
    readers = {id(source): TensorReader(source.header) for source in sources}
    known = [source.tensors for source in sources]
    notes = _notes(sources, known)
    with_ema = all(_ema_names(tensors) == _ema_names(known[0]) for tensors in known)
    if not with_ema:
        notes.append("the EMA copies are left out, as not every model has them")
    tensors: dict[str, LazyTensor] = {}
    for name, (own, info) in known[0].items():
        if not with_ema and name.startswith(ema_copies.PREFIX):
            continue
        lazy = _lazy(readers[id(first)], own, info)
        if not is_weight(name, info) or (unet_only and not name.startswith(_UNET)):
            tensors[own] = (
                lazy.cast(arithmetic.saved)
                if is_weight(name, info)
                else replace(mended(name, lazy), may_be_infinite=True)
            )
            continue
        parts = [(lazy, first.ratio)]
        for other, found in zip(others, known[1:], strict=True):
            if name in found:
                theirs = _lazy(readers[id(other)], *found[name]).reshape(info.shape)
                parts.append((theirs, other.ratio))
            else:
                parts[0] = (lazy, parts[0][1] + other.ratio)
        tensors[own] = lazy.cast(arithmetic.saved) if len(parts) == 1 else _sum(parts, arithmetic)
    for source, found in zip(sources, known, strict=True):
        marks = {mark: _lazy(readers[id(source)], *found[mark]) for mark in MARKS if mark in found}
        tensors = marks | tensors
    skipped = {name for found in known[1:] for name in found if name not in known[0] and name not in MARKS}
    return Merged(tensors, tuple(notes), tuple(sorted(skipped)))


def _notes(sources: Sequence[MergeSource], known: Sequence[Mapping[str, tuple[str, TensorInfo]]]) -> list[str]:
    """Return notes about the models for the user."""
    first = sources[0]
    notes = []
    total = sum(source.ratio for source in sources)
    if abs(total - 1) > 1e-6:
        notes.append(f"the ratios add up to {total:g}, not to 1: the weights are scaled by that")
    if first.family is None:
        notes.append("unknown kind of model: merged by names and shapes only")
    for other, found in zip(sources[1:], known[1:], strict=True):
        missing = [name for name, (_, info) in known[0].items() if name not in found and is_weight(name, info)]
        missing = [name for name in missing if not name.startswith(ema_copies.PREFIX)]
        if missing:
            what = f"{other.header.path} lacks {counted(len(missing), 'tensor')}, taken from {first.header.path}"
            notes.append(f"{what}: {listed(missing, 5)}")
    silent = [str(source.header.path) for source in sources if not source.noise]
    noise = next((source.noise for source in sources if source.noise), "")
    if silent and noise:
        notes.append(f"prediction type not declared, {noise} assumed like the others: {listed(silent, 5)}")
    with_zero_snr = [found for found in known if ZTSNR in found]
    if with_zero_snr and len(with_zero_snr) < len(sources):
        notes.append("only some models are marked as trained with zero terminal SNR; the result is marked so")
    return notes


def _ema_names(tensors: Mapping[str, object]) -> set[str]:
    return {name for name in tensors if name.startswith(ema_copies.PREFIX)}


def weighted_sum(
    headers: Sequence[Header], shares: Sequence[float], like: Header, saved: str | None = None
) -> dict[str, LazyTensor]:
    """Sum share times tensor over files with the same tensors, models or adapters, in float64. What is no weight is
    copied from `like`, one of them. `saved` ("F16"): dtype of all but single numbers, such as alphas; None: as it is.

    With shares that add up to 1, weights that are the same in all files come out exactly.
    """
    readers = [TensorReader(header) for header in headers]
    own = readers[headers.index(like)]
    tensors: dict[str, LazyTensor] = {}
    for name, info in like.tensors.items():
        if is_weight(name, info):
            dtype = info.dtype if saved is None or not info.shape else saved
            parts = [(reader.lazy(name), share) for reader, share in zip(readers, shares, strict=True)]
            tensors[name] = _sum(parts, Arithmetic("F64", dtype))
        else:
            tensors[name] = replace(own.lazy(name), may_be_infinite=True)
    return tensors


def _sum(parts: Sequence[tuple[LazyTensor, float]], arithmetic: Arithmetic) -> LazyTensor:
    """Sum ratio times tensor, one tensor at a time in memory."""

    def load() -> Tensor:
        dtype = torch_dtype(arithmetic.dtype)
        (tensor, ratio), *more = parts
        total = tensor.load().to(arithmetic.device).to(dtype) * ratio
        for other, share in more:
            total.add_(other.load().to(arithmetic.device).to(dtype), alpha=share)
        return total.to(torch_dtype(arithmetic.saved)).to("cpu")

    return LazyTensor(TensorInfo(arithmetic.saved, parts[0][0].shape), load)


def _lazy(reader: TensorReader, name: str, info: TensorInfo) -> LazyTensor:
    return replace(reader.lazy(name), info=info)


def _common(name: str) -> str:
    """Return a tensor's name with the `text_model.` level, which some files lack."""
    for prefix in _TEXT:
        if name.startswith(prefix):
            return prefix + with_text_model(name.removeprefix(prefix))
    return name


def is_weight(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a weight: not an integer, a schedule or a mask, of which a sum means nothing."""
    return info.is_float and not _PASSED.fullmatch(name)
