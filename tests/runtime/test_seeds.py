"""Draws depend only on their key."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from library.runtime.seeds import draw_seed, python_random, torch_generator

ROOT = Path(__file__).resolve().parents[2]


def test_a_seed_is_63_bits_of_blake2b() -> None:
    digest = hashlib.blake2b(b"i2:42s4:crop", digest_size=8).digest()
    assert draw_seed(42, "crop") == int.from_bytes(digest, "big") // 2 < 2**63


def test_keys_that_look_alike_are_different() -> None:
    keys = [("a", "b"), ("ab",), ("a", "", "b"), (1,), ("1",), (1, 2), (12,), (-1,), (), ("",), ("s1:b",), ("b",)]
    assert len({draw_seed(*key) for key in keys}) == len(keys)


def test_neighbouring_keys_share_nothing() -> None:
    seeds = [draw_seed(*key) for key in itertools.product(range(20), ("crop", "flip"), range(20), range(5))]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert abs(sum(python_random(*divmod(i, 50)).random() for i in range(2000)) / 2000 - 0.5) < 0.03


def test_only_int_and_str_make_a_key() -> None:
    with pytest.raises(TypeError):
        draw_seed(1.5)  # type: ignore[arg-type]


def test_equal_in_another_process() -> None:
    program = "from library.runtime.seeds import draw_seed; print(draw_seed(7, 'bildgröße', -3))"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert int(answer.stdout) == draw_seed(7, "bildgröße", -3)


def test_generators_follow_the_key() -> None:
    import torch

    one, same, other = (torch.randn(8, generator=torch_generator(1, "noise", n)) for n in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert python_random(1, 2).random() == python_random(1, 2).random() != python_random(2, 1).random()
