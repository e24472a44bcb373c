"""Resolutions and batch sizes of a dataset, and checks of its bucket settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from library.options.dataset_config.source import ConfigFile
from library.options.dataset_config.tables import Layer, Setting, describe_key, nearest
from library.options.datasets import BucketSettings, DatasetSpec, Size
from library.options.mistakes import Mistakes
from library.options.rules.bucket_sizes import usable_sizes

NOT_GIVEN: Size = (0, 0)
"""Resolution of the defaults if the user set none."""

_PLACEHOLDER: Size = (512, 512)
_LIMITS = frozenset(("enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"))


def resolutions_and_batches(
    layers: Sequence[Layer], defaults: DatasetSpec, source: ConfigFile, mistakes: Mistakes, notes: list[str]
) -> list[tuple[Size, int]]:
    """(resolution, batch size) of each dataset of one table: one, or several with `resolutions`.

    A missing or wrong resolution becomes 512, so that the images can be checked before all mistakes are reported.
    """
    size = _one_of(("resolution", "resolutions"), layers, source, mistakes)
    resolutions: tuple[Size, ...] = (defaults.buckets.resolution,)
    if size is not None:
        resolutions = size.value if size.at[-1] == "resolutions" else (size.value,)
    elif resolutions == (NOT_GIVEN,):
        if not any(layer.faulty & {"resolution", "resolutions"} for layer in layers):
            remedy = "write resolution = 512 in the dataset or in general, or set --resolution"
            mistakes.add(f"the dataset ({source.origin(layers[0].at)}) has no resolution", remedy)
        resolutions = (_PLACEHOLDER,)
    batch = _one_of(("batch_size", "pixels_per_batch"), layers, source, mistakes)
    if batch is None:
        return [(resolution, defaults.batch_size) for resolution in resolutions]
    if batch.at[-1] == "pixels_per_batch":
        return [(resolution, _batch_size_within(batch, resolution, source, notes)) for resolution in resolutions]
    sizes: tuple[int, ...] = batch.value
    if len(sizes) not in (1, len(resolutions)):
        what = (
            f"{describe_key(source, batch.at, list(sizes))} has {len(sizes)} entries for {len(resolutions)} resolutions"
        )
        mistakes.add(what, "write one batch size for all, or one for each of the resolutions")
        sizes = sizes[:1]
    return list(zip(resolutions, sizes if len(sizes) > 1 else sizes * len(resolutions), strict=True))


def _one_of(names: tuple[str, str], layers: Sequence[Layer], source: ConfigFile, mistakes: Mistakes) -> Setting | None:
    """The nearest value of two alternative keys; both in one table is a mistake."""
    for layer in layers:
        first, second = (nearest(name, [layer]) for name in names)
        if first is not None and second is not None:
            what = f"{names[0]} ({source.origin(first.at)}) and {names[1]} ({source.origin(second.at)}) are both set"
            mistakes.add(what, "keep one of the two")
        if first is not None or second is not None:
            return second or first
    return None


def _batch_size_within(budget: Setting, resolution: Size, source: ConfigFile, notes: list[str]) -> int:
    """How many images of a resolution fit into a budget of pixels, at least 1."""
    count = int(budget.value) // (resolution[0] * resolution[1])
    if count == 0:
        notes.append(
            f"{describe_key(source, budget.at, budget.value)} is less than one image of "
            f"{resolution[0]} x {resolution[1]}: the batch size is 1"
        )
    return max(1, count)


class BucketLimits:
    """Checks the bucket settings of one dataset; messages show the line of each value."""

    def __init__(self, layers: Sequence[Layer], default_origin: str, source: ConfigFile) -> None:
        """`default_origin` is the origin of values that the file does not set."""
        self._layers, self._default_origin, self._source = layers, default_origin, source

    def _describe(self, name: str, value: Any) -> str:
        if name == "resolution":
            return self._size(value)
        return self._setting(name, value)

    def _setting(self, name: str, value: Any) -> str:
        found = nearest(name, self._layers)
        if found is None:
            return f"{name} = {value} ({self._default_origin})"
        return describe_key(self._source, found.at, value)

    def _size(self, size: Size) -> str:
        value: Any = size[0] if size[0] == size[1] else list(size)
        several = nearest("resolutions", self._layers)
        if several is not None and size in several.value:
            return f"{value} of resolutions ({self._source.origin(several.at)})"
        return self._setting("resolution", value)

    def check(self, buckets: BucketSettings, mistakes: Mistakes, notes: list[str]) -> BucketSettings:
        """Check the settings; return those that training can use, with a note for each that changed."""
        if any(layer.faulty & _LIMITS for layer in self._layers):
            return buckets
        return usable_sizes(buckets, self._describe, mistakes, notes)
