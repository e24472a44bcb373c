"""Cached outputs belong to this text and encoder, or are encoded again."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator
from itertools import count, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_safetensors
from library.data import captions, retries
from library.data.batch import TextInput
from library.data.cache import text_cache
from library.data.cache.text_cache import TextCacheBuild, build_text_cache, missing, outputs, texts_of
from library.families.clip.text_encoder import encode_text, make_text_encoder
from library.families.clip.tokenizer import shipped_tokenizer
from library.families.family import TextSettings
from library.options.datasets import CaptionSettings
from library.options.mistakes import UserError
from library.runtime.seeds import python_random
from tests import tiny

TEXTS = ["a dog", "", "a dog, on a sofa", "Ёлка 犬 🐕", "a dog ", 'with "quotes"']


def states(text: str, factor: float = 1.0) -> Tensor:
    """(3, 4) float32: a plain function of the text."""
    values = [math.sin(place + 1 + sum(text.encode()) * factor) for place in range(12)]
    return torch.tensor(values, dtype=torch.float32).view(3, 4)


class Encoder:
    """An encoder with two outputs like SDXL; records its inputs."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.batches: list[list[str]] = []

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        self.batches.append(texts)
        rows = torch.stack([states(text, self.factor) for text in texts])
        return {"states": rows, "pooled": rows.mean(dim=1).to(torch.bfloat16)}

    @property
    def texts(self) -> list[str]:
        return [text for batch in self.batches for text in batch]


def filled(
    folder: Path | None, texts: list[str] = TEXTS, encoder: Encoder | None = None, **options: Any
) -> TextCacheBuild:
    keywords = {"encoder": "clip 1", "progress": False, **options}
    return build_text_cache(texts, encoder or Encoder(), folder=folder, **keywords)


def counts(found: TextCacheBuild) -> tuple[int, int, int]:
    return found.read, found.encoded, found.damaged


def shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_right(found: TextCacheBuild, texts: list[str] = TEXTS) -> bool:
    """Whether a store gives the encoder's outputs for every order of texts, with repetitions."""
    asked = [*reversed(texts), texts[0], texts[0]]
    got = found.store.get(asked)
    expected = torch.stack([states(text) for text in asked])
    assert set(got) == {"states", "pooled"} and got["pooled"].dtype == torch.bfloat16
    return torch.equal(got["states"], expected) and torch.equal(got["pooled"], expected.mean(dim=1).bfloat16())


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "disk" else None


def test_texts_come_in_the_order_of_their_first_use() -> None:
    assert texts_of(["b", "a", "b", "", "a"], 10) == (["b", "a", ""], True)
    assert texts_of(["b", "a", "b"], 2) == (["b", "a"], True)
    assert texts_of([], 0) == ([], True)


def test_what_is_beyond_the_limit_is_said_and_not_looked_for() -> None:
    endless = (f"text {number}" for number in count())
    assert texts_of(endless, 3) == (["text 0", "text 1", "text 2"], False)
    assert next(endless) == "text 4"


def test_the_variants_of_a_shuffled_caption_can_be_listed() -> None:
    def samples() -> Iterator[str]:
        chosen = CaptionSettings(shuffle=True, dropout_rate=0.2, keep_tokens=1)
        for epoch in range(1, 400):
            yield captions.process("a, b, c, d", chosen, python_random(7, "caption", epoch, "key", 0), epoch)

    texts, complete = texts_of(samples(), 100)
    assert complete and texts == texts_of(samples(), 100)[0]
    # three tags in any order behind the first, and the empty text
    assert sorted(texts) == sorted(["", *(", ".join(["a", *tags]) for tags in permutations("bcd"))])


def test_a_store_gives_what_the_encoder_gives(place: Path | None) -> None:
    encoder = Encoder()
    found = filled(place, [*TEXTS, *TEXTS], encoder, batch_size=4)
    assert is_right(found) and counts(found) == (0, 6, 0) and len(found.store) == 6
    # every batch has the same shape
    assert encoder.batches == [TEXTS[:4], [*TEXTS[4:], TEXTS[5], TEXTS[5]]]
    assert all(text in found.store for text in TEXTS) and "a cat" not in found.store
    with pytest.raises(KeyError):
        found.store.get(["a cat"])


