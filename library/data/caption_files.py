"""Which caption file belongs to a picture, and what it says."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

from library.options.mistakes import Mistake, UserError

# a tool that cuts out faces names its pictures stem_cx_cy_w_h; they share the caption of the stem
_FACE_CROP = re.compile(r"(.+)_\d+_\d+_\d+_\d+", re.ASCII | re.DOTALL)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def normal_extension(extension: str) -> str:
    """With its leading dot: "txt" is accepted for ".txt"."""
    return extension if extension.startswith(".") else "." + extension


class CaptionFiles:
    """The caption files among the names of one folder. An ending matches in any letter case, an exact match first."""

    def __init__(self, names: Iterable[str], extension: str) -> None:
        ending = normal_extension(extension)
        self._by_stem: dict[str, str] = {}
        for name in names:
            if name[-len(ending) :].lower() == ending.lower():
                stem = name[: -len(ending)]
                if stem not in self._by_stem or name.endswith(ending):
                    self._by_stem[stem] = name

    def find(self, stem: str) -> str | None:
        """Name of the caption file for a picture of this stem: its own, else that of the face crop's source."""
        own = self._by_stem.get(stem)
        if own is None and (crop := _FACE_CROP.fullmatch(stem)):
            return self._by_stem.get(crop.group(1))
        return own


def read_caption(path: Path) -> tuple[str, bool]:
    """The first line, stripped, and whether lines with text follow it (they are not used).

    UTF-8, or what a byte order mark says. Raises UserError naming the file for any other encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _mistake(path, f"cannot be read ({error})", "make the file readable") from error
    encoding = "utf-8"
    for mark, name in _BOMS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], name
            break
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _mistake(path, f"is not valid {encoding.upper()} (byte {error.start})", _SAVE_AS) from error
    if "\0" in text:  # UTF-16 without a mark reads as UTF-8 full of NULs
        raise _mistake(path, "is not UTF-8 text (it holds NUL bytes, like UTF-16 without a byte order mark)", _SAVE_AS)
    first, _, rest = text.replace("\r\n", "\n").replace("\r", "\n").partition("\n")
    return first.strip(), bool(rest.strip())


_SAVE_AS = "save it as UTF-8 in a text editor"


def _mistake(path: Path, what: str, remedy: str) -> UserError:
    return UserError([Mistake(f"caption file {path} {what}", remedy)])
