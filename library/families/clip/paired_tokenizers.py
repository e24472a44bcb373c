"""Two CLIP tokenizers side by side, for models with two text encoders: each fills its ids up in its own way. No torch
at module level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.families.clip.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClipTokenizers:
    """Captions to ids (B, encoders, n, 77). A caption counts as long as the tokenizer finds it that finds most in it:
    the one that fills up with "!" reads every "!" of a text as a token."""

    tokenizers: tuple[ClipTokenizer, ...]

    @property
    def name(self) -> str:
        """Other ids, another name."""
        return " ".join(one.name for one in self.tokenizers)

    def each(self) -> Sequence[ClipTokenizer]:
        """One for each text encoder."""
        return self.tokenizers

    def count(self, caption: str, weighted: bool = False) -> int:
        """Tokens of a caption, without begin and end."""
        return max(one.count(caption, weighted) for one in self.tokenizers)

    def counts(self, captions: Sequence[str], weighted: bool = False) -> list[int]:
        """`count` of each caption, quicker than one by one."""
        return [
            max(lengths) for lengths in zip(*(one.counts(captions, weighted) for one in self.tokenizers), strict=True)
        ]

    def tensor(self, captions: Sequence[str], chunks: int = 1, padded: bool = True) -> Tensor:
        """Ids (B, encoders, chunks, 77) int64. Raises ValueError without padding: lengths would differ."""
        import torch

        _refuse_unpadded(padded)
        return torch.stack([one.tensor(captions, chunks) for one in self.tokenizers], 1)

    def weighted(self, captions: Sequence[str], chunks: int = 1, padded: bool = True) -> tuple[Tensor, Tensor]:
        """Ids int64 and weights float32 (B, encoders, chunks, 77)."""
        import torch

        _refuse_unpadded(padded)
        ids, weights = zip(*(one.weighted(captions, chunks) for one in self.tokenizers), strict=True)
        return torch.stack(ids, 1), torch.stack(weights, 1)

    def save(self, folder: Path) -> None:
        """Write the first one's files."""
        self.tokenizers[0].save(folder)


def _refuse_unpadded(padded: bool) -> None:
    if not padded:
        raise ValueError("captions for two text encoders are always filled up to 75 tokens")
