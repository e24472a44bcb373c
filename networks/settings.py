"""What was asked of a network: --network_dim, --network_alpha, --network_args … read and checked. No torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from networks.adapter import AdapterError, Argument, Kind
from networks.argument_values import curve, factors, number, numbers, switch, whole, whole_numbers
from networks.registry import KINDS, find_kind

DEFAULT_DIM = 4

COMMON: tuple[Argument, ...] = (
    Argument("conv_dim", whole(least=0), "rank on 3x3 convolutions (LoCon); 0: none on them"),
    Argument("conv_alpha", number(least=0), "alpha on 3x3 convolutions (1 if not given)"),
    Argument("dropout", number(least=0, below=1), "as --network_dropout"),
    Argument("rank_dropout", number(least=0, below=1), "probability with which a rank is left out for a sample", 0.0),
    Argument("module_dropout", number(least=0, below=1), "probability with which a layer's adapter rests a step", 0.0),
    Argument("block_dims", whole_numbers, "rank by block of the U-Net; 0: no adapter in that block"),
    Argument("block_alphas", numbers, "alpha by block of the U-Net"),
    Argument("conv_block_dims", whole_numbers, "rank on 3x3 convolutions by block of the U-Net"),
    Argument("conv_block_alphas", numbers, "alpha on 3x3 convolutions by block of the U-Net"),
    Argument("down_lr_weight", curve, "factors on the learning rate of the down blocks, or the name of a curve"),
    Argument("mid_lr_weight", factors, "factor on the learning rate of the middle block"),
    Argument("up_lr_weight", curve, "factors on the learning rate of the up blocks, or the name of a curve"),
    Argument("block_lr_zero_threshold", number(), "a block whose factor is not above this gets no adapter", 0.0),
    Argument("loraplus_lr_ratio", number(least=0), "LoRA+: how much faster lora_up learns than lora_down"),
    Argument("loraplus_unet_lr_ratio", number(least=0), "LoRA+ for the U-Net"),
    Argument("loraplus_text_encoder_lr_ratio", number(least=0), "LoRA+ for the text encoders"),
    Argument("use_dora", switch, "DoRA: length and direction of the weight's rows are trained apart", False),
    Argument("use_rslora", switch, "rsLoRA: alpha is divided by the root of the rank, not by the rank", False),
)
# Blocks of a U-Net -> those on the way down (as many as up), in the middle, and at either end: counted by the original
# naming, where the embeddings and what comes out are blocks of their own. 25, by diffusers' naming: 12, 1, 0.
_SIDES: Mapping[int, tuple[int, int, int]] = MappingProxyType({23: (9, 3, 1), 29: (12, 3, 1)})
_LORAPLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")


@dataclass(frozen=True)
class NetworkSettings:
    """All that shapes a network and its training. Tuples by block have one item for each block of the U-Net."""

    kind: Kind
    dim: int = DEFAULT_DIM
    alpha: float = 1.0  # 0: the rank of each layer, and so for all alphas
    dropout: float = 0.0
    conv_dim: int | None = None  # None: no adapters on 3x3 convolutions
    conv_alpha: float = 1.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    block_weights: tuple[float, ...] | None = None  # factors on the learning rate; 0: no adapter there
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    use_dora: bool = False
    use_rslora: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def convolutions(self) -> bool:
        """Whether 3x3 convolutions are adapted."""
        return self.conv_dim is not None or self.conv_block_dims is not None

    def rank(self, *, conv: bool, block: int | None) -> tuple[int, float]:
        """(dim, alpha) for a layer; dim 0: no adapter. `conv`: a kernel larger than 1x1; `block`: None outside of all
        blocks. This alpha is never 0."""
        if block is not None and self.block_weights is not None and self.block_weights[block] == 0:
            return 0, 0.0
        dims, alphas = (self.conv_block_dims, self.conv_block_alphas) if conv else (self.block_dims, self.block_alphas)
        dim, alpha = (self.conv_dim or 0, self.conv_alpha) if conv else (self.dim, self.alpha)
        if block is not None and dims is not None:
            dim = dims[block]
        if block is not None and alphas is not None:
            alpha = alphas[block]
        return dim, alpha or float(dim)

    def ratio(self, part: str) -> float | None:
        """LoRA+'s ratio for a module of the model ("text_encoder_2"), or None."""
        is_text = part.startswith("text_encoder")
        special = self.loraplus_text_encoder_lr_ratio if is_text else self.loraplus_unet_lr_ratio
        return self.loraplus_lr_ratio if special is None else special


