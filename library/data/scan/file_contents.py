"""Read image headers and caption files, using the index for files that have not changed.

Reads in threads, because it is bound by the disk; a progress bar appears after a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from library.data.image_files import BadImage, too_large
from library.data.scan.caption_files import read_caption
from library.data.scan.image_headers import Header, read_header
from library.data.scan.index import Index, Text
from library.data.scan.listing import Directory
from library.options.mistakes import UserError
from library.runtime.progress import ProgressBar

_CHUNK = 64  # files that a thread reads at a time
_STORE_EVERY = 4096  # files between writes to the index, so that an interrupted scan keeps its progress
_QUEUED = 64  # chunks submitted at a time


@dataclass(frozen=True)
class Reading:
    """How caption files are read: their encoding, and all lines or the first."""

    encoding: str = "utf-8"
    all_lines: bool = False

    @property
    def name(self) -> str:
        """Key in the index."""
        return f"{self.encoding.lower()} {'all' if self.all_lines else 'first'}"


@dataclass(frozen=True, slots=True)
class _Chunk:
    directory: Directory
    names: list[str]
    reading: Reading | None  # None: images


@dataclass(slots=True)
class Contents:
    """File contents by folder (absolute path) and file name: a header or the reason why it is missing, a caption or
    its error."""

    headers: dict[str, dict[str, Header | str]] = field(default_factory=dict)
    captions: dict[tuple[str, Reading], dict[str, Text | UserError]] = field(default_factory=dict)


class ReadRequests:
    """The files whose contents a scan needs, each once. `most_memory`: GiB that a decoded image may need."""

    def __init__(self, most_memory: float) -> None:
        self._most_memory = most_memory
        self._images: dict[str, tuple[Directory, dict[str, None]]] = {}
        self._captions: dict[tuple[str, Reading], tuple[Directory, dict[str, None]]] = {}

    def add_images(self, directory: Directory, names: Iterable[str]) -> None:
        """Request headers."""
        self._images.setdefault(directory.path, (directory, {}))[1].update(dict.fromkeys(names))

    def add_captions(self, directory: Directory, names: Iterable[str], reading: Reading) -> None:
        """Request the texts of caption files."""
        key = (directory.path, reading)
        self._captions.setdefault(key, (directory, {}))[1].update(dict.fromkeys(names))

    def read(self, index: Index, *, progress: bool) -> Contents:
        """Read all requested files, from the index where they have not changed."""
        contents = Contents()
        chunks: list[_Chunk] = []
        for path, (directory, names) in self._images.items():
            known: dict[str, Header | str] = {
                name: too_large(header.size, self._most_memory) or header
                for name, header in index.headers(path, directory.images).items()
            }
            contents.headers[path] = known
            chunks += _chunks(directory, [name for name in names if name not in known], None)
        for (path, reading), (directory, names) in self._captions.items():
            texts: dict[str, Text | UserError] = {
                **index.captions(path, reading.name, directory.texts, directory.others)
            }
            contents.captions[path, reading] = texts
            chunks += _chunks(directory, [name for name in names if name not in texts], reading)
        _read_all(chunks, contents, index, partial(_read_image, most_memory=self._most_memory), progress=progress)
        return contents


def _chunks(directory: Directory, names: list[str], reading: Reading | None) -> Iterator[_Chunk]:
    for start in range(0, len(names), _CHUNK):
        yield _Chunk(directory, names[start : start + _CHUNK], reading)


def _read_all(
    chunks: list[_Chunk],
    contents: Contents,
    index: Index,
    read_image: Callable[[Path], Header | str],
    *,
    progress: bool,
) -> None:
    if not chunks:
        return
    waiting = iter(chunks)
    running: dict[Future[list[Header | str | Text | UserError]], _Chunk] = {}
    done: list[_Chunk] = []
    unstored = 0
    pool = ThreadPoolExecutor(min(16, 2 + (os.cpu_count() or 1)), "scan")
    try:
        total = sum(len(chunk.names) for chunk in chunks)
        with ProgressBar("scanning images", total, unit=" files", delay=1, shown=progress) as bar:
            while True:
                while len(running) < _QUEUED and (chunk := next(waiting, None)) is not None:
                    running[pool.submit(_read_chunk, chunk, read_image)] = chunk
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    chunk = running.pop(future)
                    _add_results(chunk, future.result(), contents)
                    done.append(chunk)
                    unstored += len(chunk.names)
                    bar.update(len(chunk.names))
                if unstored >= _STORE_EVERY:
                    _store(done, contents, index)
                    done, unstored = [], 0
    finally:
        pool.shutdown(cancel_futures=True)
        _store(done, contents, index)


def _read_chunk(chunk: _Chunk, read_image: Callable[[Path], Header | str]) -> list[Header | str | Text | UserError]:
    read: Callable[[Path], Header | str | Text | UserError] = (
        read_image if chunk.reading is None else _reader(chunk.reading)
    )
    return [read(Path(chunk.directory.path, name)) for name in chunk.names]


def _read_image(path: Path, most_memory: float) -> Header | str:
    try:
        return read_header(path, most_memory)
    except BadImage as error:
        if not os.path.lexists(path):
            return "it was deleted while the folder was being read"
        return str(error)
    except Exception as error:  # noqa: BLE001 - Pillow's readers may raise anything, and one file must not end the scan
        return f"cannot be read ({type(error).__name__}: {error})"


def _reader(reading: Reading) -> Callable[[Path], Text | UserError]:
    def read(path: Path) -> Text | UserError:
        try:
            return read_caption(path, reading.encoding, all_lines=reading.all_lines)
        except UserError as error:
            return error

    return read


def _add_results(chunk: _Chunk, results: list[Any], contents: Contents) -> None:
    into = (
        contents.headers[chunk.directory.path]
        if chunk.reading is None
        else contents.captions[chunk.directory.path, chunk.reading]
    )
    into.update(zip(chunk.names, results, strict=True))


def _store(chunks: Collection[_Chunk], contents: Contents, index: Index) -> None:
    """Store what was read in the index, folder by folder."""
    by_folder: dict[tuple[str, Reading | None], tuple[Directory, list[str]]] = {}
    for chunk in chunks:
        by_folder.setdefault((chunk.directory.path, chunk.reading), (chunk.directory, []))[1].extend(chunk.names)
    for (path, reading), (directory, names) in by_folder.items():
        if reading is None:
            headers = contents.headers[path]
            sized = [(n, directory.images[n], h) for n in names if isinstance(h := headers[n], Header)]
            index.store_headers(path, sized)
        else:
            texts = contents.captions[path, reading]
            rows = [(n, directory.texts[n], t) for n in names if isinstance(t := texts[n], tuple)]
            index.store_captions(path, reading.name, rows)
