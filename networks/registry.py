"""The table of adapter kinds. A kind's code is imported when it is used. No torch at module level."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

from networks import shapes
from networks.adapter import AdapterError, Argument, Kind
from networks.argument_values import choice, switch, whole

if TYPE_CHECKING:
    from networks.settings import NetworkSettings

_LORA_MARKS = frozenset({"lora_down.weight", "lora_up.weight", "lora_mid.weight"})
_UP = frozenset({"lora_up"})
_ALL_READERS = frozenset({"ComfyUI", "A1111", "diffusers"})
_TUCKER = Argument("use_tucker", switch, "Tucker decomposition of 3x3 convolution kernels", False)
_CONV = frozenset({"conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas"})


def _complete_dylora(settings: NetworkSettings) -> NetworkSettings:
    """Check that `unit` divides every rank and that conv_dim is the rank of all other layers, as in kohya's."""
    unit = settings.own["unit"]
    indivisible = [dim for dim in (settings.dim, *(settings.block_dims or ())) if dim % unit]
    if indivisible:
        raise AdapterError(f"unit={unit} does not divide the rank {indivisible[0]}", "use a divisor of every rank")
    if settings.conv_dim not in (None, settings.dim):
        raise AdapterError(
            f"conv_dim={settings.conv_dim} differs from network_dim {settings.dim}",
            "use the same value for both: networks.dylora trains all layers with one rank",
        )
    return settings


def _complete_oft(settings: NetworkSettings) -> NetworkSettings:
    """Give convolutions the number of blocks and the constraint of the other layers."""
    if settings.own["enable_conv"]:
        return replace(settings, conv_dim=settings.dim, conv_alpha=settings.alpha)
    return settings


def _refuse_training(settings: NetworkSettings) -> NetworkSettings:
    name = settings.kind.name
    argument = "train_norm=True" if name == "norm" else f"algo={name}"
    raise AdapterError(
        "this kind can be loaded but not trained", f"use --network_module lycoris.kohya with {argument} to train it"
    )


