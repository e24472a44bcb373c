"""From the caption of an image to the text that one sample is trained with; steps as in kohya's sd-scripts.

In order: dropout, one of the lines, prefix and suffix, choices {a|b}, tags (warm-up, shuffle, tag dropout), secondary
separator. Four things are as users mean them and not as they come out there: prefix and suffix are those of the line
that was drawn, keep_tokens_separator never stays in the text, tags are joined by the separator that they were split
at, and choices may be nested.

Draws: the generator of a sample gives, in this order, one number for the dropout (if its rate is not 0) and the
shuffle. The line, the choices and the tag dropout have streams of their own, and tag dropout draws for each tag in the
order of the caption: switching one of them on or off leaves the draws of the others alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from library.data import wildcards
from library.options.datasets import CaptionSettings
from library.runtime.seeds import python_random

if TYPE_CHECKING:
    from library.data.scan.scan import ImageRecord


def process(
    caption: str, chosen: CaptionSettings, rng: random.Random, epoch: int, step: int = 0, steps: int = 0
) -> str:
    """The text of one sample.

    `rng` is keyed by (seed, epoch, image, repeat); whatever is drawn, it moves on by one number. `epoch` counts from
    1, `step` is the optimiser steps done before this sample, `steps` those of the whole run.
    """
    draws = _Draws(rng)
    if _is_dropped(chosen, draws.main, epoch):
        return ""
    lines = _lines(caption, chosen)
    line = lines[0] if len(lines) == 1 else draws.of("line").choice(lines)
    text = _with_ends(line, chosen)
    if chosen.wildcard:
        text = wildcards.expand(text, draws.of("wildcard").choice)
    return _arranged(text, chosen, lambda tags: _varied(tags, chosen, draws, step, steps))


def longest_texts(caption: str, chosen: CaptionSettings, length: Callable[[str], int] = len) -> list[str]:
    """The longest that `process` can make of a caption, one text a line that it may draw.

    `length` says which alternative of a choice is the longest (characters, or a count of tokens). Shuffling changes no
    length and dropout only shortens, so neither is played.
    """
    texts = [_with_ends(line, chosen) for line in _lines(caption, chosen)]
    if chosen.wildcard:
        texts = [wildcards.expand(text, lambda alternatives: max(alternatives, key=length)) for text in texts]
    return [_arranged(text, chosen, list) for text in texts]


def vary_with_seed(chosen: CaptionSettings) -> bool:
    """Whether another seed gives other texts: something is drawn, or depends on when in the run a sample comes."""
    drawn = chosen.shuffle or chosen.wildcard or chosen.dropout_rate > 0 or chosen.tag_dropout_rate > 0
    return drawn or chosen.warmup_step > 0


def tag_frequency(records: Iterable[ImageRecord], names: Sequence[str] = ()) -> dict[str, dict[str, int]]:
    """How often each tag stands in the captions of a folder: {name of the folder: {tag: count}}.

    `names`: what the subsets are called, in place of the folders that their images lie in.

    As in sd-scripts' metadata: of captions as they are in the files, split at commas whatever the separator is, in
    lower case, each image once however often it is repeated.
    """
    folders: dict[str, dict[str, int]] = {}
    for record in records:
        counts = folders.setdefault(names[record.subset] if names else record.folder.name, {})
        for tag in record.caption.replace("\n", ",").split(","):
            if tag := tag.strip().lower():
                counts[tag] = counts.get(tag, 0) + 1
    return folders


class _Draws:
    """`main` is today's generator as it came; the others are keyed by their purpose."""

    def __init__(self, rng: random.Random) -> None:
        self.main = random.Random(0)
        self.main.setstate(rng.getstate())
        self._key = rng.getrandbits(63)

    def of(self, purpose: str) -> random.Random:
        return python_random(self._key, purpose)


def _is_dropped(chosen: CaptionSettings, rng: random.Random, epoch: int) -> bool:
    by_chance = chosen.dropout_rate > 0 and rng.random() < chosen.dropout_rate
    by_epoch = chosen.dropout_every_n_epochs > 0 and epoch % chosen.dropout_every_n_epochs == 0
    return by_chance or by_epoch


def _lines(caption: str, chosen: CaptionSettings) -> list[str]:
    lines = caption.split("\n")
    if not chosen.wildcard:
        return lines[:1]
    return [line for line in lines if line.strip()] or [""]


def _with_ends(line: str, chosen: CaptionSettings) -> str:
    return " ".join(part for part in (chosen.prefix, line, chosen.suffix) if part)


def _arranged(text: str, chosen: CaptionSettings, arrange: Callable[[list[str]], list[str]]) -> str:
    """The text with its flexible tags as `arrange` gives them; unless something asks for tags it is not taken apart."""
    mark = chosen.keep_tokens_separator
    marked = bool(mark) and mark in text
    if marked or chosen.shuffle or chosen.warmup_step > 0 or chosen.tag_dropout_rate > 0:
        fixed, flexible, last = _split_at_mark(text, chosen) if marked else _split(text, chosen)
        glue = chosen.separator if chosen.separator[-1:].isspace() else chosen.separator + " "
        text = glue.join([*fixed, *arrange(flexible), *last])
    if chosen.secondary_separator:
        text = text.replace(chosen.secondary_separator, chosen.separator)
    return text


def _tags(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in (text.split(separator) if separator else [text])]


def _split(text: str, chosen: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """Fixed, flexible and fixed last tags; empty tags stay tags."""
    tags = _tags(text, chosen.separator)
    return tags[: chosen.keep_tokens], tags[chosen.keep_tokens :], []


def _split_at_mark(text: str, chosen: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """As `_split`, by keep_tokens_separator: what follows its second place, third and later ones too, comes last."""
    parts = [[tag for tag in _tags(part, chosen.separator) if tag] for part in text.split(chosen.keep_tokens_separator)]
    return parts[0], parts[1], [tag for part in parts[2:] for tag in part]


def _varied(tags: list[str], chosen: CaptionSettings, draws: _Draws, step: int, steps: int) -> list[str]:
    """Warm-up, shuffle, tag dropout."""
    tags = tags[: _warm(len(tags), chosen, step, steps)]
    stays = [True] * len(tags)
    if chosen.tag_dropout_rate > 0:
        rng = draws.of("tag dropout")
        stays = [rng.random() >= chosen.tag_dropout_rate for _ in tags]
    places = list(range(len(tags)))
    if chosen.shuffle:
        draws.main.shuffle(places)
    return [tags[place] for place in places if stays[place]]


def _warm(count: int, chosen: CaptionSettings, step: int, steps: int) -> int:
    """How many of `count` flexible tags are there after `step` optimiser steps."""
    until = chosen.warmup_step if chosen.warmup_step >= 1 else math.floor(chosen.warmup_step * steps)
    if step >= until:
        return count
    return max(0, math.floor(step * (count - chosen.warmup_min) / until) + chosen.warmup_min)
