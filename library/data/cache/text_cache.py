"""Encode the captions of a run once before training, in memory or on disk.

Shuffled and dropped captions can be cached too: they are a pure function of (seed, epoch, image, repeat), so the texts
of a run can be listed in advance (`texts_of`). An entry is identified by its text and the encoder, so an edited caption
is a new entry.

On disk, many texts share a file (a *shard*): 100,000 texts are about 1,600 files, much faster to list, sync and copy
than 100,000. A shard is a safetensors file with a checksum of every tensor. It is written atomically and never changed,
so processes that fill the same folder need no lock, even on a network drive. A damaged shard is deleted and its texts
are encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.bounded import json_of
from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, TensorInfo
from library.checkpoints.lazy import torch_dtype
from library.checkpoints.writer import write_safetensors
from library.data.cache.work_sharing import processing_order
from library.data.retries import read_one
from library.messages import counted
from library.options.mistakes import Mistake, UserError
from library.runtime.processes import ALONE, Processes
from library.runtime.progress import ProgressBar
from library.whole_files import remove_leftovers

Outputs = dict[str, Tensor]
"""Outputs of the text encoders by name: {"states": (B, L, width)} for a single CLIP, more names for several."""

# texts -> Outputs with a row per text, on any device
Encode = Callable[[list[str]], Mapping[str, Tensor]]

_VERSION = 1  # increase when the same text and encoder give different outputs
_SHARD = 64  # texts per file: 15 MB for SD1 in float32, 41 MB for SDXL; an interruption loses at most one file
_SHARDS = "*.safetensors"
_THREADS = 4


class _Location(NamedTuple):
    """Location of one output of one text."""

    output: str
    file: Path
    start: int
    crc: int
    info: TensorInfo


@dataclass(frozen=True)
class MemoryTexts:
    """Outputs of each text, in memory."""

    texts: Mapping[str, Outputs]

    def __contains__(self, text: object) -> bool:
        return text in self.texts

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def size(self) -> int:
        """Bytes of all outputs."""
        return sum(tensor.nbytes for row in self.texts.values() for tensor in row.values())

    def on(self, device: torch.device) -> MemoryTexts:
        """A copy on a device."""
        return MemoryTexts(
            {text: {name: tensor.to(device) for name, tensor in row.items()} for text, row in self.texts.items()}
        )

    def get(self, texts: Sequence[str]) -> Outputs:
        """Outputs of these texts, a row each, where the store is, in the encoder dtype. Raises KeyError for a missing
        text."""
        return _stacked([self.texts[text] for text in texts])


@dataclass(frozen=True)
class DiskTexts:
    """Outputs on disk: the location of each text's."""

    texts: Mapping[str, tuple[_Location, ...]]

    def __contains__(self, text: object) -> bool:
        return text in self.texts

    def __len__(self) -> int:
        return len(self.texts)

    def get(self, texts: Sequence[str]) -> Outputs:
        """As MemoryTexts.get. Raises Unreadable for an entry that was removed or damaged after the cache was built."""
        return read_one(
            lambda: _stacked([{place.output: _read_or_raise(place) for place in self.texts[text]} for text in texts])
        )


TextStore = MemoryTexts | DiskTexts


@dataclass(frozen=True)
class TextCacheBuild:
    """The outputs of all texts, with counts of texts."""

    store: TextStore
    read: int  # from the cache folder
    encoded: int
    damaged: int = 0  # damaged files in the cache folder, whose texts were encoded again

    def __str__(self) -> str:
        text = f"captions: {self.read} read, {self.encoded} encoded"
        return f"{text} ({counted(self.damaged, 'damaged cache file')} replaced)" if self.damaged else text


def texts_of(samples: Iterable[str], limit: int) -> tuple[list[str], bool]:
    """Distinct texts of `samples` in order of first use, at most `limit`, and whether they are complete.

    Stops reading `samples` at the first text beyond the limit. Pass the samples of the whole run even when resuming:
    then a resumed run encodes the same texts in the same batches, bit for bit.
    """
    found: dict[str, None] = {}
    for text in samples:
        if text in found:
            continue
        if len(found) >= limit:
            return list(found), False
        found[text] = None
    return list(found), True


def missing(texts: Iterable[str], store: TextStore) -> list[str]:
    """Texts that are not in the store (those beyond the limit), without duplicates, in order."""
    return [text for text in dict.fromkeys(texts) if text not in store]


