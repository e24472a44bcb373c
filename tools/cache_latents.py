"""Latents of the images, encoded ahead: the training with the same flags finds them all.

python tools/cache_latents.py --config_file dreambooth.toml
python tools/cache_latents.py --config_file dreambooth.toml --processes 4

It takes the flags of the training. The same call again makes what is missing or does not fit any more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.training.precache.command import Tool, run_tool

TOOL = Tool(
    "latents",
    "Encode the images of a training ahead, in files beside them. The same call again makes what is missing.",
    "python tools/cache_latents.py --config_file options.toml",
)


def main(words: Sequence[str] | None = None) -> int:
    """Fill the cache. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    return run_tool(TOOL, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    raise SystemExit(main())
