"""Batches, as the loader passes them to the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TextInput:
    """Input of one text encoder for B texts. The length depends on its tokenizer, and may differ between encoders."""

    ids: torch.Tensor  # (B, ...) int64, for CLIP (B, chunks, 77)
    mask: torch.Tensor | None = None  # shape of ids: 1 for a token, 0 for padding; None: no mask
    weights: torch.Tensor | None = None  # shape of ids, float32: prompt weights; None: all 1

    def to(self, device: torch.device) -> TextInput:
        """Move to a device, without waiting for it."""
        from library.runtime.transfers import upload

        mask = None if self.mask is None else upload(self.mask, device)
        return TextInput(upload(self.ids, device), mask, None if self.weights is None else upload(self.weights, device))

    def pin_memory(self) -> TextInput:
        """A copy in page-locked memory."""
        mask = None if self.mask is None else self.mask.pin_memory()
        return TextInput(self.ids.pin_memory(), mask, None if self.weights is None else self.weights.pin_memory())


class Tokenize(Protocol):
    """Tokenizes texts for each text encoder, by the encoder's name. Picklable, because data workers use it.

    `padded`: inputs have the same length in every batch. `cache_key` identifies its configuration in text caches: if
    inputs can differ, so must the keys.
    """

    @property
    def padded(self) -> bool: ...

    @property
    def cache_key(self) -> str: ...

    def __call__(self, texts: Sequence[str]) -> Mapping[str, TextInput]: ...


class Unread(NamedTuple):
    """A sample whose image, mask or cached latents could not be read. In the batch it is grey and has weight 0."""

    position: int  # of the sample in the whole run
    path: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """A batch of B samples of one bucket (width W, height H). Exactly one of pixels and latents is set."""

    pixels: torch.Tensor | None  # (B, 3, H, W) float32 in [-1, 1]
    latents: torch.Tensor | None  # (B, C, h, w) float32, a sample of the VAE's posterior, not scaled
    mask: torch.Tensor | None  # (B, 1, h, w) float32 in [0, 1], loss mask; None: unmasked
    text_inputs: Mapping[str, TextInput]  # by the names of the family's text encoders
    # (B, 6) float32: original height and width, crop top and left, target height and width; see size_conditioning
    sizes: torch.Tensor
    score: torch.Tensor  # (B,) float32: aesthetic score, 0 to 10
    weights: torch.Tensor  # (B,) float32: prior_loss_weight for a regularisation image, 0 if it is unread, else 1
    is_reg: torch.Tensor  # (B,) bool: regularisation images
    # (B,) int64, the key of its noise: the position of the sample in the whole run; of fixed draws a number below 0
    sample_index: torch.Tensor
    paths: tuple[str, ...]
    captions: tuple[str, ...]  # as tokenized: after dropout and shuffling
    unread: tuple[Unread, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory (called by torch's DataLoader)."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = {name: value.pin_memory() for name, value in tensors.items() if hasattr(value, "pin_memory")}
        text_inputs = {name: text_input.pin_memory() for name, text_input in self.text_inputs.items()}
        return replace(self, text_inputs=text_inputs, **pinned)
