"""What a VAE that computes in tiles (--vae_tiling) leaves in memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.footprint.tape import Tensor

if TYPE_CHECKING:
    from library.footprint.model import TransformOver
    from library.footprint.module import Module

TILE = 512  # pixels: a side of the VAE's tiles
_OVERLAP = 0.25  # of a tile, diffusers' AutoencoderKL.tile_overlap_factor


def count_in_tiles(transform: TransformOver, vae: Module, values: Tensor, tile: int) -> None:
    """Count `transform` over values (B, C, H, W), as diffusers' `_tiled_encode` and `tiled_decode` compute it: one tile
    after the other if a side is longer than `tile`, the results of all kept, then put together."""
    height, width = values.shape[-2:]
    if max(height, width) <= tile:
        transform(vae, values)
        return
    made = [
        transform(vae, Tensor((*values.shape[:-2], rows, columns), values.width, values.block))
        for rows in _sides(height, tile)
        for columns in _sides(width, tile)
    ]
    whole = sum(each.nbytes for each in made)
    vae.tape.new((whole,), 1)


def _sides(side: int, tile: int) -> Iterator[int]:
    """The lengths of the tiles along a side: the last ones are shorter."""
    for start in range(0, side, int(tile * (1 - _OVERLAP))):
        yield min(tile, side - start)
