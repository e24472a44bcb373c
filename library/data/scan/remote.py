"""Mirror remote folders: any fsspec URL (s3://bucket/data, gs://…, memory://…).

A run reads the mirror like any folder. The remote listing (name, size, etag or date) is compared with a journal of
downloads, so only new and changed files are downloaded, and files deleted there are deleted here; other files in the
mirror, such as cached latents, stay. Files are written atomically and the journal is written after each one, so an
interrupted copy resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from library.bounded import json_of
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import replacing
from library.messages import counted, pip_install, without_secrets
from library.options.mistakes import Mistake, UserError
from library.runtime.progress import ProgressBar

_JOURNAL = "fetched.jsonl"
# Names that file systems give a file's hash and date: a changed file differs in one of them.
_HASHES = ("ETag", "etag", "md5Hash", "content_md5", "checksum", "sha256")
_DATES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
# Characters that Windows forbids in names, and % where it would look like one of our escapes.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]|%(?=[0-9A-Fa-f]{2})')
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(?=\.|$)", re.IGNORECASE)
_LONGEST = 180  # bytes of a name without its extension; file systems allow 255 with it
_KEPT = "downloaded files are kept"
_SAME_VERSION = ("s3fs", "gcsfs")  # each release requires fsspec of the same version


class _Remote(NamedTuple):
    """A file in the remote listing."""

    name: str  # in its file system
    size: int | None
    mark: str  # changes with the content


class _Download(NamedTuple):
    """A line of the journal: a downloaded file, and size and mtime of its copy."""

    local: str
    mark: str
    size: int
    changed: int  # ns


@dataclass(frozen=True)
class _Mirror:
    """The local copy of a URL: its folder, and the journal next to it."""

    url: str
    folder: Path
    journal: Path

    def path(self, local: str) -> Path:
        return self.folder.joinpath(*local.split("/"))


def local_copy(url: str, cache: Path, *, progress: bool, threads: int = 8) -> Path:
    """Bring the mirror of the folder `url` in `cache` up to date, and return its path.

    It has the name of the remote folder. For a file:// URL, returns that folder. Downloads `threads` files at a time if
    the file system supports it. Raises UserError for missing packages or credentials, no such bucket or folder, a file
    that changes during the copy, or a cache that cannot be written; files downloaded until then are kept.
    """
    with as_user_error(url):
        system, root = open_file_system(url)
        if "file" in _protocols(system):
            return _local_folder(url, Path(root))
        remotes = _listing(system, root, url)
    base = cache / _folder_name(url)
    name = _local_name(root.rstrip("/").rpartition("/")[2].rpartition(":")[2] or "data")
    mirror = _Mirror(url, base / name, base / _JOURNAL)
    done = _read_journal(mirror.journal)
    deleted = done.keys() - remotes.keys()
    for local in deleted:
        _remove(mirror, local)
        del done[local]
    to_download = {
        local: remote for local, remote in remotes.items() if not _is_current(mirror, done.get(local), remote)
    }
    if to_download:
        # only asynchronous file systems are safe to share between threads
        workers = threads if getattr(system, "async_impl", False) else 1
        done |= _download_all(system, mirror, to_download, max(1, workers), progress=progress)
    if to_download or deleted:
        _write_journal(mirror, done)
    return mirror.folder


def local_names(names: Iterable[str]) -> dict[str, str]:
    """Map remote names to local names that are valid on every system, separated by "/".

    Characters that Windows forbids become %XX as in URLs; a long name is shortened and ends in a hash. Names that
    differ only in case or in the composition of accents get ~2, ~3; files of one stem get the same number, so that
    image and caption still match.
    """
    spellings: dict[tuple[str, str], str] = {}  # local parent and remote name -> local name
    taken: set[str] = set()
    found = {}

    def spelled(parent: str, spelling: str, base: str) -> str:
        if (parent, spelling) not in spellings:
            spellings[parent, spelling] = _unused_name(parent + base, taken)[len(parent) :]
            taken.add(_case_folded(parent + spellings[parent, spelling]))
        return spellings[parent, spelling]

    for name in sorted(names):
        *folders, file = name.split("/")
        parent = ""
        for folder in folders:
            parent += spelled(parent, f"{folder}/", _local_name(folder)) + "/"
        stem, extension = _split_extension(file)
        if extension:
            # stems and folders have separate names: dog.png may be next to the folder dog
            base = spelled(f"{parent}\0", stem, _local_name(stem))
            found[name] = _unused_name(f"{parent}{base}", taken, _local_name(extension))
        else:
            found[name] = _unused_name(parent + _local_name(file), taken)
        taken.add(_case_folded(found[name]))
    return found


def _unused_name(base: str, taken: set[str], extension: str = "") -> str:
    name, number = base + extension, 1
    while _case_folded(name) in taken:
        number += 1
        name = f"{base}~{number}{extension}"
    return name


def _case_folded(name: str) -> str:
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _split_extension(file: str) -> tuple[str, str]:
    """Split into stem and extension: ("a.b", ".png"). No extension if it cannot be that of a file type."""
    stem, point, extension = file.rpartition(".")
    return (stem, point + extension) if stem and 0 < len(extension) <= 16 and extension.strip() else (file, "")


def _local_name(part: str) -> str:
    """A file or folder name, or its stem or extension, made valid on every system."""
    name = _FORBIDDEN.sub(lambda found: _escaped(found[0]), part)
    if len(name.encode("utf-8", "surrogatepass")) > _LONGEST:
        digest = hashlib.blake2b(part.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
        name = f"{name.encode('utf-8', 'surrogatepass')[: _LONGEST - 20].decode('utf-8', 'ignore')}~{digest}"
    if name.endswith((".", " ")):
        name = name[:-1] + _escaped(name[-1])
    if _DEVICES.match(name):
        name = _escaped(name[0]) + name[1:]
    return name or "%"


def _escaped(character: str) -> str:
    return f"%{ord(character):02X}"


def _folder_name(url: str) -> str:
    """A readable part of the URL, and a hash that makes it unique."""
    plain = url.rstrip("/")
    words = re.sub(r"[^a-z0-9]+", "-", without_secrets(plain).lower()).strip("-")[:48]
    return f"{words}-{hashlib.blake2b(plain.encode(), digest_size=6).hexdigest()}"


def open_file_system(url: str) -> tuple[Any, str]:
    """Open the file system of a URL; return it and the path of the folder."""
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        what = f"{without_secrets(url)} needs the package fsspec, which is not installed"
        raise UserError([Mistake(what, f"{pip_install('fsspec')}, or copy the data to a local folder")]) from error
    try:
        # a cached instance would reuse listings and credentials
        system, root = url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        raise UserError([_missing_package(url, error)]) from error
    system.invalidate_cache()
    return system, str(root)


def _missing_package(url: str, error: ImportError) -> Mistake:
    import fsspec  # type: ignore[import-untyped]

    package = getattr(error.__cause__, "name", None) or getattr(error, "name", None)
    if package is None:
        return Mistake(f"{without_secrets(url)} cannot be read: {error}", "install that package")
    pinned = f"{package}=={fsspec.__version__}" if package in _SAME_VERSION else package
    what = f"{without_secrets(url)} needs the package {package}, which is not installed"
    return Mistake(what, f"{pip_install(pinned)}, or copy the data to a local folder")


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _local_folder(url: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError([Mistake(f"{without_secrets(url)}: there is no folder {folder}", "check the URL")])
    return folder


def _listing(system: Any, root: str, url: str) -> dict[str, _Remote]:
    """List all files below the root by their local names."""
    start = root.rstrip("/") + "/"
    remotes = {}
    for name, info in system.find(root, detail=True).items():
        if name == root:
            raise UserError([Mistake(f"{without_secrets(url)} is a file", "use the folder that contains it")])
        if name.endswith("/") or info.get("type", "file") != "file":
            continue
        remotes[name.removeprefix(start)] = _Remote(name, info.get("size"), mark_of(name, info))
    if not remotes:
        what = f"{without_secrets(url)}: no such folder, or it is empty"
        raise UserError([Mistake(what, "check the URL; the copy of an earlier run is kept")])
    names = local_names(remotes)
    return {names[name]: remote for name, remote in remotes.items()}


def mark_of(name: str, info: Mapping[str, Any]) -> str:
    """A text about a remote file that changes with its content, by its entry in a listing."""
    marks = [str(info[key]) for keys in (_HASHES, _DATES) for key in keys if info.get(key)][:1]
    return repr((name, info.get("size"), *marks))


def _is_current(mirror: _Mirror, download: _Download | None, remote: _Remote) -> bool:
    if download is None or download.mark != remote.mark:
        return False
    try:
        stat = mirror.path(download.local).stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (download.size, download.changed)


def _download_all(
    system: Any, mirror: _Mirror, to_download: Mapping[str, _Remote], threads: int, *, progress: bool
) -> dict[str, _Download]:
    """Download files, several at a time, and add each to the journal as soon as it is complete."""
    done = {}
    total = sum(remote.size or 0 for remote in to_download.values())
    bar = ProgressBar(f"downloading {counted(len(to_download), 'file')}", total, unit="B", shown=progress)
    with _checking_writes(mirror.journal):
        mirror.journal.parent.mkdir(parents=True, exist_ok=True)
        journal = mirror.journal.open("a", encoding="utf-8", newline="\n")
    with bar, journal, ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(_download, system, mirror, local, remote) for local, remote in to_download.items()]
        try:
            for future in as_completed(futures):
                download = future.result()
                done[download.local] = download
                with _checking_writes(mirror.journal):
                    journal.write(json.dumps(download) + "\n")
                    journal.flush()
                bar.update(download.size)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return done


def _download(system: Any, mirror: _Mirror, local: str, remote: _Remote) -> _Download:
    path = mirror.path(local)
    with as_user_error(mirror.url):
        content = system.cat_file(remote.name)
    if remote.size is not None and len(content) != remote.size:
        what = f"{remote.name} changed while {without_secrets(mirror.url)} was being copied"
        raise UserError([Mistake(what, f"start again when it no longer changes; {_KEPT}")])
    try:
        with replacing(path) as stream:
            stream.write(content)
    except CheckpointError as error:
        raise _write_error(path, error.__cause__ or error) from error
    stat = path.stat()
    return _Download(local, remote.mark, stat.st_size, stat.st_mtime_ns)


def _remove(mirror: _Mirror, local: str) -> None:
    """Delete a file, and the folders that become empty."""
    path = mirror.path(local)
    with _checking_writes(path):
        path.unlink(missing_ok=True)
    for folder in path.parents:
        if folder == mirror.folder:
            return
        try:
            folder.rmdir()
        except OSError:  # not empty
            return


def _read_journal(journal: Path) -> dict[str, _Download]:
    """Read the journal: local name -> its last entry. Skips incomplete lines."""
    found = {}
    with contextlib.suppress(OSError), journal.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                local, mark, size, changed = json_of(line)
                found[str(local)] = _Download(str(local), str(mark), int(size), int(changed))
    return found


def _write_journal(mirror: _Mirror, done: Mapping[str, _Download]) -> None:
    """Rewrite the journal without outdated entries. Optional: errors are ignored."""
    with contextlib.suppress(CheckpointError), replacing(mirror.journal) as stream:
        for local in sorted(done):
            stream.write(f"{json.dumps(done[local])}\n".encode())


@contextlib.contextmanager
def _checking_writes(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: BaseException) -> UserError:
    what = f"copy {path} cannot be written ({error})"
    return UserError([Mistake(what, f"free disk space or make the folder writable; {_KEPT}")])


@contextlib.contextmanager
def as_user_error(url: str) -> Iterator[None]:
    """Turn any error of a storage service into a UserError: their packages have their own exception classes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError([_service_error(without_secrets(url), error)]) from error


def _service_error(url: str, error: BaseException) -> Mistake:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if "redential" in type(error).__name__ or "redential" in reason:
        hint = "set up the credentials of the service"
        if "s3" in url.partition("://")[0]:
            hint = (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run `aws configure`; "
                "for a public bucket set FSSPEC_S3_ANON=true"
            )
        return Mistake(f"{url}: no credentials found ({reason})", hint)
    if isinstance(error, PermissionError):
        return Mistake(f"{url}: access denied ({reason})", "use credentials with permission to list and read")
    if isinstance(error, FileNotFoundError):
        return Mistake(f"{url}: no such bucket or folder ({reason})", "check the URL")
    if type(error).__name__ == "ProfileNotFound":
        return Mistake(f"{url}: {reason}", "check AWS_PROFILE")
    if isinstance(error, ValueError) and reason.startswith("Protocol not known"):
        return Mistake(f"{url}: {url.partition('://')[0]} is not a protocol of fsspec", "check the URL")
    what = f"{url} cannot be read ({type(error).__name__}: {reason})"
    return Mistake(what, f"check URL and network, then start again; {_KEPT}")
