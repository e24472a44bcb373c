"""What the page is made of: plain records, so that it needs to know nothing of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Size = tuple[int, int]  # width, height


@dataclass(frozen=True, slots=True)
class ShownCaption:
    """A caption as one epoch trains it. `tokens` counts the whole text, without start and end marks."""

    text: str
    tokens: int
    fits: int | None = None  # characters of the text within the limit; None: not known


@dataclass(frozen=True, slots=True)
class Shown:
    """One image. `pixels` and `mask` are called when the page is written, from several threads, and may raise."""

    path: str
    subset: str  # as the user calls it; equal text = one entry of the filter
    is_reg: bool
    bucket: Size
    size: Size  # of the file, upright
    resized: Size  # covers the bucket
    pixels: Callable[[], NDArray[np.uint8]]  # (H, W, 3) RGB, the crop that is trained
    mask: Callable[[], NDArray[np.uint8]] | None = None  # (H, W), 255 = counts fully
    captions: tuple[ShownCaption, ...] = ()  # of the epochs 1, 2, ...
    repeats: int = 1
    weight: float = 1.0  # of its loss
    offset: tuple[int, int] = (0, 0)  # left and top of the crop in the scaled image
    score: float | None = None  # its own aesthetic score

    @property
    def enlarged(self) -> float:
        """How much the image is scaled up; 1 or less: it is not."""
        return max(new / old for new, old in zip(self.resized, self.size, strict=True))

    @property
    def cut_away(self) -> float:
        """Share of the image's area outside the crop."""
        return 1 - self.bucket[0] * self.bucket[1] / (self.resized[0] * self.resized[1])


@dataclass(frozen=True)
class Page:
    """The whole page. `problems` and `facts` (name, value) are the run's own; the page adds what it finds itself."""

    title: str
    token_limit: int  # of a caption, without start and end marks
    shown: Sequence[Shown]
    problems: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
