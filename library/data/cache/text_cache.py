"""What the text encoder gives for the captions of a run, made once before training, in memory or on disk.

Captions that are shuffled or dropped can be cached too: they are a pure function of (seed, epoch, image, repeat), so
the texts of a run can be listed beforehand (`texts_of`). An entry is found by its text and by a name of the encoder, so
an edited caption is simply another text, and no entry can be taken for one that it is not.

On disk many texts share a file (a *shard*): 100,000 texts are some 1,600 files, and syncing, listing and copying those
is far quicker than 100,000. A shard is a safetensors file with a checksum of every tensor; it is written whole or not
at all and never changed, so processes that fill one folder need no lock, on a network drive either. One that is found
damaged is taken away, and what it held is made anew.
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
from tqdm import tqdm

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, TensorInfo
from library.checkpoints.lazy import torch_dtype
from library.checkpoints.writer import write_safetensors
from library.data.cache.work_sharing import own_order
from library.options.mistakes import Mistake, UserError

Outputs = dict[str, Tensor]
"""What an encoder gives, by name: {"states": (B, L, width)} for one CLIP, more names where there are several."""

# texts -> Outputs with one row for each text, on any device
Encode = Callable[[list[str]], Mapping[str, Tensor]]

_VERSION = 1  # raise it when the same text comes out differently for the same name of an encoder
_SHARD = 64  # texts in a file: 15 MB of SD1 in float32, 41 MB of SDXL; what an interruption loses at most
_SHARDS = "*.safetensors"
_THREADS = 4


class _Place(NamedTuple):
    """Where one output of one text lies."""

    output: str
    file: Path
    start: int
    crc: int
    info: TensorInfo


@dataclass(frozen=True)
class MemoryTexts:
    """Outputs of each text, on the CPU."""

    texts: Mapping[str, Outputs]

    def __contains__(self, text: object) -> bool:
        return text in self.texts

    def __len__(self) -> int:
        return len(self.texts)

    def get(self, texts: Sequence[str]) -> Outputs:
        """The outputs of these texts, a row for each, on the CPU, dtypes as encoded. KeyError for one not in here."""
        return _stacked([self.texts[text] for text in texts])


@dataclass(frozen=True)
class DiskTexts:
    """Where the outputs of each text lie; nothing is held in memory."""

    texts: Mapping[str, tuple[_Place, ...]]

    def __contains__(self, text: object) -> bool:
        return text in self.texts

    def __len__(self) -> int:
        return len(self.texts)

    def get(self, texts: Sequence[str]) -> Outputs:
        """As MemoryTexts.get. Raises UserError for an entry that was removed or damaged since the cache was filled."""
        return _stacked([{place.output: _wanted(place) for place in self.texts[text]} for text in texts])


TextStore = MemoryTexts | DiskTexts


@dataclass(frozen=True)
class TextCacheBuild:
    """The outputs of all texts, and where they come from: counts of texts."""

    store: TextStore
    read: int  # from the cache folder
    made: int
    damaged: int = 0  # files of the cache folder that were damaged and are made anew

    def __str__(self) -> str:
        text = f"captions: {self.read} read, {self.made} encoded"
        return f"{text} ({self.damaged} damaged cache files made anew)" if self.damaged else text


def texts_of(samples: Iterable[str], limit: int) -> tuple[list[str], bool]:
    """The distinct texts of the samples of a run in the order of their first use, and whether that is all of them.

    No more than `limit`; `samples` is not read on once there is one too many. Give the samples of the whole run, not
    of what is left of it: then a resumed run encodes the same texts in the same batches, to the last bit.
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
    """Which of these texts are not in the store, each once, in order: those beyond the limit."""
    return [text for text in dict.fromkeys(texts) if text not in store]


def outputs(texts: Sequence[str], store: TextStore, encode: Encode) -> Outputs:
    """The outputs of these texts, a row for each, on the CPU: from the store, or else encoded now and not kept."""
    absent = missing(texts, store)
    if not absent:
        return store.get(texts)
    now = dict(zip(absent, _rows(absent, encode, len(absent)), strict=True))
    return _stacked([now[text] if text in now else _row(store.get([text]), 0) for text in texts])


