"""Folders packed into shards, and the scan of either."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from library.data.scan.scan import Scan, scan
from library.data.scan.shard_images import ShardImages, open_images, places_of
from library.data.shards.pack import Report, pack_folder
from library.options.datasets import SubsetSpec
from tests.data.image_files import dataset, noise, subset
from tools import make_shards


def pack(folder: Path, output: Path, limit: int = 20_000, **values: Any) -> Report:
    """Pack a folder with .txt captions."""
    return pack_folder(subset(folder, **values), output, "part", limit=limit, most_memory=1.0)


def scanned(place: Path | str, **values: Any) -> Scan:
    """The scan of a folder of images or shards, or of a pattern."""
    if isinstance(place, str):
        return scan([dataset(subset(None, shards=place, **values))])
    return scan([dataset(subset(place, **values))])


def opened(folder: Path, **values: Any) -> ShardImages:
    """The images of the shards in a folder."""
    found: SubsetSpec = subset(folder, **values)
    places = places_of(found)
    assert places is not None
    return open_images(found, 0, 0, places, None)


def png(size: tuple[int, int] = (64, 48), seed: int = 0, mode: str = "RGB") -> bytes:
    """An image of noise."""
    file = io.BytesIO()
    noise(size, seed, mode).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """A shard as other programs write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def tool(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run the tool: its exit code and all that it prints."""
    capsys.readouterr()
    code = make_shards.main([*map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err
