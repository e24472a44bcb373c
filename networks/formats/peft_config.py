"""Ranks and alphas of a LoRA in each format: a tensor per layer, or one configuration of PEFT's.

Formats: sd-scripts networks/lora.py; PEFT's LoraConfig (r, lora_alpha and the patterns for layers that differ);
diffusers' `lora_adapter_metadata`, which is PEFT's with the module's name before each entry.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.bounded import json_of
from library.limits import PATTERNS, PATTERNS_STATES
from library.messages import shortened
from networks.adapter import AdapterError
from networks.formats.name_patterns import NamePattern

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DIFFUSERS_KEY = "lora_adapter_metadata"
# How a kohya file stored its alphas, to restore it bit for bit: JSON, name of a layer ("": all others) -> form.
FORMS_KEY = "kohya_alphas"
NOT_KOHYAS = frozenset({DIFFUSERS_KEY, FORMS_KEY, "format"})
MISSING = "missing"  # no alpha: it is the rank
_ZERO = " 0"  # after a dtype: an alpha of 0, which also stands for the rank


def read_alpha(tensor: Tensor | None, rank: int) -> tuple[float, str]:
    """A kohya file's alpha and its form: the dtype, and whether it is missing or 0."""
    if tensor is None:
        return float(rank), MISSING
    alpha, form = float(tensor), str(tensor.dtype).removeprefix("torch.")
    return (float(rank), form + _ZERO) if alpha == 0 else (alpha, form)


def alpha_tensor(alpha: float, form: str, rank: int, dtype: torch.dtype) -> Tensor | None:
    """The alpha in its form, if that still represents this value; in `dtype` if the form is unknown."""
    import torch

    if alpha == rank and form == MISSING:
        return None
    name = form.removesuffix(_ZERO) if form != MISSING else ""
    if alpha == rank and form.endswith(_ZERO):
        alpha = 0.0
    kind = getattr(torch, name, None) if name else dtype
    tensor = torch.tensor(alpha, dtype=kind if isinstance(kind, torch.dtype) else torch.float32)
    return tensor if float(tensor) == alpha else torch.tensor(alpha, dtype=torch.float32)


def write_forms(forms: Mapping[str, str]) -> dict[str, str]:
    """The metadata entry for the forms of all layers; empty if none is known."""
    known = {name: form for name, form in forms.items() if form}
    if not known:
        return {}
    usual = Counter(known.values()).most_common(1)[0][0]
    others = {name: form for name, form in sorted(known.items()) if form != usual}
    return {FORMS_KEY: json.dumps({"": usual} | others)}


def read_forms(metadata: Mapping[str, str]) -> Callable[[str], str]:
    """A function from a layer's name to its form, as saved by `write_forms`; "" if unknown."""
    try:
        saved = json_of(metadata.get(FORMS_KEY, "{}"))
    except ValueError:
        saved = {}
    forms = saved if isinstance(saved, dict) else {}
    return lambda name: str(forms.get(name, forms.get("", "")))


def make_config(layers: Mapping[str, tuple[int, float]], *, use_dora: bool) -> dict[str, Any]:
    """PEFT's configuration for layers with (rank, alpha) by path: the most common values, and patterns for the rest."""
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


@dataclass(frozen=True)
class Alphas:
    """The alphas that a configuration gives. `patterns`: in its order, the first that fits a layer counts."""

    usual: float
    patterns: tuple[tuple[NamePattern, float], ...]
    by_root: bool  # scaled by the root of the rank (rsLoRA)

    def of(self, paths: Sequence[str], rank: int) -> float:
        """The alpha of a layer (`paths`: its possible paths)."""
        fitting = (value for pattern, value in self.patterns if any(map(pattern.fits, paths)))
        return next(fitting, self.usual) * (math.sqrt(rank) if self.by_root else 1.0)


def read_alphas(config: Mapping[str, Any]) -> Alphas:
    """The alphas of a configuration. AdapterError."""
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
    if kind != "LORA":
        raise AdapterError(f"peft_type is {shortened(kind)}, not LORA", "convert only LoRA and DoRA")
    try:
        given = dict(config.get("alpha_pattern") or {})
        if len(given) > PATTERNS:
            raise ValueError(f"alpha_pattern has {len(given)} entries, more than {PATTERNS}")
        patterns: list[tuple[NamePattern, float]] = []
        states = 0
        for name, alpha in given.items():
            patterns.append((NamePattern(str(name)), _finite(alpha)))
            states += patterns[-1][0].size
            if states > PATTERNS_STATES:  # counted as they are read, for that takes time
                raise ValueError("alpha_pattern has too many patterns: name the layers instead")
        return Alphas(_finite(config.get("lora_alpha", 8)), tuple(patterns), bool(config.get("use_rslora")))
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterError(
            f"lora_alpha or alpha_pattern cannot be read: {error}",
            "get the file or folder again, or write the names of layers in place of patterns",
        ) from error


def _finite(alpha: Any) -> float:
    if not math.isfinite(number := float(alpha)):
        raise ValueError(f"an alpha is {number}")
    return number


def from_diffusers_metadata(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configurations by module in the metadata of a diffusers file; empty if missing. AdapterError."""
    text = metadata.get(DIFFUSERS_KEY)
    if text is None:
        return {}
    try:
        entries = dict(json_of(text))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{DIFFUSERS_KEY} is not a JSON object: {error}", "get the file again") from error
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        module, _, name = str(key).partition(".")
        configs.setdefault(module, {})[name] = value
    return configs


def to_diffusers_metadata(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The metadata of configurations by module, as diffusers' save_lora_weights writes it."""
    entries = {f"{module}.{name}": value for module, config in configs.items() for name, value in config.items()}
    return {"format": "pt", DIFFUSERS_KEY: json.dumps(entries, indent=2, sort_keys=True)}


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha
