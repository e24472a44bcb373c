"""Weights in captions: read by the published rules, in rows that fit the ids, and multiplied onto the states."""

from __future__ import annotations

import math
import random

import pytest
import torch

from library.data.batch import TextInput
from library.families.clip.prompt_weights import encode, parse, rows
from library.families.clip.text_encoder import encode_text, join_chunks, weight_states
from library.families.clip.tokenizer import ClipTokenizer
from library.families.family import TextSettings
from tests import tiny

EOS = 49407
DOG, CAT = 1929, 2368


@pytest.fixture(scope="module", params=[EOS, 0], ids=["sd1", "sd2"])
def tokenizer(request) -> ClipTokenizer:
    return ClipTokenizer(request.param)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", [("", 1)]),
        ("a dog", [("a dog", 1)]),
        ("a (dog)", [("a ", 1), ("dog", 1.1)]),
        ("(dog:1.3) x", [("dog", 1.3), (" x", 1)]),
        ("(dog:.5)(cat:2.)(x:-1)(y:+2)", [("dog", 0.5), ("cat", 2), ("x", -1), ("y", 2)]),
        ("[dog]", [("dog", 1 / 1.1)]),
        ("((a (b:2)))", [("a ", 1.21), ("b", 2.42)]),
        ("([a] b)", [("a", 1), (" b", 1.1)]),
        ("[[a]]", [("a", 1 / 1.21)]),
        (r"a \(b\) \[c\] \\", [(r"a (b) [c] \\"[:-1], 1)]),
        (r"(a\))", [("a)", 1.1)]),
        (r"a \ b", [(r"a \ b", 1)]),
        ("a (b", [("a ", 1), ("b", 1.1)]),
        ("a ((b [c", [("a ", 1), ("b ", 1.21), ("c", 1.1)]),
        ("a) b] :2) c", [("a) b] :2) c", 1)]),
        ("a:b, 10:30", [("a:b, 10:30", 1)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("(a: 2)", [("a: 2", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("[a:2]", [("a:2", 1 / 1.1)]),
        ("()[]", [("", 1)]),
    ],
)
def test_the_rules_by_hand(caption, expected):
    pieces = parse(caption)
    assert [text for text, _ in pieces] == [text for text, _ in expected]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in expected])


def grown(rng: random.Random, depth: int, weight: float) -> tuple[str, list[tuple[str, float]]]:
    """A caption, and the weight of every letter of it that is text."""
    caption, letters = "", []
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(5 if depth else 2)
        if kind == 0:
            words = rng.choice(["dog ", "a, b", " x:y", "10", "é"])
            caption, letters = caption + words, letters + [(letter, weight) for letter in words]
        elif kind == 1:
            mark = rng.choice("()[]\\")
            caption, letters = caption + "\\" + mark, [*letters, (mark, weight)]
        else:
            number = rng.choice(["1.3", "0.7", "2", ".25"])
            factor = {2: 1.1, 3: 1 / 1.1, 4: float(number)}[kind]
            inside, more = grown(rng, depth - 1, weight * factor)
            caption += {2: f"({inside})", 3: f"[{inside}]", 4: f"({inside}:{number})"}[kind]
            letters += more
    return caption, letters


def test_random_captions_weigh_as_they_were_built():
    rng = random.Random(1)
    for _ in range(1000):
        caption, expected = grown(rng, 4, 1.0)
        pieces = parse(caption)
        assert "".join(text for text, _ in pieces) == "".join(letter for letter, _ in expected)
        weights = [weight for text, weight in pieces for _ in text]
        assert weights == pytest.approx([weight for _, weight in expected]), caption


def test_any_text_is_read():
    rng = random.Random(2)
    for _ in range(2000):
        caption = "".join(rng.choice("ab ([)]:\\.1,") for _ in range(rng.randrange(20)))
        pieces = parse(caption)
        assert pieces and all(math.isfinite(weight) for _, weight in pieces)
        assert all(one[1] != other[1] for one, other in zip(pieces, pieces[1:], strict=False))


PLAIN = ["", "a photo of sks dog", "x:y, 10:30!", "dog " * 74 + "cat cat", "dog " * 400, "日本 <|endoftext|> é"]


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_text_without_weights_has_the_plain_ids_and_weighs_one(tokenizer, chunks):
    ids, weights = tokenizer.weighted(PLAIN, chunks)
    assert torch.equal(ids, tokenizer.tensor(PLAIN, chunks)) and ids.dtype == torch.int64
    assert torch.equal(weights, torch.ones(len(PLAIN), chunks, 77)) and weights.dtype == torch.float32
    assert [tokenizer.count(text, weighted=True) for text in PLAIN] == [tokenizer.count(text) for text in PLAIN]


def test_weights_stand_beside_their_ids(tokenizer):
    caption = "dog " * 74 + "(cat cat:1.5) dog [cat]"
    ids, weights = tokenizer.weighted([caption], 2)
    assert torch.equal(ids, tokenizer.tensor(["dog " * 74 + "cat cat dog cat"], 2))
    expected = torch.ones(2, 77)
    expected[0, 75] = expected[1, 1] = 1.5  # the last of the first 75, the first of the next
    expected[1, 3] = 1 / 1.1
    assert torch.allclose(weights[0], expected)
    assert weights[0, 0, 76] == weights[0, 1, 0] == 1  # end and begin between the chunks
    assert tokenizer.count(caption, weighted=True) == 78


def test_what_does_not_fit_is_cut_with_its_weights(tokenizer):
    ids, weights = tokenizer.weighted(["(dog:2) " * 200])
    assert torch.equal(ids, tokenizer.tensor(["dog " * 200]))
    assert weights[0, 0].tolist() == [1.0, *[2.0] * 75, 1.0]


def test_without_padding_weights_reach_as_far_as_the_ids(tokenizer):
    ids, weights = tokenizer.weighted(["(dog:2) cat", "dog", ""], padded=False)
    assert torch.equal(ids, tokenizer.tensor(["dog cat", "dog", ""], padded=False))
    assert weights.tolist() == [[[1, 2, 1, 1]], [[1, 1, 1, 1]], [[1, 1, 1, 1]]]
    assert tokenizer.weighted([""], padded=False)[1].tolist() == [[[1, 1]]]
    assert tokenizer.weighted(["(dog:2) " * 100], padded=False)[1].shape == (1, 1, 77)
    with pytest.raises(ValueError, match="max_token_length"):
        tokenizer.weighted(["a"], 2, padded=False)


def test_every_token_of_a_piece_has_its_weight(tokenizer):
    ids, weights = encode("dog (supercalifragilistic:2)cat", tokenizer.encode)
    long = tokenizer.encode("supercalifragilistic")
    assert ids == [DOG, *long, CAT] and len(long) > 1
    assert weights == [1.0, *[2.0] * len(long), 1.0]
    assert rows(weights, 3, 1) == [[1.0, 1.0, 2.0, 2.0, 1.0]]


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_states_are_multiplied_by_the_weights_of_their_tokens(chunks):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 75 * chunks + 2, 8, generator=generator)
    weights = torch.ones(2, chunks, 77)
    weights[..., 1:76] = torch.rand(2, chunks, 75, generator=generator)
    weighted = weight_states(states, weights)
    for row in range(2):
        flat = [1.0, *weights[row, :, 1:76].flatten().tolist(), 1.0]
        for place, weight in enumerate(flat):
            assert torch.allclose(weighted[row, place], states[row, place] * weight)
    assert torch.equal(weight_states(states, torch.ones_like(weights)), states)


