"""Random generators keyed by what is drawn, independent of processes and order.

Every draw of a run has a key with its purpose and position, e.g. (seed, "crop", epoch, image key, repeat index) for an
image's crop (library/data/dataset.py), or (seed, "noise", global sample index) for the noise of the loss. Equal keys
give equal draws in every process, worker, order and resumed run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def draw_seed(*parts: int | str) -> int:
    """A seed in 0 .. 2**63 - 1 for the key `parts`: the first 63 bits of a BLAKE2b digest.

    Each part is encoded as type, length and text, so ("a", "b"), ("ab",) and (1,), ("1",) are different keys.
    Raises TypeError for a part that is neither int nor str.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            kind, text = b"s", part.encode("utf-8", "surrogatepass")
        elif isinstance(part, int):
            kind, text = b"i", b"%d" % part
        else:
            raise TypeError(f"a key consists of int and str, not {type(part).__name__}")
        digest.update(b"%s%d:%s" % (kind, len(text), text))
    return int.from_bytes(digest.digest(), "big") >> 1


def python_random(*parts: int | str) -> random.Random:
    """A standard library generator for the key `parts`."""
    return random.Random(draw_seed(*parts))


def torch_generator(*parts: int | str) -> torch.Generator:
    """A torch CPU generator for the key `parts`.

    Always on the CPU, so that a seed gives the same noise on every device. torch seeds its Mersenne twister with the
    low 32 bits: two keys of a run share a stream with probability 2**-32, which is harmless for noise.
    """
    import torch

    generator = torch.Generator("cpu")
    generator.manual_seed(draw_seed(*parts))
    return generator


@contextmanager
def keyed_draws(*parts: int | str) -> Iterator[None]:
    """What is drawn from torch's global generators in this context depends on the key `parts` alone, and leaves no
    trace in them."""
    from library.runtime.accelerator import forked_generators, seed_generators

    with forked_generators():
        seed_generators(draw_seed(*parts))
        yield


def device_generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A torch generator for the key `parts` on a device, or on the CPU for Apple's GPUs, which do not draw 64 bits. The
    draws differ from device to device: for what need not be the same on all of them, and is too much to be uploaded."""
    import torch

    generator = torch.Generator("cpu" if device.type == "mps" else device)
    generator.manual_seed(draw_seed(*parts))
    return generator