def known_arguments(kind: Kind) -> tuple[Argument, ...]:
    """What --network_args may hold for a kind: the general ones that mean something to it, and its own."""
    refused = kind.unsupported | (frozenset() if kind.decomposes else {"use_dora"})
    if not kind.convolutions:
        refused |= {item.name for item in COMMON if item.name.startswith("conv_")}
    if not kind.lora_plus:
        refused |= set(_LORAPLUS)
    return (*(item for item in COMMON if item.name not in refused), *kind.arguments)


Mistake = tuple[str, str]


def read_settings(
    module: str,
    *,
    dim: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    arguments: Sequence[str] = (),
    blocks: int = 25,
) -> tuple[NetworkSettings, tuple[Mistake, ...]]:
    """The settings, and what is wrong with what was given as (what, remedy): all of it, for the user.

    module     --network_module of one of ours (registry.find knows it; else KeyError)
    dim        --network_dim (None: 4); alpha --network_alpha (0 or None: the dim); dropout --network_dropout
    arguments  --network_args, "key=value" each; an empty value is as if the key had not been given
    blocks     how many blocks the model's U-Net has (25 for SD1/2, 23 for SDXL), for lists by block; 0: none
    """
    kind = find_kind(module)
    if kind is None:
        raise KeyError(module)
    mistakes: list[Mistake] = []
    values = _read(kind, arguments, mistakes)
    own = {item.name: values.get(item.name, item.default) for item in kind.arguments}
    for name, value in (("--network_dim", dim), ("--network_alpha", alpha)):
        if value is not None and value < 0:
            mistakes.append((f"{name} {value:g} is negative", "Give 1 or more."))
    if dropout and "dropout" in kind.unsupported:
        mistakes.append((f"--network_dropout {dropout:g} has no meaning for {kind.module}", "Take it out."))
    rank = dim if dim is not None and dim > 0 else DEFAULT_DIM
    lists = _lists(values, blocks, mistakes)
    general = {
        name: values[name]
        for name in ("rank_dropout", "module_dropout", "use_dora", "use_rslora", *_LORAPLUS)
        if name in values
    }
    settings = NetworkSettings(
        kind=kind,
        dim=rank,
        alpha=float(max(alpha or 0, 0)),
        dropout=values.get("dropout", dropout or 0.0),
        conv_dim=values.get("conv_dim") or None,
        conv_alpha=float(values.get("conv_alpha", 1.0)),
        block_weights=_weights(values, blocks, mistakes),
        own=own,
        **lists,
        **general,
    )
    mistakes += _combined(settings, values)
    if kind.complete_settings and not mistakes:
        try:
            settings = kind.complete_settings(settings)
        except AdapterError as error:
            mistakes.append((f"--network_module {kind.module}: {error}", error.remedy))
    return settings, tuple(mistakes)


def _read(kind: Kind, arguments: Sequence[str], mistakes: list[Mistake]) -> dict[str, Any]:
    """name -> value of all that could be read."""
    known = {item.name: item for item in known_arguments(kind)}
    values: dict[str, Any] = {}
    for given in arguments:
        name, equals, text = (piece.strip() for piece in given.partition("="))
        argument = known.get(name)
        if not equals:
            mistakes.append((f"--network_args {given!r} has no =", "Write key=value, such as conv_dim=8."))
        elif argument is None:
            mistakes.append((f"--network_args {given}: {_unknown(kind, name)}", _remedy(known, name)))
        elif text and text.lower() != "none":
            try:
                values[name] = argument.read(text)
            except ValueError as error:
                mistakes.append((f"--network_args {given}: {text!r} {error}", f"{name}: {argument.help}."))
    return values


