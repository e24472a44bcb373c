"""Read and parse files of others with bounded size, depth and time. Imports nothing but library.limits and messages.

The parsers of the standard library raise other errors than their own for what is nested thousands deep or has numbers
of thousands of digits. These raise ValueError, whatever the text.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from library.limits import CONFIG_FILE, KEY_PARTS
from library.messages import readable_bytes

TOO_DEEP = "it nests lists or tables too deeply"
_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
_LONG_KEY = re.compile(rf"""(?<![\w"'\\-])(?:{_PART}[ \t]*+\.[ \t]*+){{{KEY_PARTS}}}""")


def json_of(text: str | bytes) -> Any:
    """What JSON means. Raises ValueError: json.JSONDecodeError for a mistake in the text, or another."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def toml_of(text: str) -> dict[str, Any]:
    """What TOML means. Raises tomllib.TOMLDecodeError, which is a ValueError."""
    if _LONG_KEY.search(text):
        raise tomllib.TOMLDecodeError(f"a key has more than {KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise tomllib.TOMLDecodeError(TOO_DEEP) from None
    except (ValueError, OverflowError) as error:  # a number of thousands of digits
        raise tomllib.TOMLDecodeError(str(error)) from None


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file. Raises OSError, and ValueError if it has more than `most` bytes."""
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {readable_bytes(most)}, which no such file needs")
    return content


def read_json(path: Path, most: int = CONFIG_FILE) -> Any:
    """What a JSON file in UTF-8 holds. Raises OSError or ValueError."""
    return json_of(read_bytes(path, most).decode("utf-8"))
