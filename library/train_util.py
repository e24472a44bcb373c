"""Names of sd-scripts that LoRA_Easy_Training_Scripts imports from `library.train_util`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from library.data.buckets import assign_bucket, make_buckets
from library.options.datasets import BucketSettings, Size

if TYPE_CHECKING:
    from torch import Tensor


class BucketManager:
    """Counts images by bucket, with the arguments and methods of sd-scripts' class. LETS counts the steps of a run so.

    `max_reso`: width and height. The limits are in pixels; None where there are no buckets (set_predefined_resos).
    """

    def __init__(
        self,
        no_upscale: bool,  # noqa: FBT001 - as the backend calls it
        max_reso: Size,
        min_size: int | None,
        max_size: int | None,
        reso_steps: int | None,
    ) -> None:
        width, height = max_reso
        smallest, largest, step = min_size or 0, max_size or max(max_reso), reso_steps or 64
        self._settings = BucketSettings((width, height), True, no_upscale, smallest, largest, step)  # noqa: FBT003
        self.resos: list[Size] = []
        self.buckets: list[list[object]] = []
        """The images that were added, by bucket in the order of their first image."""
        self._by_size: dict[Size, list[object]] = {}

    def make_buckets(self) -> None:
        """Make all sizes between the limits."""
        settings = self._settings
        self.resos = make_buckets(settings.resolution, settings.smallest, settings.largest, settings.step)

    def set_predefined_resos(self, resos: Iterable[Size]) -> None:
        """Use these sizes instead."""
        self.resos = [(width, height) for width, height in resos]

    def select_bucket(self, image_width: int, image_height: int) -> tuple[Size, Size, float]:
        """The bucket of an image, the size that it is scaled to, and the difference of their aspect ratios."""
        placement = assign_bucket((image_width, image_height), self._settings, self.resos)
        width, height = placement.bucket
        return placement.bucket, placement.resized, width / height - image_width / image_height

    def add_image(self, reso: Size, image_or_info: object) -> None:
        """Add an image to a bucket."""
        if reso not in self._by_size:
            self._by_size[reso] = []
            self.buckets.append(self._by_size[reso])
        self._by_size[reso].append(image_or_info)


def precalculate_safetensors_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """The values of sshs_model_hash and sshs_legacy_hash for the file of these tensors."""
    from library.checkpoints.adapter_hashes import adapter_hashes

    hashes = adapter_hashes(tensors, metadata)
    return hashes["sshs_model_hash"], hashes["sshs_legacy_hash"]
