"""The full-size files are those that were published, and the proof on them finds what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import proof, proof_sides
from benchmarks.full_size_xl import original_tensors, random_tensor
from library.checkpoints.writer import header_bytes, in_file_order

# tensors and bytes of sd_xl_base_1.0.safetensors and sd_xl_refiner_1.0.safetensors on huggingface.co/stabilityai, whose
# metadata holds an image of under 50 kB
PUBLISHED = {"sdxl": (2515, 6_938_078_334), "refiner": (1858, 6_075_981_930)}


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_full_size_file_has_the_tensors_and_the_bytes_of_the_published_one(family: str) -> None:
    tensors = in_file_order(original_tensors(family))
    size = len(header_bytes(tensors, None)) + sum(tensor.info.nbytes for tensor in tensors.values())
    count, published = PUBLISHED[family]
    assert len(tensors) == count
    assert 0 < published - size < 50_000


def test_drawn_tensors_are_the_same_every_time_and_none_is_alike_another() -> None:
    first, second = (
        [random_tensor((2, 3), name).load() for name in ("1 unet/a.weight", "1 unet/b.weight")] for _ in "xy"
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(*first)


def test_tensors_that_differ_in_anything_are_faults(tmp_path: Path) -> None:
    right = {"a": torch.zeros(2, 3), "b": torch.ones(2), "c": torch.ones(2), "d": torch.zeros(1)}
    wrong = {
        "a": torch.zeros(3, 2),
        "b": torch.ones(2).half(),
        "c": torch.ones(2),
        "d": -torch.zeros(1),
        "e": right["b"],
    }
    save_file(right, tmp_path / "right.safetensors")
    save_file({name: tensor.clone() for name, tensor in wrong.items()}, tmp_path / "wrong.safetensors")
    one, other = (proof.loads(tmp_path / f"{name}.safetensors") for name in ("wrong", "right"))
    assert not list(proof.unequal("x", other, other))
    assert sorted(proof.unequal("x", one, other)) == [
        "x has too many: 1, such as e",
        "x: a is torch.float32 (3, 2), not torch.float32 (2, 3)",
        "x: b is torch.float16 (2,), not torch.float32 (2,)",
        "x: d has other values",
    ]


def test_differences_are_in_units_of_the_spread_and_what_is_not_finite_is_none(tmp_path: Path) -> None:
    theirs = {"a": torch.tensor([0.0, 200.0]), "b": torch.ones(2), "c": torch.ones(2)}
    ours = {"a": torch.tensor([0.0, 201.0]), "b": torch.tensor([1.0, torch.nan]), "c": torch.ones(3)}
    save_file(theirs, proof_sides.path(tmp_path, "diffusers", "text"))
    save_file(ours, proof_sides.path(tmp_path, "ours", "text"))
    found = proof_sides.differences(tmp_path, "text")
    assert found["a"] == pytest.approx(1 / (200 / 2**0.5))  # the standard deviation of two values
    assert found["b"] == found["c"] == float("inf")
