"""What stands in images' headers and in caption files: from the index where a file has not changed, else read.

Reading waits for the disk, so it runs in threads; a bar appears when it takes longer than a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.scan.caption_files import read_caption
from library.data.scan.image_headers import BadImage, Header, read_header
from library.data.scan.index import Index, Text
from library.data.scan.listing import Directory
from library.options.mistakes import UserError

_CHUNK = 64  # files in one go of a thread
_KEEP_EVERY = 4096  # files read until the index is told, so that a scan that is stopped was not in vain
_QUEUED = 64  # chunks waiting


@dataclass(frozen=True)
class Reading:
    """How caption files are read: their encoding, and whether all lines count or the first."""

    encoding: str = "utf-8"
    all_lines: bool = False

    @property
    def name(self) -> str:
        """As the index knows it."""
        return f"{self.encoding.lower()} {'all' if self.all_lines else 'first'}"


@dataclass(frozen=True, slots=True)
class _Chunk:
    directory: Directory
    names: list[str]
    reading: Reading | None  # None: images


@dataclass(slots=True)
class Contents:
    """What was found, by folder (absolute path) and file name: a header or why there is none, a caption or its
    mistake."""

    headers: dict[str, dict[str, Header | str]] = field(default_factory=dict)
    captions: dict[tuple[str, Reading], dict[str, Text | UserError]] = field(default_factory=dict)


class Wanted:
    """The files whose contents a scan needs, each once."""

    def __init__(self) -> None:
        self._images: dict[str, tuple[Directory, dict[str, None]]] = {}
        self._captions: dict[tuple[str, Reading], tuple[Directory, dict[str, None]]] = {}

    def image(self, directory: Directory, names: Iterable[str]) -> None:
        """Ask for headers."""
        self._images.setdefault(directory.path, (directory, {}))[1].update(dict.fromkeys(names))

    def captions(self, directory: Directory, names: Iterable[str], reading: Reading) -> None:
        """Ask for the texts of caption files."""
        key = (directory.path, reading)
        self._captions.setdefault(key, (directory, {}))[1].update(dict.fromkeys(names))

    def read(self, index: Index, *, progress: bool) -> Contents:
        """All that was asked for."""
        found = Contents()
        chunks: list[_Chunk] = []
        for path, (directory, names) in self._images.items():
            known: dict[str, Header | str] = {**index.headers(path, directory.images)}
            found.headers[path] = known
            chunks += _chunks(directory, [name for name in names if name not in known], None)
        for (path, reading), (directory, names) in self._captions.items():
            texts: dict[str, Text | UserError] = {
                **index.captions(path, reading.name, directory.texts, directory.others)
            }
            found.captions[path, reading] = texts
            chunks += _chunks(directory, [name for name in names if name not in texts], reading)
        _read_all(chunks, found, index, progress=progress)
        return found


def _chunks(directory: Directory, names: list[str], reading: Reading | None) -> Iterator[_Chunk]:
    for start in range(0, len(names), _CHUNK):
        yield _Chunk(directory, names[start : start + _CHUNK], reading)


def _read_all(chunks: list[_Chunk], found: Contents, index: Index, *, progress: bool) -> None:
    if not chunks:
        return
    waiting = iter(chunks)
    running: dict[Future[list[Header | str | Text | UserError]], _Chunk] = {}
    done: list[_Chunk] = []
    count = 0
    pool = ThreadPoolExecutor(min(16, 2 + (os.cpu_count() or 1)), "scan")
    try:
        with _bar(sum(len(chunk.names) for chunk in chunks), progress=progress) as advance:
            while True:
                while len(running) < _QUEUED and (chunk := next(waiting, None)) is not None:
                    running[pool.submit(_read_chunk, chunk)] = chunk
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    chunk = running.pop(future)
                    _put(chunk, future.result(), found)
                    done.append(chunk)
                    count += len(chunk.names)
                    advance(len(chunk.names))
                if count >= _KEEP_EVERY:
                    _keep(done, found, index)
                    done, count = [], 0
    finally:
        pool.shutdown(cancel_futures=True)
        _keep(done, found, index)


def _read_chunk(chunk: _Chunk) -> list[Header | str | Text | UserError]:
    read: Callable[[Path], Header | str | Text | UserError] = (
        _read_image if chunk.reading is None else _reader(chunk.reading)
    )
    return [read(Path(chunk.directory.path, name)) for name in chunk.names]


def _read_image(path: Path) -> Header | str:
    try:
        return read_header(path)
    except BadImage as error:
        if not os.path.lexists(path):
            return "it vanished while the folder was being read"
        return str(error)
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise what they like on odd files: one must not end the scan
        return f"cannot be read ({type(error).__name__}: {error})"


def _reader(reading: Reading) -> Callable[[Path], Text | UserError]:
    def read(path: Path) -> Text | UserError:
        try:
            return read_caption(path, reading.encoding, all_lines=reading.all_lines)
        except UserError as error:
            return error

    return read


def _put(chunk: _Chunk, results: list[Any], found: Contents) -> None:
    into = (
        found.headers[chunk.directory.path]
        if chunk.reading is None
        else found.captions[chunk.directory.path, chunk.reading]
    )
    into.update(zip(chunk.names, results, strict=True))


def _keep(chunks: Collection[_Chunk], found: Contents, index: Index) -> None:
    """Tell the index what was read, folder by folder."""
    together: dict[tuple[str, Reading | None], tuple[Directory, list[str]]] = {}
    for chunk in chunks:
        together.setdefault((chunk.directory.path, chunk.reading), (chunk.directory, []))[1].extend(chunk.names)
    for (path, reading), (directory, names) in together.items():
        if reading is None:
            headers = found.headers[path]
            sized = [(n, directory.images[n], h) for n in names if isinstance(h := headers[n], Header)]
            index.keep_headers(path, sized)
        else:
            texts = found.captions[path, reading]
            told = [(n, directory.texts[n], t) for n in names if isinstance(t := texts[n], tuple)]
            index.keep_captions(path, reading.name, told)


@contextmanager
def _bar(total: int, *, progress: bool) -> Iterator[Callable[[int], object]]:
    if not progress:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="looking at images", unit=" files", delay=1) as bar:
        yield bar.update
