"""From the caption of a picture to the text that one sample is trained with; steps as in kohya's sd-scripts.

The steps stand in one order and later ones join it there: prefix and suffix before the dropout, line choice and
wildcards after it, warm-up and tag dropout around the shuffle, secondary separator after the join.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from library.options.dataset import DatasetOptions


@dataclass(frozen=True)
class CaptionSettings:
    """What happens to a caption each time a sample is made."""

    shuffle: bool = False
    keep_tokens: int = 0
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0  # 0 = never


def settings(options: DatasetOptions) -> CaptionSettings:
    """The caption settings of the options."""
    return CaptionSettings(
        shuffle=options.shuffle_caption,
        keep_tokens=options.keep_tokens or 0,
        dropout_rate=options.caption_dropout_rate or 0.0,
        dropout_every_n_epochs=options.caption_dropout_every_n_epochs or 0,
    )


def process(caption: str, chosen: CaptionSettings, rng: random.Random, epoch: int) -> str:
    """The text of one sample. `epoch` counts from 1; `rng` is keyed by (seed, epoch, picture, repeat)."""
    if _is_dropped(chosen, rng, epoch):
        return ""
    if chosen.shuffle:
        caption = _shuffle(caption, chosen.keep_tokens, rng)
    return caption


def _is_dropped(chosen: CaptionSettings, rng: random.Random, epoch: int) -> bool:
    by_chance = chosen.dropout_rate > 0 and rng.random() < chosen.dropout_rate
    by_epoch = chosen.dropout_every_n_epochs > 0 and epoch % chosen.dropout_every_n_epochs == 0
    return by_chance or by_epoch


def _shuffle(caption: str, keep_tokens: int, rng: random.Random) -> str:
    """Tags are separated by commas; the first `keep_tokens` stay in place. Empty tags stay tags."""
    tags = [tag.strip() for tag in caption.split(",")]
    fixed, flexible = tags[:keep_tokens], tags[keep_tokens:]
    rng.shuffle(flexible)
    return ", ".join(fixed + flexible)
