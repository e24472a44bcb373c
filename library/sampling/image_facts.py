"""Facts of a drawn image: all that decides its pixels, for records of what was drawn how. No torch at module level."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.checkpoints.files import read_part_header, sha256
from library.checkpoints.header import Header
from library.sampling.draw_command import Drawing
from library.sampling.options import DrawingOptions
from library.sampling.prompts import ImageRequest

_NAMES = ("model", "vae", "networks")  # not compared, as files may be renamed; their hashes are


def request_facts(request: ImageRequest, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """What a request asks for. `hashes`: of the adapter files."""
    uses = request.adapters
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "sampler": request.sampler,
        "steps": request.steps,
        "scale": request.scale,
        "networks": [use.path.name for use in uses] or None,
        "networks_sha256": [[hashes[use.path], use.multiplier, use.text_multiplier] for use in uses] or None,
    }


def hashes_of_adapters(requests: Iterable[ImageRequest]) -> dict[Path, str]:
    """The SHA-256 of every adapter file of the requests."""
    return {path: sha256(path) for path in {use.path for request in requests for use in request.adapters}}


def model_facts(options: DrawingOptions, drawing: Drawing) -> dict[str, Any]:
    """What all images of a model share."""
    precision = "fp16" if options.fp16 else "bf16" if options.bf16 else "fp32"
    return {
        "model": drawing.header.path.name,
        "model_sha256": _content_hash(drawing.header),
        "vae": drawing.vae.name if drawing.vae is not None else None,
        "vae_sha256": _content_hash(read_part_header(drawing.vae)) if drawing.vae is not None else None,
        "prediction": drawing.prediction,
        "clip_skip": options.clip_skip or 1,
        "max_embeddings_multiples": options.max_embeddings_multiples,
        "precision": precision + (" (VAE fp32)" if drawing.vae_in_full(options) and precision != "fp32" else ""),
    }


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> Sequence[str]:
    """The facts in which an image that exists differs from the one that is wanted."""
    return [key for key, value in now.items() if key not in _NAMES and was.get(key) != value]


def _content_hash(header: Header) -> str:
    """The SHA-256 of a model file; of a folder, of the names and hashes of its weight files."""
    files = sorted({place.file for place in header.places.values()})
    if files == [header.path]:
        return sha256(header.path)
    lines = [f"{file.relative_to(header.path).as_posix()} {sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()
