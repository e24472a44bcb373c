"""Tokenize captions for all CLIP text encoders of a model. No torch at module level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from library.data.batch import TextInput
from library.families.clip.tokenizer import CHUNK, ClipTokenizer


@dataclass(frozen=True)
class ClipTokenizers:
    """The tokenizers of a model's text encoders, by encoder name: see families.family.Tokenizer.

    A caption longer than 75 tokens is read in up to `chunks` chunks of 75, for all encoders alike. Its length is the
    largest count of any tokenizer: the one that pads with "!" reads every "!" as a token of its own.
    """

    by_encoder: Mapping[str, ClipTokenizer]
    chunks: int = 1
    padded: bool = True
    weighted: bool = False

    def configured(
        self, *, max_tokens: int | None = None, padded: bool = True, weighted: bool = False
    ) -> ClipTokenizers:
        """Return tokenizers with the fewest chunks that hold `max_tokens`; one by default."""
        chunks = max(1, -(-(max_tokens or 0) // CHUNK))
        return replace(self, chunks=chunks, padded=padded, weighted=weighted)

    @property
    def name(self) -> str:
        """Everything that a caption's tokens depend on."""
        return " ".join([*(tokenizer.name for tokenizer in self.by_encoder.values()), str(self.weighted)])

    @property
    def cache_key(self) -> str:
        """The configuration, as part of text cache names."""
        return f"{self.chunks} {self.padded} {self.weighted}"

    @property
    def limit(self) -> int:
        """Maximum number of tokens of a caption, without begin and end."""
        return CHUNK * self.chunks

    def count(self, caption: str) -> int:
        """Count the tokens of a caption, without begin and end."""
        return max(tokenizer.count(caption, weighted=self.weighted) for tokenizer in self.by_encoder.values())

    def counts(self, captions: Sequence[str]) -> list[int]:
        """Count the tokens of many captions, faster than one by one."""
        counts = (tokenizer.counts(captions, weighted=self.weighted) for tokenizer in self.by_encoder.values())
        return [max(lengths) for lengths in zip(*counts, strict=True)]

    def __call__(self, texts: Sequence[str]) -> dict[str, TextInput]:
        """Return ids (B, chunks, 77), or (B, 1, L) if not padded, and weights of the same shape if `weighted`; no mask.

        Raises ValueError for several text encoders without padding: their states could differ in length.
        """
        if not self.padded and len(self.by_encoder) > 1:
            raise ValueError("captions for two text encoders are always padded to 75 tokens")
        return {name: self._input(tokenizer, texts) for name, tokenizer in self.by_encoder.items()}

    def _input(self, tokenizer: ClipTokenizer, texts: Sequence[str]) -> TextInput:
        if self.weighted:
            ids, weights = tokenizer.weighted(texts, self.chunks, padded=self.padded)
            return TextInput(ids, weights=weights)
        return TextInput(tokenizer.tensor(texts, self.chunks, padded=self.padded))
