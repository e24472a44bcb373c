"""Convert a dataset file: kohya's --dataset_config to SimpleTuner's multidatabackend.json and back.

python tools/convert_dataset_config.py data.toml --output multidatabackend.json
python tools/convert_dataset_config.py multidatabackend.json --to kohya

Settings without a counterpart in the other format are listed; the source file is not changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.options.dataset_config.convert import Converted, convert
from library.options.flag import flag
from library.options.mistakes import Mistake, UserError
from library.options.tool_command import Tool, run_tool
from library.whole_files import write_text


@dataclass(frozen=True)
class ConvertDatasetOptions:
    """Command-line options."""

    file: Path = flag(None, "the file to convert: kohya's .toml or .json, or SimpleTuner's .json")
    to: Literal["kohya", "simpletuner"] | None = flag(
        None, "format to write. Not set: the other one", choices=("kohya", "simpletuner")
    )
    output: Path | None = flag(None, "the new file. Not set: print it")


def work(options: ConvertDatasetOptions) -> None:
    """Convert the file and list what could not be converted. Raises UserError."""
    converted = convert(options.file, options.to)
    write(converted, options.output)
    for heading, lines in (("about", converted.notes), ("without a counterpart", converted.lost)):
        for line in lines:
            print(f"{heading}: {line}", file=sys.stderr)


def write(converted: Converted, output: Path | None) -> None:
    """Print the new file, or write it unless the file exists. Raises UserError."""
    if output is None:
        print(converted.text, end="")
        return
    if output.exists():
        raise UserError([Mistake(f"--output {output} already exists", "choose another name")])
    if not output.parent.is_dir():
        what = f"--output {output} cannot be written: there is no folder {output.parent}"
        raise UserError([Mistake(what, "choose a file in an existing folder")])
    try:
        write_text(output, converted.text)
    except OSError as error:
        what = f"--output {output} cannot be written: {error.strerror or error}"
        raise UserError([Mistake(what, "choose a file in an existing folder")]) from error


TOOL = Tool(
    "Convert a dataset file from kohya's format to SimpleTuner's, or back.",
    "python tools/convert_dataset_config.py FILE [--to FORMAT] [--output FILE]",
    ConvertDatasetOptions,
    work,
    required={"file": "give the file to convert: convert_dataset_config.py data.toml"},
    positional=("file",),
)


def main(words: Sequence[str] | None = None) -> int:
    """Convert one file. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