def _unknown(kind: Kind, name: str) -> str:
    if any(item.name == name for item in COMMON):
        return f"{name} has no meaning for {kind.module}"
    others = [other.module for other in KINDS if any(item.name == name for item in other.arguments)]
    if others:
        return f"{kind.module} has no argument {name}; it belongs to {', '.join(others)}"
    return f"{kind.module} has no argument {name}"


def _remedy(known: Mapping[str, Argument], name: str) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if near:
        return f"Did you mean {near[0]}?"
    if name in ("algo", "preset"):
        return "It belongs to --network_module lycoris.kohya."
    return f"Take it out. Known are {', '.join(known)}."


def _lists(values: Mapping[str, Any], blocks: int, mistakes: list[Mistake]) -> dict[str, Any]:
    lists: dict[str, Any] = {}
    for name in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
        if name not in values:
            continue
        lists[name] = values[name]
        if len(values[name]) != blocks:
            mistakes.append(
                (
                    f"--network_args {name} has {len(values[name])} items",
                    f"This model has {blocks} blocks: one item each.",
                )
            )
            del lists[name]
    return lists


def _weights(values: Mapping[str, Any], blocks: int, mistakes: list[Mistake]) -> tuple[float, ...] | None:
    """Factors by block from down_, mid_ and up_lr_weight; 1 where nothing is said."""
    names = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
    if not any(name in values for name in names):
        return None
    if not blocks:
        mistakes.append(
            ("--network_args down_, mid_, up_lr_weight: this model is not divided into blocks", "Take them out.")
        )
        return None
    sides, middle, rim = _SIDES.get(blocks, ((blocks - 1) // 2, 1, 0))
    threshold = values.get("block_lr_zero_threshold", 0.0)
    found: list[float] = []
    for name, count in zip(names, (sides, middle, sides), strict=True):
        make: Callable[[int], tuple[float, ...]] = values.get(name, lambda count: (1.0,) * count)
        found += [weight if weight > threshold else 0.0 for weight in make(count)]
    if not any(found):
        mistakes.append(("--network_args: the learning rate of every block is 0", "Leave at least one block above 0."))
    return (*(1.0,) * rim, *found, *(1.0,) * rim)  # of the ends nothing is said


def _combined(settings: NetworkSettings, values: Mapping[str, Any]) -> list[Mistake]:
    """What is wrong with arguments together."""
    mistakes: list[Mistake] = []
    if "conv_alpha" in values and not settings.convolutions:
        mistakes.append(("--network_args conv_alpha without conv_dim", "Give conv_dim too, or take it out."))
    if settings.conv_block_alphas is not None and not settings.convolutions:
        mistakes.append(
            ("--network_args conv_block_alphas without conv_block_dims", "Give conv_block_dims or conv_dim.")
        )
    if "block_lr_zero_threshold" in values and settings.block_weights is None:
        mistakes.append(
            ("--network_args block_lr_zero_threshold has nothing to work on", "Give down_, mid_ or up_lr_weight too.")
        )
    if any(ratio == 0 for ratio in (settings.loraplus_unet_lr_ratio, settings.loraplus_text_encoder_lr_ratio)):
        mistakes.append(
            ("--network_args: a LoRA+ ratio of 0 would not train lora_up at all", "About 4 to 16 is usual.")
        )
    return mistakes


def scaled_alpha(settings: NetworkSettings, dim: int, alpha: float) -> float:
    """The alpha to store: files know only alpha / dim, so rsLoRA's alpha / sqrt(dim) is alpha * sqrt(dim) in them
    (arXiv 2312.03732)."""
    return alpha * math.sqrt(dim) if settings.use_rslora else alpha
