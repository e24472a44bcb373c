"""Count what torch's operations allocate, by the storages that they return. Not what a kernel takes meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class Counted(TorchDispatchMode):
    """While active: `live` and `peak` bytes of tensors made meanwhile by this thread. `known` are not counted."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [each.untyped_storage() for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
        for storage in inputs:  # made before, or by another thread
            self._seen.setdefault(storage, True)
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage() not in self._seen:
                storage = each.untyped_storage()
                self._seen[storage] = True
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes
