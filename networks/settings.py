"""Read and check the settings of a network: --network_dim, --network_alpha, --network_args … No torch."""

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
    Argument("conv_dim", whole(least=0), "rank for 3x3 convolutions (LoCon); 0: no adapters on them"),
    Argument("conv_alpha", number(least=0), "alpha for 3x3 convolutions (default 1)"),
    Argument("dropout", number(least=0, below=1), "same as --network_dropout"),
    Argument("rank_dropout", number(least=0, below=1), "probability of dropping a rank for a sample", 0.0),
    Argument("module_dropout", number(least=0, below=1), "probability of skipping a layer's adapter in a step", 0.0),
    Argument("block_dims", whole_numbers, "rank per U-Net block; 0: no adapter in that block"),
    Argument("block_alphas", numbers, "alpha per U-Net block"),
    Argument("conv_block_dims", whole_numbers, "rank for 3x3 convolutions per U-Net block"),
    Argument("conv_block_alphas", numbers, "alpha for 3x3 convolutions per U-Net block"),
    Argument("down_lr_weight", curve, "learning rate factors of the down blocks, or the name of a curve"),
    Argument("mid_lr_weight", factors, "learning rate factor of the middle block"),
    Argument("up_lr_weight", curve, "learning rate factors of the up blocks, or the name of a curve"),
    Argument(
        "block_lr_zero_threshold", number(), "a block whose learning rate factor is at most this gets no adapter", 0.0
    ),
    Argument("loraplus_lr_ratio", number(least=0), "LoRA+: ratio of the learning rates of lora_up and lora_down"),
    Argument("loraplus_unet_lr_ratio", number(least=0), "LoRA+ ratio for the U-Net"),
    Argument("loraplus_text_encoder_lr_ratio", number(least=0), "LoRA+ ratio for the text encoders"),
    Argument("use_dora", switch, "DoRA: train magnitude and direction of the weights separately", False),
    Argument("wd_on_output", switch, "DoRA's magnitudes per output, as in PEFT, instead of per input", False),
    Argument("use_rslora", switch, "rsLoRA: divide alpha by the square root of the rank", False),
)
# Number of U-Net blocks -> (down blocks = up blocks, middle blocks, blocks at either end). SDXL and its refiner count
# by the original names, where embeddings and the output layer are blocks too. 25 blocks (diffusers' names): 12, 1, 0.
_BLOCK_COUNTS: Mapping[int, tuple[int, int, int]] = MappingProxyType({23: (9, 3, 1), 29: (12, 3, 1)})
# Arguments of sd-scripts' networks.loha and networks.lokr (its docs/loha_lokr.md) that these kinds do not have.
ONLY_IN_SD_SCRIPTS = frozenset(
    {"exclude_patterns", "include_patterns", "network_reg_dims", "network_reg_lrs", "train_llm_adapter"}
)
_HARMLESS = frozenset({"verbose"})  # what it prints there, show_metadata.py and check_lora_weights.py print
_OFF = ("", "none", "false", "0", "[]")
_LORAPLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")


@dataclass(frozen=True)
class NetworkSettings:
    """The settings of a network. Tuples by block have one item for each U-Net block."""

    kind: Kind
    dim: int = DEFAULT_DIM
    alpha: float = 1.0  # 0 means the layer's rank, for all alphas here
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
    wd_on_output: bool = False  # DoRA's magnitudes are per output; else per input
    use_rslora: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)  # arguments that only this kind has

    @property
    def convolutions(self) -> bool:
        """Whether 3x3 convolutions get adapters."""
        return self.conv_dim is not None or self.conv_block_dims is not None

    @property
    def scale(self) -> float:
        """The factor alpha / rank of ΔW, for rsLoRA alpha / √rank."""
        return scaled_alpha(self, self.dim, self.alpha or self.dim) / self.dim

    def rank(self, *, conv: bool, block: int | None) -> tuple[int, float]:
        """(dim, alpha) of a layer; dim 0 means no adapter, alpha is never 0.

        `conv`: the kernel is larger than 1x1. `block`: index of its U-Net block, None outside the blocks.
        """
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
        """The LoRA+ ratio for a module of the model ("text_encoder_2"), or None."""
        is_text = part.startswith("text_encoder")
        specific = self.loraplus_text_encoder_lr_ratio if is_text else self.loraplus_unet_lr_ratio
        return self.loraplus_lr_ratio if specific is None else specific


