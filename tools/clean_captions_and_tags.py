"""Clean the captions and tags of a metadata file by the rules of sd-scripts.

python finetune/clean_captions_and_tags.py meta_cap_dd.json meta_clean.json --debug

Captions (of BLIP) get one word, girl, for people in anime. Tags lose underscores, ratings, those that belong to one of
several people, and those that another tag says in more words.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.mistakes import Mistake, UserError
from library.options.tool_command import Tool, run_tool


@dataclass(frozen=True)
class CleanOptions:
    """Command-line options, named as in sd-scripts."""

    in_json: Path = flag(None, "the metadata file to clean")
    out_json: Path = flag(None, "the metadata file to write")
    debug: bool = flag(False, "print every text that changes")


def work(options: CleanOptions) -> None:
    """Write the cleaned file. Raises UserError."""
    from library.data.caption_cleaning import clean_caption, clean_tags
    from library.data.scan.metadata_entries import read_entries, write_entries

    entries = read_entries(options.in_json)
    mistakes = []
    for kind, clean in (("caption", clean_caption), ("tags", clean_tags)):
        changed = missing = 0
        for key, entry in entries.items():
            old = entry.get(kind)
            if not isinstance(old, str):
                missing += old is None
                if old is not None:
                    what = f"metadata file {options.in_json}: {kind} of {key!r} is not text"
                    mistakes.append(Mistake(what, "put it in quotes"))
                continue
            entry[kind] = clean(old)
            changed += entry[kind] != old
            if options.debug and entry[kind] != old:
                print(f"{key}\n  from: {old}\n  to:   {entry[kind]}")
        print(f"{kind}: {changed} of {counted(len(entries), 'image')} cleaned, {missing} have none")
    if mistakes:
        raise UserError(mistakes)
    write_entries(options.out_json, entries)
    print(f"written: {options.out_json}")


TOOL = Tool(
    "Clean the captions and tags of a metadata file.",
    "python finetune/clean_captions_and_tags.py IN_JSON OUT_JSON [--debug]",
    CleanOptions,
    work,
    required={"in_json": "give the file to clean first", "out_json": "give the file to write second"},
    positional=("in_json", "out_json"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Clean one file. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    names = [word for word in words if not word.startswith("--")]
    if len(names) == 3:  # as sd-scripts was first called
        print(f"{names[0]} is not used: all texts of the metadata file are cleaned")
        words.remove(names[0])
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
