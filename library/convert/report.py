"""Describe a checkpoint: family, parts, precision, prediction type, and anything unusual.

From the header, in milliseconds and without torch; values are read only for broken_tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.files import TensorReader
from library.checkpoints.header import CheckpointError, Header, TensorInfo
from library.checkpoints.position_ids import faults
from library.checkpoints.prediction_marks import declared_prediction
from library.convert import ema_copies
from library.families.sd.checkpoint_parts import other_noise, split_checkpoint
from library.families.sd.variant import TITLES
from library.messages import counted, listed

if TYPE_CHECKING:
    from library.families.family import Family

KINDS = {"safetensors": "one .safetensors file", "ckpt": "one .ckpt file", "diffusers": "a diffusers folder"}
_NAME_WIDTH = 22


def describe(header: Header, family: Family) -> list[str]:
    """Return lines that describe a checkpoint of this family."""
    lines = [f"{header.path}: {family.title}, {KINDS[header.kind]}, {_size(header) / 1e9:.2f} GB"]
    for title, tensors in _groups(header, family):
        if tensors:
            lines.append(f"  {title:{_NAME_WIDTH}}{_tensors(tensors)}")
    lines += _prediction(header, family)
    unusual = [*_unusual(header, family)]
    lines += ["unusual:", *(f"  {line}" for line in unusual)] if unusual else ["nothing unusual"]
    return lines


def describe_unknown(header: Header) -> list[str]:
    """Return lines that describe a file of an unknown family: names, sizes and dtypes of its tensors."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in header.tensors.items():
        groups.setdefault(name.partition(".")[0], {})[name] = info
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))[:12]
    more = f", the largest of {len(groups)} groups" if len(groups) > len(largest) else ""
    count = counted(len(header.tensors), "tensor")
    return [
        f"{header.path}: {KINDS[header.kind]}, {_size(header) / 1e9:.2f} GB, {count}{more}",
        *(f"  {name[:40] + '.*':{_NAME_WIDTH}}{_tensors(tensors)}" for name, tensors in largest),
    ]


def broken_tensors(header: Header) -> list[str]:
    """Return the tensors with NaN or infinite values, except masks and schedules. Reads the whole checkpoint."""
    from library.checkpoints.loading import READ_AT_ONCE, is_finite

    reader, found, read = TensorReader(header), [], 0
    for name, info in header.tensors.items():
        if info.is_float and not re.search(r"attn_mask$|alphas_cumprod$|posterior_|sigmas$", name):
            tensor = reader.get(name)
            if not is_finite(tensor.float() if tensor.element_size() == 1 else tensor):
                found.append(name)
        read += info.nbytes
        if read >= READ_AT_ONCE:
            reader.release()
            read = 0
    reader.close()
    return found


def _size(header: Header) -> int:
    files = {place.file for place in header.places.values()} or {header.path}
    return sum(Path(file).stat().st_size for file in files)


def _prefixes(header: Header, family: Family) -> dict[str, str]:
    """Map each part to the prefix of its tensors in this checkpoint."""
    layout = family.variant.layout
    return {part.name: f"{part.name}/" if header.kind == "diffusers" else part.prefix for part in layout.parts}


def _groups(header: Header, family: Family) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """Yield (title, tensors) of each part, of the EMA copies, and of all other tensors."""
    left = dict(header.tensors)
    for part, prefix in _prefixes(header, family).items():
        yield TITLES[part], {name: left.pop(name) for name in list(left) if name.startswith(prefix)}
    yield "EMA copies", {name: left.pop(name) for name in ema_copies.names(header)}
    yield "other tensors", left


def _tensors(tensors: Mapping[str, TensorInfo]) -> str:
    """Return `686 tensors, 859.5 M values, F16`; several dtypes with the number of tensors of each."""
    dtypes = Counter(info.dtype for info in tensors.values()).most_common()
    stored = dtypes[0][0] if len(dtypes) == 1 else ", ".join(f"{dtype} ({count})" for dtype, count in dtypes)
    values = sum(info.count for info in tensors.values()) / 1e6
    return f"{counted(len(tensors), 'tensor')}, {values:.1f} M values, {stored}"


