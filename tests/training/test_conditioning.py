"""Text encoders of different lengths and masks: from captions to conditioning."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.data.batch import TextInput
from library.data.cache.text_cache import build_text_cache
from library.data.dataset import BatchLoader
from library.families.family import AS_TRAINED, TextSettings
from library.families.sd.sd import SD1
from library.training.conditioning import Conditioner
from tests.data.test_dataset import dataset, request_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TwoLengths:
    """Code points for two encoders, as of a CLIP and a T5: 77 ids, and 512 with a mask of what is text."""

    padded: bool = True
    cache_key: str = "two lengths"

    def __call__(self, texts: Sequence[str]) -> dict[str, TextInput]:
        short, long = (
            torch.tensor([[ord(letter) for letter in text.ljust(length, "\0")] for text in texts])
            for length in (77, 512)
        )
        return {"clip": TextInput(short), "t5": TextInput(long, mask=(long > 0).long())}


def encode_text(
    text_encoders: Mapping[str, Any], text_inputs: Mapping[str, TextInput], settings: TextSettings = AS_TRAINED
) -> dict[str, Tensor]:
    """The states of the one encoder, where its mask has text; of the other a vector."""
    short, long = text_inputs["clip"], text_inputs["t5"]
    assert long.mask is not None
    states = text_encoders["t5"](long.ids) * long.mask
    return {"states": states[..., None].float(), "pooled": text_encoders["clip"](short.ids).float()}


FAMILY = replace(SD1, name="made up", text_encoders=("clip", "t5"), encode_text=encode_text)
ENCODERS = {"clip": lambda ids: ids[:, :2] * 10, "t5": lambda ids: ids + 1}


def test_encoders_of_two_lengths_give_one_conditioning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tuple(tensor.shape))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    data = pickle.loads(pickle.dumps(replace(dataset(tmp_path), tokenize=TwoLengths())))  # as a worker gets it
    ((_, batch),) = BatchLoader(data, pin_memory=True).batches([request_of(1, (64, 64), ((0, 0), (2, 1)))])
    batch = pickle.loads(pickle.dumps(batch))  # as a worker gives it
    assert batch.text_inputs["clip"].ids.shape == (2, 77) and batch.text_inputs["t5"].ids.shape == (2, 512)
    assert pinned.count((2, 77)) == 1 and pinned.count((2, 512)) == 2  # ids, ids and mask

    conditioner = Conditioner(FAMILY, ENCODERS, TwoLengths(), AS_TRAINED, CPU)
    conditioning = conditioner(batch)
    # "a, b, c, d0" and "a, b, c, d2": 11 letters, of which 'a' is 97, ',' 44, 'd' 100, '0' 48 and '2' 50
    assert conditioning["states"].shape == (2, 512, 1)
    assert conditioning["states"][:, [0, 9, 10, 11, 511], 0].tolist() == [[98, 101, 49, 0, 0], [98, 101, 51, 0, 0]]
    assert conditioning["pooled"].tolist() == [[970, 440], [970, 440]]
    assert conditioning["sizes"].shape == (2, 6) and conditioning["score"].tolist() == [7.0, 7.0]

    texts = list(batch.captions)
    from_texts = conditioner.from_texts(texts, batch.sizes, batch.score)
    conditioner.store = build_text_cache(
        texts, conditioner.encode, encoder="made up", folder=tmp_path / "captions", batch_size=2, progress=False
    ).store
    for other in (from_texts, conditioner(batch)):
        assert other.keys() == conditioning.keys()
        assert all(torch.equal(other[name], conditioning[name]) for name in conditioning)


def test_weights_of_captions_move_and_are_pinned_with_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    text_input = TextInput(torch.zeros(1, 3, dtype=torch.int64), weights=torch.ones(1, 3))
    pinned, moved = text_input.pin_memory(), text_input.to(torch.device("meta"))
    assert pinned.ids.tolist() == [[1, 1, 1]] and pinned.mask is None
    assert pinned.weights is not None and pinned.weights.tolist() == [[2, 2, 2]]
    assert moved.ids.is_meta and moved.weights is not None and moved.weights.is_meta and moved.mask is None
