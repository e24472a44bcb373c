"""Initial images for image-to-image: read, resize, encode. No torch at module level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.decoding import read, to_rgb
from library.data.image_files import BadImage
from library.options.mistakes import Mistake, UserError
from library.runtime.seeds import torch_generator
from library.sampling.prompts import SMALLEST_SIDE, STRIDE, ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.families.family import Family, Model


@dataclass(frozen=True)
class InitImage:
    """An image to start from, RGB and upright. `strength`: denoising strength, the share of the timesteps that run;
    None: the refiner's own for a refiner, otherwise that of sd-scripts."""

    image: Image
    strength: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that the model can draw, closest to the image's."""
        width, height = (max(SMALLEST_SIDE, side - side % STRIDE) for side in self.image.size)
        return width, height

    def strength_for(self, family: Family) -> float:
        """The denoising strength for a model of this family."""
        return self.strength or (0.2 if family.refines else 0.8)


def read_init_image(path: Path, strength: float | None, most_memory: float) -> InitImage:
    """Read an image as training does. `most_memory`: GiB that it may need. Raises UserError."""
    try:
        return InitImage(read(path, to_rgb, most_memory), strength)
    except BadImage as error:
        what = f"--image_path {path} cannot be read ({error})"
        raise UserError([Mistake(what, "give a valid image file")]) from error


def encode_init_image(model: Model, init: InitImage, requests: Sequence[ImageRequest]) -> list[Tensor]:
    """Return unscaled latents (C, h, w) of the image for each request: resized to cover the request's size, cropped at
    the centre and encoded with the request's seed."""
    import numpy
    import torch
    from PIL import Image, ImageOps

    latents: list[Tensor] = []
    for request in requests:
        fitted = ImageOps.fit(init.image, (request.width, request.height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents += model.family.encode_images(model.vae, pixels, [torch_generator("start", request.seed or 0)])
    return latents