def _prediction(header: Header, family: Family) -> list[str]:
    declared = declared_prediction(header)
    words = {True: "yes", False: "no", None: "no (not declared)"}
    where = f"   (declared by {declared.where})" if declared.where else ""
    noise = other_noise(family, header)
    unknown = f"not supported: {listed(noise)}" if noise else ""
    prediction = unknown or declared.prediction or "epsilon (not declared; --prediction_type v sets v)"
    return [f"prediction: {prediction}; zero terminal SNR: {words[declared.zero_terminal_snr]}{where}"]


def _unusual(header: Header, family: Family) -> Iterator[str]:
    """Yield one line for each difference from a usual file of the family."""
    prefixes = _prefixes(header, family)
    yield from _levels(header)
    if header.kind != "diffusers":
        for part, prefix in prefixes.items():
            if not any(name.startswith(prefix) for name in header.tensors):
                yield f"no {TITLES[part]} (no key starts with {prefix})"
        yield from _spellings(header, family)
        yield from _ema(header)
        known = re.compile(rf"{family.variant.layout.kept}|{family.variant.layout.ignored}")
        unknown = [
            name
            for name in header.tensors
            if not name.startswith(tuple(prefixes.values())) and not known.fullmatch(name)
        ]
        if unknown:
            yield f"{counted(len(unknown), 'tensor')} of no part of the model, kept unchanged: {listed(unknown)}"
        left_out = [name for name in header.tensors if re.search(r"(?:^|\.)loss\.", name)]
        if left_out:
            yield f"{counted(len(left_out), 'tensor')} of training, left out: {listed(left_out)}"
    for part, prefix in prefixes.items():
        kinds = {info.dtype for name, info in header.tensors.items() if name.startswith(prefix) and info.is_float}
        if len(kinds) > 1 or kinds & {"F64", "F8_E4M3", "F8_E5M2"}:
            yield f"{TITLES[part]}: stored as {', '.join(sorted(kinds))}"
    if header.scaled:
        yield f"fp8 with scales: {counted(len(header.scaled), 'weight')}, read and converted as float32"
    yield from _load_errors(header, family)


def _levels(header: Header) -> Iterator[str]:
    level = {
        place.name.removesuffix(name)
        for name, place in header.places.items()
        if header.kind != "diffusers" and place.name != name
    }
    if level:
        yield f"all keys have an extra prefix: {', '.join(sorted(level))}"


def _spellings(header: Header, family: Family) -> Iterator[str]:
    yield from faults(header)
    bare = [name for name in header.tensors if re.search(r"\.transformer\.embeddings\.", name)]
    if bare:
        yield "the text encoder's keys lack the text_model. level"
    ranks = {len(info.shape) for name, info in header.tensors.items() if name.endswith(".1.proj_in.weight")}
    usual = {2} if family.variant.linear else {4}
    if ranks and ranks != usual:
        yield f"the U-Net's projections have {' and '.join(map(str, sorted(ranks)))} dimensions, usually {usual.pop()}"
    if any(name.endswith(".text_projection.weight") for name in header.tensors):
        yield "text projection with the name and layout of transformers"
    if any(name in header.tensors for name in ("edm_mean", "edm_vpred.sigma_max")):
        yield "marked as a model with EDM noise, which is not supported"


def _ema(header: Header) -> Iterator[str]:
    if not ema_copies.names(header):
        return
    weights = sum(name.startswith("model.diffusion_model.") for name in header.tensors)
    try:
        count = len(ema_copies.copies(header))
    except CheckpointError as error:
        yield str(error)
        return
    share = "all" if count == weights else f"{count} of {weights}"
    yield f"EMA copies of {share} U-Net tensors (--ema use uses them as weights)"


def _load_errors(header: Header, family: Family) -> Iterable[str]:
    try:
        split_checkpoint(family, family.variant, TensorReader(header))
    except CheckpointError as error:
        return [f"it cannot be loaded: {error}"]
    return []
