"""Captions become the ids that transformers' CLIPTokenizer gives, in chunks as kohya's trainer cuts them."""

from __future__ import annotations

import hashlib
import pickle
from functools import lru_cache

import pytest

from library.checkpoints.header import CheckpointError
from library.families.clip.tokenizer import ClipTokenizer, cached_tokenizer, keep_tokenizer, vocabulary

BOS, EOS = 49406, 49407
CAPTIONS = [
    "",
    " ",
    "a photo of sks dog",
    "  odd \t spacing\n\nhere  ",
    "Ünïcödé café naïve İstanbul ß Ǆ e\u0301",
    "😀🎉 party 👩‍👩‍👧",
    "日本語のテキスト 漢字 한국어 العربية",
    "(masterpiece:1.3), [blurry], {red|blue}, <lora:x:1>",
    "supercalifragilisticexpialidocious" * 6,
    "1234 5.67e-8 1,000 №5 ½",
    "it's we're I'll don't he'd they've I'm",
    "<b>html</b> &amp; &lt;br&gt;",
    "a_b__c--d...e!!!!?",
    "<|endoftext|> in the middle <|startoftext|><|ENDOFTEXT|>",
    "\x00\u0085\u200b\ufeffz",
    "x" * 500,
]


@pytest.fixture(scope="module")
def sd1() -> ClipTokenizer:
    return ClipTokenizer(EOS)


@pytest.fixture(scope="module")
def sd2() -> ClipTokenizer:
    return ClipTokenizer(0)


@lru_cache(maxsize=2)
def peer(tokenizer: ClipTokenizer, pad: str):
    from transformers import CLIPTokenizer

    merges = [tuple(merge.split(" ")) for merge in tokenizer.merges]
    return CLIPTokenizer(vocab=dict(tokenizer.vocab), merges=merges, pad_token=pad, model_max_length=77)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ids_are_those_of_transformers(sd1, caption):
    expected = peer(sd1, "<|endoftext|>")(caption, padding="max_length", truncation=True).input_ids
    assert sd1.ids([caption]) == [[expected]]
    assert sd1.count(caption) == len(peer(sd1, "<|endoftext|>")(caption, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_sd2_fills_up_with_zero(sd2, caption):
    expected = peer(sd2, "!")(caption, padding="max_length", truncation=True).input_ids
    assert sd2.ids([caption]) == [[expected]]


# SHA-256 of lines 2 to 48895 of OpenAI's bpe_simple_vocab_16e6.txt, joined by line feeds (from open_clip_torch 3.3.0)
PUBLISHED = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


def test_the_merges_are_the_published_ones(sd1):
    assert hashlib.sha256("\n".join(sd1.merges).encode()).hexdigest() == PUBLISHED
    assert len(sd1.vocab) == 49408
    known = {"sks</w>": 48136, "ohwx</w>": 47993, "olis</w>": 49397, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: sd1.vocab[token] for token in known} == known


def reference_chunks(row: list[int], pad: int, chunks: int) -> list[list[int]]:
    """The published rule, by ids: BOS + 75 ids + last id; with a pad of its own, an end token where one is lacking."""
    result = []
    for k in range(chunks):
        chunk = [row[0], *row[1 + 75 * k : 76 + 75 * k], row[-1]]
        if pad != EOS:
            if chunk[-2] not in (EOS, pad):
                chunk[-1] = EOS
            if chunk[1] == pad:
                chunk[1] = EOS
        result.append(chunk)
    return result


@pytest.mark.parametrize("pad", [EOS, 0])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("words", [0, 1, 73, 74, 75, 76, 149, 150, 151, 224, 225, 226, 400])
def test_long_captions_are_cut_as_published(sd1, pad, chunks, words):
    tokenizer = ClipTokenizer(pad, sd1.vocab, sd1.merges)
    body = [1929] * words  # "dog"
    row = [BOS, *body[: 75 * chunks], EOS]
    row += [pad] * (75 * chunks + 2 - len(row))
    assert tokenizer.ids(["dog " * words], chunks) == [reference_chunks(row, pad, chunks)]


def test_an_exclamation_mark_is_not_taken_for_filling(sd2):
    # In SD2 "!" is token 0, which also fills rows up: the rule by ids would end the text before it.
    assert sd2.encode("hi!") == [1883, 0]
    first, second = sd2.ids(["dog " * 74 + "!! cat"], 2)[0]
    assert first == [BOS, *[1929] * 74, 0, EOS]
    assert second == [BOS, 0, 2368, EOS, *[0] * 73]


def test_without_padding_rows_reach_only_to_the_longest(sd1):
    rows = sd1.ids(["a dog", "a"], padded=False)
    assert rows == [[[BOS, 320, 1929, EOS]], [[BOS, 320, EOS, EOS]]]
    assert sd1.tensor(["a dog", "a"], padded=False).shape == (2, 1, 4)
    assert sd1.tensor(["dog " * 100], padded=False).shape == (1, 1, 77)
    assert sd1.tensor(["a", "b"], 3).shape == (2, 3, 77)


def test_without_padding_several_chunks_have_no_meaning(sd1):
    with pytest.raises(ValueError, match="max_token_length"):
        sd1.ids(["a"], 2, padded=False)


@pytest.mark.parametrize("pad", [EOS, 0])
def test_a_written_folder_is_read_by_transformers_and_by_us(tmp_path, pad):
    from transformers import CLIPTokenizer

    ours = ClipTokenizer(pad)
    ours.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    again = ClipTokenizer.from_folder(tmp_path, pad_id=5)
    assert theirs.model_max_length == 77 and again.pad_id == pad
    for caption in CAPTIONS:
        expected = theirs(caption, padding="max_length", truncation=True).input_ids
        assert ours.ids([caption]) == again.ids([caption]) == [[expected]]


def test_a_folder_written_by_transformers_is_read(tmp_path, sd2):
    peer(sd2, "!").save_pretrained(tmp_path)
    assert ClipTokenizer.from_folder(tmp_path, EOS).ids(CAPTIONS, 2) == sd2.ids(CAPTIONS, 2)


def test_the_cache_folder_is_written_once_and_then_read(tmp_path):
    first = cached_tokenizer(tmp_path, "openai/clip-vit-large-patch14", EOS)
    folder = tmp_path / "openai_clip-vit-large-patch14"
    assert not folder.exists()  # asking is not writing: a dry run asks
    keep_tokenizer(first, tmp_path, "openai/clip-vit-large-patch14")
    assert (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    stamp = (folder / "vocab.json").stat().st_mtime_ns
    keep_tokenizer(first, tmp_path, "openai/clip-vit-large-patch14")
    again = cached_tokenizer(tmp_path, "openai/clip-vit-large-patch14", EOS)
    assert again.ids(CAPTIONS) == first.ids(CAPTIONS)
    assert (folder / "vocab.json").stat().st_mtime_ns == stamp


def test_a_broken_folder_is_named(tmp_path):
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot be read.*merges\.txt"):
        ClipTokenizer.from_folder(tmp_path, EOS)


def test_it_travels_to_worker_processes(sd1):
    assert pickle.loads(pickle.dumps(sd1)).ids(CAPTIONS) == sd1.ids(CAPTIONS)


def test_the_vocabulary_counts_as_clip_does(sd1):
    vocab = vocabulary(sd1.merges)
    assert (vocab["!"], vocab["a</w>"], vocab["<|startoftext|>"], vocab["<|endoftext|>"]) == (0, 320, BOS, EOS)


def test_many_captions_are_counted_as_one_by_one() -> None:
    captions = ["", "a dog", "a dog, (sitting:1.2)", "犬 🐕 Ünïcode", "dog " * 200]
    tokenizer = ClipTokenizer(49407)
    for weighted in (False, True):
        expected = [tokenizer.count(caption, weighted=weighted) for caption in captions]
        assert tokenizer.counts(captions, weighted=weighted) == expected
