"""Run tests/smoke.py with the oldest packages that pyproject.toml allows: python -m tests.lowest_versions

They are installed into `.lowest`, which goes before the environment's own packages on the path. So nothing else has to
be installed again, least of all PyTorch, whose lower end is not tested. Exit code: that of pip or of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from library.options.packages import Range, read_ranges

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".lowest"
NOT_TESTED = {"torch"}  # a gigabyte or more


def lower_ends(ranges: Iterable[Range]) -> list[str]:
    """Requirements of exactly the lower ends: transformers>=4.54,<6 becomes transformers==4.54."""
    return [f"{range_.package}=={range_.lowest}" for range_ in ranges if range_.package not in NOT_TESTED]


def main() -> int:
    """Install them unless they are there, then run the tests."""
    wanted = lower_ends(read_ranges())
    stamp = FOLDER / "installed.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").split() != wanted:
        install = ["install", "--quiet", "--upgrade", "--no-deps", "--target", str(FOLDER), *wanted]
        code = subprocess.call([sys.executable, "-m", "pip", *install])
        if code:
            return code
        stamp.write_text("\n".join(wanted), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    tests = [sys.executable, "-m", "pytest", "-q", "tests/smoke.py"]
    return subprocess.call(tests, cwd=ROOT, env=environment)


if __name__ == "__main__":
    raise SystemExit(main())
