"""Wording that all messages share. Imports neither torch nor the rest of the project."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable


def listed(names: Iterable[object], most: int = 3, separator: str = ", ") -> str:
    """The first `most` names and the number of the others: "a, b, c and 2 more"."""
    texts = [str(name) for name in names]
    more = len(texts) - most
    return separator.join(texts[:most]) + (f" and {more} more" if more > 0 else "")


def without_secrets(url: str) -> str:
    """A path, or a URL without password or signature."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0] if "://" in url else url


def shortened(text: str, most: int = 60) -> str:
    """A text of at most `most` characters: what is longer ends in dots."""
    return text if len(text) <= most else text[: most - 3] + "..."


def readable_bytes(count: float) -> str:
    """`2.1 GB`, `34 MB`, `0.5 kB`: decimal units, as file managers show them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def readable_time(seconds: float) -> str:
    """`3.2 s`, `48 s`, `12 min`, `3 h 20 min`: as precise as somebody who waits needs it."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def counted(count: float, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 image", "2 images"; `plural` for one that takes more than an s: "3 batches"."""
    return f"{count:.15g} {noun}" if count == 1 else f"{count:.15g} {plural or f'{noun}s'}"


def pip_install(requirement: str) -> str:
    """The command that installs a package for the Python that is running: "/usr/bin/python3 -m pip install scipy"."""
    return f"{quoted(sys.executable)} -m pip install {requirement}"


def quoted(path: object) -> str:
    """A path as a word of a command: in quotes if it contains a space."""
    return f'"{path}"' if " " in str(path) else str(path)
