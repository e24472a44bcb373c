"""Measure what a text encoder knows of names: norms, nearest common words, and how far they move a prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from library.families.family import EncoderTokenizer
from library.rare_tokens.ranking import Measures

BEFORE = "a photo of"

Progress = Callable[[int], object]
"""Called with the number of texts of each batch when it is encoded."""


@dataclass(frozen=True)
class Encoded:
    """Texts in one text encoder.

    `norms` (N,): see Measures; of a text's tokens the one farthest from the median. `states` (N, width): the last
    hidden state at the last token of each text in "a photo of TEXT", behind which the encoder sees nothing. `moved`
    (N,): see Measures.
    """

    norms: Tensor
    states: Tensor
    moved: Tensor


@torch.no_grad()
def encode(
    encoder: Any,
    tokenizer: EncoderTokenizer,
    texts: Sequence[str],
    class_word: str,
    batch_size: int,
    progress: Progress = lambda count: None,
) -> Encoded:
    """Encode "a photo of TEXT CLASS" for each text, on the encoder's device; no more tokens than the prompt has."""
    plain = _states(encoder, [_row(tokenizer, f"{BEFORE} {class_word}")])[0]
    rows = [_row(tokenizer, f"{BEFORE} {text} {class_word}") for text in texts]
    # behind the begin token, so the number of tokens up to the text is the place of its last one
    places = [len(tokenizer.encode(f"{BEFORE} {text}")) for text in texts]
    at_text, moved = torch.empty(len(texts), plain.shape[-1]), torch.empty(len(texts))
    for batch in _batches(rows, batch_size):
        states = _states(encoder, [rows[number] for number in batch])
        at_text[batch] = states[range(len(batch)), [places[number] for number in batch]]
        # the last token of the class and the end token, with and without the text before them
        moved[batch] = 1 - functional.cosine_similarity(states[:, -2:], plain[-2:], dim=-1).mean(-1)
        progress(len(batch))
    return Encoded(_norms(encoder, tokenizer, texts), at_text, moved)


def measure(
    encoded: Encoded, texts: Sequence[str], common: Encoded, common_words: Sequence[str]
) -> dict[str, Measures]:
    """The measures of encoded texts, compared with those of common words. A word is not compared with itself.

    States have a large part in common, so the mean of the common words is subtracted first.
    """
    centre = common.states.mean(0)
    cosines = _unit(encoded.states - centre) @ _unit(common.states - centre).T
    numbers = {word: number for number, word in enumerate(common_words)}
    for row, text in enumerate(texts):
        if text in numbers:
            cosines[row, numbers[text]] = -2
    closest = cosines.max(1)
    found = zip(encoded.norms.tolist(), closest.values.tolist(), encoded.moved.tolist(), closest.indices, strict=True)
    return {
        text: Measures(norm, closeness, moved, common_words[int(number)])
        for text, (norm, closeness, moved, number) in zip(texts, found, strict=True)
    }


def likeness(encoded: Encoded, to: int, common: Encoded) -> list[float]:
    """The cosines of all texts with the text number `to`, centred as in `measure`."""
    states = _unit(encoded.states - common.states.mean(0))
    cosines: list[float] = (states @ states[to]).tolist()
    return cosines


def _unit(states: Tensor) -> Tensor:
    return functional.normalize(states, dim=-1)


def _row(tokenizer: EncoderTokenizer, text: str) -> list[int]:
    return tokenizer.ids([text], padded=False)[0][0]


def _states(encoder: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Last hidden states (B, L, width) float32 on the CPU, of rows of one length."""
    states: Tensor = encoder(torch.tensor(rows, device=encoder.device)).last_hidden_state
    return states.float().cpu()


def _batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """The numbers of the rows, up to `size` rows of one length at once."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_length[len(row)].append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def _norms(encoder: Any, tokenizer: EncoderTokenizer, texts: Sequence[str]) -> Tensor:
    """How far the norm of each text's embedding is from the median of all tokens, as a share of it (N,)."""
    norms = encoder.get_input_embeddings().weight.detach().float().norm(dim=-1).cpu()
    distances = (norms / norms.median() - 1).abs()
    return torch.stack([distances[tokenizer.encode(text)].max() for text in texts])
