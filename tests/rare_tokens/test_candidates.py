"""Which words may be an identifier: facts of CLIP's vocabulary, and the word lists."""

from __future__ import annotations

import pytest

from library.families.clip.tokenizer import ClipTokenizer, shipped_tokenizer
from library.families.registry import FAMILIES
from library.rare_tokens.candidates import common_words, find_candidates, meanings, merged_at, read_name

SD1 = FAMILIES[0].tokenizer()
CLIP = shipped_tokenizer(49407)
# identifiers that the documentation of sd-scripts recommends
KOHYA = "shs sts scs cpc coc cic msm usu ici lvl dii muk ori hru rik koo yos wny".split()


@pytest.mark.parametrize(("word", "index"), [("sks", 48136), ("ohwx", 47993), ("olis", 49397)])
def test_names_of_one_token(word: str, index: int) -> None:
    name = read_name(word, SD1)
    assert name.ids == {"text_encoder": (index,)} and name.pieces == {"text_encoder": (word,)} and name.tokens == 1
    assert CLIP.whole_words()[word] == index


@pytest.mark.parametrize(("word", "pieces"), [("zwx", ("z", "wx")), ("xyz", ("xy", "z"))])
def test_names_of_two_tokens(word: str, pieces: tuple[str, ...]) -> None:
    name = read_name(word, SD1)
    assert name.pieces == {"text_encoder": pieces} and name.tokens == 2


def test_pieces_of_other_scripts_are_text() -> None:
    """A letter of several bytes may be cut; together the pieces have all its bytes."""
    assert CLIP.pieces("café SKS") == ["café", "sks"] and CLIP.pieces("") == []
    assert len(CLIP.pieces("\U0001f9ff")) == len(CLIP.encode("\U0001f9ff"))


def test_the_vocabulary_has_as_many_short_words_as_it_should() -> None:
    """4202 and 9274 tokens with capitals; 26 of each are single capitals, which the tokenizer never makes."""
    words = {word: index for word, index in CLIP.whole_words().items() if word.isascii() and word.isalpha()}
    for longest, count, late in ((3, 4202, 627), (4, 9274, 1557)):
        short = {word: index for word, index in words.items() if len(word) <= longest}
        assert len(short) == count and sum(index >= 40000 for index in short.values()) == late
        assert sum(not word.islower() for word in short) == 26


def test_the_recommended_identifiers_are_candidates() -> None:
    """All but usu, which is in the word list as an abbreviation of usually."""
    found = {name.text: name for name in find_candidates(SD1)}
    assert [word for word in KOHYA if word not in found] == ["usu"] and "usu" in meanings()
    assert {"sks", "ohwx", "olis"} <= found.keys() and not {"zwx", "xyz"} & found.keys()
    assert all(len(word) <= 3 for word in (name.text for name in find_candidates(SD1, 3)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_candidate_is_one_token_wherever_it_is_written(family) -> None:
    tokenizer = family.tokenizer()
    names = find_candidates(tokenizer)
    assert len(names) > 4000 and [merged_at(name) for name in names] == sorted(map(merged_at, names), reverse=True)
    for name in names[::97]:
        for encoder, each in tokenizer.by_encoder.items():
            before, after = each.encode("a photo of"), each.encode("person")
            assert each.encode(f"a photo of {name.text} person") == [*before, *name.ids[encoder], *after]
            assert name == read_name(name.text, tokenizer)


@pytest.mark.parametrize("word", ["dog", "the", "emma", "ibm", "nasa", "fuk", "xxx"])
def test_words_names_and_profanity_are_left_out(word: str) -> None:
    assert word in meanings() and word not in {name.text for name in find_candidates(SD1)}


def test_a_word_must_be_one_token_in_each_tokenizer() -> None:
    """The second tokenizer has another merge in place of the one that makes sks."""
    poorer = ClipTokenizer(0, merges=["q b" if merge == "s ks</w>" else merge for merge in CLIP.merges])
    both = type(SD1)({"text_encoder": CLIP, "text_encoder_2": poorer})
    assert "sks" not in poorer.whole_words() and "sks" not in {name.text for name in find_candidates(both)}
    assert read_name("sks", both).tokens == 2


def test_common_words_are_common() -> None:
    """Each one token, and none that is recommended as rare."""
    words = common_words(CLIP)
    assert {"dog", "person", "red", "house"} <= set(words) and not set(words) & {*KOHYA, "sks", "ohwx"}
    assert all(len(CLIP.encode(word)) == 1 for word in words) and len(words) > 3000


def test_the_lists_are_words_in_lower_case() -> None:
    assert all(word.islower() and word.isascii() and word.isalpha() and 2 <= len(word) <= 4 for word in meanings())
