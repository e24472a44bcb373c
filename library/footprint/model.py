"""What a model family tells about the memory of its modules: their passes over shapes, one for each of the family's
functions of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from library.footprint.module import Module
from library.footprint.tape import Tensor

Conditions = Mapping[str, Tensor]
"""The conditioning by name, as the backbone gets it, over shapes."""


class EncodeTextOver(Protocol):
    """Encode ids (n, chunks, L) by text encoder to the conditioning. `skipped`: last layers that --clip_skip leaves
    out, where it has an effect."""

    def __call__(
        self, encoders: Mapping[str, Module], ids: Mapping[str, Tensor], *, skipped: int = 0
    ) -> Conditions: ...


class PredictOver(Protocol):
    """The output of the backbone for noisy latents (n, C, h, w)."""

    def __call__(self, backbone: Module, noisy: Tensor, conditioning: Conditions) -> Tensor: ...


class TransformOver(Protocol):
    """Pixels (n, 3, H, W) to latents by a VAE, or back."""

    def __call__(self, vae: Module, values: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Footprint:
    """The passes of a family's modules over shapes."""

    encode_text: EncodeTextOver
    predict: PredictOver
    encode_images: TransformOver
    decode_latents: TransformOver
