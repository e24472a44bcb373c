"""The shapes of a layer's tensors in files, by kind, before the network is made. No torch.

Each function follows `create` of its kind and has its rules of which layers get an adapter (None: this one does not);
tests/networks/test_planned.py compares the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from networks.adapter import AdapterError, Layer, LayerSettings

Shapes = dict[str, tuple[int, ...]]

# (IA)³ scales keys, values and the input of the second layer of feed-forward networks (arXiv 2205.05638), as LyCORIS'
# preset "ia3" does; by the names in files.
KEYS_AND_VALUES = ("_to_k", "_to_v", "_k_proj", "_v_proj")
SECOND_LAYERS = ("_ff_net_2", "_mlp_fc2")
_ATTENTION = re.compile(r"_attn\d*_to_(q|k|v|out_0)$")  # kohya's class CrossAttention
_TRANSFORMER = re.compile(r"_(proj_in|proj_out|transformer_blocks_\d+_\w+)$")  # Transformer2DModel


def lora(layer: Layer, settings: LayerSettings) -> Shapes:
    """A LoRA, LoRA-FA or DyLoRA."""
    ones = (1, 1) if layer.is_conv else ()
    down = (settings.dim, *layer.shape[1:])
    return {"alpha": (), "lora_down.weight": down, "lora_up.weight": (layer.shape[0], settings.dim, *ones)}


def loha(layer: Layer, settings: LayerSettings) -> Shapes:
    """A LoHa, with a Tucker core if asked for."""
    dim, out, inside = settings.dim, layer.shape[0], math.prod(layer.shape[1:])
    if not (settings.own.get("use_tucker") and layer.kernel != (1, 1)):
        halves = {
            f"hada_w{half}_{side}": (dim, inside) if side == "b" else (out, dim) for half in "12" for side in "ab"
        }
        return {"alpha": (), **halves}
    halves = {f"hada_w{half}_{side}": (dim, layer.shape[side == "b"]) for half in "12" for side in "ab"}
    return {"alpha": (), **halves, **{f"hada_t{half}": (dim, dim, *layer.kernel) for half in "12"}}


def lokr(layer: Layer, settings: LayerSettings) -> Shapes:
    """A LoKr, with LyCORIS' rules of which matrix is whole."""
    own, dim = settings.own, settings.dim
    factor, whole = int(own.get("factor", -1)), bool(own.get("full_matrix"))
    a, b = factorization(layer.shape[0], factor)
    c, d = factorization(layer.shape[1], factor)
    if own.get("unbalanced_factorization"):
        a, b = b, a
    kernel = layer.shape[2:]
    shapes: Shapes = {"alpha": ()}
    if own.get("decompose_both") and dim < max(a, c) / 2 and not whole:
        shapes |= {"lokr_w1_a": (a, dim), "lokr_w1_b": (dim, c)}
    else:
        shapes["lokr_w1"] = (a, c)
    if whole or dim >= max(b, d) / 2:
        shapes["lokr_w2"] = (b, d, *kernel)
    elif own.get("use_tucker") and layer.kernel != (1, 1):
        shapes |= {"lokr_t2": (dim, dim, *kernel), "lokr_w2_a": (dim, b), "lokr_w2_b": (dim, d)}
    else:
        shapes |= {"lokr_w2_a": (b, dim), "lokr_w2_b": (dim, d * math.prod(kernel))}
    return shapes


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers, the smaller first, whose product is `dimension`: LyCORIS' rule, which defines the shapes in files.

    `factor` and its cofactor if it divides `dimension`; else the most equal pair whose smaller number is at most
    `factor` (-1: no bound).
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    bound = dimension if factor < 0 else factor
    smaller = max((n for n in range(1, math.isqrt(dimension) + 1) if dimension % n == 0 and n <= bound), default=1)
    return smaller, dimension // smaller


def oft(layer: Layer, settings: LayerSettings) -> Shapes | None:
    """An OFT of `dim` blocks. AdapterError if the outputs cannot be divided into them."""
    if not oft_selects(layer, settings):
        return None
    size, remainder = divmod(layer.shape[0], settings.dim)
    if remainder or not size:
        remedy = f"set --network_dim (OFT's number of blocks) to a divisor of {layer.shape[0]}, such as 4 or 8"
        raise AdapterError(
            f"{layer.name}: {layer.shape[0]} outputs cannot be divided into {settings.dim} blocks", remedy
        )
    return {"alpha": (), "oft_blocks": (settings.dim, size, size)}


