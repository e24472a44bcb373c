"""Process the caption of an image for one sample, in the steps of kohya's sd-scripts.

The steps: dropout, choice of a line, prefix and suffix, wildcards {a|b}, tags (warm-up, shuffle, tag dropout),
secondary separator. Four differences from sd-scripts: prefix and suffix are added to the drawn line,
keep_tokens_separator is always removed, tags are joined by the separator that splits them, and wildcards may be nested.

Random draws: the generator of a sample gives one number for the dropout (if its rate is not 0), then the shuffle. Line,
wildcards and tag dropout have their own streams, and tag dropout draws for each tag in caption order, so switching one
of them on or off does not change the draws of the others.
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
    from library.data.scan.image_record import ImageRecord


def process(
    caption: str, settings: CaptionSettings, rng: random.Random, epoch: int, step: int = 0, steps: int = 0
) -> str:
    """Return the caption of one sample.

    `rng` is keyed by (seed, epoch, image, repeat) and always advances by one number. `epoch` counts from 1, `step` is
    the number of optimizer steps before this sample, `steps` that of the whole run.
    """
    draws = _Draws(rng)
    if _is_dropped(settings, draws.main, epoch):
        return ""
    lines = _lines(caption, settings)
    line = lines[0] if len(lines) == 1 else draws.of("line").choice(lines)
    text = _add_prefix_and_suffix(line, settings)
    if settings.wildcard:
        text = wildcards.expand(text, draws.of("wildcard").choice)
    return _arrange(text, settings, lambda tags: _shuffle_and_drop(tags, settings, draws, step, steps))


def longest_texts(caption: str, settings: CaptionSettings, length: Callable[[str], int] = len) -> list[str]:
    """The longest texts that `process` can return for a caption, one per line that it may draw.

    `length` measures the alternatives of a wildcard (characters or tokens). Shuffling does not change the length and
    dropout only shortens, so both are ignored.
    """
    texts = [_add_prefix_and_suffix(line, settings) for line in _lines(caption, settings)]
    if settings.wildcard:
        texts = [wildcards.expand(text, lambda alternatives: max(alternatives, key=length)) for text in texts]
    return [_arrange(text, settings, list) for text in texts]


def vary_with_seed(settings: CaptionSettings) -> bool:
    """Whether captions depend on the seed or on the step of a sample."""
    drawn = settings.shuffle or settings.wildcard or settings.dropout_rate > 0 or settings.tag_dropout_rate > 0
    return drawn or settings.warmup_step > 0


def tag_frequency(records: Iterable[ImageRecord], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count the tags in the captions of each folder: {name: {tag: count}}. `names`: names of the subsets.

    As in the metadata of sd-scripts: unprocessed captions, split at commas regardless of the separator, in lower case,
    each image once regardless of its repeats.
    """
    folders: dict[str, dict[str, int]] = {}
    for record in records:
        counts = folders.setdefault(names[record.subset], {})
        for tag in record.caption.replace("\n", ",").split(","):
            if tag := tag.strip().lower():
                counts[tag] = counts.get(tag, 0) + 1
    return folders


class _Draws:
    """The random streams of a sample: `main` is a copy of its generator, the others are keyed by purpose."""

    def __init__(self, rng: random.Random) -> None:
        self.main = random.Random(0)
        self.main.setstate(rng.getstate())
        self._key = rng.getrandbits(63)

    def of(self, purpose: str) -> random.Random:
        return python_random(self._key, purpose)


def _is_dropped(settings: CaptionSettings, rng: random.Random, epoch: int) -> bool:
    by_rate = settings.dropout_rate > 0 and rng.random() < settings.dropout_rate
    by_epoch = settings.dropout_every_n_epochs > 0 and epoch % settings.dropout_every_n_epochs == 0
    return by_rate or by_epoch


def _lines(caption: str, settings: CaptionSettings) -> list[str]:
    lines = caption.split("\n")
    if not settings.wildcard:
        return lines[:1]
    return [line for line in lines if line.strip()] or [""]


def _add_prefix_and_suffix(line: str, settings: CaptionSettings) -> str:
    return " ".join(part for part in (settings.prefix, line, settings.suffix) if part)


def _arrange(text: str, settings: CaptionSettings, arrange: Callable[[list[str]], list[str]]) -> str:
    """Split the text into tags, if a setting needs that, and apply `arrange` to those that are not fixed."""
    mark = settings.keep_tokens_separator
    has_mark = bool(mark) and mark in text
    if has_mark or settings.shuffle or settings.warmup_step > 0 or settings.tag_dropout_rate > 0:
        fixed, flexible, last = _split_at_mark(text, settings) if has_mark else _split(text, settings)
        joiner = settings.separator if settings.separator[-1:].isspace() else settings.separator + " "
        text = joiner.join([*fixed, *arrange(flexible), *last])
    if settings.secondary_separator:
        text = text.replace(settings.secondary_separator, settings.separator)
    return text


def _tags(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in (text.split(separator) if separator else [text])]


def _split(text: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """Fixed, flexible and fixed last tags; keeps empty tags."""
    tags = _tags(text, settings.separator)
    return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []


def _split_at_mark(text: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """As `_split`, by keep_tokens_separator: all tags after its second occurrence are fixed last tags."""
    parts = [
        [tag for tag in _tags(part, settings.separator) if tag] for part in text.split(settings.keep_tokens_separator)
    ]
    return parts[0], parts[1], [tag for part in parts[2:] for tag in part]


def _shuffle_and_drop(tags: list[str], settings: CaptionSettings, draws: _Draws, step: int, steps: int) -> list[str]:
    """Apply warm-up, shuffle and tag dropout."""
    tags = tags[: _tags_in_warmup(len(tags), settings, step, steps)]
    kept = [True] * len(tags)
    if settings.tag_dropout_rate > 0:
        rng = draws.of("tag dropout")
        kept = [rng.random() >= settings.tag_dropout_rate for _ in tags]
    places = list(range(len(tags)))
    if settings.shuffle:
        draws.main.shuffle(places)
    return [tags[place] for place in places if kept[place]]


def _tags_in_warmup(count: int, settings: CaptionSettings, step: int, steps: int) -> int:
    """Number of the `count` flexible tags to use after `step` optimizer steps."""
    until = settings.warmup_step if settings.warmup_step >= 1 else math.floor(settings.warmup_step * steps)
    if step >= until:
        return count
    return max(0, math.floor(step * (count - settings.warmup_min) / until) + settings.warmup_min)
