"""OFT: rotate the output channels in blocks of equal size, which keeps all angles between neurons (arXiv 2306.07280,
equations 2 to 5: W' = R W, R block-diagonal, each block the Cayley transform of a skew-symmetric matrix).

In files (LyCORIS' diag-oft): `oft_blocks` (blocks, size, size), of which the skew-symmetric part Q is used; `alpha`,
the constraint: ‖Q‖ over all blocks is limited to alpha · out (0: not limited); optionally `rescale` (out, 1, …),
factors for the outputs. Written with the constraint applied and an alpha of 0: programs differ in what they take alpha
for. Files of sd-scripts are the same under names with `oft_unet` instead of `lora_unet`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from networks import boft, layer_tensors, oft_rotations, shapes
from networks.adapter import Layer, LayerSettings


class Oft(nn.Module):
    """One layer's blocks, and the factors after the rotation if the file has them."""

    alpha: Tensor
    factors: nn.Parameter | None  # `rescale` in files

    def __init__(self, blocks: Tensor, alpha: float, rescale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))
        self.oft_blocks = nn.Parameter(blocks)
        self.register_parameter("factors", None if rescale is None else nn.Parameter(rescale))
        self._set_limit()

    def _set_limit(self) -> None:
        self.limit = float(self.alpha) * self.oft_blocks.shape[0] * self.oft_blocks.shape[1]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *given: Any) -> None:
        if not state.get(f"{prefix}alpha", 1):  # of a file, which holds no constraint: the run's own stays
            state[f"{prefix}alpha"] = self.alpha
        super()._load_from_state_dict(state, prefix, *given)
        self._set_limit()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Oft:  # noqa: FBT001, FBT002 - torch's
        alpha = self.alpha
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.alpha = alpha.to(self.alpha.device)  # exact, whatever the precision of the others
        return self

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW = (R - I) W, of the shape and dtype of `weight`."""
        dtype = weight.dtype if weight.dtype is torch.float64 else torch.float32  # no solver takes halves
        base = weight.to(dtype)
        blocks = base.reshape(*self.oft_blocks.shape[:2], *base.shape[1:])
        delta = torch.einsum("knm,km...->kn...", self._rotation_change(base), blocks).reshape(base.shape)
        if self.factors is not None:
            factors = self.factors.to(base)
            delta = factors * delta + (factors - 1) * base
        return delta.to(weight.dtype)

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors under their names in files, with the constraint applied to the blocks."""
        tensors = {"rescale" if key == "factors" else key: value for key, value in self.state_dict().items()}
        if not self.limit:
            return tensors
        blocks = without_constraint(self.oft_blocks.detach(), float(self.alpha))
        return tensors | {"alpha": torch.zeros_like(self.alpha), "oft_blocks": blocks}

    def _rotation_change(self, like: Tensor) -> Tensor:
        """R - I of every block. With R = (I + Q)⁻¹ (I - Q), kohya's and LyCORIS' transform of W, this is
        -2 (I + Q)⁻¹ Q: one solve, and a small Q is not rounded off against I. I + Q always has an inverse; to check it,
        the program would wait for the device."""
        skew = _skew(self.oft_blocks.to(like), self.limit)
        one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        change: Tensor = torch.linalg.solve_ex(one + skew, -2 * skew).result
        return change


def without_constraint(blocks: Tensor, alpha: float) -> Tensor:
    """Blocks with the rotations that a file's blocks have under the constraint alpha."""
    exact = blocks if blocks.dtype is torch.float64 else blocks.float()
    skew = _skew(exact, alpha * blocks.shape[0] * blocks.shape[1])
    return (skew / 2).to(blocks.dtype)  # of which Q is the difference from its transpose


def _skew(blocks: Tensor, limit: float) -> Tensor:
    """Q, with ‖Q‖ at most `limit` (0: not limited)."""
    skew = blocks - blocks.mT
    return skew * (limit / torch.linalg.vector_norm(skew).clamp(min=limit)) if limit else skew


def create(layer: Layer, settings: LayerSettings, weight: Tensor) -> Oft | None:
    """Create blocks of 0, which rotate nothing. `dim` is their number and `alpha` the constraint.

    `settings.own`: enable_all_linear (all linear layers of the transformers, not only attention) and enable_conv (also
    the residual blocks). None for a layer that is not selected. AdapterError if the outputs cannot be divided.
    """
    planned = shapes.oft(layer, settings)
    return None if planned is None else Oft(torch.zeros(planned["oft_blocks"]), settings.alpha)


def load(layer: Layer, tensors: dict[str, Tensor], constraint: float = 0.0) -> Any:
    """Load a layer's tensors; blocks with a fourth axis are BOFT. `constraint`: of the run that trains them on, if the
    file has none. AdapterError for missing tensors and for shapes that do not fit the layer."""
    if tensors.keys() & {oft_rotations.OUTPUTS, oft_rotations.INPUTS}:
        return oft_rotations.load(layer, tensors)
    if "oft_blocks" in tensors and tensors["oft_blocks"].ndim == 4:
        return boft.load(layer, tensors)
    (blocks,) = layer_tensors.take(layer, tensors, "oft_blocks")
    size = layer.shape[0] // max(blocks.shape[0], 1)
    layer_tensors.check_shape(layer, "oft_blocks", blocks, (blocks.shape[0], size, size))
    if blocks.shape[0] * size != layer.shape[0]:
        raise layer_tensors.shape_error(layer, f"oft_blocks is for {blocks.shape[0] * size} outputs")
    rescale = tensors.pop("rescale", None)
    if rescale is not None:
        layer_tensors.check_shape(layer, "rescale", rescale, (layer.shape[0], *(1 for _ in layer.shape[1:])))
    return Oft(blocks, layer_tensors.take_alpha(tensors, 0) or constraint, rescale)
