"""What a run draws its pictures with: the trained modules in place, the VAE fetched, prompts encoded or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.options.mistakes import Mistake, UserError
from library.sampling.pictures import chunks_of, encode_prompts, sample_batch, texts_of
from library.sampling.prompts import PictureRequest
from library.training.memory import working_copy

if TYPE_CHECKING:
    from library.families.family import Family, Model, Tokenizer
    from library.runtime.precision import FloatName
    from library.training.preview import Draw

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class PromptStates:
    """Called with texts and a number of chunks, gives their states: see library.sampling.pictures.EncodePrompts.

    `text_encoder` is the one that the run computes with. Where its captions are encoded beforehand it may be needed no
    more: `keep` the prompts' states and `forget` it.
    """

    family: Family
    tokenizer: Tokenizer
    text_encoder: Any
    clip_skip: int | None = None
    autocast: Autocast = nullcontext
    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str], chunks: int) -> Tensor:
        """States (B, 75 chunks + 2, width). Raises UserError for a text that is unknown when the encoder is gone."""
        if self.text_encoder is not None:
            return self._encode(texts, chunks)
        unknown = [text for text in texts if (text, chunks) not in self.kept]
        if unknown:
            what = f'"{unknown[0]}" came to the prompt file after the text encoder had done its work'
            raise UserError((Mistake(what, "start again, or without --cache_text_encoder_outputs"),))
        return torch.cat([self.kept[text, chunks] for text in texts])

    def keep(self, requests: Iterable[PictureRequest]) -> None:
        """Encode what these requests will need, each text by itself."""
        for request in requests:
            chunks = chunks_of(self.tokenizer, request)
            for text in texts_of(request):
                if (text, chunks) not in self.kept:
                    with torch.no_grad():
                        self.kept[text, chunks] = self._encode([text], chunks).cpu()

    def forget(self) -> None:
        """Let go of the text encoder."""
        self.text_encoder = None

    def _encode(self, texts: Sequence[str], chunks: int) -> Tensor:
        with self.autocast():
            return encode_prompts(self.family, self.tokenizer, self.text_encoder, self.clip_skip, texts, chunks)


@contextmanager
def drawing(
    model: Model,
    states: PromptStates,
    *,
    vae: Any,
    vae_format: FloatName,
    device: torch.device,
    autocast: Autocast = nullcontext,
    release: Callable[[], None] = lambda: None,
) -> Iterator[Draw]:
    """Make ready what draws with the model's own U-Net, and put it away again.

    `vae`: the one that the run computes with, or None where it needs none; then the model's own is fetched to the
    device, in the format of the computation. `release` gives memory back.
    """
    try:
        with decoder(model.vae, vae, vae_format, device) as decoding:
            shown = replace(model, vae=decoding, text_encoder=None)
            yield partial(
                sample_batch,
                shown,
                encode=states,
                autocast=autocast,
                dtype=torch.float32,  # as in training: weights of fewer bits meet them by themselves or under autocast
            )
    finally:
        release()


@contextmanager
def decoder(original: Any, computing: Any, dtype: FloatName, device: torch.device) -> Iterator[Any]:
    """A VAE on the device: the one that computes already; else the original, for a while, or a copy of it.

    In main memory the original decodes as it is: no copy is worth its memory there.
    """
    if computing is not None:
        yield computing
    elif original.device == device or device.type == "cpu":
        yield original
    elif dtype != "fp32":
        yield working_copy(original, dtype, device)
    else:
        home = original.device
        try:
            yield original.to(device)
        finally:
            original.to(home)
