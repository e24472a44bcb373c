"""The kinds of adapters, one row each; their code is imported when one is used. No torch at module level."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from types import ModuleType
from typing import TYPE_CHECKING

from networks.adapter import AdapterError, Argument, Kind
from networks.values import choice, switch, whole

if TYPE_CHECKING:
    from networks.settings import NetworkSettings

_LORA_MARKS = frozenset({"lora_down.weight", "lora_up.weight", "lora_mid.weight"})
_UP = frozenset({"lora_up.weight"})
_LYCORIS = (Argument("use_tucker", switch, "Tucker decomposition of the kernels of 3x3 convolutions", False),)


def _settle_dylora(settings: NetworkSettings) -> NetworkSettings:
    """DyLoRA draws one window of ranks for all layers, so all have the same number."""
    unit = settings.own["unit"]
    if unit < 1 or settings.dim % unit:
        raise AdapterError(f"unit={unit} does not divide network_dim {settings.dim}", "Choose a divisor of it.")
    if settings.conv_dim not in (None, settings.dim):
        raise AdapterError(
            f"conv_dim={settings.conv_dim} differs from network_dim {settings.dim}",
            "networks.dylora trains all layers with one rank: give both the same value.",
        )
    return settings


KINDS: tuple[Kind, ...] = (
    Kind(
        "lora",
        "networks.lora",
        "LoRA (LoCon on convolutions, DoRA)",
        marks=_LORA_MARKS,
        arguments=(
            Argument(
                "init",
                choice("default", "pissa"),
                "default: the adapter adds 0 at the start; pissa: it starts as the largest singular values of the base",
                "default",
            ),
        ),
        plus=_UP,
    ),
    Kind("lora_fa", "networks.lora_fa", "LoRA-FA: lora_down is frozen", frozenset(), family="lora"),
    Kind(
        "dylora",
        "networks.dylora",
        "DyLoRA: usable at every multiple of `unit` of its rank",
        marks=frozenset(),
        arguments=(Argument("unit", whole(least=1), "ranks trained at once; divides the rank", 1),),
        family="lora",
        plus=_UP,
        settle=_settle_dylora,
    ),
    Kind(
        "oft",
        "networks.oft",
        "OFT: blocks of the output are rotated",
        marks=frozenset({"oft_blocks"}),
        arguments=(
            Argument("enable_all_linear", switch, "all linear layers of the transformers, not attention alone", False),
            Argument("enable_conv", switch, "convolutions too", False),
        ),
        prefix="oft",
        decomposes=False,
        parts=frozenset({"unet"}),
    ),
    Kind(
        "loha",
        "networks.loha",
        "LoHa: the Hadamard product of two LoRAs",
        marks=frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        arguments=_LYCORIS,
    ),
    Kind(
        "lokr",
        "networks.lokr",
        "LoKr: a Kronecker product",
        marks=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"}),
        arguments=_LYCORIS,
    ),
    Kind("ia3", "networks.ia3", "(IA)3: one factor per channel", marks=frozenset({"on_input"}), decomposes=False),
)


def find(name: str) -> Kind | None:
    """The kind by --network_module ("networks.lora"), or None: then it may be somebody else's module."""
    return next((kind for kind in KINDS if kind.file == name), None)


def named(name: str) -> Kind:
    """The kind by its name ("lora"). KeyError."""
    return {kind.name: kind for kind in KINDS}[name]


def mark_of(key: str) -> str:
    """What a file's key says of the tensor's role in its layer: all behind the first dot."""
    return key.partition(".")[2]


def recognise(keys: Collection[str]) -> Kind:
    """The kind that a file, or one layer of it, is of, by its keys (`lora_unet_….lora_down.weight`).

    AdapterError if it is none of ours, or if the keys are of more than one kind.
    """
    marks = {mark_of(key) for key in keys}
    found = [kind for kind in KINDS if kind.marks & marks]
    if len(found) == 1:
        return found[0]
    if found:
        titles = ", ".join(kind.name for kind in found)
        raise AdapterError(f"its layers are of several kinds: {titles}")
    some = ", ".join(sorted(marks)[:5]) or "no tensors"
    raise AdapterError(
        f"this is no kind of adapter that is known here (it has {some})",
        f"Known are: {', '.join(kind.name for kind in KINDS)}, in kohya's and LyCORIS' layout.",
    )


def load_kind(kind: Kind) -> ModuleType:
    """The module of a kind, with its functions `create` (adapter.Create) and `load` (adapter.Load)."""
    return importlib.import_module(kind.file)