def test_texts_beyond_the_limit_are_encoded_when_they_come(place: Path | None) -> None:
    found = filled(place, TEXTS[:2])
    encoder = Encoder()
    asked = ["a cat", "a dog", "a cow", "a cat", ""]
    assert missing(asked, found.store) == ["a cat", "a cow"] and not missing(TEXTS[:2], found.store)
    got = outputs(asked, found.store, encoder)
    assert encoder.batches == [["a cat", "a cow"]]
    assert torch.equal(got["states"], torch.stack([states(text) for text in asked]))
    assert torch.equal(outputs(TEXTS[:2], found.store, encoder)["states"], found.store.get(TEXTS[:2])["states"])
    assert len(encoder.batches) == 1 and len(found.store) == 2


def test_nothing_is_encoded_twice(tmp_path: Path) -> None:
    filled(tmp_path)
    before = [(path, path.stat().st_mtime_ns) for path in shards(tmp_path)]
    encoder = Encoder()
    found = filled(tmp_path, encoder=encoder)
    assert not encoder.batches and counts(found) == (6, 0, 0) and is_right(found)
    assert [(path, path.stat().st_mtime_ns) for path in shards(tmp_path)] == before
    assert str(found) == "captions: 6 read, 0 encoded"


def test_an_edited_caption_is_encoded_and_no_other(tmp_path: Path) -> None:
    filled(tmp_path)
    encoder = Encoder()
    edited = ["a dog!", *TEXTS[1:]]
    found = filled(tmp_path, edited, encoder)
    assert encoder.texts == ["a dog!"] and counts(found) == (5, 1, 0) and is_right(found, edited)
    # and what it was before is still there
    assert counts(filled(tmp_path)) == (6, 0, 0)


def test_another_encoder_shares_nothing(tmp_path: Path) -> None:
    filled(tmp_path)
    found = filled(tmp_path, encoder=Encoder(2.0))
    assert is_right(found)  # of the same name: its outputs are taken for the same
    other = build_text_cache(TEXTS, Encoder(2.0), encoder="clip 2", folder=tmp_path, progress=False)
    assert counts(other) == (0, 6, 0)
    assert torch.equal(other.store.get(["a dog"])["states"][0], states("a dog", 2.0))
    assert is_right(filled(tmp_path))


def test_a_hundred_texts_are_few_files(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(150)]
    assert is_right(filled(tmp_path, texts, batch_size=10), texts)
    assert len(shards(tmp_path)) == 3


def test_an_interrupted_cache_goes_on_where_it_was(tmp_path: Path) -> None:
    class Stops(Encoder):
        def __call__(self, texts: list[str]) -> dict[str, Tensor]:
            if len(self.texts) >= 100:
                raise KeyboardInterrupt
            return super().__call__(texts)

    texts = [f"text {number}" for number in range(150)]
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, texts, Stops())
    assert len(shards(tmp_path)) == 1
    found = filled(tmp_path, texts)
    assert counts(found) == (64, 86, 0) and is_right(found, texts)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: b"",
        lambda raw: raw[:5],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: bytes(8) + raw[8:],
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw.replace(b'"F32"', b'"F33"'),
        lambda raw: raw.replace(b"crc32", b"crc33"),
        lambda raw: b"x" * len(raw),
    ],
    ids=[
        "empty",
        "5 bytes",
        "incomplete",
        "one short",
        "a bit",
        "no length",
        "a huge length",
        "dtype",
        "sums",
        "other",
    ],
)
def test_what_is_damaged_is_made_anew(tmp_path: Path, spoil: Any) -> None:
    filled(tmp_path)
    later = filled(tmp_path, ["a cat"])  # a file of its own, which stays
    assert counts(later) == (0, 1, 0)
    file = max(shards(tmp_path), key=lambda path: path.stat().st_size)
    file.write_bytes(spoil(file.read_bytes()))
    found = filled(tmp_path, [*TEXTS, "a cat"])
    assert counts(found) == (1, 6, 1) and is_right(found, [*TEXTS, "a cat"])
    assert str(found) == "captions: 1 read, 6 encoded (1 damaged cache file replaced)"
    assert counts(filled(tmp_path, [*TEXTS, "a cat"])) == (7, 0, 0)


def test_damage_during_the_run_is_no_wrong_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DELAYS", ())
    found = filled(tmp_path)
    (file,) = shards(tmp_path)
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(UserError, match="was removed or changed by another program"):
        found.store.get(TEXTS)
    file.unlink()
    with pytest.raises(UserError, match="was removed or changed by another program"):
        found.store.get(TEXTS)


MANY = [f"text {number}" for number in range(200)]


def fill_in_a_process(folder: Path, begin: Any) -> None:
    begin.wait()
    assert is_right(filled(folder, MANY), MANY)


