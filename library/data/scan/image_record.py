"""The record of one image to train on, whatever it was found in. Imports no torch."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from library.data.colour_profiles import ProfileUse
from library.data.image_files import ImageSource
from library.data.shards.member import Member
from library.options.datasets import Size


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image to train on.

    `key` identifies it in every random draw: kind, folder and file name. Unlike an index, it does not change when
    other images are added or removed, when the data moves, or with the sort order of another system.
    """

    folder: Path  # one object shared by all images of the folder
    name: str  # path relative to `folder`, with "/"
    subset: int  # index in Scan.subsets
    dataset: int  # index in Scan.datasets
    size: Size  # width, height, upright
    caption: str  # unprocessed; multiple lines only if the subset enables wildcards
    from_file: bool  # the caption is from a file, not from class tokens or the file name
    repeats: int
    is_reg: bool
    transparent: bool = False
    mask: str | None = None  # path relative to the subset's mask_dir
    held_out: bool = False  # only validated on
    score: float | None = None  # aesthetic score, 0 to 10, from metadata or subset; None: the run's
    profile: ProfileUse = ""  # what becomes of its colour profile
    animated: bool = False  # other frames or pages of the file are not used
    length: int = 0  # bytes of the file; 0: not known
    member: Member | None = None  # where it is in a shard; None: it is a file
    mask_member: Member | None = None  # its mask in the shard
    row: int = 0  # its number in the table of the shards

    @property
    def path(self) -> ImageSource:
        """Where the image is read from: its path, or its place in a shard."""
        return self.folder / self.name if self.member is None else self.member

    @property
    def key(self) -> str:
        """Its key in random draws."""
        kind = "reg" if self.is_reg else "train"
        return unicodedata.normalize("NFC", f"{kind}/{self.folder.name}/{self.name}")
