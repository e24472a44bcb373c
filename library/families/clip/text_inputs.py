"""Captions to what each CLIP text encoder of a model reads, by its own tokenizer. No torch at module level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from library.data.batch import TextInput
from library.families.clip.tokenizer import CHUNK, ClipTokenizer


@dataclass(frozen=True)
class ClipTokenizers:
    """The tokenizers of a model's text encoders, by the names of these: see families.family.Tokenizer.

    A caption longer than 75 tokens is read in up to `chunks` chunks of 75, which all encoders share. It counts as
    long as the tokenizer finds it that finds most in it: the one that pads with "!" reads every "!" as a token.
    """

    by_encoder: Mapping[str, ClipTokenizer]
    chunks: int = 1
    padded: bool = True
    weighted: bool = False

    def configured(
        self, *, max_tokens: int | None = None, padded: bool = True, weighted: bool = False
    ) -> ClipTokenizers:
        """With as few chunks as hold `max_tokens`; one by default."""
        chunks = max(1, -(-(max_tokens or 0) // CHUNK))
        return replace(self, chunks=chunks, padded=padded, weighted=weighted)

    @property
    def name(self) -> str:
        """All that the tokens of a caption depend on."""
        return " ".join([*(one.name for one in self.by_encoder.values()), str(self.weighted)])

    @property
    def cache_key(self) -> str:
        """The configuration, as names of text caches have it."""
        return f"{self.chunks} {self.padded} {self.weighted}"

    @property
    def limit(self) -> int:
        """Tokens of a caption that are read, without begin and end."""
        return CHUNK * self.chunks

    def count(self, caption: str) -> int:
        """Tokens of a caption, without begin and end."""
        return max(one.count(caption, self.weighted) for one in self.by_encoder.values())

    def counts(self, captions: Sequence[str]) -> list[int]:
        """`count` of each caption, quicker than one by one."""
        lengths = (one.counts(captions, self.weighted) for one in self.by_encoder.values())
        return [max(each) for each in zip(*lengths, strict=True)]

    def __call__(self, texts: Sequence[str]) -> dict[str, TextInput]:
        """Ids (B, chunks, 77), (B, 1, L) when not padded, and with `weighted` weights of their shape; no mask.

        Raises ValueError for several text encoders without padding: their states, side by side, could differ in length.
        """
        if not self.padded and len(self.by_encoder) > 1:
            raise ValueError("captions for two text encoders are always filled up to 75 tokens")
        return {name: self._input(one, texts) for name, one in self.by_encoder.items()}

    def _input(self, tokenizer: ClipTokenizer, texts: Sequence[str]) -> TextInput:
        if self.weighted:
            ids, weights = tokenizer.weighted(texts, self.chunks, self.padded)
            return TextInput(ids, weights=weights)
        return TextInput(tokenizer.tensor(texts, self.chunks, self.padded))
