"""What the file of a resized, summed, split or extracted LoRA says of itself.

Keys: kohya's ss_* and Stability-AI/ModelSpec 1.0.1. Hashes are made where files are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from library.checkpoints.metadata import ADAPTER_MINIMUM
from networks.arithmetic.factors import Factors

DYNAMIC = "Dynamic"  # kohya's word for a number that differs from layer to layer
MODULE = "networks.lora"
_BY_BLOCK = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


@dataclass(frozen=True)
class ResultInfo:
    """What a result is called, when it was made (local time), of what (names of LoRAs), and what is known of its model:
    modelspec values such as `architecture`, without the prefix."""

    title: str
    made_at: datetime
    merged_from: Sequence[str] = ()
    model: Mapping[str, str] = field(default_factory=dict)


def ranks(layers: Mapping[str, Factors], arguments: Mapping[str, Any] | None = None) -> dict[str, str]:
    """ss_network_dim, _alpha and _args of layers. `arguments`: those of the source, of which the ranks are replaced."""
    plain = [layer for layer in layers.values() if not layer.is_kernel] or list(layers.values())
    kernels = [layer for layer in layers.values() if layer.is_kernel]
    args = {key: value for key, value in (arguments or {}).items() if key not in (*_BY_BLOCK, "conv_dim", "conv_alpha")}
    if kernels:
        args["conv_dim"] = _one(layer.rank for layer in kernels)
        args["conv_alpha"] = _one(layer.alpha for layer in kernels)
    found = {
        "ss_network_dim": _one(layer.rank for layer in plain),
        "ss_network_alpha": _one(layer.alpha for layer in plain),
    }
    return found | ({"ss_network_args": json.dumps(args)} if args or arguments else {})


def _one(numbers: Iterable[float]) -> str:
    different = {f"{number:.6g}": number for number in numbers}
    return str(next(iter(different.values()))) if len(different) == 1 else DYNAMIC


def resized_metadata(
    metadata: Mapping[str, str], layers: Mapping[str, Factors], comment: str, *, dynamic: bool = False
) -> dict[str, str]:
    """The metadata of a LoRA whose ranks changed; `comment` goes before ss_training_comment, as in sd-scripts.

    `dynamic`: the ranks were chosen layer by layer, which is what it says then, whatever came of it.
    """
    kept = without_hashes(metadata)
    before = kept.get("ss_training_comment", "")
    # with the blank at the end where there was no comment: so it is in files of sd-scripts
    kept["ss_training_comment"] = f"{comment}; {before}"
    word = {"ss_network_dim": DYNAMIC, "ss_network_alpha": DYNAMIC} if dynamic else {}
    return kept | ranks(layers, read_arguments(metadata)) | word


def merged_metadata(
    sources: Sequence[Mapping[str, str]], layers: Mapping[str, Factors], about: ResultInfo
) -> dict[str, str]:
    """The metadata of a sum: what all sources agree on, the ranks of the result, what it was made of."""
    known = [without_hashes(source) for source in sources if source]
    first = known[0] if known else {}
    agreed = {key: value for key, value in first.items() if all(source.get(key) == value for source in known)}
    for key in ("ss_v2", "ss_base_model_version"):  # as sd-scripts: the first one that knows
        value = next((source[key] for source in known if key in source), None)
        if value is not None:
            agreed[key] = value
    agreed.pop("ss_network_args", None)
    return agreed | {"ss_network_module": MODULE} | ranks(layers) | _modelspec(agreed, about)


def extracted_metadata(
    layers: Mapping[str, Factors], about: ResultInfo, *, v2: bool, base_version: str
) -> dict[str, str]:
    """The metadata of a LoRA that was no training's: what it is and which models it is for."""
    found = {"ss_v2": str(v2), "ss_base_model_version": base_version, "ss_network_module": MODULE}
    return {"ss_network_args": "{}"} | found | ranks(layers) | _modelspec(found, about)


def minimal_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What stays with --no_metadata: what loaders need."""
    return {key: metadata[key] for key in ADAPTER_MINIMUM if key in metadata}


def title_of(metadata: Mapping[str, str], stem: str) -> str:
    """What modelspec.merged_from calls a file: the title it has, else its name."""
    return metadata.get("modelspec.title") or stem


def read_arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """ss_network_args as a dictionary; empty where there is none or it cannot be read."""
    try:
        read = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file that becomes another file."""
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
    made = {f"modelspec.{key}": value for key, value in {**spec, **about.model}.items()}
    return made | {key: agreed[key] for key in stated}
