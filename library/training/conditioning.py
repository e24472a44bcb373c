"""Compute the conditioning of a batch; captions are encoded now or come from the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.data.batch import Batch, TextInput
from library.data.cache import text_cache
from library.data.cache.text_cache import TextStore
from library.families.empty_text import zero_empty
from library.runtime.transfers import upload
from library.training.loading import text_settings
from library.training.memory import compute_module

if TYPE_CHECKING:
    from library.families.family import Conditioning, Family, Model, TextSettings, Tokenizer
    from library.training.plan.facts import RunFacts
    from library.training.trainable import Trainable

MOST_IN_MEMORY = 4096  # captions: 1 GB of SD1's hidden states in float32
MOST_ON_DISK = 65536


@dataclass
class Conditioner:
    """Called with a batch, returns its conditioning on the device (families.family.Conditioning).

    `text_encoders`: the modules that encode, see memory.compute_module. `store`: cached outputs; None: no cache.
    """

    family: Family
    text_encoders: Mapping[str, Any]
    tokenize: Tokenizer
    settings: TextSettings
    device: torch.device
    store: TextStore | None = None

    def __call__(self, batch: Batch) -> Conditioning:
        """The conditioning of a batch. Without a cache, captions are encoded with gradients if encoders are trained;
        captions that the cache lacks are encoded without."""
        if self.store is None:
            outputs = self._encode(batch.text_inputs)
        else:
            outputs = text_cache.outputs(batch.captions, self.store, self.encode)
        return self._conditioning(outputs, batch.captions, batch.sizes, batch.score)

    def from_texts(self, texts: list[str], sizes: Tensor, score: Tensor) -> Conditioning:
        """The conditioning of texts, with sizes (B, 6) and aesthetic scores (B,) float32."""
        if self.store is None:
            outputs = self._encode(self.tokenize(texts))
        else:
            outputs = text_cache.outputs(texts, self.store, self.encode)
        return self._conditioning(outputs, texts, sizes, score)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """The text encoder outputs of texts, without gradients: what a cache holds."""
        with torch.no_grad():
            return self._encode(self.tokenize(texts))

    def _encode(self, text_inputs: Mapping[str, TextInput]) -> dict[str, Tensor]:
        on_device = {name: text_input.to(self.device) for name, text_input in text_inputs.items()}
        return self.family.encode_text(self.text_encoders, on_device, self.settings)

    def _conditioning(
        self, outputs: Mapping[str, Tensor], texts: Sequence[str], sizes: Tensor, score: Tensor
    ) -> Conditioning:
        if self.settings.empty_is_zero:
            outputs = zero_empty(outputs, texts)
        conditioning = {**outputs, "sizes": sizes, "score": score}
        return {name: upload(tensor, self.device) for name, tensor in conditioning.items()}


def build_conditioner(facts: RunFacts, model: Model, trainable: Trainable, device: torch.device) -> Conditioner:
    """The conditioner of a run, with the text encoders on the device."""
    return Conditioner(
        family=model.family,
        text_encoders={
            name: compute_module(module, trainable, facts.precision, device, active=name in trainable.active)
            for name, module in model.text_encoders.items()
        },
        tokenize=facts.base_model.tokenizer,
        settings=text_settings(facts.options, facts.base_model),
        device=device,
    )
