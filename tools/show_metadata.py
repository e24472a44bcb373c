"""Show the metadata of a model or adapter file: training, data, tags, network and hashes.

python tools/show_metadata.py --model output/dog.safetensors
python tools/show_metadata.py output/dog.safetensors --tags 0
python tools/show_metadata.py output/dog.safetensors --json

Values that are not set are left out; --json prints everything as it is in the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError
from library.checkpoints.metadata_text import describe_metadata
from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, run_tool


@dataclass(frozen=True)
class ShowOptions:
    """Command-line options; --model is what sd-scripts calls the file."""

    file: Path | None = flag(None, "the file: .safetensors, .ckpt, .pt, or a diffusers folder")
    model: Path | None = flag(None, "the same under its name in sd-scripts")
    json: bool = flag(False, "print everything as JSON, values as the strings in the file")
    tags: int = flag(20, "number of tags shown per folder; 0 = all", at_least=0)


def check(options: ShowOptions, mistakes: Mistakes) -> None:
    """Add a mistake unless there is exactly one file."""
    if (options.file is None) == (options.model is None):
        mistakes.add("show_metadata.py needs one file", "give one: show_metadata.py dog.safetensors")


def work(options: ShowOptions) -> None:
    """Print the metadata of the file. Raises UserError."""
    try:
        header = read_header(options.file or options.model or "")
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error
    if options.json:
        print(json.dumps(dict(header.metadata), indent=2, sort_keys=True, ensure_ascii=False))
    else:
        print(describe_metadata(header, options.tags))


TOOL = Tool(
    "Show the metadata of a model or adapter file.",
    "python tools/show_metadata.py FILE [--json] [--tags N]",
    ShowOptions,
    work,
    check=check,
    positional=("file",),
)


def main(words: Sequence[str] | None = None) -> int:
    """Show one file. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