def build_text_cache(
    texts: Sequence[str],
    encode: Encode,
    *,
    encoder: str,
    folder: Path | None,
    batch_size: int = 1,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> TextCacheBuild:
    """Make the outputs of all texts available, encoding what is not in `folder` (None: all, kept in memory).

    `encoder` names all that outputs depend on beside the text: weights, dtype, clip_skip, maximal length, whether
    weights in brackets count. Every batch has `batch_size` texts, the last one filled up, as other shapes of a batch
    may give other last bits. `share` is (number, of how many processes) that fill one folder at once: each has an
    order of its own and passes over what another has done meanwhile, and all end with all texts. Raises UserError for
    outputs that are not finite, or a file that cannot be written.
    """
    size = max(1, batch_size)
    distinct = list(dict.fromkeys(texts))
    if folder is None:
        with tqdm(desc="encoding captions", total=len(distinct), disable=not progress or not distinct) as bar:
            in_memory = dict(_encoded(distinct, encode, size, bar))
        return TextCacheBuild(MemoryTexts(in_memory), 0, len(in_memory))
    folder = folder / _digest(str(_VERSION), encoder)
    keys = {text: _digest(str(_VERSION), encoder, text) for text in distinct}
    wanted = set(keys.values())
    known = set(folder.glob(_SHARDS))
    found, damaged = _read_folder(folder, wanted, progress=progress)
    pending = [text for text in distinct if keys[text] not in found]
    made = 0
    shards = _parts(pending, -(-_SHARD // size) * size)
    with tqdm(desc="encoding captions", total=len(pending), disable=not progress or not pending) as bar:
        for shard in own_order(shards, share):
            found.update(_news(folder, known, wanted))
            left = [text for text in shard if keys[text] not in found]
            bar.update(len(shard) - len(left))
            if not left:
                continue
            file = folder / f"{_digest(*(keys[text] for text in left))}.safetensors"
            _write_shard(file, {keys[text]: one for text, one in _encoded(left, encode, size, bar)}, encoder)
            known.add(file)
            found.update(_layout(file))
            made += len(left)
    store = DiskTexts({text: found[key] for text, key in keys.items()})
    return TextCacheBuild(store, len(distinct) - made, made, damaged)


def _encoded(texts: Sequence[str], encode: Encode, size: int, bar: tqdm) -> Iterator[tuple[str, Outputs]]:
    for batch in _parts(texts, size):
        yield from zip(batch, _rows(batch, encode, size), strict=True)
        bar.update(len(batch))


def _rows(texts: Sequence[str], encode: Encode, size: int) -> list[Outputs]:
    """The outputs of each text by itself, on the CPU and finite, encoded in a batch of `size`."""
    with torch.no_grad():
        batch = encode([*texts, *[texts[-1]] * (size - len(texts))])
    there = {name: tensor.detach().to("cpu") for name, tensor in batch.items()}
    for name, tensor in there.items():
        for place, text in enumerate(texts):
            if not torch.isfinite(tensor[place]).all():
                what = f'caption "{text}": the text encoder gives {name} that are not finite'
                raise UserError([Mistake(what, "train in full precision, use another model, or change the caption")])
    # a view would keep the whole batch alive
    return [{name: tensor.clone() for name, tensor in _row(there, place).items()} for place in range(len(texts))]


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
    """Names are "<key>.<output>"; the checksums stand in the metadata."""
    tensors = {f"{key}.{name}": tensor.contiguous() for key, row in entries.items() for name, tensor in row.items()}
    sums = {name: _crc(tensor) for name, tensor in tensors.items()}
    try:
        write_safetensors(file, tensors, {"encoder": encoder, "crc32": json.dumps(sums)})
    except CheckpointError as error:
        if len(_read_shard(file, set(entries)) or ()) == len(entries):
            return  # another process was quicker, and Windows replaces no file that is being read
        what = f"text cache {file} cannot be written ({error.__cause__ or error})"
        remedy = "free the disk, make the folder writable, or use --cache_text_encoder_outputs without its _to_disk"
        raise UserError([Mistake(what, remedy)]) from error


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _layout(file: Path) -> dict[str, tuple[_Place, ...]]:
    """Key -> places of a shard, by its header alone. {} for one that is not there or has no good header."""
    try:
        header = read_header(file)
        sums = json.loads(header.metadata["crc32"])
        places: dict[str, list[_Place]] = {}
        for name, info in header.tensors.items():
            key, _, output = name.partition(".")
            start = header.places[name].start or 0
            places.setdefault(key, []).append(_Place(sys.intern(output), file, start, int(sums[name]), info))
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return {}
    return {key: tuple(sorted(found)) for key, found in places.items()}


def _read_shard(file: Path, keys: set[str]) -> dict[str, tuple[_Place, ...]] | None:
    """Those of the wanted entries that it holds. None if one of them is damaged, or the whole file."""
    layout = _layout(file)
    wanted = {key: places for key, places in layout.items() if key in keys}
    whole = all(_read(place) is not None for places in wanted.values() for place in places)
    return wanted if layout and whole else None


def _read_folder(folder: Path, keys: set[str], *, progress: bool) -> tuple[dict[str, tuple[_Place, ...]], int]:
    """The wanted entries of all shards, and how many shards were damaged. Those are gone now."""
    files = sorted(folder.glob(_SHARDS))
    stamps = [_stamp(file) for file in files]
    found: dict[str, tuple[_Place, ...]] = {}
    infos: dict[TensorInfo, TensorInfo] = {}
    damaged = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        shards = pool.map(lambda file: _read_shard(file, keys), files)
        bar = tqdm(shards, "checking captions", len(files), disable=not progress or not files)
        for file, stamp, entries in zip(files, stamps, bar, strict=True):
            if entries is None:
                damaged += 1
                _discard(file, stamp)
                continue
            # equal shapes are one object: a hundred thousand of their own would take more memory than the texts
            for key, places in entries.items():
                found[key] = tuple(place._replace(info=infos.setdefault(place.info, place.info)) for place in places)
    return found, damaged


def _news(folder: Path, known: set[Path], keys: set[str]) -> dict[str, tuple[_Place, ...]]:
    """The wanted entries of shards that other processes have written since; their files are added to `known`."""
    new = sorted(set(folder.glob(_SHARDS)) - known)
    known.update(new)
    found: dict[str, tuple[_Place, ...]] = {}
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
    """Take a damaged shard away, unless another process has put a good one in its place meanwhile."""
    with contextlib.suppress(OSError):  # what cannot be taken away is passed over
        if _stamp(file) == stamp:
            file.unlink()


def _read(place: _Place) -> Tensor | None:
    """One tensor, None if its file is gone or its bytes are not those that were written.

    Read, not mapped: a file that is cut short under a mapping ends the program.
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


def _wanted(place: _Place) -> Tensor:
    tensor = _read(place)
    if tensor is None:
        what = f"text cache {place.file} was removed or changed by another program during the run"
        raise UserError([Mistake(what, "start again: what is damaged or missing is made anew")])
    return tensor
