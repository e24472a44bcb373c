"""Metadata files of kohya's fine-tuning: which images there are and their captions, as .json or .jsonl.

.json holds one object, image -> {caption, tags}; .jsonl one object a line, {image_path, caption, tags}. Images are
absolute paths or paths relative to image_dir. Ours is aesthetic_score, a number from 0 to 10. image_size and other keys
are not used: images tell their own size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief

from library.data.scan.listing import Directories, Directory, absolute, is_image, stamp_of, stem
from library.options.datasets import CaptionSettings
from library.options.mistakes import Mistake, UserError

_TOLD = 20  # mistakes of one file
_BEST = 10  # score: the models whose scores train the refiner rate from 0 to 10


@dataclass(frozen=True)
class Metadata:
    """What a file lists: image as it is written there -> caption; and -> aesthetic score, for those that have one.
    `twice`: lines whose image an earlier line has; the last one counts."""

    captions: Mapping[str, str]
    scores: Mapping[str, float]
    twice: int = 0


@dataclass(frozen=True, slots=True)
class Located:
    """An image that a metadata file lists and that is there."""

    directory: Directory
    base: str  # its name in the directory


def read_metadata(path: Path, chosen: CaptionSettings) -> Metadata:
    """Read a metadata file. Raises UserError with all that is wrong in it."""
    ending = path.suffix.lower()
    if ending not in (".json", ".jsonl"):
        raise _error(path, "ends neither in .json nor in .jsonl", "give it the ending of what it holds")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror or error})", "check the path") from error
    except UnicodeDecodeError as error:
        raise _error(path, f"is not valid UTF-8 (byte {error.start})", "save it as UTF-8") from error
    mistakes: list[Mistake] = []
    captions: dict[str, str] = {}
    scores: dict[str, float] = {}
    twice = 0
    entries = _lines(path, text, mistakes) if ending == ".jsonl" else _object(path, text)
    for where, key, entry in entries:
        if not isinstance(entry, dict):
            mistakes.append(Mistake(f"{where}: {key!r} is no object", 'write {"caption": "...", "tags": "..."}'))
            continue
        caption = _text(entry.get("caption"), "\n")
        tags = _text(entry.get("tags"), chosen.separator)
        for name, value in (("caption", caption), ("tags", tags)):
            if value is None:
                mistakes.append(Mistake(f"{where}: {name} of {key!r} is no text", "put it into quotes"))
        twice += key in captions
        captions[key] = join(caption or "", tags or "", chosen)
        scores.pop(key, None)
        if (raw := entry.get("aesthetic_score")) is None:
            continue
        if (score := _score(raw)) is None:
            what = f"{where}: aesthetic_score of {key!r} is {brief(raw)}, which is no number from 0 to {_BEST}"
            mistakes.append(Mistake(what, "write one such as 6.5, or leave it out"))
        else:
            scores[key] = score
    if mistakes:
        more = [Mistake(f"{path}: and {len(mistakes) - _TOLD} more like these")] if len(mistakes) > _TOLD else []
        raise UserError(mistakes[:_TOLD] + more)
    return Metadata(captions, scores, twice)


def join(caption: str, tags: str, chosen: CaptionSettings) -> str:
    """One caption of both, joined by the separator. With wildcards each line of the caption gets the tags, and lines of
    tags become one; without, lines mean no more than blanks."""
    if not chosen.wildcard:
        return " ".join(f"{caption}{chosen.separator if caption and tags else ''}{tags}".split("\n")).strip()
    tags = tags.replace("\n", chosen.separator)
    lines = [line for line in caption.split("\n") if line.strip()]
    return "\n".join(f"{line}{chosen.separator}{tags}" if tags else line for line in lines) if lines else tags


def _object(path: Path, text: str) -> Iterator[tuple[str, str, object]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(path, f"is not valid JSON ({error})", "mend it there") from error
    if not isinstance(content, dict):
        raise _error(path, "does not hold one object of images", 'it begins with {"image.png": {"caption": "..."}')
    for key, entry in content.items():
        yield str(path), key, entry


def _lines(path: Path, text: str, mistakes: list[Mistake]) -> Iterator[tuple[str, str, object]]:
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            mistakes.append(Mistake(f"{where} is not valid JSON ({error})", "mend it there"))
            continue
        key = entry.get("image_path") if isinstance(entry, dict) else None
        if isinstance(key, str) and key:
            yield where, key, entry
        else:
            mistakes.append(Mistake(f"{where} names no image", 'write {"image_path": "...", "caption": "..."}'))


def _text(value: object, separator: str) -> str | None:
    """Text, nothing as no text, a list of texts joined; None for anything else."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return separator.join(value)
    return value.replace("\r\n", "\n") if isinstance(value, str) else None


def _score(value: object) -> float | None:
    """A number, or the text of one, in the range of scores; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= _BEST else None


def _error(path: Path, what: str, remedy: str) -> UserError:
    return UserError([Mistake(f"metadata file {path} {what}", remedy)])


@dataclass
class Locator:
    """Finds the images of a metadata file. Keys may lack their ending and may be written with backslashes."""

    directories: Directories
    root: str | None  # what relative keys are relative to: an absolute path
    extensions: Collection[str]
    _parents: dict[str, Directory | None] = field(default_factory=dict)
    _stems: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, directories: Directories, image_dir: Path | None, extensions: Collection[str]) -> Locator:
        """For images relative to `image_dir`; None: all keys are absolute."""
        return cls(directories, None if image_dir is None else absolute(image_dir), extensions)

    def find(self, key: str) -> Located | str:
        """The image of a key, or why there is none."""
        found = self._find(key)
        if isinstance(found, str) and "\\" in key and os.sep == "/":
            again = self._find(key.replace("\\", "/"))
            return found if isinstance(again, str) else again
        return found

    def _find(self, key: str) -> Located | str:
        head, base = os.path.split(key)
        directory = self._parent(head)
        if directory is None:
            return "its folder is not there" if os.path.isabs(key) or self.root else "its path is not absolute"
        if base in directory.images:
            return Located(directory, base)
        if base in directory.lost_images:
            return directory.lost_images[base]
        if is_image(base, self.extensions):
            # the file system may take other letters for the same, in case or composition
            stamp = stamp_of(os.path.join(directory.path, base))
            if stamp is not None:
                directory.images[base] = stamp
                return Located(directory, base)
        having = self._by_stem(directory).get(base, [])
        if len(having) > 1:
            return f"{' and '.join(sorted(having))} are meant by it: write its ending"
        return Located(directory, having[0]) if having else "it is not there"

    def _parent(self, head: str) -> Directory | None:
        if head not in self._parents:
            place = head if self.root is None else os.path.join(self.root, head)
            try:
                listed = self.directories.one(os.path.normpath(place)) if os.path.isabs(place) else None
            except (OSError, ValueError):
                listed = None
            self._parents[head] = listed
        return self._parents[head]

    def _by_stem(self, directory: Directory) -> dict[str, list[str]]:
        if directory.path not in self._stems:
            stems: dict[str, list[str]] = {}
            for name in directory.images:
                stems.setdefault(stem(name), []).append(name)
            self._stems[directory.path] = stems
        return self._stems[directory.path]
