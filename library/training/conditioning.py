"""From the captions of a batch to what the network is told: encoded now, or once before the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.data import text_cache
from library.data.batch import Batch
from library.data.dataset import Tokenize
from library.data.text_cache import TextStore

if TYPE_CHECKING:
    from library.families.family import Family

STATES = "states"
MOST_IN_MEMORY = 4096  # texts: 1 GB of SD1's states in float32
MOST_ON_DISK = 65536
FEW = 128  # texts that are encoded beforehand without being asked: 30 MB, and seconds also on a CPU


@dataclass
class Conditioning:
    """Called with a batch, gives the states of its captions (B, L, width) on the device.

    `text_encoder` is the one that computes. `store` None: nothing was encoded beforehand.
    """

    family: Family
    text_encoder: Any
    tokenize: Tokenize
    clip_skip: int | None
    device: torch.device
    store: TextStore | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """States of a batch; those of captions that are in no store are computed, with gradients if there are any."""
        if self.store is None:
            return self._states(batch.input_ids, batch.token_weights)
        return text_cache.outputs(batch.captions, self.store, self.encode)[STATES].to(self.device, non_blocking=True)

    def of_texts(self, texts: list[str]) -> Tensor:
        """States of texts that are in no batch."""
        if self.store is None:
            return self._states(*self.tokenize(texts))
        return text_cache.outputs(texts, self.store, self.encode)[STATES].to(self.device)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """The states of texts, without gradients: what a cache keeps."""
        with torch.no_grad():
            return {STATES: self._states(*self.tokenize(texts))}

    def _states(self, input_ids: Tensor, weights: Tensor | None) -> Tensor:
        return self.family.encode_text(self.text_encoder, input_ids.to(self.device), self.clip_skip, weights)