def outputs(texts: Sequence[str], store: TextStore, encode: Encode) -> Outputs:
    """Outputs of these texts, a row each, where the store is: from it, or, on the CPU, some of them encoded now without
    storing them."""
    new = missing(texts, store)
    if not new:
        return store.get(texts)
    encoded = dict(zip(new, _rows(new, encode, len(new)), strict=True))
    rows = [encoded[text] if text in encoded else _row(store.get([text]), 0) for text in texts]
    return _stacked([{name: tensor.cpu() for name, tensor in row.items()} for row in rows])


def build_text_cache(  # noqa: PLR0913 - called once; each argument varies alone in tests
    texts: Sequence[str],
    encode: Encode,
    *,
    encoder: str,
    folder: Path | None,
    batch_size: int = 1,
    share: tuple[int, int] = (0, 1),
    ranks: Processes = ALONE,
    progress: bool = True,
) -> TextCacheBuild:
    """Return the outputs of all texts, encoding those that are not in `folder` (None: all, kept in memory).

    `encoder` identifies everything that outputs depend on besides the text: weights, dtype, clip_skip, maximum length,
    whether prompt weights are parsed. Every batch has `batch_size` texts, the last one padded, because another batch
    shape may change the last bits. `share` is (rank, number of processes) of processes that fill the same folder: each
    has its own order and skips what another has finished, and all return all texts; `ranks` are processes that fill the
    cache together: each encodes its share. Raises UserError for outputs that are not finite, and for a file that cannot
    be written.
    """
    size = max(1, batch_size)
    distinct = list(dict.fromkeys(texts))
    if folder is None:
        own = [text for part in ranks.own(_parts(distinct, size)) for text in part]
        in_memory: dict[str, Outputs] = {}
        with ranks.failing_together(), ProgressBar("encoding captions", len(own), shown=progress) as bar:
            in_memory.update(_encoded(own, encode, size, bar))
        of_all = ranks.merge(in_memory)
        return TextCacheBuild(MemoryTexts({text: of_all[text] for text in distinct}), 0, len(distinct))
    folder = folder / _digest(str(_VERSION), encoder)
    remove_leftovers(folder)
    keys = {text: _digest(str(_VERSION), encoder, text) for text in distinct}
    needed = set(keys.values())
    known = set(folder.glob(_SHARDS))
    found, damaged = _read_folder(folder, needed, progress=progress)
    pending = [text for text in distinct if keys[text] not in found]
    encoded = 0
    ranks.barrier()  # all have seen which texts are missing
    shards = ranks.own(_parts(pending, -(-_SHARD // size) * size))
    with (
        ranks.failing_together(),
        ProgressBar("encoding captions", sum(map(len, shards)), shown=progress) as bar,
    ):
        for shard in processing_order(shards, share):
            found.update(_read_new_shards(folder, known, needed))
            left = [text for text in shard if keys[text] not in found]
            bar.update(len(shard) - len(left))
            if not left:
                continue
            file = folder / f"{_digest(*(keys[text] for text in left))}.safetensors"
            _write_shard(file, {keys[text]: row for text, row in _encoded(left, encode, size, bar)}, encoder)
            known.add(file)
            found.update(_layout(file))
            encoded += len(left)
    if ranks.world > 1:
        found.update(_read_new_shards(folder, known, needed))
    store = DiskTexts({text: found[key] for text, key in keys.items()})
    encoded = ranks.total(encoded)
    return TextCacheBuild(store, len(distinct) - encoded, encoded, damaged)


def _encoded(texts: Sequence[str], encode: Encode, size: int, bar: ProgressBar) -> Iterator[tuple[str, Outputs]]:
    for batch in _parts(texts, size):
        yield from zip(batch, _rows(batch, encode, size), strict=True)
        bar.update(len(batch))


def _rows(texts: Sequence[str], encode: Encode, size: int) -> list[Outputs]:
    """Encode texts in a batch padded to `size`; outputs of each, on the CPU. Raises UserError if not finite."""
    with torch.no_grad():
        batch = encode([*texts, *[texts[-1]] * (size - len(texts))])
    on_cpu = {name: tensor.detach().to("cpu") for name, tensor in batch.items()}
    for name, tensor in on_cpu.items():
        for place, text in enumerate(texts):
            if not torch.isfinite(tensor[place]).all():
                what = f'caption "{text}": the text encoder gives {name} that are not finite'
                raise UserError([Mistake(what, "train in full precision, use another model, or change the caption")])
    # a view would keep the whole batch in memory
    return [{name: tensor.clone() for name, tensor in _row(on_cpu, place).items()} for place in range(len(texts))]


def _row(batch: Mapping[str, Tensor], place: int) -> Outputs:
    return {name: tensor[place] for name, tensor in batch.items()}


def _stacked(rows: Sequence[Outputs]) -> Outputs:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _parts(texts: Sequence[str], size: int) -> list[list[str]]:
    return [list(texts[start : start + size]) for start in range(0, len(texts), size)]


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:%s" % (len(raw), raw))
    return digest.hexdigest()


def _write_shard(file: Path, entries: Mapping[str, Outputs], encoder: str) -> None:
    """Write tensors "<key>.<output>", with their checksums in the metadata."""
    tensors = {f"{key}.{name}": tensor.contiguous() for key, row in entries.items() for name, tensor in row.items()}
    sums = {name: _crc(tensor) for name, tensor in tensors.items()}
    try:
        write_safetensors(file, tensors, {"encoder": encoder, "crc32": json.dumps(sums)})
    except CheckpointError as error:
        if len(_read_shard(file, set(entries)) or ()) == len(entries):
            return  # another process was faster, and Windows cannot replace a file that is being read
        what = f"text cache {file} cannot be written ({error.__cause__ or error})"
        remedy = "free disk space, make the folder writable, or remove --cache_text_encoder_outputs_to_disk"
        raise UserError([Mistake(what, remedy)]) from error


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _layout(file: Path) -> dict[str, tuple[_Location, ...]]:
    """Read a shard's header: key -> locations. {} if the file is missing or its header damaged."""
    try:
        header = read_header(file)
        sums = json_of(header.metadata["crc32"])
        places: dict[str, list[_Location]] = {}
        for name, info in header.tensors.items():
            key, _, output = name.partition(".")
            start = header.places[name].start or 0
            places.setdefault(key, []).append(_Location(sys.intern(output), file, start, int(sums[name]), info))
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return {}
    return {key: tuple(sorted(found)) for key, found in places.items()}


def _read_shard(file: Path, keys: set[str]) -> dict[str, tuple[_Location, ...]] | None:
    """Entries of `keys` in a shard. None if the header or one of these entries is damaged."""
    layout = _layout(file)
    entries = {key: places for key, places in layout.items() if key in keys}
    is_valid = all(_read(place) is not None for places in entries.values() for place in places)
    return entries if layout and is_valid else None


def _read_folder(folder: Path, keys: set[str], *, progress: bool) -> tuple[dict[str, tuple[_Location, ...]], int]:
    """Entries of `keys` in all shards, and the number of damaged shards, which are deleted."""
    files = sorted(folder.glob(_SHARDS))
    stamps = [_stamp(file) for file in files]
    found: dict[str, tuple[_Location, ...]] = {}
    infos: dict[TensorInfo, TensorInfo] = {}
    damaged = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        shards = pool.map(lambda file: _read_shard(file, keys), files)
        bar = ProgressBar("checking captions", len(files), shown=progress).over(shards)
        for file, stamp, entries in zip(files, stamps, bar, strict=True):
            if entries is None:
                damaged += 1
                _discard(file, stamp)
                continue
            # share equal objects: 100,000 of them would need more memory than the texts
            for key, places in entries.items():
                found[key] = tuple(place._replace(info=infos.setdefault(place.info, place.info)) for place in places)
    return found, damaged


def _read_new_shards(folder: Path, known: set[Path], keys: set[str]) -> dict[str, tuple[_Location, ...]]:
    """Entries of `keys` in shards that other processes have written since; adds their files to `known`."""
    new = sorted(set(folder.glob(_SHARDS)) - known)
    known.update(new)
    found: dict[str, tuple[_Location, ...]] = {}
    for file in new:
        found.update(_read_shard(file, keys) or {})
    return found


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _discard(file: Path, stamp: tuple[int, int] | None) -> None:
    """Delete a damaged shard, unless another process has replaced it meanwhile."""
    with contextlib.suppress(OSError):  # a file that cannot be deleted is ignored
        if _stamp(file) == stamp:
            file.unlink()


def _read(place: _Location) -> Tensor | None:
    """Read a tensor; None if its file is missing or the checksum differs.

    Not memory-mapped: truncating a mapped file would crash the program.
    """
    raw = bytearray(place.info.nbytes)
    try:
        with place.file.open("rb") as stream:
            stream.seek(place.start)
            if stream.readinto(raw) != len(raw) or zlib.crc32(raw) != place.crc:
                return None
    except OSError:
        return None
    dtype = torch_dtype(place.info.dtype)
    return torch.frombuffer(raw, dtype=dtype).view(place.info.shape) if raw else torch.empty(place.info.shape)


def _read_or_raise(place: _Location) -> Tensor:
    tensor = _read(place)
    if tensor is None:
        what = f"text cache {place.file} was removed or changed by another program during the run"
        raise UserError([Mistake(what, "start again: missing and damaged entries are encoded again")])
    return tensor
