"""Images, records and dataset settings for these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from library.data.scan.image_record import ImageRecord
from library.options.datasets import BucketSettings, DatasetSpec, SubsetSpec


def noise(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A noise image (width, height), which every resize, flip and crop changes."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values if channels > 1 else values[:, :, 0], mode)


def save(path: Path, size: tuple[int, int] = (64, 48), caption: str | None = None, **keywords: Any) -> Path:
    """Write an image and optionally its .txt caption; creates folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(size, seed=sum(path.name.encode())).save(path, **keywords)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def record(
    path: Path,
    size: tuple[int, int],
    *,
    repeats: int = 1,
    is_reg: bool = False,
    caption: str = "",
    subset: int = 0,
    dataset: int = 0,
    transparent: bool = False,
    mask: str | None = None,
    score: float | None = None,
) -> ImageRecord:
    """A record as from a scan."""
    return ImageRecord(
        path.parent, path.name, subset, dataset, size, caption, True, repeats, is_reg, transparent, mask, score=score
    )


def subset(folder: Path | None, **values: Any) -> SubsetSpec:
    """A subset as from a dataset file, with .txt captions."""
    return SubsetSpec(folder, **{"origin": "data.toml, line 1", "caption_extensions": (".txt",), **values})


def dataset(*subsets: SubsetSpec, resolution: tuple[int, int] = (64, 64), **values: Any) -> DatasetSpec:
    """A dataset of these subsets."""
    return DatasetSpec(**{"origin": "data.toml", **values}, buckets=BucketSettings(resolution), subsets=subsets)


def template(**values: Any) -> DatasetSpec:
    """The template of the command line for datasets of folders."""
    return dataset(subset(None, **{"origin": "the command line", **values}), origin="the command line")
