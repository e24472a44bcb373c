"""kohya's name for tools/merge_dd_tags_to_metadata.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from tools.merge_dd_tags_to_metadata import main

if __name__ == "__main__":
    raise SystemExit(main())
