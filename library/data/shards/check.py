"""Compare shards with their table, and unpack them into a folder again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from library.data.scan.shard_images import ShardImages
from library.data.shards.archive import Skipped, files_in
from library.data.shards.member import Member
from library.data.shards.places import join
from library.messages import counted
from library.options.mistakes import Mistake, UserError
from library.runtime.progress import ProgressBar
from library.whole_files import replacing

_THREADS = 8
_NAMED = 20
_BLOCK = 256


def check_members(images: ShardImages) -> int:
    """Read every image and mask, and return how many there are. Raises UserError that names those that differ."""
    faults: list[str] = []
    count = 0
    with ThreadPoolExecutor(_THREADS) as pool, ProgressBar("checking shards", len(images.table)) as bar:
        for block in _blocks(images):
            members = [member for row in block for member in row]
            count += len(members)
            faults += filter(None, pool.map(_fault, members))
            bar.update(len(block))
    if faults:
        more = [f"  and {len(faults) - _NAMED} more"] if len(faults) > _NAMED else []
        what = f"{counted(len(faults), 'file')} of {count} cannot be used:\n" + "\n".join(faults[:_NAMED] + more)
        raise UserError([Mistake(what, "restore the shards, or make the table again")])
    return count


def _blocks(images: ShardImages) -> Iterator[list[list[Member]]]:
    block: list[list[Member]] = []
    for number, row in images.rows():
        record = images.record(number, row)
        block.append([member for member in (record.member, record.mask_member) if member is not None])
        if len(block) == _BLOCK:
            yield block
            block = []
    yield block


def _fault(member: Member) -> str:
    try:
        member.open("rb")
    except OSError as error:
        return f"  {member}: {error.strerror or error}"
    return ""


def unpack(images: ShardImages, folder: Path, masks: Path | None) -> int:
    """Write the files of the shards into a folder, masks into another or, if None, not at all; return how many files
    were written. Raises UserError; a file that exists is never replaced."""
    names = {(images.shards[row.shard].place, row.mask_offset): row.mask for _, row in images.rows() if row.mask}
    count = 0
    for shard in images.shards.values():
        try:
            for found in files_in(shard.place, [""], [], Skipped()):
                mask = names.get((shard.place, found.offset))
                if mask is not None and masks is None:
                    continue
                target = folder if mask is None or masks is None else masks
                _write(Path(join(str(target), mask or found.name)), found.data or b"")
                count += 1
        except OSError as error:
            what = f"{shard.place} cannot be unpacked into {folder} ({error.strerror or error})"
            raise UserError([Mistake(what, "free disk space, or give another folder")]) from error
    return count


def _write(path: Path, data: bytes) -> None:
    if path.exists():
        if path.read_bytes() == data:  # images that share a caption or mask
            return
        raise UserError([Mistake(f"{path} exists already", "unpack into an empty folder")])
    with replacing(path, durable=False) as stream:
        stream.write(data)
