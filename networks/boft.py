"""BOFT: OFT in several stages, between which the channels are shuffled as in a fast Fourier transform, so that a few
small blocks reach all of them (arXiv 2311.06243, section 4).

In files (LyCORIS): `oft_blocks` (stages, blocks, size, size), `alpha`, the constraint (0: none), and `rescale`
(out, 1, …), factors for the output channels, if asked for. For reading.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks import reading
from networks.adapter import Layer


class Boft(nn.Module):
    """One layer's blocks, and the factors after turning where a file has them."""

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
        base = turned = weight.to(dtype)
        blocks = self.oft_blocks.to(base)
        skew = blocks - blocks.mT
        if self.limit:
            skew = skew * (self.limit / torch.linalg.vector_norm(skew).clamp(min=self.limit))
        one = torch.eye(blocks.shape[-1], dtype=dtype, device=blocks.device)
        for stage, rotations in enumerate(torch.linalg.solve(one - skew, one + skew)):
            turned = _stage(turned, rotations, 2**stage * blocks.shape[-1] // 2)
        if self.factors is not None:
            turned = turned * self.factors.to(base)
        return (turned - base).to(weight.dtype)

    def file_tensors(self) -> dict[str, Tensor]:
        """What a file holds."""
        return {"rescale" if key == "factors" else key: value for key, value in self.state_dict().items()}


def _stage(weight: Tensor, rotations: Tensor, reach: int) -> Tensor:
    """One stage: channels that lie `reach` apart come to lie beside each other, are turned in blocks, and go back."""
    behind = weight.shape[1:]
    shuffled = weight.reshape(-1, 2, reach, *behind).transpose(1, 2)
    turned = torch.einsum("kij,kj...->ki...", rotations, shuffled.reshape(*rotations.shape[:2], *behind))
    return turned.reshape(-1, reach, 2, *behind).transpose(1, 2).reshape(weight.shape)


def load(layer: Layer, tensors: dict[str, Tensor]) -> Boft:
    """The blocks of a file. AdapterError for missing tensors and for shapes that do not fit the layer."""
    (blocks,) = reading.take(layer, tensors, "oft_blocks", axes=4)
    stages, count, size, _ = blocks.shape
    reading.want(layer, "oft_blocks", blocks, (stages, count, size, size))
    if count * size != layer.shape[0] or size % 2 or layer.shape[0] % (2**stages * size // 2):
        raise reading.misfit(layer, f"which {stages} stages of {count} blocks of {size} do not turn")
    rescale = tensors.pop("rescale", None)
    if rescale is not None:
        reading.want(layer, "rescale", rescale, (layer.shape[0], *(1 for _ in layer.shape[1:])))
    return Boft(blocks, reading.take_alpha(tensors, 0), rescale)
