"""Encode the latents of a dataset before training; training with the same flags uses them.

python tools/cache_latents.py --config_file dreambooth.toml
python tools/cache_latents.py --config_file dreambooth.toml --processes 4

It takes the flags of the training program. Run it again to encode what is missing or out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.training.precache.command import Tool, run_tool

TOOL = Tool(
    "latents",
    "Encode the images of a dataset to latent files before training. Run it again to encode what is missing.",
    "python tools/cache_latents.py --config_file options.toml",
)


def main(words: Sequence[str] | None = None) -> int:
    """Fill the cache. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    raise SystemExit(main())
