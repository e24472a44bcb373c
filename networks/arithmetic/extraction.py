"""Extract a LoRA from two models: the best approximation of W_tuned - W_original at a rank, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor, nn

from library.checkpoints.adapter_key_names import AdapterPart
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
    """`dim` is the rank of linear layers and 1x1 convolutions, `conv_dim` (None: dim) that of larger convolutions.

    `min_diff`: by part of the model; a part whose weights differ by no more is skipped. `unchanged_in`: the coarser
    dtype of the two files; weights that are equal in it differ only by rounding. `clamp_quantile`: see svd.
    """

    dim: int
    conv_dim: int | None = None
    min_diff: dict[str, float] = field(default_factory=dict)
    clamp_quantile: float = 1.0
    unchanged_in: torch.dtype = torch.float32


@dataclass
class Extracted:
    """The extracted layers. `largest`: the largest difference of a weight by part; `skipped`: parts below `min_diff`;
    `same`: number of unchanged layers; `kept`: the share of the differences' norm that the layers keep."""

    layers: dict[str, Factors] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    same: int = 0
    kept: float = 1.0


def extract(changes: Iterable[Change], settings: ExtractionSettings, device: torch.device | str = "cpu") -> Extracted:
    """Extract all layers. Layers that are the same in both models, up to rounding, are skipped."""
    result = Extracted()
    changed: list[Change] = []
    for change in changes:
        if equal(change.before, change.after, settings.unchanged_in):
            result.same += 1
            continue
        largest = float((change.after.float() - change.before.float()).abs().max())
        result.largest[change.part] = max(largest, result.largest.get(change.part, 0.0))
        changed.append(change)
    result.skipped = [part for part, largest in result.largest.items() if largest <= settings.min_diff.get(part, -1.0)]
    kept = total = 0.0
    for change in changed:
        if change.part in result.skipped:
            continue
        rank = (settings.conv_dim if change.is_kernel else None) or settings.dim
        layer, layer_kept, layer_total = extract_layer(change, rank, settings.clamp_quantile, device)
        result.layers[change.name] = layer
        kept, total = kept + layer_kept, total + layer_total
    result.kept = (kept / total) ** 0.5 if total else 1.0
    return result


def extract_layer(
    change: Change, rank: int, clamp_quantile: float = 1.0, device: torch.device | str = "cpu"
) -> tuple[Factors, float, float]:
    """The layer with alpha = rank, and the squared norms of its approximation and of the difference."""
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
    """Whether two weights are equal in a dtype."""
    return before.shape == after.shape and torch.equal(before.to(dtype), after.to(dtype))


def find_changes(
    original: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module], parts: Sequence[AdapterPart], *, kernels: bool
) -> Iterator[Change]:
    """The layers of two models that a LoRA can adapt; `kernels`: with conv_dim, too.

    AdapterError for models of different sizes.
    """
    targets = (find_targets(model, parts, convolutions=kernels) for model in (original, tuned))
    for before, after in zip_longest(*targets):
        if before is None or after is None or before.layer != after.layer:
            name = next(target.layer.name for target in (before, after) if target is not None)
            raise AdapterError(
                f"the two models differ in size: {name} is not the same layer in both",
                "use two models of one kind, from before and after the training",
            )
        yield Change(before.layer.name, before.part.module, before.module.weight.detach(), after.module.weight.detach())


def count_unextracted(
    original: Mapping[str, nn.Module],
    tuned: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    names: Collection[str],
    dtype: torch.dtype,
) -> tuple[int, int]:
    """Number of changed weights outside of the layers `names`: convolutions larger than 1x1, and other tensors (norms,
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
