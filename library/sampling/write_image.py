"""Write a drawn image with its prompt, seed and settings as text in the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import replacing
from library.options.mistakes import Mistake, UserError
from library.sampling.prompts import ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo


def write_image(path: Path, request: ImageRequest, image: Image) -> None:
    """Write a PNG atomically, with its settings as text chunks. Raises UserError."""
    try:
        with replacing(path) as stream:
            image.save(stream, "png", pnginfo=_facts(request))
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error


def _facts(request: ImageRequest) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    facts.add_itxt("prompt", request.prompt)
    facts.add_itxt("negative-prompt", request.negative_prompt)
    for key, value in (("seed", request.seed), ("sampler", request.sampler), ("steps", request.steps)):
        facts.add_text(key, str(value))
    facts.add_text("scale", str(request.scale))
    if request.adapters:
        facts.add_itxt("networks", ", ".join(map(str, request.adapters)))
    return facts
