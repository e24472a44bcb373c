"""A dataset file as another trainer wants it: kohya's --dataset_config to SimpleTuner's multidatabackend.json and back.

python tools/convert_dataset_config.py data.toml --output multidatabackend.json
python tools/convert_dataset_config.py multidatabackend.json --to kohya

What the other kind of file cannot say is told; the file that is converted is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.options.dataset_config.convert import Converted, convert
from library.options.mistakes import Mistake, UserError


def main(words: Sequence[str] | None = None) -> int:
    """Convert one file. Returns the exit code: 0 done, 2 mistakes of the user."""
    for stream in (sys.stdout, sys.stderr):  # what is printed is the file itself, if it is sent into one
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the file to convert: kohya's .toml or .json, or SimpleTuner's .json")
    parser.add_argument("--to", choices=("kohya", "simpletuner"), help="what to write; not set: the other kind")
    parser.add_argument("--output", type=Path, help="the new file; not set: it is printed")
    try:
        options = parser.parse_args(words)
    except SystemExit as end:  # --help, or a mistake that argparse has told
        return int(end.code or 0)
    try:
        converted = convert(options.file, options.to)
        write(converted, options.output)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    for heading, lines in (("about", converted.notes), ("without a counterpart", converted.lost)):
        for line in lines:
            print(f"{heading}: {line}", file=sys.stderr)
    return 0


def write(converted: Converted, output: Path | None) -> None:
    """Print the new file, or write it where nothing is yet. Raises UserError."""
    if output is None:
        print(converted.text, end="")
        return
    try:
        with output.open("x", encoding="utf-8", newline="\n") as file:
            file.write(converted.text)
    except FileExistsError as error:
        raise UserError([Mistake(f"--output {output} is there already", "name another, or move it away")]) from error
    except OSError as error:
        what = f"--output {output} cannot be written: {error.strerror or error}"
        raise UserError([Mistake(what, "name a file in a folder that is there")]) from error


if __name__ == "__main__":
    raise SystemExit(main())
