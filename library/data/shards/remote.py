"""Shards and their tables behind URLs, by fsspec: ranges of bytes, lengths, whole copies. Raises OSError."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from library.messages import without_secrets

_PIECE = 1 << 22


def read_range(url: str, offset: int, length: int) -> bytes:
    """Bytes of a file, in one request."""
    with _as_os_error(url):
        system, path = _open(url)
        return bytes(system.cat_file(path, start=offset, end=offset + length))


def length_of(url: str) -> int:
    """The length of a file in bytes. Raises FileNotFoundError if there is none."""
    with _as_os_error(url):
        system, path = _open(url)
        system.invalidate_cache()
        return int(system.size(path))


def copy_to(url: str, stream: BinaryIO) -> None:
    """Write a whole file to a stream."""
    with open_url(url) as file, _as_os_error(url):
        shutil.copyfileobj(file, stream, _PIECE)


@contextmanager
def open_url(url: str) -> Iterator[BinaryIO]:
    """A file that can be read and searched."""
    with _as_os_error(url):
        system, path = _open(url)
        file = system.open(path, "rb")
    with file:
        yield file


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    system, path = url_to_fs(url)
    return system, str(path)


@contextmanager
def _as_os_error(url: str) -> Iterator[None]:
    """Storage services have their own exception classes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{without_secrets(url)} cannot be read ({type(error).__name__}: {reason})") from error