KINDS: tuple[Kind, ...] = (
    Kind(
        "lora",
        "networks.lora",
        "LoRA",
        key_suffixes=_LORA_MARKS,
        arguments=(
            Argument(
                "init",
                choice("default", "pissa"),
                "default: the adapter starts as 0; pissa: it starts as the largest singular values of the base model",
                "default",
            ),
        ),
        lora_plus=_UP,
        readers=_ALL_READERS,
        shapes=shapes.lora,
    ),
    Kind(
        "lora_fa",
        "networks.lora_fa",
        "LoRA-FA: lora_down is frozen",
        key_suffixes=frozenset(),
        file_kind="lora",
        readers=_ALL_READERS,
        shapes=shapes.lora,
        frozen=frozenset({"lora_down.weight"}),
        no_delta_average="lora_down is frozen, so the average of the weights is that of ΔW",
    ),
    Kind(
        "dylora",
        "networks.dylora",
        "DyLoRA: usable at every multiple of `unit` up to its rank",
        key_suffixes=frozenset(),
        arguments=(Argument("unit", whole(least=1), "ranks trained together; must divide the rank", 1),),
        decomposes=False,
        file_kind="lora",
        lora_plus=_UP,
        unsupported=frozenset({"rank_dropout", "conv_block_dims"}),
        readers=_ALL_READERS,
        complete_settings=_complete_dylora,
        shapes=shapes.lora,
        no_delta_average="each of its ranks is trained to be usable with those before it, and an SVD mixes them",
    ),
    Kind(
        "oft",
        "networks.oft",
        "OFT: rotates blocks of the outputs",
        key_suffixes=frozenset({"oft_blocks", "oft_diag", "oft_R.weight"}),
        arguments=(
            Argument("enable_all_linear", switch, "all linear layers of the transformers, not only attention", False),
            Argument("enable_conv", switch, "also the residual blocks and their convolutions", False),
        ),
        other_prefix="oft",
        decomposes=False,
        rescales=False,
        parts=frozenset({"unet"}),
        unsupported=_CONV | {"dropout", "rank_dropout", "use_rslora"},
        complete_settings=_complete_oft,
        shapes=shapes.oft,
        is_scaled=False,
        no_delta_average="an average of rotations is no rotation",
    ),
    Kind(
        "loha",
        "networks.loha",
        "LoHa: the Hadamard product of two LoRAs",
        key_suffixes=frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        arguments=(_TUCKER,),
        lora_plus=frozenset({"hada_w2_a"}),
        unsupported=frozenset({"dropout"}),
        shapes=shapes.loha,
        no_delta_average="the singular values of ΔW give no Hadamard product",
    ),
    Kind(
        "lokr",
        "networks.lokr",
        "LoKr: a Kronecker product",
        key_suffixes=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"}),
        arguments=(
            Argument("factor", whole(least=-1), "size of the small matrix; -1: factors as equal as possible", -1),
            Argument("decompose_both", switch, "the small matrix may also be of low rank", False),
            Argument("full_matrix", switch, "do not decompose the large matrix, whatever the rank", False),
            Argument(
                "unbalanced_factorization", switch, "the small matrix gets the larger factor of the outputs", False
            ),
            _TUCKER,
        ),
        lora_plus=frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b"}),
        unsupported=frozenset({"dropout"}),
        shapes=shapes.lokr,
        no_delta_average="the singular values of ΔW give no Kronecker product",
    ),
    Kind(
        "ia3",
        "networks.ia3",
        "(IA)3: one factor per channel",
        key_suffixes=frozenset({"on_input"}),
        arguments=(
            Argument(
                "enable_all",
                switch,
                "all layers, not only keys, values and the second layers of feed-forward networks",
                False,
            ),
            Argument("train_on_input", switch, "scale inputs instead of outputs; default: as in the paper, by layer"),
        ),
        convolutions=False,
        decomposes=False,
        unsupported=_CONV | {"dropout", "rank_dropout", "use_rslora", "block_alphas"},
        readers=frozenset({"A1111"}),
        shapes=shapes.ia3,
        is_scaled=False,
        has_dim=False,
        no_delta_average="its ΔW is linear in its factors, so the average of the weights is that of ΔW",
    ),
    Kind(
        "full",
        "networks.full",
        "full weight difference (LyCORIS)",
        key_suffixes=frozenset({"diff", "diff_b"}),
        decomposes=False,
        complete_settings=_refuse_training,
    ),
    Kind(
        "norm",
        "networks.norm",
        "difference of a normalisation layer (LyCORIS)",
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
    """The kind of a --network_module ("networks.lora"), or None: it may be a third-party module."""
    return next((kind for kind in KINDS if kind.module == name), None)


def kind_by_name(name: str) -> Kind:
    """The kind with this name ("lora"). KeyError."""
    return {kind.name: kind for kind in KINDS}[name]


def detect_kind(keys: Collection[str]) -> Kind:
    """The kind of a file, or of one layer of it, by its keys (`lora_unet_….lora_down.weight`).

    AdapterError for an unknown kind, and for keys of more than one kind.
    """
    suffixes = {key.partition(".")[2] for key in keys}
    matches = [kind for kind in KINDS if kind.key_suffixes & suffixes]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise AdapterError(f"its layers mix several kinds: {', '.join(kind.name for kind in matches)}")
    raise AdapterError(
        f"this kind of adapter is not supported (its keys: {', '.join(sorted(suffixes)[:5]) or 'none'})",
        f"use one of {', '.join(kind.name for kind in KINDS)}, in kohya's or LyCORIS' format",
    )


def load_kind(kind: Kind) -> ModuleType:
    """Import the module of a kind, with its functions `create` (adapter.Create) and `load` (adapter.Load)."""
    return importlib.import_module(kind.module)
