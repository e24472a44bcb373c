"""Where each format keeps the ranks and alphas of a LoRA: a tensor beside each layer, or one configuration of PEFT's.

Formats: sd-scripts networks/lora.py; PEFT's LoraConfig (r, lora_alpha and the patterns for layers that differ);
diffusers' `lora_adapter_metadata`, which is the latter with the module's name before each entry.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from networks.adapter import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DIFFUSERS_KEY = "lora_adapter_metadata"
# How a kohya file had its alphas, so that it comes back bit for bit: JSON, name of a layer ("": all others) -> form.
FORMS_KEY = "kohya_alphas"
NOT_KOHYAS = frozenset({DIFFUSERS_KEY, FORMS_KEY, "format"})
MISSING = "missing"  # no alpha: means the rank
_ZERO = " 0"  # behind a dtype: an alpha of 0, which means the rank as well


def read_alpha(tensor: Tensor | None, rank: int) -> tuple[float, str]:
    """A kohya file's alpha and the form it has there: its dtype, or that it is missing or 0."""
    if tensor is None:
        return float(rank), MISSING
    alpha, form = float(tensor), str(tensor.dtype).removeprefix("torch.")
    return (float(rank), form + _ZERO) if alpha == 0 else (alpha, form)


def alpha_tensor(alpha: float, form: str, rank: int, dtype: torch.dtype) -> Tensor | None:
    """The alpha as the form says, as far as it still means this number; in `dtype` if nothing is known of it."""
    import torch

    if alpha == rank and form == MISSING:
        return None
    name = form.removesuffix(_ZERO) if form != MISSING else ""
    if alpha == rank and form.endswith(_ZERO):
        alpha = 0.0
    kind = getattr(torch, name, None) if name else dtype
    made = torch.tensor(alpha, dtype=kind if isinstance(kind, torch.dtype) else torch.float32)
    return made if float(made) == alpha else torch.tensor(alpha, dtype=torch.float32)


def write_forms(forms: Mapping[str, str]) -> dict[str, str]:
    """The metadata entry for the forms of all layers; none if nothing is known."""
    known = {name: form for name, form in forms.items() if form}
    if not known:
        return {}
    usual = Counter(known.values()).most_common(1)[0][0]
    others = {name: form for name, form in sorted(known.items()) if form != usual}
    return {FORMS_KEY: json.dumps({"": usual} | others)}


def read_forms(metadata: Mapping[str, str]) -> Callable[[str], str]:
    """The form of a layer by its name, as `write_forms` noted it; "" if it is not known."""
    try:
        noted = json.loads(metadata.get(FORMS_KEY, "{}"))
    except ValueError:
        noted = {}
    forms = noted if isinstance(noted, dict) else {}
    return lambda name: str(forms.get(name, forms.get("", "")))


def make_config(layers: Mapping[str, tuple[int, float]], *, use_dora: bool) -> dict[str, Any]:
    """PEFT's configuration for layers with (rank, alpha) by path: the commonest, and patterns for those that differ."""
    rank = Counter(rank for rank, _ in layers.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {path: own for path, (own, _) in sorted(layers.items()) if own != rank},
        "alpha_pattern": {path: _number(own) for path, (_, own) in sorted(layers.items()) if own != alpha},
        "target_modules": sorted(layers),
        "use_dora": use_dora,
        "use_rslora": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def alpha_of(config: Mapping[str, Any] | None, paths: Sequence[str], rank: int) -> float:
    """The alpha of a layer, of which `paths` are the spellings; the rank without a configuration. AdapterError."""
    if config is None:
        return float(rank)
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
    if kind != "LORA":
        raise AdapterError(f"peft_type is {kind}, not LORA", "Only LoRA and DoRA can be converted.")
    try:
        patterns = config.get("alpha_pattern") or {}
        alpha = next((value for key, value in patterns.items() if _fits(key, paths)), config.get("lora_alpha", 8))
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise AdapterError(
            f"lora_alpha or alpha_pattern cannot be read: {error}", "Get the file or folder again."
        ) from error


def _fits(pattern: str, paths: Sequence[str]) -> bool:
    """Whether PEFT takes this pattern for a layer: a regular expression for the end of its path."""
    return any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths)


def from_diffusers_metadata(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configurations by module that diffusers notes in a file. Empty if there is no note. AdapterError."""
    text = metadata.get(DIFFUSERS_KEY)
    if text is None:
        return {}
    try:
        entries = dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{DIFFUSERS_KEY} is no JSON object: {error}", "Get the file again.") from error
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        module, _, name = str(key).partition(".")
        configs.setdefault(module, {})[name] = value
    return configs


def to_diffusers_metadata(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The same, as diffusers' save_lora_weights writes it."""
    entries = {f"{module}.{name}": value for module, config in configs.items() for name, value in config.items()}
    return {"format": "pt", DIFFUSERS_KEY: json.dumps(entries, indent=2, sort_keys=True)}


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha
