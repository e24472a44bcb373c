"""The kinds of adapters, one row each; their code is imported when one is used. No torch at module level."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

from networks.adapter import AdapterError, Argument, Kind
from networks.argument_values import choice, switch, whole

if TYPE_CHECKING:
    from networks.settings import NetworkSettings

_LORA_MARKS = frozenset({"lora_down.weight", "lora_up.weight", "lora_mid.weight"})
_UP = frozenset({"lora_up"})
_TUCKER = Argument("use_tucker", switch, "Tucker decomposition of the kernels of 3x3 convolutions", False)
_CONV = frozenset({"conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas"})


def _complete_dylora(settings: NetworkSettings) -> NetworkSettings:
    """Windows of `unit` ranks have to fill every layer's rank, and as in kohya's all layers have the same one."""
    unit = settings.own["unit"]
    odd = [dim for dim in (settings.dim, *(settings.block_dims or ())) if dim % unit]
    if odd:
        raise AdapterError(f"unit={unit} does not divide {odd[0]}, the rank", "Choose a divisor of every rank.")
    if settings.conv_dim not in (None, settings.dim):
        raise AdapterError(
            f"conv_dim={settings.conv_dim} differs from network_dim {settings.dim}",
            "networks.dylora trains all layers with one rank: give both the same value.",
        )
    return settings


def _complete_oft(settings: NetworkSettings) -> NetworkSettings:
    """Convolutions are turned like all other layers: as many blocks, the same constraint."""
    if settings.own["enable_conv"]:
        return replace(settings, conv_dim=settings.dim, conv_alpha=settings.alpha)
    return settings


def _refuse_training(settings: NetworkSettings) -> NetworkSettings:
    name = settings.kind.name
    argument = "train_norm=True" if name == "norm" else f"algo={name}"
    raise AdapterError("such files are read here, not trained", f"Train with lycoris.kohya and {argument}.")


KINDS: tuple[Kind, ...] = (
    Kind(
        "lora",
        "networks.lora",
        "LoRA (LoCon on convolutions, DoRA)",
        key_suffixes=_LORA_MARKS,
        arguments=(
            Argument(
                "init",
                choice("default", "pissa"),
                "default: the adapter adds 0 at the start; pissa: it starts as the largest singular values of the base",
                "default",
            ),
        ),
        lora_plus=_UP,
    ),
    Kind("lora_fa", "networks.lora_fa", "LoRA-FA: lora_down is frozen", frozenset(), file_kind="lora"),
    Kind(
        "dylora",
        "networks.dylora",
        "DyLoRA: usable at every multiple of `unit` of its rank",
        key_suffixes=frozenset(),
        arguments=(Argument("unit", whole(least=1), "ranks trained at once; divides the rank", 1),),
        decomposes=False,
        file_kind="lora",
        lora_plus=_UP,
        unsupported=frozenset({"rank_dropout", "conv_block_dims"}),
        complete_settings=_complete_dylora,
    ),
    Kind(
        "oft",
        "networks.oft",
        "OFT: blocks of the output are rotated",
        key_suffixes=frozenset({"oft_blocks"}),
        arguments=(
            Argument("enable_all_linear", switch, "all linear layers of the transformers, not attention alone", False),
            Argument("enable_conv", switch, "the residual blocks and their convolutions too", False),
        ),
        prefix="oft",
        decomposes=False,
        rescales=False,
        parts=frozenset({"unet"}),
        unsupported=_CONV | {"dropout", "rank_dropout", "use_rslora"},
        complete_settings=_complete_oft,
    ),
    Kind(
        "loha",
        "networks.loha",
        "LoHa: the Hadamard product of two LoRAs",
        key_suffixes=frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        arguments=(_TUCKER,),
        lora_plus=frozenset({"hada_w2_a"}),
        unsupported=frozenset({"dropout"}),
    ),
    Kind(
        "lokr",
        "networks.lokr",
        "LoKr: a Kronecker product",
        key_suffixes=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"}),
        arguments=(
            Argument("factor", whole(least=-1), "size of the small matrix; -1: as near to a square as can be", -1),
            Argument("decompose_both", switch, "the small matrix may be of low rank too", False),
            Argument("full_matrix", switch, "the large matrix is whole, whatever the rank", False),
            Argument(
                "unbalanced_factorization", switch, "of the outputs, the larger factor is the small matrix's", False
            ),
            _TUCKER,
        ),
        lora_plus=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b"}),
        unsupported=frozenset({"dropout"}),
    ),
    Kind(
        "ia3",
        "networks.ia3",
        "(IA)3: one factor per channel",
        key_suffixes=frozenset({"on_input"}),
        arguments=(
            Argument(
                "enable_all", switch, "all layers, not only keys, values and feed-forward networks' second ones", False
            ),
            Argument("train_on_input", switch, "factors for inputs; if not given, as the paper has it for each layer"),
        ),
        convolutions=False,
        decomposes=False,
        unsupported=_CONV | {"dropout", "rank_dropout", "use_rslora", "block_alphas"},
    ),
    Kind(
        "full",
        "networks.full",
        "a layer's whole change (LyCORIS)",
        key_suffixes=frozenset({"diff", "diff_b"}),
        decomposes=False,
        complete_settings=_refuse_training,
    ),
    Kind(
        "norm",
        "networks.norm",
        "a normalisation's change (LyCORIS)",
        key_suffixes=frozenset({"w_norm", "b_norm"}),
        decomposes=False,
        complete_settings=_refuse_training,
    ),
    Kind(
        "glora",
        "networks.glora",
        "GLoRA (LyCORIS)",
        key_suffixes=frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight"}),
        decomposes=False,
        complete_settings=_refuse_training,
    ),
)


def find_kind(name: str) -> Kind | None:
    """The kind by --network_module ("networks.lora"), or None: then it may be somebody else's module."""
    return next((kind for kind in KINDS if kind.module == name), None)


def kind_by_name(name: str) -> Kind:
    """The kind by its name ("lora"). KeyError."""
    return {kind.name: kind for kind in KINDS}[name]


def mark_of(key: str) -> str:
    """What a file's key says of the tensor's role in its layer: all behind the first dot."""
    return key.partition(".")[2]


def detect_kind(keys: Collection[str]) -> Kind:
    """The kind that a file, or one layer of it, is of, by its keys (`lora_unet_….lora_down.weight`).

    AdapterError if it is none of ours, or if the keys are of more than one kind.
    """
    marks = {mark_of(key) for key in keys}
    found = [kind for kind in KINDS if kind.key_suffixes & marks]
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
    return importlib.import_module(kind.module)
