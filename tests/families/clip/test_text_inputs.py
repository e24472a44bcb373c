"""Two text encoders read one caption, each as its own tokenizer of transformers makes ids of it."""

from __future__ import annotations

import pickle
from functools import cache
from typing import Any

import pytest
import torch

from library.checkpoints.files import read_header
from library.families.clip.text_inputs import ClipTokenizers
from library.families.clip.tokenizer import ClipTokenizer
from library.families.registry import detect
from tests.families.clip.test_tokenizer import CAPTIONS

EOS = 49407
PADS = ("<|endoftext|>", "!")  # of openai/clip-vit-large-patch14, and of SDXL's tokenizer_2


@pytest.fixture(scope="module")
def both() -> ClipTokenizers:
    first = ClipTokenizer(EOS)
    return ClipTokenizers({"first": first, "second": ClipTokenizer(0, first.vocab, first.merges)})


def same_ids(one: ClipTokenizers, other: ClipTokenizers) -> bool:
    ours, theirs = one(CAPTIONS), other(CAPTIONS)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].ids, theirs[name].ids) for name in ours)


@cache
def peers() -> list[Any]:
    from transformers import CLIPTokenizer

    merges = [tuple(merge.split(" ")) for merge in ClipTokenizer(EOS).merges]
    vocab = ClipTokenizer(EOS).vocab
    return [CLIPTokenizer(vocab=dict(vocab), merges=merges, pad_token=pad, model_max_length=77) for pad in PADS]


def test_ids_are_those_of_both_tokenizers_of_transformers(both: ClipTokenizers) -> None:
    text_inputs = both(CAPTIONS)
    for name, peer in zip(("first", "second"), peers(), strict=True):
        ids = text_inputs[name].ids
        expected = peer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert ids.shape == (len(CAPTIONS), 1, 77) and ids.dtype == torch.int64 and torch.equal(ids[:, 0], expected)
        assert text_inputs[name].mask is None and text_inputs[name].weights is None


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_every_chunk_is_that_of_either_alone(both: ClipTokenizers, chunks: int) -> None:
    captions = [*CAPTIONS, "dog " * 160, "dog " * 74 + "!! cat"]
    text_inputs = both.configured(max_tokens=75 * chunks)(captions)
    for name, one in both.by_encoder.items():
        assert torch.equal(text_inputs[name].ids, one.tensor(captions, chunks))


def test_weights_stand_beside_the_ids_of_either(both: ClipTokenizers) -> None:
    captions = ["a (dog:1.5)", "[cat]!", "dog " * 74 + "(cat cat:0.5)"]
    text_inputs = both.configured(max_tokens=150, weighted=True)(captions)
    for name, one in both.by_encoder.items():
        ids, weights = text_inputs[name].ids, text_inputs[name].weights
        assert weights is not None and ids.shape == weights.shape == (3, 2, 77) and weights.dtype == torch.float32
        alone = one.weighted(captions, 2)
        assert torch.equal(ids, alone[0]) and torch.equal(weights, alone[1])


@pytest.mark.parametrize(("max_token_length", "chunks"), [(None, 1), (75, 1), (150, 2), (225, 3)])
def test_max_token_length_means_chunks_as_in_sd_scripts(both, max_token_length: int | None, chunks: int) -> None:
    """sd-scripts, library/train_util.py: tokenizer_max_length = max_token_length + 2, and for each step of 75 in it a
    chunk of 77: (B, 2, 77) for 150, (B, 3, 77) for 225."""
    configured = both.configured(max_tokens=max_token_length)
    assert configured.limit == (max_token_length or 75)
    assert {one.ids.shape for one in configured(["dog " * 400]).values()} == {(1, chunks, 77)}


def test_a_text_takes_as_few_chunks_as_hold_it(both: ClipTokenizers) -> None:
    asked = {0: 1, 1: 1, 75: 1, 76: 2, 150: 2, 151: 3}
    assert {tokens: both.configured(max_tokens=tokens).limit // 75 for tokens in asked} == asked


def test_names_of_existing_text_caches_stay(both: ClipTokenizers) -> None:
    """Chunks, padding and weights have stood in the names of text caches since there are any, in these words."""
    assert both.cache_key == "1 True False"
    assert both.configured(max_tokens=225, weighted=True).cache_key == "3 True True"
    assert both.configured(padded=False).cache_key == "1 False False"


@pytest.mark.parametrize("weighted", [False, True])
def test_a_caption_counts_as_where_it_is_longest(both: ClipTokenizers, weighted: bool) -> None:
    """ "!!!!" is one token (or two) of the one vocabulary; to the other each "!" is what it fills up with."""
    captions = ["", "a dog", "what!!!!", "(a dog:1.5)!!", "dog " * 300]
    alone = [[one.count(caption, weighted=weighted) for caption in captions] for one in both.by_encoder.values()]
    assert alone[0] != alone[1]
    configured = both.configured(weighted=weighted)
    assert configured.counts(captions) == [max(pair) for pair in zip(*alone, strict=True)]
    assert configured.counts(captions) == [configured.count(caption) for caption in captions]


def test_without_padding_it_says_why_not(both: ClipTokenizers) -> None:
    for weighted in (False, True):
        with pytest.raises(ValueError, match="two text encoders"):
            both.configured(padded=False, weighted=weighted)(["a"])


def test_one_encoder_alone_reads_texts_of_any_length(both: ClipTokenizers) -> None:
    alone = ClipTokenizers({"first": both.by_encoder["first"]}).configured(padded=False)
    assert alone(["a dog", "a"])["first"].ids.shape == (2, 1, 4)  # begin, a, dog, end


def test_it_travels_to_worker_processes(both: ClipTokenizers) -> None:
    there = pickle.loads(pickle.dumps(both))
    assert same_ids(there, both) and there.name == both.name


def test_other_ids_have_another_name(both: ClipTokenizers) -> None:
    swapped = dict(zip(both.by_encoder, reversed(both.by_encoder.values()), strict=True))
    others = [both.configured(weighted=True), ClipTokenizers(swapped)]
    alone = [ClipTokenizers({name: one}) for name, one in both.by_encoder.items()]
    assert len({one.name for one in (both, *others, *alone)}) == 5


def test_the_cache_folder_holds_both_and_does_not_say_what_fills_rows_up(files, tmp_path, both) -> None:
    """kohya's trainer puts OpenCLIP's tokenizer there as the hub has it: its pad token is the end token."""
    header = read_header(files["sdxl"])
    family = detect(header)
    family.load(header, only=(), tokenizer_cache_dir=tmp_path)
    folders = ["laion_CLIP-ViT-bigG-14-laion2B-39B-b160k", "openai_clip-vit-large-patch14"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == folders
    ClipTokenizer(EOS).save(tmp_path / folders[0])
    found = family.tokenizer(header, tmp_path)
    assert found.name == both.name
    for one, expected in zip(found(CAPTIONS).values(), both(CAPTIONS).values(), strict=True):
        assert torch.equal(one.ids, expected.ids)


def test_each_folder_of_a_model_has_its_own(files) -> None:
    """The file and the folder agree; the refiner has the second alone."""
    for family, pads in (("sdxl", [EOS, 0]), ("refiner", [0])):
        for source in (files[family], files[f"{family} folder"]):
            header = read_header(source)
            found = detect(header).tokenizer(header)
            assert [one.pad_id for one in found.by_encoder.values()] == pads
            assert tuple(found(["a!"])) == ("text_encoder", "text_encoder_2")[-len(pads) :]
