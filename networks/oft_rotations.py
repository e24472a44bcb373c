"""OFT files of other programs, which are only loaded: whole rotations, and rotations of the inputs.

In files: `oft_diag` (blocks, size, size) of earlier LyCORIS: the rotations themselves, W' = Rᵀ W by blocks of outputs,
and optionally `rescale`, factors for the outputs. `oft_R.weight` (blocks, size · (size - 1) / 2) of PEFT's OFT and
OneTrainer's OFTv2: the upper triangles of skew-symmetric Q, W' = W Rᵀ by blocks of inputs (kernels included); a single
block is for all of them. R is their approximation of the Cayley transform, I + 2Q + 2Q² + 2Q³ + Q⁴ (arXiv 2506.19847).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from networks import layer_tensors
from networks.adapter import Layer

OUTPUTS, INPUTS = "oft_diag", "oft_R.weight"


class OutputRotations(nn.Module):
    """One layer's rotations of blocks of outputs."""

    rescale: nn.Parameter | None

    def __init__(self, rotations: Tensor, rescale: Tensor | None) -> None:
        super().__init__()
        self.rotations = nn.Parameter(rotations)
        self.register_parameter("rescale", None if rescale is None else nn.Parameter(rescale))

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW = Rᵀ W - W, of the shape and dtype of `weight`."""
        rows = weight.reshape(*self.rotations.shape[:2], *weight.shape[1:])
        rotated = torch.einsum("knm,kn...->km...", self.rotations.to(weight), rows).reshape(weight.shape)
        if self.rescale is not None:
            rotated = rotated * self.rescale.to(weight).reshape(-1, *(1 for _ in weight.shape[1:]))
        return rotated - weight

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors under their names in files."""
        return {OUTPUTS if key == "rotations" else key: value for key, value in self.state_dict().items()}


class InputRotations(nn.Module):
    """One layer's rotations of blocks of inputs."""

    def __init__(self, triangles: Tensor) -> None:
        super().__init__()
        self.triangles = nn.Parameter(triangles)
        self.size = _block_size(triangles)

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW = W Rᵀ - W, of the shape and dtype of `weight`."""
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        upper = weight.new_zeros(self.triangles.shape[0], self.size, self.size)
        upper[:, rows, columns] = self.triangles.to(weight)
        skew = upper - upper.mT
        square = skew @ skew
        change = 2 * (skew + square + skew @ square) + square @ square
        blocks = weight.reshape(weight.shape[0], -1, self.size)
        return torch.einsum("okj,kij->oki", blocks, change.expand(blocks.shape[1], -1, -1)).reshape(weight.shape)

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors under their names in files."""
        return {INPUTS: self.triangles}


def _block_size(triangles: Tensor) -> int:
    """The size of a block, by the number of elements above the diagonal."""
    return (1 + math.isqrt(1 + 8 * triangles.shape[1])) // 2


def load(layer: Layer, tensors: dict[str, Tensor]) -> OutputRotations | InputRotations:
    """Load a layer's tensors. AdapterError for missing tensors and for shapes that do not fit the layer."""
    if INPUTS in tensors:
        (triangles,) = layer_tensors.take(layer, tensors, INPUTS)
        tensors.pop("alpha", None)  # OneTrainer writes one, without a meaning here
        size, inputs = _block_size(triangles), math.prod(layer.shape[1:])
        blocks = triangles.shape[0]
        fits = inputs % size == 0 if blocks == 1 else blocks * size == inputs
        if size * (size - 1) // 2 != triangles.shape[1] or not fits:
            raise layer_tensors.shape_error(layer, f"{INPUTS} has {blocks} blocks of {triangles.shape[1]} numbers")
        return InputRotations(triangles)
    (rotations,) = layer_tensors.take(layer, tensors, OUTPUTS, axes=3)
    tensors.pop("alpha", None)
    blocks, size, _ = rotations.shape
    layer_tensors.check_shape(layer, OUTPUTS, rotations, (blocks, size, size))
    if blocks * size != layer.shape[0]:
        raise layer_tensors.shape_error(layer, f"{OUTPUTS} is for {blocks * size} outputs")
    rescale = tensors.pop("rescale", None)
    if rescale is not None and rescale.numel() != layer.shape[0]:
        raise layer_tensors.shape_error(layer, f"rescale has {rescale.numel()} factors")
    return OutputRotations(rotations, rescale)
