"""Words that may be the identifier of a subject: one token in every tokenizer, and in no word list. No torch.

DreamBooth (arXiv 2208.12242, section 3.2) chooses from rare tokens of up to three letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from library.families.family import EncoderTokenizer, Tokenizer

SHORTEST, LONGEST = 2, 4
"""Letters of a candidate; the word lists have words of these lengths only."""

_DATA = Path(__file__).parent / "data"
_LISTS = {"words.txt": "a word, a name or an abbreviation", "profanity.txt": "profane"}


@dataclass(frozen=True)
class Name:
    """A candidate, or a name to check: its tokens in each text encoder, by the encoder's name, as ids and as texts."""

    text: str
    ids: Mapping[str, tuple[int, ...]]
    pieces: Mapping[str, tuple[str, ...]]

    @property
    def tokens(self) -> int:
        """The number of tokens, the largest of all text encoders."""
        return max(map(len, self.ids.values()))


@cache
def meanings() -> Mapping[str, str]:
    """What the word lists say of a word: why it is left out. Sources and licences: data/README.md."""
    return {word: why for file, why in _LISTS.items() for word in _words(file)}


def read_name(text: str, tokenizer: Tokenizer) -> Name:
    """A name with its tokens."""
    return Name(
        text,
        {encoder: tuple(each.encode(text)) for encoder, each in tokenizer.by_encoder.items()},
        {encoder: tuple(each.pieces(text)) for encoder, each in tokenizer.by_encoder.items()},
    )


def find_candidates(tokenizer: Tokenizer, longest: int = LONGEST) -> list[Name]:
    """All words of SHORTEST to `longest` letters a to z that are one token in each tokenizer and in no word list, those
    first that the tokenizers merged last. Merges are in the order of frequency; but a token that was merged early may
    be the end of many words and rare as a word, such as sts.
    """
    words = {encoder: each.whole_words() for encoder, each in tokenizer.by_encoder.items()}
    names = [
        Name(
            word,
            {encoder: tuple(each.encode(word)) for encoder, each in tokenizer.by_encoder.items()},
            dict.fromkeys(words, (word,)),
        )
        for word in set.intersection(*map(set, words.values())) - meanings().keys()
        if _may_be_candidate(word, longest)
    ]
    return sorted((name for name in names if name.tokens == 1), key=merged_at, reverse=True)


def _may_be_candidate(word: str, longest: int) -> bool:
    return SHORTEST <= len(word) <= longest and word.isascii() and word.isalpha() and word.islower()


def merged_at(name: Name) -> int:
    """The lowest id of a name in any tokenizer: its least rare token."""
    return min(min(ids) for ids in name.ids.values())


def common_words(tokenizer: EncoderTokenizer) -> list[str]:
    """The common words that are one token."""
    return [word for word in _words("common.txt") if len(tokenizer.encode(word)) == 1]


def _words(file: str) -> list[str]:
    return (_DATA / file).read_text(encoding="utf-8").split()
