"""Where the validation loss is measured: timesteps and noise, a function of the content of an image alone.

The content is that of the file, byte by byte. So a renamed or moved image keeps its points.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from library.data.image_files import ImageSource
from library.data.retries import read_one
from library.data.scan.image_record import ImageRecord
from library.options.mistakes import Mistake, UserError
from library.runtime.seeds import torch_generator
from library.training.validation.plan import TIMESTEPS


def content_keys(numbers: Collection[int], records: Sequence[ImageRecord]) -> dict[int, str]:
    """A hash of the file of each of these records. Raises UserError for one that cannot be read."""
    return {number: read_one(_reading(records[number].path)) for number in numbers}


def _reading(path: ImageSource) -> Callable[[], str]:
    def read() -> str:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            what = f"{path} cannot be read ({error.strerror or error})"
            raise UserError((Mistake(what, "repair it, or remove it from the data"),)) from None

    return read


def timestep_of(key: str, part: int, low: int, high: int) -> int:
    """The timestep of an image in part `part` of TIMESTEPS equal parts of [low, high):
    floor(low + (part + u) / TIMESTEPS * (high - low)), where u is the first 64 bits of BLAKE2b of "KEY|PART" / 2^64."""
    digest = hashlib.blake2b(f"{key}|{part}".encode(), digest_size=8).digest()
    return low + int((part + int.from_bytes(digest, "big") / 2**64) / TIMESTEPS * (high - low))


def noise_of(key: str, part: int, shape: Sequence[int]) -> Tensor:
    """The noise of an image in this part, of the shape (C, h, w), float32."""
    return torch.randn(tuple(shape), generator=torch_generator("validation noise", key, part))
