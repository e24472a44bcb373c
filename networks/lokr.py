"""LoKr: ΔW is the Kronecker product of a small matrix and a large one, which may be of low rank (LyCORIS,
arXiv 2309.14859, section 3.3).

In files (LyCORIS): `lokr_w1` (a, c), or `lokr_w1_a` (a, dim) and `lokr_w1_b` (dim, c); `lokr_w2` (b, d, kh, kw), or
`lokr_w2_a` (b, dim) and `lokr_w2_b` (dim, d·kh·kw), with ab = out and cd = in; `alpha`. With a Tucker core for
convolutions: `lokr_t2` (dim, dim, kh, kw), and then w2_a is (dim, b) and w2_b (dim, d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from networks import layer_tensors, shapes
from networks.adapter import Layer, LayerSettings


class LoKr(nn.Module):
    """One layer's factors: each of the two matrices is whole, or a product of two or three."""

    alpha: Tensor

    def __init__(self, layer: Layer, tensors: dict[str, Tensor], alpha: float) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))
        self.layer = layer
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self._names = frozenset(tensors)
        self.rank_dropout = 0.0
        self.dim = _dim(tensors)
        self._set_scale()

    def _set_scale(self) -> None:
        self.scale = layer_tensors.scale(self.alpha, self.dim) if self.dim else 1.0

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self._set_scale()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoKr:  # noqa: FBT001, FBT002 - torch's
        alpha = self.alpha
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.alpha = alpha.to(self.alpha.device)  # stays in float32, so that its value stays exact
        return self

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW = alpha / dim · w1 ⊗ w2, of the shape and dtype of `weight`. The factor is 1 if w1 and w2 are whole."""
        first, second = self._first(weight) * self.scale, self._second(weight)
        return torch.kron(first.reshape(*first.shape, *(1 for _ in second.shape[2:])), second)

    def norm(self) -> Tensor:
        """‖ΔW‖ (Frobenius): the product of both norms."""
        norm: Tensor = self._first().detach().float().norm() * self._second().detach().float().norm()
        return norm * abs(self.scale)

    @torch.no_grad()
    def rescale(self, ratio: float) -> None:
        """Multiply ΔW by `ratio`, spread evenly over the factors."""
        for name in self._names:
            self.get_parameter(name).mul_(ratio ** (1 / len(self._names)))

    def bypass(self, x: Tensor) -> Tensor:
        """ΔW's contribution to the layer's output for x, without forming ΔW: (..., in) -> (..., out) for a Linear,
        (n, in, h, w) -> (n, out, h', w') for a convolution. (A ⊗ B) vec(X) = vec(A X Bᵀ), with X of c rows."""
        first = self._first() * self.scale
        if x.dtype != first.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(first.dtype)
        if self.layer.is_conv:
            return self._apply_dropout(self._convolve(first, x), (-1, 1, 1))
        hidden = x.reshape(*x.shape[:-1], first.shape[1], -1)
        for matrix in self._pair()[::-1] if self._low_rank else (self._second(),):
            hidden = functional.linear(hidden, matrix)
        return self._apply_dropout(functional.linear(hidden.mT, first).mT.flatten(-2), (-1,))

    def _apply_dropout(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """In training, drop random outputs, the same ones for all samples: kohya's rank dropout for LoKr."""
        if not (self.training and self.rank_dropout):
            return out
        kept = torch.rand(self.layer.shape[0], device=out.device) >= self.rank_dropout
        return out * (kept / (1 - self.rank_dropout)).to(out.dtype).reshape(shape)

    def _convolve(self, first: Tensor, x: Tensor) -> Tensor:
        rows = first.shape[1]
        if self.layer.groups > 1:  # the rows of c are spread over several groups
            return self._conv2d(x, torch.kron(first[..., None, None], self._second()), self.layer.groups)
        hidden = x.reshape(x.shape[0] * rows, -1, *x.shape[2:])
        if self._low_rank:
            a, b = self._pair()
            hidden = self._conv2d(hidden, b.reshape(b.shape[0], -1, *self.layer.kernel))
            hidden = functional.conv2d(hidden, a[..., None, None])
        else:
            hidden = self._conv2d(hidden, self._second())
        mixed = torch.matmul(first, hidden.reshape(x.shape[0], rows, -1))
        return mixed.reshape(x.shape[0], -1, *hidden.shape[2:])

    def _conv2d(self, x: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
        layer = self.layer
        return functional.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation, groups)

    @property
    def _low_rank(self) -> bool:
        return "lokr_w2" not in self._names and "lokr_t2" not in self._names

    def _get(self, name: str, like: Tensor | None) -> Tensor:
        tensor = self.get_parameter(name)
        return tensor if like is None else tensor.to(like)

    def _pair(self, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._get("lokr_w2_a", like), self._get("lokr_w2_b", like)

    def _first(self, like: Tensor | None = None) -> Tensor:
        """w1, (a, c)."""
        if "lokr_w1" in self._names:
            return self._get("lokr_w1", like)
        return self._get("lokr_w1_a", like) @ self._get("lokr_w1_b", like)

    def _second(self, like: Tensor | None = None) -> Tensor:
        """w2: (b, d), or (b, d, kh, kw) for a convolution."""
        if "lokr_w2" in self._names:
            second = self._get("lokr_w2", like)
        elif "lokr_t2" in self._names:
            second = torch.einsum("ijhw,ip,jr->prhw", self._get("lokr_t2", like), *self._pair(like))
        else:
            a, b = self._pair(like)
            second = a @ b
        if self.layer.is_conv:
            second = second.reshape(second.shape[0], -1, *self.layer.kernel)
        return second.contiguous()


def create(layer: Layer, settings: LayerSettings, weight: Tensor) -> LoKr:
    """Create a LoKr with LyCORIS' shapes; the last matrix of the product starts at 0.

    `settings.own`: factor (-1: as equal as possible), decompose_both (w1 of low rank too), full_matrix (w2 whole at any
    dim), unbalanced_factorization (w1 gets the larger factor of the outputs), use_tucker.
    """
    made = shapes.lokr(layer, settings)
    last = "lokr_w2" if "lokr_w2" in made else "lokr_w2_b"
    tensors = {
        name: torch.zeros(shape) if name == last else _random(*shape) for name, shape in made.items() if name != "alpha"
    }
    # If no matrix is of low rank, alpha is unused and dim has no limit (users write 100000 for "full rank"): limited,
    # as it would be infinite in half precision.
    alpha = settings.alpha if _dim(tensors) else float(min(settings.dim, max(layer.shape)))
    adapter = LoKr(layer, tensors, alpha)
    adapter.rank_dropout = settings.rank_dropout
    return adapter


def load(layer: Layer, tensors: dict[str, Tensor]) -> LoKr:
    """Load a layer's tensors. AdapterError for missing tensors and for shapes that do not fit the layer."""
    names = ["lokr_w1"] if "lokr_w1" in tensors else ["lokr_w1_a", "lokr_w1_b"]
    names += ["lokr_w2"] if "lokr_w2" in tensors else ["lokr_w2_a", "lokr_w2_b"]
    names += ["lokr_t2"] if "lokr_t2" in tensors else []
    factors = dict(zip(names, layer_tensors.take(layer, tensors, *names), strict=True))
    _check_shapes(layer, factors)
    return LoKr(layer, factors, layer_tensors.take_alpha(tensors, _dim(factors) or 1))


def _random(*shape: int) -> Tensor:
    tensor = torch.empty(shape)
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    return tensor


def _dim(tensors: dict[str, Tensor]) -> int | None:
    """The rank that alpha is divided by: that of w1, else that of w2 (LyCORIS' order); None if both are whole."""
    for name in ("lokr_w1_b", "lokr_w2_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return None


def _check_shapes(layer: Layer, tensors: dict[str, Tensor]) -> None:
    """AdapterError unless the factors fit each other and their product fits the layer."""
    kernel = math.prod(layer.kernel)
    if "lokr_w1" in tensors:
        a, c = tensors["lokr_w1"].flatten(1).shape
    else:
        a, c = tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1]
        layer_tensors.check_shape(layer, "lokr_w1_a", tensors["lokr_w1_a"], (a, tensors["lokr_w1_b"].shape[0]))
    if "lokr_w2" in tensors:
        b, rest = tensors["lokr_w2"].flatten(1).shape
    else:
        dim, rest = tensors["lokr_w2_b"].shape
        if "lokr_t2" in tensors:
            b, rest = tensors["lokr_w2_a"].shape[1], rest * kernel
            layer_tensors.check_shape(
                layer, "lokr_t2", tensors["lokr_t2"], (tensors["lokr_w2_a"].shape[0], dim, *layer.kernel)
            )
        else:
            b = tensors["lokr_w2_a"].shape[0]
            layer_tensors.check_shape(layer, "lokr_w2_a", tensors["lokr_w2_a"], (b, dim))
    if a * b != layer.shape[0] or c * rest != math.prod(layer.shape[1:]):
        product = f"{a}·{b} = {a * b} x {c}·{rest // kernel} = {c * rest // kernel}"
        raise layer_tensors.shape_error(
            layer, f"its factors give {product}" + (f" x {layer.kernel}" if layer.is_conv else "")
        )
