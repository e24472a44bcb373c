"""Captions in which the identifier of a subject is replaced by its class: "sks dog" becomes "dog". No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.data.captions import longest_texts
from library.messages import counted

if TYPE_CHECKING:
    from library.options.datasets import SubsetSpec
    from library.options.groups.preservation import PreservationOptions
    from library.training.plan.images import Images


@dataclass(frozen=True)
class ClassPrompts:
    """Identifiers with their classes: {"sks": "dog"}. `found` and `missing`: the number of training images whose
    captions have an identifier, and of those without. `samples`: those of the found images in an epoch."""

    pairs: tuple[tuple[str, str], ...] = ()
    found: int = 0
    missing: int = 0
    samples: int = 0

    def of(self, caption: str) -> str | None:
        """The caption with the classes in place of the identifiers, or None without an identifier.

        Whole words are replaced, in any letter case, since CLIP ignores it. An identifier before its own class goes:
        "sks dog on a beach" becomes "dog on a beach", and so does "sks on a beach".
        """
        text, count = self._pattern.subn(lambda found: self._class_of[found.lastindex or 0], caption)
        return text if count else None

    @cached_property
    def _words(self) -> list[tuple[str, str]]:
        """What is replaced, the longest first, and by what."""
        pairs = [(words, name) for identifier, name in self.pairs for words in (f"{identifier} {name}", identifier)]
        return sorted(pairs, key=lambda pair: -len(pair[0]))

    @cached_property
    def _class_of(self) -> dict[int, str]:
        """The class by the number of the group in the pattern."""
        return {number: name for number, (_, name) in enumerate(self._words, 1)}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        groups = ("(" + r"\s+".join(map(re.escape, words.split())) + ")" for words, _ in self._words)
        return re.compile(rf"(?<!\w)(?:{'|'.join(groups) or '(?!)'})(?!\w)", re.IGNORECASE)

    def describe(self) -> Iterator[str]:
        """Lines of the plan."""
        changes = " and ".join(f'"{identifier}" becomes "{name}"' for identifier, name in self.pairs)
        skipped = f"; skipped: {counted(self.missing, 'image')} whose captions lack it" if self.missing else ""
        yield f"class_prompt: {changes} in the captions of {counted(self.found, 'training image')}{skipped}"


def find_class_prompts(options: PreservationOptions, images: Images) -> ClassPrompts:
    """Identifiers and classes, from flags or from folder names and class tokens, and the captions that have them."""
    subsets = images.scan.subsets
    trained = [subset for subset in subsets if not subset.is_reg and not subset.validation]
    pairs = tuple(dict.fromkeys(pair for subset in trained if (pair := _pair(options, subset)) is not None))
    prompts = ClassPrompts(pairs)
    records = [record for record in images.records if not record.is_reg]
    has: dict[tuple[int, str], bool] = {}
    for record in records:
        key = record.subset, record.caption
        if key not in has:
            texts = longest_texts(record.caption, subsets[record.subset].captions)
            has[key] = any(prompts.of(text) is not None for text in texts)
    found = [record for record in records if has[record.subset, record.caption]]
    return ClassPrompts(pairs, len(found), len(records) - len(found), sum(record.repeats for record in found))


def _pair(options: PreservationOptions, subset: SubsetSpec) -> tuple[str, str] | None:
    """Identifier and class of one subset; None if one of them is not known."""
    tokens = (subset.class_tokens or "").split("\n")[0].split()
    identifier = options.preservation_identifier or " ".join(tokens[:1])
    own: Sequence[str] = identifier.split()
    behind = tokens[len(own) :] if tokens[: len(own)] == own else tokens[1:]
    name = options.preservation_class or " ".join(behind)
    return (identifier, name) if identifier and name else None
