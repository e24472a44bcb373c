"""Pack a folder of images into tar archives (WebDataset shards) with a table, or make the table of archives that exist.

python tools/make_shards.py --input_dir "train/10_sks dog" --output_dir "packed/10_sks dog"
python tools/make_shards.py --shards "data/train-{000000..000099}.tar"
python tools/make_shards.py --check "packed/10_sks dog"
python tools/make_shards.py --unpack "packed/10_sks dog" --output_dir folder
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.data.shards.options import ShardOptions, check
from library.options.tool_command import Tool, run_tool


def work(options: ShardOptions) -> None:
    """Pack, index, check or unpack. Raises UserError."""
    from library.data.shards import make  # not needed for --help

    if options.input_dir is not None:
        make.pack(options.input_dir, options)
    elif options.shards is not None:
        make.index(options.shards, options)
    elif options.check is not None:
        make.check(options.check, options)
    elif options.unpack is not None:
        make.unpack(options.unpack, options)


TOOL = Tool(
    "Pack images into tar archives (WebDataset shards) with a table, or make the table of archives that exist.",
    "python tools/make_shards.py --input_dir FOLDER --output_dir FOLDER [more flags]",
    ShardOptions,
    work,
    check=check,
    interrupted="interrupted: nothing was written; start again",
)


def main(words: Sequence[str] | None = None) -> int:
    """Do one of the four. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
