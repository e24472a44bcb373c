"""Whole checkpoints merged into one: a weighted sum of their tensors by name, made while the new file is written.

All that is compared beforehand stands in the headers. No torch at module level.
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
from library.checkpoints.prediction_marks import MARKS, ZTSNR
from library.checkpoints.sd_layout import SD1, with_text_model
from library.convert import ema_copies
from library.families.registry import declared_prediction, detect
from library.options.mistakes import Mistakes

if TYPE_CHECKING:
    from torch import Tensor

    from library.families.family import Family
    from library.objective.process import Prediction

_UNET = ("model.diffusion_model.", ema_copies.PREFIX)
_TEXT = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
# not weights: they pass through, as half of a causal mask's infinity and half of a schedule mean nothing
_PASSED = re.compile(
    rf"{SD1.kept}|.*\.attn_mask|.*position_ids|{'|'.join(map(re.escape, ema_copies.NUMBERS))}|{'|'.join(MARKS)}"
)
_LISTED = 5


@dataclass(frozen=True)
class MergeSource:
    """One of the models: its header, its ratio, its family (None: not one that is known), and what it says that its
    U-Net predicts."""

    header: Header
    ratio: float
    family: Family | None
    prediction: Prediction | None

    @property
    def tensors(self) -> dict[str, tuple[str, TensorInfo]]:
        """Its tensors by names that are the same for every spelling: (name in the file, what it is)."""
        return {_common(name): (name, info) for name, info in self.header.tensors.items()}


@dataclass(frozen=True)
class Merged:
    """The tensors of the new file, made when they are read; `skipped`: those of other models that the first lacks."""

    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Arithmetic:
    """How it is computed: `dtype` and `device` of the sums, `saved` the dtype of the file ("F32", "F16", "BF16")."""

    dtype: str = "F32"
    saved: str = "F32"
    device: str = "cpu"


def open_source(header: Header, ratio: float) -> MergeSource:
    """A model to merge. Raises CheckpointError for a folder, and for what is not a model."""
    if header.kind == "diffusers":
        raise CheckpointError(
            f"{header.path}: a diffusers folder, and single files are merged. Make one of it first: "
            f"python tools/convert_checkpoint.py {header.path} {header.path.name}.safetensors"
        )
    try:
        family = detect(header)
    except CheckpointError:
        if not any(name.startswith(_UNET[0]) for name in header.tensors):
            raise
        family = None  # another model with a U-Net, such as one for inpainting: names and shapes must do
    return MergeSource(header, ratio, family, declared_prediction(header).prediction)


def check(sources: Sequence[MergeSource], mistakes: Mistakes) -> None:
    """Add what keeps the models from being merged: other families, other shapes, other predictions, nothing shared."""
    first = sources[0]
    kinds = {source.header.path: source.family.title if source.family else "unknown here" for source in sources}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{path} is {kind}" for path, kind in kinds.items())
        mistakes.add(f"the models differ in kind: {told}", "merge models of one kind")
        return
    if len({source.prediction for source in sources} - {None}) > 1:
        told = ", ".join(f"{source.header.path}: {source.prediction or 'does not say'}" for source in sources)
        mistakes.add(
            f"the U-Nets predict different things, and a sum of them predicts neither ({told})",
            "merge models that predict the same; where a file says the wrong thing, correct it with "
            "tools/convert_checkpoint.py --prediction_type",
        )
    known = first.tensors
    for other in sources[1:]:
        shared = {name: pair for name, pair in other.tensors.items() if name in known and _is_weight(name, pair[1])}
        if not shared:
            mistakes.add(f"{other.header.path} and {first.header.path} have no weights of the same name")
        wrong = [
            f"{name} {known[name][1].shape} and {info.shape}"
            for name, (_, info) in shared.items()
            if flat_shape(info.shape) != flat_shape(known[name][1].shape)
        ]
        if wrong:
            mistakes.add(
                f"{len(wrong)} tensors of {first.header.path} and {other.header.path} differ in shape: {_some(wrong)}",
                "merge models of one kind",
            )


def merge(sources: Sequence[MergeSource], arithmetic: Arithmetic, *, unet_only: bool = False) -> Merged:
    """The sum of ratio times tensor, under the first model's names; with `unet_only` all else is the first model's.

    Where a model lacks a tensor, the first one stands in for it. Integers, schedules and masks are the first model's.
    The sources must have passed `check`.
    """
    first, *others = sources
    readers = {id(source): TensorReader(source.header) for source in sources}
    known = [source.tensors for source in sources]
    notes = _notes(sources, known)
    with_ema = all(_ema_names(tensors) == _ema_names(known[0]) for tensors in known)
    if not with_ema:
        notes.append("the EMA copies are left out, as not every model has them: they would not fit the sum")
    tensors: dict[str, LazyTensor] = {}
    for name, (own, info) in known[0].items():
        if not with_ema and name.startswith(ema_copies.PREFIX):
            continue
        lazy = _lazy(readers[id(first)], own, info)
        if not _is_weight(name, info) or (unet_only and not name.startswith(_UNET)):
            tensors[own] = (
                lazy.cast(arithmetic.saved) if _is_weight(name, info) else replace(lazy, may_be_infinite=True)
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
    """What a user should know about the models before they are summed."""
    first = sources[0]
    notes = []
    total = sum(source.ratio for source in sources)
    if abs(total - 1) > 1e-6:
        notes.append(f"the ratios add up to {total:g}: so much of a whole model's strength the result has")
    if first.family is None:
        notes.append("models of a kind that is not known here: merged by names and shapes alone")
    for other, found in zip(sources[1:], known[1:], strict=True):
        missing = [name for name, (_, info) in known[0].items() if name not in found and _is_weight(name, info)]
        missing = [name for name in missing if not name.startswith(ema_copies.PREFIX)]
        if missing:
            count = f"{len(missing)} tensor{'s' if len(missing) > 1 else ''}"
            what = f"{other.header.path} lacks {count}, for which {first.header.path} stands in"
            notes.append(f"{what}: {_some(missing)}")
    silent = [str(source.header.path) for source in sources if source.prediction is None]
    prediction = next((source.prediction for source in sources if source.prediction), None)
    if silent and prediction:
        notes.append(f"not said, and taken as {prediction}, which the others say: what is predicted by {_some(silent)}")
    with_zero_snr = [found for found in known if ZTSNR in found]
    if with_zero_snr and len(with_zero_snr) < len(sources):
        notes.append("only some of the models are marked as trained to zero terminal SNR; the result is marked so")
    return notes


def _ema_names(tensors: Mapping[str, object]) -> set[str]:
    return {name for name in tensors if name.startswith(ema_copies.PREFIX)}


def _sum(parts: Sequence[tuple[LazyTensor, float]], arithmetic: Arithmetic) -> LazyTensor:
    """Ratio times tensor, added up; one tensor of each model at a time."""

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
    """A tensor's name with the `text_model.` level, which some files leave out."""
    for prefix in _TEXT:
        if name.startswith(prefix):
            return prefix + with_text_model(name.removeprefix(prefix))
    return name


def _is_weight(name: str, info: TensorInfo) -> bool:
    return info.is_float and not _PASSED.fullmatch(name)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
