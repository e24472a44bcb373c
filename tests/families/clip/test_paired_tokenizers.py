"""Two text encoders read one caption, each as its own tokenizer of transformers makes ids of it."""

from __future__ import annotations

import pickle
from functools import cache
from typing import Any

import pytest
import torch

from library.checkpoints.files import read_header
from library.families.clip.paired_tokenizers import ClipTokenizers
from library.families.clip.tokenizer import ClipTokenizer
from library.families.registry import detect
from tests.families.clip.test_tokenizer import CAPTIONS

EOS = 49407
PADS = ("<|endoftext|>", "!")  # of openai/clip-vit-large-patch14, and of SDXL's tokenizer_2


@pytest.fixture(scope="module")
def both() -> ClipTokenizers:
    first = ClipTokenizer(EOS)
    return ClipTokenizers((first, ClipTokenizer(0, first.vocab, first.merges)))


@cache
def peers() -> list[Any]:
    from transformers import CLIPTokenizer

    merges = [tuple(merge.split(" ")) for merge in ClipTokenizer(EOS).merges]
    vocab = ClipTokenizer(EOS).vocab
    return [CLIPTokenizer(vocab=dict(vocab), merges=merges, pad_token=pad, model_max_length=77) for pad in PADS]


def test_ids_are_those_of_both_tokenizers_of_transformers(both: ClipTokenizers) -> None:
    ids = both.tensor(CAPTIONS)
    assert ids.shape == (len(CAPTIONS), 2, 1, 77) and ids.dtype == torch.int64
    for encoder, peer in enumerate(peers()):
        expected = peer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ids[:, encoder, 0], expected)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_every_chunk_is_that_of_either_alone(both: ClipTokenizers, chunks: int) -> None:
    captions = [*CAPTIONS, "dog " * 160, "dog " * 74 + "!! cat"]
    ids = both.tensor(captions, chunks)
    for encoder, one in enumerate(both.each()):
        assert torch.equal(ids[:, encoder], one.tensor(captions, chunks))


def test_weights_stand_beside_the_ids_of_either(both: ClipTokenizers) -> None:
    captions = ["a (dog:1.5)", "[cat]!", "dog " * 74 + "(cat cat:0.5)"]
    ids, weights = both.weighted(captions, 2)
    assert ids.shape == weights.shape == (3, 2, 2, 77) and weights.dtype == torch.float32
    for encoder, one in enumerate(both.each()):
        alone = one.weighted(captions, 2)
        assert torch.equal(ids[:, encoder], alone[0]) and torch.equal(weights[:, encoder], alone[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_caption_counts_as_where_it_is_longest(both: ClipTokenizers, weighted: bool) -> None:
    """ "!!!!" is one token (or two) of the one vocabulary; to the other each "!" is what it fills up with."""
    captions = ["", "a dog", "what!!!!", "(a dog:1.5)!!", "dog " * 300]
    alone = [[one.count(caption, weighted) for caption in captions] for one in both.each()]
    assert alone[0] != alone[1]
    assert both.counts(captions, weighted) == [max(pair) for pair in zip(*alone, strict=True)]
    assert both.counts(captions, weighted) == [both.count(caption, weighted) for caption in captions]


def test_without_padding_it_says_why_not(both: ClipTokenizers) -> None:
    for make in (both.tensor, both.weighted):
        with pytest.raises(ValueError, match="two text encoders"):
            make(["a"], 1, padded=False)


def test_it_travels_to_worker_processes(both: ClipTokenizers) -> None:
    there = pickle.loads(pickle.dumps(both))
    assert torch.equal(there.tensor(CAPTIONS), both.tensor(CAPTIONS)) and there.name == both.name


def test_other_ids_have_another_name(both: ClipTokenizers) -> None:
    first, second = both.each()
    assert len({both.name, first.name, second.name, ClipTokenizers((second, first)).name}) == 4


def test_the_cache_folder_holds_both_and_does_not_say_what_fills_rows_up(files, tmp_path, both) -> None:
    """kohya's trainer puts OpenCLIP's tokenizer there as the hub has it: its pad token is the end token."""
    header = read_header(files["sdxl"])
    family = detect(header)
    family.load(header, only=(), tokenizer_cache_dir=tmp_path)
    folders = ["laion_CLIP-ViT-bigG-14-laion2B-39B-b160k", "openai_clip-vit-large-patch14"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == folders
    ClipTokenizer(EOS).save(tmp_path / folders[0])
    found = family.tokenizer(header, tmp_path)
    assert torch.equal(found.tensor(CAPTIONS), both.tensor(CAPTIONS)) and found.name == both.name


def test_each_folder_of_a_model_has_its_own(files) -> None:
    """The file and the folder agree, and the refiner, which has the second alone, has no dimension for it."""
    for family, pads in (("sdxl", [EOS, 0]), ("refiner", [0])):
        for source in (files[family], files[f"{family} folder"]):
            header = read_header(source)
            found = detect(header).tokenizer(header)
            assert [one.pad_id for one in found.each()] == pads
            assert found.tensor(["a!"]).shape == ((1, 2, 1, 77) if len(pads) == 2 else (1, 1, 77))