def test_states_keep_their_dtype_and_round_once():
    states = torch.full((1, 77, 2), 3.0, dtype=torch.bfloat16)
    weighted = weight_states(states, torch.full((1, 1, 77), 1.1))
    assert weighted.dtype == torch.bfloat16
    assert torch.equal(weighted, torch.full((1, 77, 2), 3.3).to(torch.bfloat16))


def test_the_encoder_gives_weighted_states_and_their_gradient():
    tokenizer, encoder = ClipTokenizer(EOS), tiny.diffusers_modules("sd1").text_encoder
    encoders, settings = {"text_encoder": encoder}, TextSettings(clip_skip=2)
    ids, weights = tokenizer.weighted(["a (dog:1.5)"], 2)
    plain = encode_text(encoders, {"text_encoder": TextInput(ids)}, settings)["states"]
    weighted = encode_text(encoders, {"text_encoder": TextInput(ids, weights=weights)}, settings)["states"]
    assert torch.equal(weighted, plain * join_chunks(weights[..., None]))
    weighted.sum().backward()
    assert encoder.embeddings.token_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "text", ["(" * 20_000 + ":" * 20_000, "(" * 100_000, "[(" * 50_000 + ")]" * 50_000, ")" * 100_000]
)
def test_brackets_without_end_take_no_time(text):
    """Each closing bracket looked at all pieces since its opening one: a megabyte of both took hours."""
    assert all(0 < abs(weight) <= 1000 for _, weight in parse(text))


def test_weights_are_numbers_that_a_model_can_take():
    """A weight of 400 digits was infinite, and the states NaN."""
    assert parse(f"(a:{'9' * 400})") == [("a", 1000.0)] and parse(f"(a:-{'9' * 400})") == [("a", -1000.0)]
    assert parse("(" * 90 + "a" + ")" * 90)[0][1] == 1000.0
