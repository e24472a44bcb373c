"""Open the table of shards and check that the shards are those of the table, before any of them is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from library.bounded import read_json
from library.data.scan.remote import as_user_error, mark_of, open_file_system
from library.data.shards.copies import Copies
from library.data.shards.member import Shard
from library.data.shards.places import Places, join, name_of
from library.data.shards.table import MAKE_IT, ShardEntry, ShardTable, is_inside
from library.messages import counted, listed, without_secrets
from library.options.convert_values import is_remote
from library.options.mistakes import Mistake, UserError
from library.whole_files import replacing

_THREADS = 16
_NAMED = 20


@dataclass(frozen=True)
class OpenedShards:
    """A table with its shards by their numbers; those that are not used are missing. `root`: their folder or URL."""

    root: str
    table: ShardTable
    shards: dict[int, Shard]

    @property
    def folder(self) -> Path:
        """The folder by whose name random draws are keyed: the one that the images were packed from."""
        return Path(self.root if not is_remote(self.root) else "", self.table.folder_name or name_of(self.root))


def open_shards(places: Places, caches: Path, copies: int = 0) -> OpenedShards:
    """Open the table, copied to `caches` if it is remote, and check the lengths of the shards. `copies`: how many whole
    copies of remote shards may be kept, 0 for none. Raises UserError."""
    table = ShardTable(_table_here(places.table, caches))
    used = _select(places, table)
    names = [entry.path for entry in used]
    if outside := [name for name in names if not is_inside(name)]:
        what = f"{without_secrets(places.table)} names shards outside of their folder: {listed(outside, _NAMED)}"
        raise UserError([Mistake(what, MAKE_IT)])
    _check_lengths(places.root, used)
    own = caches / "latents" / table.content
    kept = Copies(str(caches / "shards"), copies, table.content) if copies and is_remote(places.root) else None
    shards = {
        entry.number: Shard(join(places.root, entry.path), entry.length, str(own / _plain(entry.path)), kept)
        for entry in used
    }
    return OpenedShards(places.root, table, shards)


def _plain(path: str) -> str:
    return path.removesuffix(".tar").replace("%", "%25").replace("/", "%2F").replace("\\", "%5C")


def _select(places: Places, table: ShardTable) -> list[ShardEntry]:
    """The entries of the shards that are used."""
    if places.names is None:
        return list(table.shards)
    by_path = {entry.path: entry for entry in table.shards}
    if missing := [name for name in places.names if name not in by_path]:
        where = f"the table {without_secrets(places.table)}"
        what = f"{counted(len(missing), 'shard')} not in {where}: {listed(missing, _NAMED)}"
        raise UserError([Mistake(what, f"{MAKE_IT} for all shards")])
    return [by_path[name] for name in places.names]


def _check_lengths(root: str, used: Iterable[ShardEntry]) -> None:
    """Raises UserError that names missing, truncated and changed shards."""
    used = list(used)
    if is_remote(root):
        with as_user_error(root):
            open_file_system(root)  # names a missing package, credentials and so on
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = list(pool.map(lambda entry: _fault(join(root, entry.path), entry.length), used))
    if wrong := [f"  {fault}" for fault in faults if fault]:
        more = [f"  and {len(wrong) - _NAMED} more"] if len(wrong) > _NAMED else []
        lines = "\n".join(wrong[:_NAMED] + more)
        what = f"{counted(len(wrong), 'shard')} of {len(used)} cannot be used:\n{lines}"
        raise UserError([Mistake(what, "restore them, or make the table again: tools/make_shards.py")])


def _fault(place: str, expected: int) -> str:
    """Why a shard cannot be used; "" if it can."""
    shown = without_secrets(place)
    try:
        if is_remote(place):
            from library.data.shards.remote import length_of

            length = length_of(place)
        else:
            length = os.stat(place).st_size
    except FileNotFoundError:
        return f"{shown}: it is missing"
    except OSError as error:
        return f"{shown}: {error.strerror or error}"
    if length < expected:
        return f"{shown}: it is truncated ({length} of {expected} bytes)"
    return f"{shown}: it was changed ({length} bytes, {expected} by the table)" if length != expected else ""


def _table_here(place: str, caches: Path) -> Path:
    """The table as a local file. A remote one is copied again if it has changed."""
    if not is_remote(place):
        return Path(place)
    copy = caches / "shards" / f"{hashlib.blake2b(place.encode(), digest_size=16).hexdigest()}.sqlite"
    known = copy.with_suffix(".json")
    with as_user_error(place):
        system, path = open_file_system(place)
        try:
            mark = mark_of(path, system.info(path))
        except FileNotFoundError:
            raise UserError([Mistake(f"there is no table of shards {without_secrets(place)}", MAKE_IT)]) from None
    try:
        if copy.is_file() and read_json(known) == mark:
            return copy
    except (OSError, ValueError):
        pass  # copied again
    from library.data.shards.remote import copy_to

    try:
        with replacing(copy) as stream:
            copy_to(place, stream)
        with replacing(known) as stream:
            stream.write(json.dumps(mark).encode())
    except OSError as error:
        raise UserError(
            [Mistake(f"the table {without_secrets(place)} cannot be copied: {error}", "check it")]
        ) from error
    return copy
