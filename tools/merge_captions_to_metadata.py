"""Write the captions beside the images of a folder into a metadata file, for --in_json.

python finetune/merge_captions_to_metadata.py train_data meta_cap.json --full_path --caption_extension .caption

An existing metadata file is continued: captions of its images are replaced, everything else in it is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.mistakes import Mistakes
from library.options.tool_command import Tool, run_tool


@dataclass(frozen=True)
class MergeCaptionsOptions:
    """Command-line options, named as in sd-scripts."""

    train_data_dir: Path = flag(None, "the folder of the images")
    out_json: Path = flag(None, "the metadata file to write")
    in_json: Path | None = flag(None, "the metadata file to continue. Not set: out_json, if it exists")
    caption_extension: str = flag(".caption", "extension of the caption files")
    caption_encoding: str = flag("utf-8", "encoding of files without a byte order mark, for example cp932")
    full_path: bool = flag(False, "name images by their absolute paths, so that they may be in several folders")
    recursive: bool = flag(False, "read the sub-folders too; needs --full_path")
    debug: bool = flag(False, "print every image with its text")


@dataclass(frozen=True)
class MergeTagsOptions(MergeCaptionsOptions):
    """The same for tags."""

    caption_extension: str = flag(".txt", "extension of the files with tags")


def check(options: MergeCaptionsOptions, mistakes: Mistakes) -> None:
    """Add mistakes that concern more than one flag."""
    if options.recursive and not options.full_path:
        what = "--recursive without --full_path: images of two sub-folders may have the same name"
        mistakes.add(what, "add --full_path")


def merge(kind: Literal["caption", "tags"], options: MergeCaptionsOptions) -> None:
    """Give each image of the folder its text in the metadata file. Raises UserError."""
    from library.data.scan.metadata_entries import name_images, read_entries, read_texts, write_entries

    source = options.in_json or (options.out_json if options.out_json.exists() else None)
    entries = {} if source is None else read_entries(source)
    texts = read_texts(
        options.train_data_dir,
        options.caption_extension,
        recursive=options.recursive,
        encoding=options.caption_encoding,
    )
    keys = name_images(entries, texts, options.train_data_dir, full_path=options.full_path)
    replaced = sum(kind in entries.get(key, {}) for key in keys.values())
    for path, text in texts.items():
        entries.setdefault(keys[path], {})[kind] = text
        if options.debug:
            print(keys[path], text)
    write_entries(options.out_json, entries)
    names = counted(len(texts), "caption") if kind == "caption" else f"tags of {counted(len(texts), 'image')}"
    print(f"{names} from {options.train_data_dir}, {replaced} of them in place of others")
    print(f"written: {options.out_json} ({counted(len(entries), 'image')})")


TOOL = Tool(
    "Write the captions beside images into a metadata file.",
    "python finetune/merge_captions_to_metadata.py TRAIN_DATA_DIR OUT_JSON [more flags]",
    MergeCaptionsOptions,
    partial(merge, "caption"),
    required={"train_data_dir": "give the folder of the images first", "out_json": "give the file to write second"},
    check=check,
    positional=("train_data_dir", "out_json"),
    aliases={"--caption_extention": "--caption_extension"},
)


def main(words: Sequence[str] | None = None) -> int:
    """Merge. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
