"""The page's input: plain records, independent of the training code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Size = tuple[int, int]  # width, height


@dataclass(frozen=True, slots=True)
class SheetCaption:
    """A caption as trained in an epoch. `tokens` counts the whole text, without start and end tokens."""

    text: str
    tokens: int
    fits: int | None = None  # characters of the text within the token limit; None: unknown


@dataclass(frozen=True, slots=True)
class SheetImage:
    """An image. `pixels` and `mask` are called when the page is written, from several threads, and may raise."""

    path: str
    subset: str  # its folder or file; equal texts are one entry of the filter
    is_reg: bool
    bucket: Size
    size: Size  # of the file, upright
    resized: Size  # covers the bucket
    pixels: Callable[[], NDArray[np.uint8]]  # (H, W, 3) RGB, the crop
    mask: Callable[[], NDArray[np.uint8]] | None = None  # (H, W), 255 = full loss
    captions: tuple[SheetCaption, ...] = ()  # of the epochs 1, 2, ...
    repeats: int = 1
    weight: float = 1.0  # loss weight
    offset: tuple[int, int] = (0, 0)  # left and top of the crop in the scaled image
    score: float | None = None  # aesthetic score of the image, if it has one

    @property
    def enlarged(self) -> float:
        """Upscaling factor; 1 or less: not upscaled."""
        return max(new / old for new, old in zip(self.resized, self.size, strict=True))

    @property
    def cut_away(self) -> float:
        """Share of the image's area outside the crop."""
        return 1 - self.bucket[0] * self.bucket[1] / (self.resized[0] * self.resized[1])


@dataclass(frozen=True)
class Page:
    """The page. `problems` and `facts` (name, value) come from the run; the page adds problems that it finds itself."""

    title: str
    token_limit: int  # of a caption, without start and end tokens
    images: Sequence[SheetImage]
    held_out: int = 0  # images that are only validated on, and not shown
    problems: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
