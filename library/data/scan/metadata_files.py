"""Read metadata files of kohya's fine-tuning: images and their captions, as .json or .jsonl.

A .json file is one object, image -> {caption, tags}; a .jsonl file has one object per line, {image_path, caption,
tags}. Image paths are relative to image_dir or absolute paths in it; without image_dir, any absolute path.
aesthetic_score, a number from 0 to 10, is an addition of this trainer. image_size and other keys are ignored: sizes are
read from the images.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief

from library.bounded import json_of
from library.data.scan.listing import Directories, Directory, absolute, is_below, is_image, stamp_of, stem
from library.data.scan.pairing import Spelling, composed, folded, whole
from library.limits import METADATA_FILE
from library.messages import counted
from library.options.datasets import CaptionSettings
from library.options.mistakes import Mistake, UserError
from library.options.text_files import METADATA, other_kind, read_text

_MOST_MISTAKES = 20  # reported per file
# names that other programs give to captions
_FOREIGN = (
    "text", "txt", "prompt", "prompts", "captions", "caption_text", "description", "descriptions", "label", "labels",
    "tag", "tag_string", "annotation", "blip_caption", "title", "alt",
)  # fmt: skip
MOST_SCORE = 10  # the aesthetic predictors that the refiner was trained with rate from 0 to 10


@dataclass(frozen=True)
class Metadata:
    """Contents of a file: image path as written -> caption, and -> aesthetic score where present. `twice`: entries
    that repeat an image; the last one is used."""

    captions: Mapping[str, str]
    scores: Mapping[str, float]
    twice: int = 0


@dataclass(frozen=True, slots=True)
class Located:
    """An existing image that a metadata file lists."""

    directory: Directory
    base: str  # its file name


def read_metadata(path: Path, settings: CaptionSettings) -> Metadata:
    """Read a metadata file. Raises UserError with all mistakes in it."""
    named, ending = f"metadata file {path}", path.suffix.lower()
    text = read_text(path, named, METADATA_FILE)
    if isinstance(text, Mistake):
        raise UserError([text])
    if ending not in (".json", ".jsonl"):
        wrong = Mistake(f"{named} is neither .json nor .jsonl", "rename it to the extension of its format")
        raise UserError([other_kind(named, text, METADATA) or wrong])
    mistakes: list[Mistake] = []
    captions: dict[str, str] = {}
    scores: dict[str, float] = {}
    foreign: Counter[str] = Counter()
    twice = 0
    entries = _lines(path, text, mistakes) if ending == ".jsonl" else entries_of(path, text)
    for where, key, entry in entries:
        if not isinstance(entry, dict):
            mistakes.append(Mistake(f"{where}: {key!r} is not an object", 'write {"caption": "...", "tags": "..."}'))
            continue
        caption = _text(entry.get("caption"), "\n")
        tags = _text(entry.get("tags"), settings.separator)
        for name, value in (("caption", caption), ("tags", tags)):
            if value is None:
                mistakes.append(Mistake(f"{where}: {name} of {key!r} is not text", "put it in quotes"))
        twice += key in captions
        captions[key] = join(caption or "", tags or "", settings)
        if not captions[key]:
            foreign.update(name for name, value in entry.items() if _is_foreign_caption(name, value))
        scores.pop(key, None)
        if (raw := entry.get("aesthetic_score")) is None:
            continue
        if (score := _score(raw)) is None:
            what = f"{where}: aesthetic_score of {key!r} is {brief(raw)}, not a number from 0 to {MOST_SCORE}"
            mistakes.append(Mistake(what, "write for example 6.5, or remove it"))
        else:
            scores[key] = score
    if foreign:
        mistakes += _check_foreign(path, foreign, captions)
    if mistakes:
        if not any(captions.values()) and (other := other_kind(named, text, METADATA)) is not None:
            raise UserError([other])
        more = len(mistakes) - _MOST_MISTAKES
        rest = [Mistake(f"{path}: {counted(more, 'more mistake')}")] if more > 0 else []
        raise UserError(mistakes[:_MOST_MISTAKES] + rest)
    return Metadata(captions, scores, twice)


def _is_foreign_caption(name: str, value: object) -> bool:
    """Whether a key that is not read holds a caption."""
    known = name.lower() in (*_FOREIGN, "caption", "tags") and name not in ("caption", "tags")
    return known and bool(_text(value, ","))


def _check_foreign(path: Path, foreign: Counter[str], captions: Mapping[str, str]) -> list[Mistake]:
    """A mistake if more entries have their caption under a name that is not read than under one that is."""
    name, count = foreign.most_common(1)[0]
    with_caption = sum(bool(caption) for caption in captions.values())
    if count <= with_caption:
        return []
    what = f'metadata file {path}: {with_caption} of {counted(len(captions), "image")} with "caption" or "tags"'
    return [Mistake(f'{what}, {count} with "{name}", which is not read', f'rename "{name}" to "caption" there')]


def join(caption: str, tags: str, settings: CaptionSettings) -> str:
    """Join caption and tags with the separator. With wildcards, the tags, on one line, are appended to each line of the
    caption; without, line breaks become spaces."""
    if not settings.wildcard:
        return " ".join(f"{caption}{settings.separator if caption and tags else ''}{tags}".split("\n")).strip()
    tags = tags.replace("\n", settings.separator)
    lines = [line for line in caption.split("\n") if line.strip()]
    return "\n".join(f"{line}{settings.separator}{tags}" if tags else line for line in lines) if lines else tags


def entries_of(path: Path, text: str) -> Iterator[tuple[str, str, object]]:
    """The entries of a .json file with this text, each with the file's name and its key. Raises UserError."""
    try:
        content = json_of(text)
    except ValueError as error:
        raise _error(path, f"is not valid JSON ({error})", "correct it there") from error
    if not isinstance(content, dict):
        if (other := other_kind(f"metadata file {path}", content, METADATA)) is not None:
            raise UserError([other])
        raise _error(path, "is not an object of images", 'write {"image.png": {"caption": "..."}, ...}')
    for key, entry in content.items():
        yield str(path), key, entry


