"""The metadata of a resized, merged, split or extracted LoRA.

Keys: kohya's ss_* and Stability-AI/ModelSpec 1.0.1. Hashes are added where files are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from library.bounded import json_of
from library.checkpoints.metadata import ADAPTER_MINIMUM
from networks.arithmetic.factors import Factors

DYNAMIC = "Dynamic"  # kohya's word for a number that differs from layer to layer
MODULE = "networks.lora"
_BY_BLOCK = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


@dataclass(frozen=True)
class ResultInfo:
    """The title of a result, its date (local time), the names of the merged LoRAs, and facts about its model: modelspec
    values such as `architecture`, without the prefix."""

    title: str
    made_at: datetime
    merged_from: Sequence[str] = ()
    model: Mapping[str, str] = field(default_factory=dict)


def ranks(layers: Mapping[str, Factors], arguments: Mapping[str, Any] | None = None) -> dict[str, str]:
    """ss_network_dim, _alpha and _args of layers. `arguments`: the source's, in which the ranks are replaced."""
    plain = [layer for layer in layers.values() if not layer.is_kernel] or list(layers.values())
    kernels = [layer for layer in layers.values() if layer.is_kernel]
    args = {key: value for key, value in (arguments or {}).items() if key not in (*_BY_BLOCK, "conv_dim", "conv_alpha")}
    if kernels:
        args["conv_dim"] = _common_value(layer.rank for layer in kernels)
        args["conv_alpha"] = _common_value(layer.alpha for layer in kernels)
    metadata = {
        "ss_network_dim": _common_value(layer.rank for layer in plain),
        "ss_network_alpha": _common_value(layer.alpha for layer in plain),
    }
    return metadata | ({"ss_network_args": json.dumps(args)} if args or arguments else {})


def _common_value(numbers: Iterable[float]) -> str:
    """The number as text if all are equal, else "Dynamic"."""
    different = {f"{number:.6g}": number for number in numbers}
    return str(next(iter(different.values()))) if len(different) == 1 else DYNAMIC


def resized_metadata(
    metadata: Mapping[str, str], layers: Mapping[str, Factors], comment: str, *, dynamic: bool = False
) -> dict[str, str]:
    """The metadata of a LoRA whose ranks changed; `comment` goes before ss_training_comment, as in sd-scripts.

    `dynamic`: the ranks were chosen layer by layer; they are then "Dynamic" even if all are equal.
    """
    kept = without_hashes(metadata)
    before = kept.get("ss_training_comment", "")
    # as in sd-scripts, with a trailing blank if there was no comment
    kept["ss_training_comment"] = f"{comment}; {before}"
    overrides = {"ss_network_dim": DYNAMIC, "ss_network_alpha": DYNAMIC} if dynamic else {}
    if "ss_network_module" in kept:
        overrides["ss_network_module"] = MODULE  # also of DyLoRA and LyCORIS the result is a LoRA
    return kept | ranks(layers, read_arguments(metadata)) | overrides


def merged_metadata(
    sources: Sequence[Mapping[str, str]], layers: Mapping[str, Factors], about: ResultInfo
) -> dict[str, str]:
    """The metadata of a merged LoRA: entries that all sources share, the ranks of the result, and its sources."""
    known = [without_hashes(source) for source in sources if source]
    first = known[0] if known else {}
    agreed = {key: value for key, value in first.items() if all(source.get(key) == value for source in known)}
    for key in ("ss_v2", "ss_base_model_version"):  # as in sd-scripts: from the first source that has it
        value = next((source[key] for source in known if key in source), None)
        if value is not None:
            agreed[key] = value
    agreed.pop("ss_network_args", None)
    return agreed | {"ss_network_module": MODULE} | ranks(layers) | _modelspec(agreed, about)


def extracted_metadata(
    layers: Mapping[str, Factors], about: ResultInfo, *, v2: bool, base_version: str
) -> dict[str, str]:
    """The metadata of an extracted LoRA: its kind and its base model."""
    found = {"ss_v2": str(v2), "ss_base_model_version": base_version, "ss_network_module": MODULE}
    return {"ss_network_args": "{}"} | found | ranks(layers) | _modelspec(found, about)


def minimal_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries that loaders need, which --no_metadata keeps."""
    return {key: metadata[key] for key in ADAPTER_MINIMUM if key in metadata}


def title_of(metadata: Mapping[str, str], stem: str) -> str:
    """The name of a file in modelspec.merged_from: its title, else its file name."""
    return metadata.get("modelspec.title") or stem


def read_arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """ss_network_args as a dictionary; empty if missing or unreadable."""
    try:
        read = json_of(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without the hashes of the file's contents."""
    gone = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
    return {key: value for key, value in metadata.items() if key not in gone}


def _modelspec(agreed: Mapping[str, str], about: ResultInfo) -> dict[str, str]:
    spec = {
        "sai_model_spec": "1.0.1",
        "implementation": "diffusers",
        "title": about.title,
        "date": about.made_at.replace(microsecond=0).isoformat(),
    }
    if about.merged_from:
        spec["merged_from"] = ", ".join(about.merged_from)
    stated = {f"modelspec.{key}" for key in ("implementation", *about.model)} & agreed.keys()
    entries = {f"modelspec.{key}": value for key, value in {**spec, **about.model}.items()}
    return entries | {key: agreed[key] for key in stated}
