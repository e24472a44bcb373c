"""The memory of a VAE that computes in tiles, against what diffusers allocates for them."""

from __future__ import annotations

import pytest
import torch

from library.families.registry import FAMILIES
from library.footprint.ledger import Ledger
from library.footprint.module import Module
from library.footprint.tape import FULL, Tape
from library.training import memory
from library.training.plan.memory.tiles import count_in_tiles
from tests import tiny
from tests.footprint.counted import Counted

TILE = 64


@pytest.mark.parametrize(
    ("way", "shape", "stride"), [("encode_images", (1, 3, 136, 64), 1), ("decode_latents", (1, 4, 8, 17), 8)]
)
def test_tiles_take_what_diffusers_allocates(
    way: str, shape: tuple[int, ...], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two whole tiles and a short one; less than the whole image takes."""
    monkeypatch.setattr(memory, "TILE", TILE)
    vae = tiny.diffusers_modules("sd1").vae
    memory.tile_vae(vae, 8)
    footprint = next(family.footprint for family in FAMILIES if family.name == "sd1")
    assert footprint is not None
    values = torch.zeros(shape)
    try:
        with torch.no_grad(), Counted([*vae.parameters(), values]) as counted:
            vae.encode(values) if way == "encode_images" else vae.decode(values)
    finally:
        vae.disable_tiling()
    peaks = []
    for tile in (TILE // stride, max(shape)):
        tape = Tape(Ledger(), mode="off")
        module = Module(tape, {name: tuple(each.shape) for name, each in vae.named_parameters()})
        given = tape.new(shape, FULL)
        count_in_tiles(getattr(footprint, way), module, given, tile)
        peaks.append(tape.ledger.peak - given.nbytes)
    assert peaks[0] == pytest.approx(counted.peak, rel=0.05)
    assert peaks[0] < 0.6 * peaks[1]
