"""Images that drawing begins with in place of noise: read, brought to size, encoded. No torch at module level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.mistakes import Mistake, UserError
from library.runtime.seeds import torch_generator
from library.sampling.prompts import SMALLEST_SIDE, STRIDE, ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.families.family import Model


@dataclass(frozen=True)
class InitImage:
    """An image to refine, RGB and upright. `strength` is the share of the timesteps that it is refined in; None: of a
    refiner its own, else kohya's."""

    image: Image
    strength: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that the model can draw, as near to the image's as may be."""
        width, height = (max(SMALLEST_SIDE, side - side % STRIDE) for side in self.image.size)
        return width, height

    def share(self, refines: bool) -> float:
        """The share of the timesteps, for a model that refines images or for one that draws them."""
        return self.strength or (0.2 if refines else 0.8)


def read_init_image(path: Path, strength: float | None) -> InitImage:
    """Read an image. Raises UserError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return InitImage(ImageOps.exif_transpose(image).convert("RGB"), strength)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = f"--image_path {path} cannot be read ({error})"
        raise UserError([Mistake(what, "give an image file")]) from error


def encode_init_image(model: Model, start: InitImage, images: Sequence[ImageRequest]) -> list[Tensor]:
    """Latents (C, h, w), not scaled, of the image for each request: scaled to cover its size and cropped at the
    centre, encoded with the request's seed."""
    import numpy
    import torch
    from PIL import Image, ImageOps

    latents: list[Tensor] = []
    for one in images:
        fitted = ImageOps.fit(start.image, (one.width, one.height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents += model.family.encode_images(model.vae, pixels, [torch_generator("start", one.seed or 0)])
    return latents
