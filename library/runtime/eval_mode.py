"""Switch modules to evaluation mode and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode (no dropout, no gradient checkpointing) and restore them afterwards.

    The mode of every submodule is restored separately: parts of a trained module may be frozen.
    """
    roots = list(modules)
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
