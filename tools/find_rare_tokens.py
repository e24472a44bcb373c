"""Find a rare token for the identifier of a subject, or check a chosen one.

python tools/find_rare_tokens.py --ckpt models/sd15.safetensors --class_word dog
python tools/find_rare_tokens.py --ckpt models/sd15.safetensors --check sks ohwx
python tools/find_rare_tokens.py --ckpt models/sd15.safetensors --like robot
python tools/find_rare_tokens.py --family sdxl --save_to tokens.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.options.tool_command import Tool, run_tool
from library.rare_tokens.options import RareTokenOptions, check


def find(options: RareTokenOptions) -> None:
    """Print and save the names."""
    from library.rare_tokens.find import find_rare_tokens  # not needed for --help

    find_rare_tokens(options)


TOOL = Tool(
    "Find rare tokens for the identifier of a subject, or check a chosen one.",
    "python tools/find_rare_tokens.py (--ckpt MODEL | --family sd1) [--check NAME ...] [--like NAME] [more flags]",
    RareTokenOptions,
    find,
    check=check,
    interrupted="interrupted: nothing was written",
)


def main(words: Sequence[str] | None = None) -> int:
    """Find or check. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
