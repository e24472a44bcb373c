"""Measures in the text encoders of miniatures, against transformers' own computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from library.families.registry import FAMILIES
from library.rare_tokens.measures import Encoded, encode, likeness, measure
from tests import tiny

TOKENIZERS = {family.name: family.tokenizer().by_encoder for family in FAMILIES}


def states_of(encoder: Any, ids: list[int]) -> torch.Tensor:
    """The last hidden state of a prompt padded to 77 tokens, as a user's program encodes it."""
    row = [49406, *ids, 49407]
    with torch.no_grad():
        return encoder(torch.tensor([row + [49407] * (77 - len(row))])).last_hidden_state[0]


@pytest.mark.parametrize(
    ("family", "name"), [("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder_2")]
)
def test_an_encoded_text_is_what_transformers_encodes(family: str, name: str) -> None:
    """Short and long texts, of one and of three tokens, in batches that mix them. A wrong median, place or prompt would
    show."""
    encoder = tiny.diffusers_modules(family).text_encoders[name]
    tokenizer = TOKENIZERS[family][name]
    texts = ["sks", "dog", "zwx cat", "ohwx"]
    done: list[int] = []
    found = encode(encoder, tokenizer, texts, "person", 2, done.append)
    assert sorted(done) == [1, 1, 2] and sum(done) == 4
    plain = states_of(encoder, tokenizer.encode("a photo of person"))
    table = encoder.get_input_embeddings().weight.detach().norm(dim=1)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text)
        whole = states_of(encoder, tokenizer.encode(f"a photo of {text} person"))
        assert torch.allclose(found.states[row], whole[3 + len(ids)], atol=1e-4)
        moved = [
            1 - functional.cosine_similarity(whole[4 + len(ids) + at], plain[4 + at], dim=0) for at in (0, 1)
        ]  # person, and the end
        assert float(found.moved[row]) == pytest.approx(float(sum(moved)) / 2, abs=1e-4)
        off = max(abs(float(table[index] / table.median()) - 1) for index in ids)
        assert float(found.norms[row]) == pytest.approx(off, abs=1e-5)


def test_the_nearest_word_is_that_of_the_highest_cosine_around_the_mean() -> None:
    """Common words around (10, 10): right, up, left. As they are, all four would be nearly parallel."""
    common = encoded([[11, 10], [10, 11], [9, 9]])
    texts = encoded([[10.5, 10.1], [10, 8], [10, 11]])
    found = measure(texts, ["x", "y", "up"], common, ["right", "up", "left"])
    assert [found[text].word for text in ("x", "y", "up")] == ["right", "left", "right"]  # a word is not its own
    assert found["x"].closeness == pytest.approx((0.5 * 1 + 0.1 * 0) / (0.26**0.5), abs=1e-5)
    assert likeness(texts, 0, common)[0] == pytest.approx(1)


def encoded(states: list[list[float]]) -> Encoded:
    rows = torch.tensor(states, dtype=torch.float32)
    return Encoded(torch.zeros(len(rows)), rows, torch.zeros(len(rows)))
