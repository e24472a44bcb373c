"""Checksums of the files of a training state, kept in its train_state.json. No torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATE_FILE = "train_state.json"
FILES = "files"
OWN = "head_crc32"  # of train_state.json, without this entry
PIECE = 2**20  # bytes read at a time


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and CRC-32 of each file of a folder and its folders, for `train_state.json`."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != STATE_FILE
    }


def checksum(path: Path) -> str:
    """The CRC-32 of a file, as 8 hexadecimal digits."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def sealed(head: Mapping[str, Any]) -> dict[str, Any]:
    """The content of train_state.json with its own CRC-32."""
    return {**head, OWN: _checksum_of(head)}


def is_sealed(head: Mapping[str, Any]) -> bool:
    """Whether the content of train_state.json is as it was written; also for states of earlier versions, which cannot
    tell."""
    return OWN not in head or bool(head[OWN] == _checksum_of(head))


def _checksum_of(head: Mapping[str, Any]) -> str:
    content = {name: value for name, value in head.items() if name != OWN}
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode('utf-8')):08x}"
