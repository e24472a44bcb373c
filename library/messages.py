"""Wording that all messages share. Imports neither torch nor the rest of the project."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def listed(names: Iterable[object], most: int = 3, separator: str = ", ") -> str:
    """The first `most` names and the number of the others: "a, b, c and 2 more"."""
    texts = [str(name) for name in names]
    more = len(texts) - most
    return separator.join(texts[:most]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def pip_install(requirement: str) -> str:
    """The command that installs a package for the Python that is running: "/usr/bin/python3 -m pip install scipy"."""
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return f"{python} -m pip install {requirement}"
