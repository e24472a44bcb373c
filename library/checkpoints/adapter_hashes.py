"""The hashes by which WebUI extensions identify adapter files, as defined by sd-scripts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from library.checkpoints.lazy import LazyTensor
from library.checkpoints.writer import header_bytes, in_file_order, raw_bytes

if TYPE_CHECKING:
    from torch import Tensor

_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000
_TRAINING = "ss_"


def adapter_hashes(
    tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str], dtype: str | None = None
) -> dict[str, str]:
    """Return sshs_model_hash and sshs_legacy_hash of the file `write_safetensors(path, tensors, metadata, dtype)`.

    The first is the SHA-256 of the tensors' bytes. The second covers 64 KiB at 1 MiB of the file, as if written with
    only the ss_* metadata, so that a new title does not change it: 8 digits, the hash of nothing (e3b0c442) for smaller
    files. One pass over the tensors; one at a time is converted and copied to the CPU.
    """
    ordered = in_file_order(tensors, dtype)
    training = {name: value for name, value in metadata.items() if name.startswith(_TRAINING)}
    whole, part = hashlib.sha256(), hashlib.sha256()
    header = header_bytes(ordered, training)
    part.update(header[_LEGACY_START : _LEGACY_START + _LEGACY_LENGTH])
    position = len(header)
    for tensor in ordered.values():
        raw = raw_bytes(tensor.load().detach().to("cpu").contiguous())
        whole.update(raw)
        start = max(0, _LEGACY_START - position)
        part.update(raw[start : max(start, _LEGACY_START + _LEGACY_LENGTH - position)])
        position += len(raw)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": part.hexdigest()[:8]}
