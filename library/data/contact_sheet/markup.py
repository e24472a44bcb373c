"""Escape text for HTML, format numbers, and begin a page."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def escape(text: str) -> str:
    """Escape text for element content and quoted attributes. Control characters and broken Unicode become visible, as
    ␇ or \\udc80.

    Linux allows any byte in a file name, and such a name could not be written as UTF-8.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    text = _CONTROLS.sub(lambda found: "\u2421" if found[0] == "\x7f" else chr(0x2400 + ord(found[0])), text)
    return html.escape(text)


def head(title: str, style: str, script: str = "") -> str:
    """Begin a page, up to <body>. Nothing is fetched, and no text can run as a script: only `script` can."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    scripts = f"; script-src 'sha256-{digest}'" if script else ""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{scripts}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style></head>\n"
    )


def number(value: float) -> str:
    """1234567 as "1,234,567"."""
    return f"{value:,}"


def count(value: int, one: str, many: str = "") -> str:
    """ "1 image", "2 images"."""
    return f"{number(value)} {one if value == 1 else many or one + 's'}"


def percent(share: float) -> str:
    """A share of 1 in whole per cent; "under 1 %" for a small one that is not 0."""
    return "under 1 %" if 0 < share < 0.01 else f"{share:.0%}".replace("%", " %")


def epochs(numbers: Sequence[int]) -> str:
    """ "epoch 2", "epochs 1-3", "epochs 1, 3"."""
    if len(numbers) == 1:
        return f"epoch {numbers[0]}"
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"epochs {numbers[0]}–{numbers[-1]}"
    return "epochs " + ", ".join(map(str, numbers))
