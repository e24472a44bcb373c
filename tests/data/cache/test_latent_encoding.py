"""Images are decoded ahead of the encoder, and latents do not depend on the rest of the batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from library.data.cache.latent_encoding import THREADS, DecodedImage, Encoder, encode_all
from library.data.cache.latent_entries import CacheEntry
from library.data.cache.latent_files import FileHash
from library.data.images import Geometry

BUCKETS = [(16, 8), (8, 8), (16, 8), (8, 16), (8, 8), (16, 8), (8, 8)]


def wanted(number: int, bucket: tuple[int, int] = (8, 8)) -> CacheEntry:
    return CacheEntry(
        number, number, f"{number}.png", None, False, bucket, Geometry(bucket, (0, 0), bucket), False, False, "", True
    )


def ready(entry: CacheEntry) -> DecodedImage:
    width, height = entry.geometry.bucket
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(entry.number))
    return DecodedImage(entry, FileHash(str(entry.number), None), None, pixels, None)


def sample(pixels: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    means = torch.nn.functional.avg_pool2d(pixels, 8)
    return means + torch.stack([torch.randn(means.shape[1:], generator=one) for one in generators])


def made(batch_size: int, **options: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
    entries = [wanted(number, bucket) for number, bucket in enumerate(BUCKETS)]
    found = encode_all(entries, Encoder(sample), ready, batch_size=batch_size, progress=False, **options)
    return {one.entry.number: (one.latents, one.flipped) for one in found}


@pytest.mark.parametrize("options", [{}, {"share": (1, 2)}, {"share": (2, 3)}], ids=str)
@pytest.mark.parametrize("batch_size", [0, 2, 3, 100])
def test_batch_and_order_change_nothing(batch_size: int, options: dict[str, Any]) -> None:
    alone, together = made(1), made(batch_size, **options)
    assert sorted(alone) == sorted(together) == list(range(len(BUCKETS)))
    for number, (latents, flipped) in alone.items():
        assert torch.equal(latents, together[number][0])
        assert flipped is not None and torch.equal(flipped, together[number][1])
        assert not torch.equal(latents, flipped)  # another sample, not only another image


def test_each_process_begins_at_another_place() -> None:
    firsts = [next(iter(made(1, share=(number, 3)))) for number in range(3)]
    assert len(set(firsts)) == 3


def test_images_are_decoded_while_the_encoder_works() -> None:
    begun, enough = [], threading.Event()

    def prepare(entry: CacheEntry) -> DecodedImage:
        begun.append(entry.number)
        if len(begun) > THREADS:
            enough.set()
        return ready(entry)

    def encode(pixels: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        assert enough.wait(10), "the encoder waits for images that nobody decodes"
        return sample(pixels, generators)

    entries = [wanted(number) for number in range(3 * THREADS)]
    for count, _ in enumerate(encode_all(entries, Encoder(encode), prepare, batch_size=1, progress=False), 1):
        assert len(begun) <= count + THREADS + 2  # and no more than that lie in memory


def test_what_was_made_elsewhere_is_passed_over() -> None:
    entries = [wanted(number) for number in range(5)]
    found = encode_all(
        entries, Encoder(sample), lambda one: ready(one) if one.number % 2 else None, batch_size=2, progress=False
    )
    assert [one.entry.number for one in found] == [1, 3]