def oft_selects(layer: Layer, settings: LayerSettings) -> bool:
    """Whether OFT adapts a layer: attention, or what enable_all_linear and enable_conv add."""
    switch = "enable_all_linear" if _TRANSFORMER.search(layer.name) else "enable_conv"
    return bool(_ATTENTION.search(layer.name) or settings.own.get(switch))


def ia3(layer: Layer, settings: LayerSettings) -> Shapes | None:
    """An (IA)³."""
    on_input = ia3_on_input(layer, settings)
    return None if on_input is None else {"on_input": (), "weight": ia3_shape(layer, on_input=on_input)}


def ia3_on_input(layer: Layer, settings: LayerSettings) -> bool | None:
    """Whether (IA)³ scales a layer's inputs, else its outputs; None: neither."""
    if not (settings.own.get("enable_all") or layer.name.endswith(KEYS_AND_VALUES + SECOND_LAYERS)):
        return None
    on_input = settings.own.get("train_on_input")
    return layer.name.endswith(SECOND_LAYERS) if on_input is None else bool(on_input)


def ia3_shape(layer: Layer, *, on_input: bool) -> tuple[int, ...]:
    """The shape of (IA)³'s factors."""
    channels = layer.shape[1] * layer.groups if on_input else layer.shape[0]
    return (1, channels, 1, 1) if layer.is_conv else (channels,)


def dora_scale(layer: Layer, *, by_output: bool) -> tuple[int, ...]:
    """The shape of DoRA's magnitudes."""
    ones = (1,) * (len(layer.shape) - 2)
    return (layer.shape[0], 1, *ones) if by_output else (1, layer.shape[1], *ones)


def weight_size(tensors: Shapes) -> tuple[int | None, int | None]:
    """(outputs, inputs) of the weight that a layer's tensors in a file are for, inputs times the kernel's size; None
    where these tensors do not show it, or lack one another."""
    try:
        return next((read(tensors) for mark, read in _WEIGHT_SIZES.items() if mark in tensors), (None, None))
    except (KeyError, IndexError):
        return None, None


def _of_lora(tensors: Shapes) -> tuple[int, int]:
    down = tensors["lora_down.weight"]
    return tensors["lora_up.weight"][0], down[1] * math.prod((*down[2:], *tensors.get("lora_mid.weight", ())[2:]))


def _of_halves(a: tuple[int, ...], b: tuple[int, ...], core: tuple[int, ...] | None) -> tuple[int, int]:
    """Of a product of low rank: a b, or with a Tucker core, whose kernel stands in it."""
    return (a[0], b[1]) if core is None else (a[1], b[1] * math.prod(core[2:]))


def _of_loha(tensors: Shapes) -> tuple[int, int]:
    return _of_halves(tensors["hada_w1_a"], tensors["hada_w1_b"], tensors.get("hada_t1"))


def _of_lokr(tensors: Shapes) -> tuple[int, int]:
    outputs = inputs = 1
    for half in ("lokr_w1", "lokr_w2"):
        if half in tensors:
            rows, columns = tensors[half][0], math.prod(tensors[half][1:])
        else:
            core = tensors.get("lokr_t2") if half == "lokr_w2" else None
            rows, columns = _of_halves(tensors[f"{half}_a"], tensors[f"{half}_b"], core)
        outputs, inputs = outputs * rows, inputs * columns
    return outputs, inputs


def _of_difference(tensors: Shapes) -> tuple[int, int]:
    shape = tensors["diff"]
    return shape[0], math.prod(shape[1:])


def _of_blocks(name: str) -> Callable[[Shapes], tuple[int, None]]:
    return lambda tensors: (math.prod(tensors[name][-3:-1]), None)  # a fourth axis is BOFT's


_WEIGHT_SIZES: dict[str, Callable[[Shapes], tuple[int | None, int | None]]] = {
    "lora_down.weight": _of_lora,
    "hada_w1_a": _of_loha,
    "lokr_w1": _of_lokr,
    "lokr_w1_a": _of_lokr,
    "diff": _of_difference,
    "oft_blocks": _of_blocks("oft_blocks"),
    "oft_diag": _of_blocks("oft_diag"),
}
