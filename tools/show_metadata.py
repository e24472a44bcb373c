"""What a model's or an adapter's file says about itself: its training, data, tags, network and hashes.

python tools/show_metadata.py --model output/dog.safetensors
python tools/show_metadata.py output/dog.safetensors --tags 0
python tools/show_metadata.py output/dog.safetensors --json

What is not set is left out; --json has everything, as it stands in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError
from library.checkpoints.metadata_text import describe_metadata


def main(words: Sequence[str] | None = None) -> int:
    """Show one file. Returns the exit code: 0 done, 2 mistakes of the user."""
    for stream in (sys.stdout, sys.stderr):  # names and tags in any script, also where they are sent into a file
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="the file: .safetensors, .ckpt, .pt, or a diffusers folder")
    parser.add_argument("--model", type=Path, metavar="FILE", help="the same, as sd-scripts calls it")
    parser.add_argument("--json", action="store_true", help="everything as JSON, values as the texts in the file")
    parser.add_argument("--tags", type=int, default=20, metavar="N", help="tags of each folder, 0 = all (default: 20)")
    try:
        options = parser.parse_args(words)
        if (options.file is None) == (options.model is None):
            parser.error("give one file, such as: show_metadata.py dog.safetensors")
        if options.tags < 0:
            parser.error(f"--tags {options.tags}: give 0 or more")
    except SystemExit as end:  # --help, or a mistake that argparse has told
        return int(end.code or 0)
    try:
        header = read_header(options.file or options.model)
    except CheckpointError as error:
        print(f"\n- {error}", file=sys.stderr)
        return 2
    try:
        if options.json:
            print(json.dumps(dict(header.metadata), indent=2, sort_keys=True, ensure_ascii=False), flush=True)
        else:
            print(describe_metadata(header, options.tags), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
