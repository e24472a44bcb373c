"""Read an architecture from tensor shapes."""

from __future__ import annotations

from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape of one module, under diffusers' or transformers' names."""


def count_blocks(names: Mapping[str, object], prefix: str) -> int:
    """Count the numbered blocks under `prefix`: "encoder.layers." -> 12."""
    return len({name[len(prefix) :].split(".", 1)[0] for name in names if name.startswith(prefix)})
