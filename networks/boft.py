"""BOFT: OFT in several stages. Between them the channels are shuffled as in a fast Fourier transform, so that a few
small blocks mix all channels (arXiv 2311.06243, section 4).

In files (LyCORIS): `oft_blocks` (stages, blocks, size, size), `alpha`, the constraint (0: none), and optionally
`rescale` (out, 1, …), factors for the output channels. Only loaded, not trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks import layer_tensors
from networks.adapter import Layer


class Boft(nn.Module):
    """One layer's blocks, and the factors after the rotation if the file has them."""

    alpha: Tensor
    factors: nn.Parameter | None  # `rescale` in files

    def __init__(self, blocks: Tensor, alpha: float, rescale: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))
        self.oft_blocks = nn.Parameter(blocks)
        self.register_parameter("factors", None if rescale is None else nn.Parameter(rescale))
        self.limit = alpha * blocks.shape[1] * blocks.shape[2]

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW = R W - W, of the shape and dtype of `weight`."""
        dtype = weight.dtype if weight.dtype is torch.float64 else torch.float32  # no solver takes halves
        base = rotated = weight.to(dtype)
        blocks = self.oft_blocks.to(base)
        skew = blocks - blocks.mT
        if self.limit:
            skew = skew * (self.limit / torch.linalg.vector_norm(skew).clamp(min=self.limit))
        one = torch.eye(blocks.shape[-1], dtype=dtype, device=blocks.device)
        for stage, rotations in enumerate(torch.linalg.solve(one - skew, one + skew)):
            rotated = _rotate_stage(rotated, rotations, 2**stage * blocks.shape[-1] // 2)
        if self.factors is not None:
            rotated = rotated * self.factors.to(base)
        return (rotated - base).to(weight.dtype)

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors under their names in files."""
        return {"rescale" if key == "factors" else key: value for key, value in self.state_dict().items()}


def _rotate_stage(weight: Tensor, rotations: Tensor, distance: int) -> Tensor:
    """One stage: bring channels that are `distance` apart next to each other, rotate the blocks, shuffle back."""
    rest = weight.shape[1:]
    shuffled = weight.reshape(-1, 2, distance, *rest).transpose(1, 2)
    rotated = torch.einsum("kij,kj...->ki...", rotations, shuffled.reshape(*rotations.shape[:2], *rest))
    return rotated.reshape(-1, distance, 2, *rest).transpose(1, 2).reshape(weight.shape)


def load(layer: Layer, tensors: dict[str, Tensor]) -> Boft:
    """Load a layer's tensors. AdapterError for missing tensors and for shapes that do not fit the layer."""
    (blocks,) = layer_tensors.take(layer, tensors, "oft_blocks", axes=4)
    stages, count, size, _ = blocks.shape
    layer_tensors.check_shape(layer, "oft_blocks", blocks, (stages, count, size, size))
    if count * size != layer.shape[0] or size % 2 or layer.shape[0] % (2**stages * size // 2):
        raise layer_tensors.shape_error(layer, f"the file has {stages} stages of {count} blocks of {size}")
    rescale = tensors.pop("rescale", None)
    if rescale is not None:
        layer_tensors.check_shape(layer, "rescale", rescale, (layer.shape[0], *(1 for _ in layer.shape[1:])))
    return Boft(blocks, layer_tensors.take_alpha(tensors, 0), rescale)
