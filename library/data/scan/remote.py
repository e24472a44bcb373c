"""Data that lies elsewhere: the folder behind any fsspec URL (s3://bucket/data, gs://…, memory://…), mirrored here.

A run reads the mirror as it reads any folder. What the listing tells of a file (name, size, etag or date) is compared
with a journal of what was fetched, so only what is new or changed is fetched; what is gone is taken away, other files
in the mirror, such as latents that were cached there, stay. Every file is there whole or not at all, and the journal
grows with every one, so that an interrupted copy goes on where it was.
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

from tqdm import tqdm

from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import replacing
from library.options.mistakes import Mistake, UserError

_JOURNAL = "fetched.jsonl"
# What file systems call the hash of a file, and its date: a changed file differs in one of them.
_HASHES = ("ETag", "etag", "md5Hash", "content_md5", "checksum", "sha256")
_DATES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
# What Windows takes in no name, and % where it would look like one of our escapes.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]|%(?=[0-9A-Fa-f]{2})')
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(?=\.|$)", re.IGNORECASE)
_LONGEST = 180  # bytes of a name without its ending; file systems take 255 with ending and all
_SAME_VERSION = ("s3fs", "gcsfs")  # each release of these wants the fsspec of the same number


class _Remote(NamedTuple):
    """A file as the listing tells of it."""

    name: str  # as its file system calls it
    size: int | None
    mark: str  # another content, another mark


class _Fetched(NamedTuple):
    """A line of the journal: what was fetched, and what its copy looked like then."""

    local: str
    mark: str
    size: int
    changed: int  # ns


@dataclass(frozen=True)
class _Mirror:
    """The copy of one URL: its folder, and the journal beside it."""

    url: str
    folder: Path
    journal: Path

    def path(self, local: str) -> Path:
        return self.folder.joinpath(*local.split("/"))


def local_copy(url: str, cache: Path, *, progress: bool, threads: int = 8) -> Path:
    """The folder that holds what the folder `url` holds, as it is now: a mirror in `cache`, brought up to date.

    It has the name of the remote folder. A file:// URL is the folder itself. Where the kind of storage allows it,
    `threads` files are fetched at a time. Raises UserError: package or credentials missing, no such bucket or folder,
    a file that changes meanwhile, a cache that cannot be written; what was fetched until then is kept.
    """
    with _explained(url):
        system, root = _open(url)
        if "file" in _protocols(system):
            return _here(url, Path(root))
        remotes = _listing(system, root, url)
    base = cache / _folder_name(url)
    name = _local_name(root.rstrip("/").rpartition("/")[2].rpartition(":")[2] or "data")
    mirror = _Mirror(url, base / name, base / _JOURNAL)
    done = _read_journal(mirror.journal)
    gone = done.keys() - remotes.keys()
    for local in gone:
        _remove(mirror, local)
        del done[local]
    wanted = {local: remote for local, remote in remotes.items() if not _is_current(mirror, done.get(local), remote)}
    if wanted:
        # not every kind of connection may be shared by threads; those that work asynchronously may
        workers = threads if getattr(system, "async_impl", False) else 1
        done |= _fetch_all(system, mirror, wanted, max(1, workers), progress=progress)
    if wanted or gone:
        _write_journal(mirror, done)
    return mirror.folder


def local_names(names: Iterable[str]) -> dict[str, str]:
    """A name for the copy of each file, "/" separated as the given ones, that every system can have.

    What Windows forbids becomes %XX as in URLs, a long name is cut and ends in a hash. Of names that differ only in
    case or in the way accents are composed the later ones get ~2, ~3; files of one stem stay together, as an image
    and its caption must.
    """
    given: dict[tuple[str, str], str] = {}  # parent here and spelling there -> spelling here
    taken: set[str] = set()
    found = {}

    def spelled(parent: str, spelling: str, base: str) -> str:
        if (parent, spelling) not in given:
            given[parent, spelling] = _free(parent + base, taken)[len(parent) :]
            taken.add(_folded(parent + given[parent, spelling]))
        return given[parent, spelling]

    for name in sorted(names):
        *folders, file = name.split("/")
        parent = ""
        for folder in folders:
            parent += spelled(parent, f"{folder}/", _local_name(folder)) + "/"
        stem, ending = _parted(file)
        if ending:
            # a stem is kept apart from folders of its name: dog.png may stand beside the folder dog
            base = spelled(f"{parent}\0", stem, _local_name(stem))
            found[name] = _free(f"{parent}{base}", taken, _local_name(ending))
        else:
            found[name] = _free(parent + _local_name(file), taken)
        taken.add(_folded(found[name]))
    return found


def _free(base: str, taken: set[str], ending: str = "") -> str:
    name, number = base + ending, 1
    while _folded(name) in taken:
        number += 1
        name = f"{base}~{number}{ending}"
    return name


def _folded(name: str) -> str:
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _parted(file: str) -> tuple[str, str]:
    """Stem and ending: ("a.b", ".png"). No ending where it is none that a file type has."""
    stem, point, ending = file.rpartition(".")
    return (stem, point + ending) if stem and 0 < len(ending) <= 16 and ending.strip() else (file, "")


def _local_name(part: str) -> str:
    """A file or folder name, or the stem or the ending of one, as every system can have it."""
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
    """Something to recognise the URL by, and what makes it the only one."""
    plain = url.rstrip("/")
    words = re.sub(r"[^a-z0-9]+", "-", _shown(plain).lower()).strip("-")[:48]
    return f"{words}-{hashlib.blake2b(plain.encode(), digest_size=6).hexdigest()}"


def _shown(url: str) -> str:
    """The URL without password or signature."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0]


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path of its folder there."""
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        what = f"{_shown(url)} needs the package fsspec, which is not installed"
        raise UserError([Mistake(what, "pip install fsspec, or copy the data here and give the folder")]) from error
    try:
        # an instance that was used before remembers listings and credentials
        system, root = url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        raise UserError([_missing_package(url, error)]) from error
    system.invalidate_cache()
    return system, str(root)


def _missing_package(url: str, error: ImportError) -> Mistake:
    import fsspec  # type: ignore[import-untyped]

    package = getattr(error.__cause__, "name", None) or getattr(error, "name", None)
    if package is None:
        return Mistake(f"{_shown(url)} cannot be read: {error}", "install that package")
    pinned = f"{package}=={fsspec.__version__}" if package in _SAME_VERSION else package
    what = f"{_shown(url)} needs the package {package}, which is not installed"
    return Mistake(what, f"pip install {pinned}, or copy the data here and give the folder")


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _here(url: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError([Mistake(f"{_shown(url)}: there is no folder {folder}", "check the URL")])
    return folder


def _listing(system: Any, root: str, url: str) -> dict[str, _Remote]:
    """Local name -> file, of all files below the root."""
    start = root.rstrip("/") + "/"
    remotes = {}
    for name, info in system.find(root, detail=True).items():
        if name == root:
            raise UserError([Mistake(f"{_shown(url)} is a file", "give the folder that it is in")])
        if name.endswith("/") or info.get("type", "file") != "file":
            continue
        marks = [str(info[key]) for keys in (_HASHES, _DATES) for key in keys if info.get(key)][:1]
        remotes[name.removeprefix(start)] = _Remote(name, info.get("size"), repr((name, info.get("size"), *marks)))
    if not remotes:
        what = f"{_shown(url)}: there is no such folder, or it is empty"
        raise UserError([Mistake(what, "check the URL; the copy of an earlier run is left as it is")])
    locals_ = local_names(remotes)
    return {locals_[name]: remote for name, remote in remotes.items()}


def _is_current(mirror: _Mirror, fetched: _Fetched | None, remote: _Remote) -> bool:
    if fetched is None or fetched.mark != remote.mark:
        return False
    try:
        stat = mirror.path(fetched.local).stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (fetched.size, fetched.changed)


def _fetch_all(
    system: Any, mirror: _Mirror, wanted: Mapping[str, _Remote], threads: int, *, progress: bool
) -> dict[str, _Fetched]:
    """Fetch files, several at a time; the journal tells of each as soon as it is there."""
    done = {}
    total = sum(remote.size or 0 for remote in wanted.values())
    bar = tqdm(desc=f"fetching {len(wanted)} files", total=total, unit="B", unit_scale=True, disable=not progress)
    with _written(mirror.journal):
        mirror.journal.parent.mkdir(parents=True, exist_ok=True)
        journal = mirror.journal.open("a", encoding="utf-8", newline="\n")
    with bar, journal, ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(_fetch, system, mirror, local, remote) for local, remote in wanted.items()]
        try:
            for future in as_completed(futures):
                fetched = future.result()
                done[fetched.local] = fetched
                with _written(mirror.journal):
                    journal.write(json.dumps(fetched) + "\n")
                    journal.flush()
                bar.update(fetched.size)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return done


def _fetch(system: Any, mirror: _Mirror, local: str, remote: _Remote) -> _Fetched:
    path = mirror.path(local)
    with _explained(mirror.url):
        content = system.cat_file(remote.name)
    if remote.size is not None and len(content) != remote.size:
        what = f"{remote.name} changed while {_shown(mirror.url)} was copied"
        raise UserError([Mistake(what, "start again once nobody writes there: what was fetched is kept")])
    try:
        with replacing(path) as stream:
            stream.write(content)
    except CheckpointError as error:
        raise _unwritten(path, error.__cause__ or error) from error
    stat = path.stat()
    return _Fetched(local, remote.mark, stat.st_size, stat.st_mtime_ns)


def _remove(mirror: _Mirror, local: str) -> None:
    """Take a file away, and the folders that it leaves empty."""
    path = mirror.path(local)
    with _written(path):
        path.unlink(missing_ok=True)
    for folder in path.parents:
        if folder == mirror.folder:
            return
        try:
            folder.rmdir()
        except OSError:  # something else is in it
            return


def _read_journal(journal: Path) -> dict[str, _Fetched]:
    """Local name -> what was fetched last under it. Lines that were cut short count for nothing."""
    found = {}
    with contextlib.suppress(OSError), journal.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                local, mark, size, changed = json.loads(line)
                found[str(local)] = _Fetched(str(local), str(mark), int(size), int(changed))
    return found


def _write_journal(mirror: _Mirror, done: Mapping[str, _Fetched]) -> None:
    """Take out of the journal what no longer counts. Without that it is longer, and just as right."""
    with contextlib.suppress(CheckpointError), replacing(mirror.journal) as stream:
        for local in sorted(done):
            stream.write(f"{json.dumps(done[local])}\n".encode())


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: BaseException) -> UserError:
    what = f"the copy {path} cannot be written ({error})"
    return UserError([Mistake(what, "free the disk or make the folder writable: what was fetched is kept")])


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a storage service raises into a UserError. Its packages have error classes of their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError([_refusal(_shown(url), error)]) from error


def _refusal(url: str, error: BaseException) -> Mistake:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if "redential" in type(error).__name__ or "redential" in reason:
        hint = "set up those of the service"
        if "s3" in url.partition("://")[0]:
            hint = (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run `aws configure`; "
                "for a public bucket set FSSPEC_S3_ANON=true"
            )
        return Mistake(f"{url}: there are no credentials ({reason})", hint)
    if isinstance(error, PermissionError):
        return Mistake(
            f"{url}: access is refused ({reason})", "check the credentials: they must allow to list and read"
        )
    if isinstance(error, FileNotFoundError):
        return Mistake(f"{url}: there is no such bucket or folder ({reason})", "check the URL")
    if type(error).__name__ == "ProfileNotFound":
        return Mistake(f"{url}: {reason}", "check AWS_PROFILE")
    if isinstance(error, ValueError) and reason.startswith("Protocol not known"):
        return Mistake(f"{url}: {url.partition('://')[0]} is no kind of storage that fsspec knows", "check the URL")
    what = f"{url} cannot be read ({type(error).__name__}: {reason})"
    return Mistake(what, "check address and network, then start again: what was fetched is kept")