def _lines(path: Path, text: str, mistakes: list[Mistake]) -> Iterator[tuple[str, str, object]]:
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json_of(line)
        except ValueError as error:
            mistakes.append(Mistake(f"{where} is not valid JSON ({error})", "correct it there"))
            continue
        key = entry.get("image_path") if isinstance(entry, dict) else None
        if isinstance(key, str) and key:
            yield where, key, entry
        else:
            mistakes.append(Mistake(f"{where} has no image_path", 'write {"image_path": "...", "caption": "..."}'))


def _text(value: object, separator: str) -> str | None:
    """Text, a joined list of texts, or "" for null; None for anything else."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return separator.join(value)
    return value.replace("\r\n", "\n") if isinstance(value, str) else None


def _score(value: object) -> float | None:
    """A score as a number or text; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= MOST_SCORE else None


def _error(path: Path, what: str, remedy: str) -> UserError:
    return UserError([Mistake(f"metadata file {path} {what}", remedy)])


@dataclass
class Locator:
    """Finds the images of a metadata file. Keys may lack the extension, use backslashes, and differ from the name in
    Unicode form and letter case. A relative key with a folder that is not below `root` is relative to the current
    folder: sd-scripts' merge_captions_to_metadata.py writes it so for a relative folder with --full_path.

    A file that was downloaded may name any file of this machine, so nothing outside of `root` is looked at. Without a
    root the user has asked for absolute paths.
    """

    directories: Directories
    root: str | None  # absolute path that relative keys are relative to first
    extensions: Collection[str]
    _parents: dict[str, Directory | None] = field(default_factory=dict)
    _below: dict[str, bool] = field(default_factory=dict)
    _names: dict[tuple[str, Spelling], dict[str, list[str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, directories: Directories, image_dir: Path | None, extensions: Collection[str]) -> Locator:
        """Create a locator for keys relative to `image_dir`; None: all keys are absolute."""
        return cls(directories, None if image_dir is None else absolute(image_dir), extensions)

    def find(self, key: str) -> Located | str:
        """Find the image of a key; if there is none, return the reason."""
        found = self._find(key)
        if not isinstance(found, str):
            return found
        keys = [key, key.replace("\\", "/")] if "\\" in key and os.sep == "/" else [key]
        from_here = [os.path.abspath(name) for name in keys if os.path.dirname(name)]
        for other in (*keys[1:], *from_here):
            if not isinstance(again := self._find(other), str):
                return again
        return found

    def _find(self, key: str) -> Located | str:
        head, base = os.path.split(key)
        if self.root is not None and not self._is_below(head, self.root):
            return f"it is outside of {self.root}: move it there, or set no folder of images to allow any path"
        directory = self._parent(head)
        if directory is None:
            return "its folder does not exist" if os.path.isabs(key) or self.root else "its path is not absolute"
        if base in directory.images:
            return Located(directory, base)
        if base in directory.unusable_images:
            return directory.unusable_images[base]
        if is_image(base, self.extensions):
            # the file system may ignore case or the composition of accents
            stamp = stamp_of(os.path.join(directory.path, base))
            if stamp is not None:
                directory.images[base] = stamp
                return Located(directory, base)
        for same in (whole, composed, folded):
            matches = self._by_name(directory, same).get(same(base), [])
            if len(matches) > 1:
                return f"it may be {' or '.join(sorted(matches))}: write its whole name"
            if matches:
                return Located(directory, matches[0])
        return "it does not exist"

    def _is_below(self, head: str, root: str) -> bool:
        if head not in self._below:
            self._below[head] = is_below(os.path.join(root, head), root)
        return self._below[head]

    def _parent(self, head: str) -> Directory | None:
        if head not in self._parents:
            place = head if self.root is None else os.path.join(self.root, head)
            try:
                directory = self.directories.get(os.path.normpath(place)) if os.path.isabs(place) else None
            except (OSError, ValueError):
                directory = None
            self._parents[head] = directory
        return self._parents[head]

    def _by_name(self, directory: Directory, same: Spelling) -> dict[str, list[str]]:
        """Names of the images by their stem and by their whole name, as `same` spells them."""
        if (directory.path, same) not in self._names:
            names: dict[str, list[str]] = {}
            for name in directory.images:
                for key in dict.fromkeys((same(stem(name)), same(name))):
                    names.setdefault(key, []).append(name)
            self._names[directory.path, same] = names
        return self._names[directory.path, same]
