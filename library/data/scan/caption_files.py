"""Find the caption file of an image, and read it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from library.bounded import read_bytes
from library.data.scan.listing import stem as stem_of
from library.data.scan.pairing import pair
from library.limits import CAPTION_FILE
from library.messages import readable_bytes
from library.options.mistakes import Mistake, UserError

# face crops are named stem_cx_cy_w_h and share the caption of the stem
_FACE_CROP = re.compile(r"(.+)_\d+_\d+_\d+_\d+", re.ASCII | re.DOTALL)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def normal_extension(extension: str) -> str:
    """An extension with its leading dot: "txt" becomes ".txt"."""
    return extension if extension.startswith(".") else "." + extension


def normal_extensions(extensions: str) -> tuple[str, ...]:
    """Split a comma-separated list of extensions: ".txt, caption" becomes (".txt", ".caption")."""
    parts = (extension.strip() for extension in extensions.split(","))
    return tuple(dict.fromkeys(normal_extension(extension) for extension in parts if extension))


class CaptionFiles:
    """The caption files among the names of one folder.

    `extensions`: extensions or a comma-separated list, the first match wins. Case is ignored, but an exact match is
    preferred.
    """

    def __init__(self, names: Iterable[str], extensions: str | Sequence[str]) -> None:
        lists = (extensions,) if isinstance(extensions, str) else extensions
        endings = [ending for item in lists for ending in normal_extensions(item)]
        self._by_stem: list[dict[str, str]] = [{} for _ in endings]  # per extension
        for name in names:
            for ending, by_stem in zip(endings, self._by_stem, strict=True):
                if name[-len(ending) :].lower() == ending.lower():
                    stem = name[: -len(ending)]
                    if stem not in by_stem or name.endswith(ending):
                        by_stem[stem] = name

    def find(self, stem: str) -> str | None:
        """Name of the caption file for an image stem: its own, or for a face crop that of the original image."""
        own = self._find(stem)
        if own is None and (crop := _FACE_CROP.fullmatch(stem)):
            return self._find(crop.group(1))
        return own

    def pair(self, images: Iterable[str]) -> dict[str, str]:
        """Image -> caption file, by file names: the file that `find` gives, else the one by the rule of `pairing`."""
        found: dict[str, str] = {}
        taken: set[str] = set()
        waiting: list[str] = []
        for image in images:
            stem = stem_of(image)
            if (own := self._find(stem)) is not None:
                found[image] = own
                taken.add(own)
            elif (shared := self.find(stem)) is not None:
                found[image] = shared
            else:
                waiting.append(image)
        if not waiting:
            return found
        files = [each for by_stem in self._by_stem for each in sorted(by_stem.items())]
        found |= pair(waiting, [each for each in files if each[1] not in taken])
        originals = {image: original for image in waiting if image not in found and (original := _original(image))}
        captions = pair(dict.fromkeys(originals.values()), files)
        return found | {image: captions[name] for image, name in originals.items() if name in captions}

    def _find(self, stem: str) -> str | None:
        return next((by_stem[stem] for by_stem in self._by_stem if stem in by_stem), None)


def _original(image: str) -> str | None:
    """The file name that the original image of a face crop would have; None for other images."""
    crop = _FACE_CROP.fullmatch(stem_of(image))
    return None if crop is None else crop.group(1) + image[image.rfind(".") :]


def read_caption(path: Path, encoding: str = "utf-8", *, all_lines: bool = False) -> tuple[str, bool]:
    """Read the first line, stripped, and whether more lines with text follow.

    With `all_lines`, returns all lines with text, stripped and joined by line feeds. A byte order mark overrides
    `encoding`. Raises UserError for text in another encoding, naming the file, and for an unknown encoding.
    """
    if (unknown := check_encoding(encoding)) is not None:
        raise UserError([unknown])
    try:
        data = read_bytes(path, CAPTION_FILE)
    except OSError as error:
        raise _mistake(path, f"cannot be read ({error})", "check its permissions") from error
    except ValueError as error:
        raise _mistake(path, f"is not read: {error}", _SHORTEN) from error
    return lines_of(decode_caption(path, data, encoding), all_lines=all_lines)


def decode_caption(path: object, data: bytes, encoding: str = "utf-8") -> str:
    """The text of a caption file `path` with these bytes. Raises UserError as `read_caption` does."""
    if len(data) > CAPTION_FILE:
        raise _mistake(path, f"is not read: it has more than {readable_bytes(CAPTION_FILE)}", _SHORTEN)
    for mark, name in _BOMS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], name
            break
    try:
        text = data.decode(encoding)
    except UnicodeError as error:
        place = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise _mistake(path, f"is not valid {encoding.upper()}{place}", _SAVE_AS) from error
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8 with NULs
        what = f"is not {encoding.upper()} text (it contains NUL bytes, like UTF-16 without a byte order mark)"
        raise _mistake(path, what, _SAVE_AS)
    return text


def lines_of(text: str, *, all_lines: bool = False) -> tuple[str, bool]:
    """What is used of the text of a caption file, and whether more lines with text follow: see `read_caption`."""
    first, *rest = (line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    if all_lines:
        return "\n".join(line for line in (first, *rest) if line), False
    return first, any(rest)


def check_encoding(encoding: str) -> Mistake | None:
    """Check a value of --caption_encoding; None if Python knows it."""
    try:
        "a".encode(encoding)  # codecs.lookup would also accept base64 and other non-text codecs
    except (LookupError, ValueError):
        what = f'--caption_encoding: "{encoding}" is not a known encoding'
        return Mistake(what, f"use utf-8, or {_EXAMPLES}")
    return None


_EXAMPLES = "for example cp932 (Japanese), gb18030 (Chinese), cp1251 (Cyrillic) or cp1252 (Western European)"
_SHORTEN = "shorten it, or remove the file"
_SAVE_AS = f"save it as UTF-8 in a text editor, or set its encoding with --caption_encoding, {_EXAMPLES}"


def _mistake(path: object, what: str, remedy: str) -> UserError:
    return UserError([Mistake(f"caption file {path} {what}", remedy)])