@pytest.mark.slow
def test_two_processes_at_once_do_no_harm(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(2)
    other = context.Process(target=fill_in_a_process, args=(tmp_path, begin))
    other.start()
    fill_in_a_process(tmp_path, begin)
    other.join(60)
    assert other.exitcode == 0
    found = filled(tmp_path, MANY)
    assert counts(found) == (200, 0, 0) and is_right(found, MANY)
    assert [path.suffix for path in shards(tmp_path)] == [".safetensors"] * 4


def test_what_another_process_has_made_meanwhile_is_read(tmp_path: Path) -> None:
    class Slow(Encoder):
        def __call__(self, texts: list[str]) -> dict[str, Tensor]:
            if not self.batches:
                filled(tmp_path, MANY)  # the other one does all of its work while this one encodes its first batch
            return super().__call__(texts)

    encoder = Slow()
    found = filled(tmp_path, MANY, encoder)
    assert counts(found) == (136, 64, 0) and encoder.texts == MANY[:64] and is_right(found, MANY)
    assert len(shards(tmp_path)) == 4


def test_a_file_that_another_process_wrote_and_reads_need_not_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses_to_replace(*given: Any) -> None:
        write_safetensors(*given)
        raise CheckpointError("access is denied")

    monkeypatch.setattr(text_cache, "write_safetensors", refuses_to_replace)
    assert is_right(filled(tmp_path))


def test_outputs_that_are_not_finite_name_the_caption(place: Path | None) -> None:
    def broken(texts: list[str]) -> dict[str, Tensor]:
        return {"states": torch.stack([torch.full((2, 2), math.nan if "sofa" in text else 0.0) for text in texts])}

    with pytest.raises(UserError, match='caption "a dog, on a sofa": the text encoder gives states'):
        build_text_cache(TEXTS, broken, encoder="x", folder=place, batch_size=4, progress=False)
    assert place is None or not shards(place)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"text cache .* cannot be written .*No space left.*\n.*free disk space"):
        filled(tmp_path)
    assert not shards(tmp_path)


def test_a_place_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        filled(tmp_path / "cache")


def test_no_gradients_are_kept() -> None:
    weight = torch.ones(3, requires_grad=True)
    found = build_text_cache(
        ["x"], lambda texts: {"states": weight[None] * 2}, encoder="x", folder=None, progress=False
    )
    assert not found.store.get(["x"])["states"].requires_grad


@pytest.mark.parametrize(("clip_skip", "chunks"), [(None, 1), (2, 3)])
def test_the_states_of_a_clip_come_back_to_the_last_bit(tmp_path: Path, clip_skip: int | None, chunks: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = make_text_encoder(tiny.text_config("sd1"), projects=False).eval()
    tokenizer = shipped_tokenizer(49407)

    def encode(texts: list[str]) -> dict[str, Tensor]:
        text_inputs = {"text_encoder": TextInput(tokenizer.tensor(texts, chunks))}
        return encode_text({"text_encoder": clip}, text_inputs, TextSettings(clip_skip))

    name = f"tiny {clip_skip} {chunks}"
    found = build_text_cache(TEXTS, encode, encoder=name, folder=tmp_path, batch_size=len(TEXTS), progress=False)
    with torch.no_grad():
        expected = encode(TEXTS)["states"]
    got = found.store.get(TEXTS)["states"]
    assert got.shape == (len(TEXTS), 75 * chunks + 2, 64) and torch.equal(got, expected)
    # other batches, and texts of which some are not in the store, give the same but for rounding
    few = build_text_cache(TEXTS[:3], encode, encoder=name, folder=None, batch_size=2, progress=False)
    torch.testing.assert_close(outputs(TEXTS, few.store, encode)["states"], expected)


def test_what_is_kept_in_memory_is_what_is_kept_on_disk(tmp_path: Path) -> None:
    kept, read = filled(None).store.get(TEXTS), filled(tmp_path).store.get(TEXTS)
    assert list(kept) != [] and all(torch.equal(kept[name], read[name]) for name in kept)


def test_processes_that_share_begin_elsewhere_and_pass_over_what_others_did(tmp_path: Path) -> None:
    texts = [f"caption {number}" for number in range(200)]
    order: list[str] = []

    def encode(batch: list[str]) -> dict[str, torch.Tensor]:
        if not order:  # meanwhile another one does its first half
            order.append("")
            build_text_cache(
                texts[:128], lambda other: {"states": torch.ones(len(other), 2)}, encoder="x", folder=tmp_path
            )
        order.extend(batch)
        return {"states": torch.ones(len(batch), 2)}

    found = build_text_cache(texts, encode, encoder="x", folder=tmp_path, share=(1, 2), progress=False)
    assert order[1:] == texts[128:]
    assert (found.read, found.encoded) == (128, 72) and all(text in found.store for text in texts)
