"""Computing beside the training that leaves no trace in it: images and measurements while a run goes on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn

from library.runtime.accelerator import random_states, set_random_states
from library.runtime.eval_mode import eval_mode


@contextmanager
def isolated_eval(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode, without gradients, and afterwards leave everything as it was.

    What is put back: the mode of every submodule by itself (parts of a trained module may be frozen), and the global
    random states of Python, NumPy and torch on the CPU and on all devices. A run that computes aside in this block
    trains bit for bit as one that does not. Casts that autocast kept are dropped: they carry no gradients.
    """
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    on_devices = random_states()
    try:
        with eval_mode(modules), torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        set_random_states(on_devices)
