"""The flags of tools/make_shards.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.flag import flag
from library.options.groups.dataset import DatasetOptions
from library.options.mistakes import Mistakes


@dataclass(frozen=True)
class ShardOptions:
    """Command-line options: one of input_dir, shards, check and unpack."""

    input_dir: Path | None = flag(
        None,
        'pack the images of this folder with their captions; or, if it contains folders like "10_sks dog", those of '
        "each, into folders of the same names",
    )
    shards: str | None = flag(
        None,
        "make the table of these shards, which are not changed: a pattern such as data/train-{000000..000099}.tar, or "
        "such a URL",
    )
    check: str | None = flag(None, "compare the shards in this folder, or of this pattern, with their table")
    unpack: str | None = flag(None, "write the files of the shards in this folder, or of this pattern, to output_dir")
    output_dir: Path | None = flag(
        None,
        "folder of the new shards and their table; with --shards, of the table. Not set with --shards: beside them",
    )
    in_json: Path | None = flag(None, "with --input_dir: metadata file with the captions of the images")
    conditioning_data_dir: Path | None = flag(
        None, "with --input_dir: pack the masks of this folder too; with --unpack: write them there"
    )
    recursive: bool = flag(False, "with --input_dir: sub-folders too")
    caption_extension: str = flag(".txt,.caption", "extensions of caption files; the first that exists is used")
    caption_encoding: str = flag("utf-8", "encoding of caption files")
    caption_separator: str = flag(",", "with --in_json: what joins caption and tags")
    caption_key: str = flag("caption", "with --shards: key of the caption in .json files, for images without a text")
    shard_table: str | None = flag(None, "with --check and --unpack: the table, if it is not beside the shards")
    shard_size: float = flag(500.0, "with --input_dir: largest size of a shard in megabytes", above=0)
    max_image_memory: float = flag(
        DatasetOptions.max_image_memory,
        "memory in GiB that a decoded image may need; larger ones are left out",
        above=0,
    )


def check(options: ShardOptions, mistakes: Mistakes) -> None:
    """Add a mistake unless exactly one thing is to be done, and all that it needs is there."""
    chosen = [name for name in ("input_dir", "shards", "check", "unpack") if getattr(options, name) is not None]
    if len(chosen) != 1:
        what = f"{' and '.join(f'--{name}' for name in chosen)} are set" if chosen else "nothing to do"
        mistakes.add(what, "give one of --input_dir, --shards, --check and --unpack")
    elif chosen[0] in ("input_dir", "unpack") and options.output_dir is None:
        mistakes.add(f"--{chosen[0]} needs --output_dir", "give a folder to write to")