def known_arguments(kind: Kind) -> tuple[Argument, ...]:
    """The keys that --network_args accepts for a kind: the common ones that it supports, and its own."""
    unsupported = kind.unsupported | (frozenset() if kind.decomposes else {"use_dora", "wd_on_output"})
    if not kind.convolutions:
        unsupported |= {item.name for item in COMMON if item.name.startswith("conv_")}
    if not kind.lora_plus:
        unsupported |= set(_LORAPLUS)
    return (*(item for item in COMMON if item.name not in unsupported), *kind.arguments)


Mistake = tuple[str, str]

_BLOCK_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


def read_settings(
    module: str,
    *,
    dim: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    arguments: Sequence[str] = (),
    blocks: int | None = 25,
) -> tuple[NetworkSettings, tuple[Mistake, ...]]:
    """The settings, and every user error in them as (what is wrong, remedy).

    module     --network_module, one of this project's (KeyError where registry.find_kind does not know it)
    dim        --network_dim (None: 4); alpha --network_alpha (0 or None: the dim); dropout --network_dropout
    arguments  --network_args as "key=value"; a key with an empty value counts as not set
    blocks     number of U-Net blocks (25 for SD1/2, 23 for SDXL), for lists by block; 0: not divided into blocks,
               None: unknown, so that these lists are not checked
    """
    kind = find_kind(module)
    if kind is None:
        raise KeyError(module)
    mistakes: list[Mistake] = []
    values = _read_arguments(kind, arguments, mistakes)
    own = {item.name: values.get(item.name, item.default) for item in kind.arguments}
    for name, value in (("--network_dim", dim), ("--network_alpha", alpha)):
        if value is not None and value < 0:
            mistakes.append((f"{name} {value:g} is negative", "set 1 or more"))
    if dropout and "dropout" in kind.unsupported:
        mistakes.append((f"--network_dropout {dropout:g}: {kind.module} does not support it", "remove it"))
    rank = dim if dim is not None and dim > 0 else DEFAULT_DIM
    lists = _check_block_lists(values, blocks, mistakes)
    common = {
        name: values[name]
        for name in ("rank_dropout", "module_dropout", "use_dora", "wd_on_output", "use_rslora", *_LORAPLUS)
        if name in values
    }
    settings = NetworkSettings(
        kind=kind,
        dim=rank,
        alpha=float(max(alpha or 0, 0)),
        dropout=values.get("dropout", dropout or 0.0),
        conv_dim=values.get("conv_dim") or None,
        conv_alpha=float(values.get("conv_alpha", 1.0)),
        block_weights=_block_weights(values, blocks, mistakes),
        own=own,
        **lists,
        **common,
    )
    mistakes += _check_combinations(settings, values)
    if kind.complete_settings and not mistakes:
        try:
            settings = kind.complete_settings(settings)
        except AdapterError as error:
            mistakes.append((f"--network_module {kind.module}: {error}", error.remedy))
    return settings, tuple(mistakes)


def _read_arguments(kind: Kind, arguments: Sequence[str], mistakes: list[Mistake]) -> dict[str, Any]:
    """name -> value of every valid argument."""
    known = {item.name: item for item in known_arguments(kind)}
    values: dict[str, Any] = {}
    for pair in arguments:
        name, equals, text = (piece.strip() for piece in pair.partition("="))
        argument = known.get(name)
        if not equals:
            mistakes.append((f"--network_args {pair!r} has no =", "write key=value, such as conv_dim=8"))
        elif argument is None and (name in _HARMLESS or (name in ONLY_IN_SD_SCRIPTS and text.lower() in _OFF)):
            continue
        elif argument is None:
            mistakes.append((f"--network_args {pair}: {_describe_unknown(kind, name)}", _suggest_name(known, name)))
        elif text and text.lower() != "none":
            try:
                values[name] = argument.read(text)
            except ValueError as error:
                mistakes.append((f"--network_args {pair}: {text!r} {error}", f"{name}: {argument.help}"))
    return values


def _describe_unknown(kind: Kind, name: str) -> str:
    if name in ONLY_IN_SD_SCRIPTS:
        return f"{name} is not supported in this version, and ignoring it would change the trained weights"
    if any(item.name == name for item in COMMON):
        return f"{kind.module} does not support {name}"
    others = [other.module for other in KINDS if any(item.name == name for item in other.arguments)]
    if others:
        return f"{kind.module} has no argument {name}; it belongs to {', '.join(others)}"
    return f"{kind.module} has no argument {name}"


def _suggest_name(known: Mapping[str, Argument], name: str) -> str:
    if name in ONLY_IN_SD_SCRIPTS:
        return "remove it"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]}?"
    if name in ("algo", "preset"):
        return "use it with --network_module lycoris.kohya"
    return f"remove it; valid arguments are {', '.join(known)}"


