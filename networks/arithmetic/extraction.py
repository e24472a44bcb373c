"""A LoRA from the difference of two models: for each layer the best approximation of W_tuned - W_original at a rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor, nn

from library.checkpoints.adapter_names import AdapterPart
from networks.adapter import AdapterError
from networks.arithmetic.factors import Factors
from networks.arithmetic.svd import decompose
from networks.targets import find_targets


@dataclass(frozen=True, eq=False)
class Change:
    """One layer of two models: its name in files, the part of the model it is in, its weights (out, in[, kh, kw])."""

    name: str
    part: str
    before: Tensor
    after: Tensor

    @property
    def is_kernel(self) -> bool:
        """Whether it is a convolution larger than 1x1."""
        return self.before.ndim == 4 and tuple(self.before.shape[2:]) != (1, 1)


@dataclass(frozen=True)
class ExtractionSettings:
    """How much is extracted: `dim` ranks of linear layers and 1x1 convolutions, `conv_dim` (None: dim) of larger ones.

    `min_diff`: a part of a model, by its name, of which no number differs by more is left out. `unchanged_in`: the
    coarser dtype of the two files; weights that are equal in it differ by rounding alone. `clamp_quantile`: see svd.
    """

    dim: int
    conv_dim: int | None = None
    min_diff: dict[str, float] = field(default_factory=dict)
    clamp_quantile: float = 1.0
    unchanged_in: torch.dtype = torch.float32


@dataclass
class Extracted:
    """What came of it. `largest`: by part, the largest difference of a number; `skipped`: parts below `min_diff`;
    `same`: layers that did not change; `kept`: the share of the differences' norm that the layers hold."""

    layers: dict[str, Factors] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    same: int = 0
    kept: float = 1.0


def extract(changes: Iterable[Change], depth: ExtractionSettings, device: torch.device | str = "cpu") -> Extracted:
    """The LoRA of many layers. Layers that are the same in both models, up to rounding, are left out."""
    found = Extracted()
    changed: list[Change] = []
    for change in changes:
        if equal(change.before, change.after, depth.unchanged_in):
            found.same += 1
            continue
        largest = float((change.after.float() - change.before.float()).abs().max())
        found.largest[change.part] = max(largest, found.largest.get(change.part, 0.0))
        changed.append(change)
    found.skipped = [part for part, most in found.largest.items() if most <= depth.min_diff.get(part, -1.0)]
    kept = total = 0.0
    for change in changed:
        if change.part in found.skipped:
            continue
        rank = (depth.conv_dim if change.is_kernel else None) or depth.dim
        found.layers[change.name], here, of = extract_layer(change, rank, depth.clamp_quantile, device)
        kept, total = kept + here, total + of
    found.kept = (kept / total) ** 0.5 if total else 1.0
    return found


def extract_layer(
    change: Change, rank: int, clamp_quantile: float = 1.0, device: torch.device | str = "cpu"
) -> tuple[Factors, float, float]:
    """The layer with alpha = rank, and the squared norms of what it holds of the difference and of the difference."""
    difference = change.after.to(device).float() - change.before.to(device).float()
    parts = decompose(difference.flatten(1))
    up, down = parts.factors(rank, clamp_quantile)
    rank = down.shape[0]
    ones = (1,) * (difference.ndim - 2)
    down = down.reshape(rank, *difference.shape[1:])
    squares = parts.values.double().square()
    layer = Factors(down.cpu(), up.reshape(up.shape[0], rank, *ones).cpu(), float(rank))
    return layer, float(squares[:rank].sum()), float(squares.sum())


def equal(before: Tensor, after: Tensor, dtype: torch.dtype) -> bool:
    """Whether two weights are the same numbers in a dtype."""
    return before.shape == after.shape and torch.equal(before.to(dtype), after.to(dtype))


def find_changes(
    original: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module], parts: Sequence[AdapterPart], *, kernels: bool
) -> Iterator[Change]:
    """The layers of two models that a LoRA reaches; `kernels`: those that it reaches with conv_dim too.

    AdapterError for models of different sizes.
    """
    ours, theirs = (find_targets(model, parts, convolutions=kernels) for model in (original, tuned))
    for one, other in zip_longest(ours, theirs):
        if one is None or other is None or one.layer != other.layer:
            name = next(each.layer.name for each in (one, other) if each is not None)
            raise AdapterError(
                f"the two models differ in size: {name} is not the same layer in both",
                "give two models of one kind, the one before and the one after a training",
            )
        yield Change(one.layer.name, one.part.module, one.module.weight.detach(), other.module.weight.detach())


def count_unextracted(
    original: Mapping[str, nn.Module],
    tuned: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    names: Collection[str],
    dtype: torch.dtype,
) -> tuple[int, int]:
    """What changed and is in none of the layers `names`: convolutions larger than 1x1, and other tensors (norms,
    biases, embeddings, linear layers)."""
    kernels = others = 0
    for part in parts:
        now = tuned[part.module].state_dict()
        for path, tensor in original[part.module].state_dict().items():
            layer, _, kind = path.rpartition(".")
            if (kind == "weight" and part.name(layer) in names) or equal(tensor, now[path], dtype):
                continue
            is_kernel = tensor.ndim == 4 and tuple(tensor.shape[2:]) != (1, 1)
            kernels, others = kernels + is_kernel, others + (not is_kernel)
    return kernels, others
