"""kohya's name for tools/prepare_buckets_latents.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from tools.prepare_buckets_latents import main

if __name__ == "__main__":
    raise SystemExit(main())