def _check_block_lists(values: Mapping[str, Any], blocks: int | None, mistakes: list[Mistake]) -> dict[str, Any]:
    """The lists by block that have the right length."""
    lists: dict[str, Any] = {}
    for name in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
        if name not in values:
            continue
        if blocks is None or len(values[name]) == blocks:
            lists[name] = values[name]
        else:
            what = f"--network_args {name} has {len(values[name])} items, but this model has {blocks} blocks"
            mistakes.append((what, f"give {blocks} items, one per block"))
    return lists


def _block_weights(values: Mapping[str, Any], blocks: int | None, mistakes: list[Mistake]) -> tuple[float, ...] | None:
    """Learning rate factors by block from down_, mid_ and up_lr_weight; 1 where none is set."""
    if blocks is None or not any(name in values for name in _BLOCK_WEIGHTS):
        return None
    if not blocks:
        mistakes.append(
            ("--network_args down_, mid_, up_lr_weight: this model is not divided into blocks", "remove them")
        )
        return None
    sides, middle, ends = _BLOCK_COUNTS.get(blocks, ((blocks - 1) // 2, 1, 0))
    threshold = values.get("block_lr_zero_threshold", 0.0)
    factors: list[float] = []
    for name, count in zip(_BLOCK_WEIGHTS, (sides, middle, sides), strict=True):
        factors_of: Callable[[int], tuple[float, ...]] = values.get(name, lambda count: (1.0,) * count)
        factors += [factor if factor > threshold else 0.0 for factor in factors_of(count)]
    if not any(factors):
        mistakes.append(
            ("--network_args: the learning rate of every block is 0", "set a factor above 0 for at least one block")
        )
    return (*(1.0,) * ends, *factors, *(1.0,) * ends)  # no argument covers the ends


def _check_combinations(settings: NetworkSettings, values: Mapping[str, Any]) -> list[Mistake]:
    """Errors of arguments that need another one."""
    mistakes: list[Mistake] = []
    if "conv_alpha" in values and not settings.convolutions:
        mistakes.append(("--network_args conv_alpha without conv_dim", "add conv_dim, or remove conv_alpha"))
    if settings.conv_block_alphas is not None and not settings.convolutions:
        mistakes.append(("--network_args conv_block_alphas without conv_block_dims", "add conv_block_dims or conv_dim"))
    if "block_lr_zero_threshold" in values and not any(name in values for name in _BLOCK_WEIGHTS):
        mistakes.append(
            (
                "--network_args block_lr_zero_threshold has no effect without block weights",
                "add down_lr_weight, mid_lr_weight or up_lr_weight",
            )
        )
    if settings.wd_on_output and not settings.use_dora:
        mistakes.append(
            ("--network_args wd_on_output=True without use_dora", "add use_dora=True, or remove wd_on_output")
        )
    if any(ratio == 0 for ratio in (settings.loraplus_unet_lr_ratio, settings.loraplus_text_encoder_lr_ratio)):
        mistakes.append(("--network_args: with a LoRA+ ratio of 0 lora_up is not trained", "use a ratio of 4 to 16"))
    return mistakes


def scaled_alpha(settings: NetworkSettings, dim: int, alpha: float) -> float:
    """The alpha to store. Files know only alpha / dim, so rsLoRA's alpha / sqrt(dim) is stored as alpha * sqrt(dim)
    (arXiv 2312.03732)."""
    return alpha * math.sqrt(dim) if settings.use_rslora else alpha


def variants(settings: NetworkSettings, *, alphas: bool = True) -> list[str]:
    """What is on besides the plain kind: convolutions (LoCon), DoRA, rsLoRA, PiSSA, LoRA+. `alphas` False: a file
    has them."""
    found = []
    if settings.conv_dim is not None:
        alpha = f", alpha {settings.conv_alpha or settings.conv_dim:g}" if alphas else ""
        found.append(f"rank {settings.conv_dim}{alpha} on 3x3 convolutions")
    elif settings.conv_block_dims is not None:
        found.append("ranks by block on 3x3 convolutions")
    if settings.use_dora:
        found.append(f"DoRA (magnitudes per {'output' if settings.wd_on_output else 'input'})")
    found += ["rsLoRA"] if settings.use_rslora else []
    found += ["PiSSA"] if settings.own.get("init") == "pissa" else []
    ratios = (settings.loraplus_lr_ratio, settings.loraplus_unet_lr_ratio, settings.loraplus_text_encoder_lr_ratio)
    found += ["LoRA+"] if any(ratios) else []
    return found
