"""Checkpoints with quantised weights: fp8 with scales is read as float32; other kinds are named.

fp8      ComfyUI's: `X.weight` in fp8 times `X.scale_weight` or `X.weight_scale`, one number or one per row. Markers and
         scales of activations (`scaled_fp8`, `X.comfy_quant`, `X.scale_input`, `X.input_scale`) are no weights.
others   ComfyUI's int8, nvfp4 and mxfp8 (`X.comfy_quant`, `X.weight_scale`), bitsandbytes' nf4, fp4 and int8
         (`X.weight.absmax`, `X.weight.quant_state.bitsandbytes__nf4`, `X.SCB`), and bare integers.

No torch at module level. fp8 without scales is an ordinary dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from library.checkpoints.header import FLOATS, CheckpointError, Header, Place, TensorInfo

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (".scale_weight", ".weight_scale")
_MARKER = re.compile(r"(?:.*\.)?(?:scaled_fp8|comfy_quant|scale_input|input_scale)")
_METADATA = "_quantization_metadata"  # ComfyUI's: a table of the quantised layers
# The first pattern that a tensor's name matches names the kind.
_KINDS: tuple[tuple[str, str], ...] = (
    (r".*\.quant_state\.bitsandbytes__(nf4|fp4)", "4-bit {} of bitsandbytes"),
    (r".*\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map)", "4 bits of bitsandbytes"),
    (r".*\.(?:SCB|weight_format)", "int8 of bitsandbytes"),
    (r".*\.(?:qweight|qzeros|g_idx)", "GPTQ or AWQ"),
    (r".*\.weight_scale_2", "nvfp4"),
    (r".*\.(?:scale_weight|weight_scale|weight_s_rel|weight_s_channel|comfy_quant)", "a format of ComfyUI"),
)


@dataclass(frozen=True)
class Scaled:
    """A weight in fp8 with its scale: `info` and `place` of both as in the file."""

    info: TensorInfo
    place: Place
    scale_info: TensorInfo
    scale_place: Place


def with_scales_applied(header: Header) -> Header:
    """Return the header of a checkpoint with fp8 weights and scales as one of float32 weights, to be multiplied when
    they are read; unchanged if there are none."""
    scaled: dict[str, Scaled] = {}
    gone: set[str] = set()
    for name, info in header.tensors.items():
        if info.dtype not in _FP8 or not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        scale = next((layer + ending for ending in _SCALES if layer + ending in header.tensors), None)
        if scale is not None and _fits(header.tensors[scale], info):
            scaled[name] = Scaled(info, header.places[name], header.tensors[scale], header.places[scale])
            gone.add(scale)
    if not scaled:
        return header
    layers = {name.removesuffix(".weight") for name in scaled}
    gone |= {name for name in header.tensors if _MARKER.fullmatch(name) and _is_of(name, layers)}
    tensors = {
        name: TensorInfo("F32", info.shape) if name in scaled else info
        for name, info in header.tensors.items()
        if name not in gone
    }
    places = {name: place for name, place in header.places.items() if name not in gone}
    metadata = {name: value for name, value in header.metadata.items() if name != _METADATA}
    return replace(header, tensors=tensors, places=places, metadata=metadata, scaled=scaled)


def _is_of(marker: str, layers: set[str]) -> bool:
    """Whether a marker belongs to layers in fp8: `X.comfy_quant` to X, `scaled_fp8` to all of a module."""
    return marker.rpartition(".")[2] == "scaled_fp8" or marker.rpartition(".")[0] in layers


def _fits(scale: TensorInfo, weight: TensorInfo) -> bool:
    """Whether a scale is one number, or one number per row, (out,) or (out, 1, ...)."""
    rows = scale.shape[:1] == weight.shape[:1] and all(length == 1 for length in scale.shape[1:])
    return scale.dtype in ("F16", "BF16", "F32") and (scale.count == 1 or rows)


def refuse(header: Header) -> None:
    """Raise CheckpointError that names the kind if the weights are quantised in a form that is not read."""
    kind = kind_of(header.tensors)
    if kind is not None:
        raise CheckpointError(
            f"{header.path}: its weights are quantised ({kind}), which cannot be trained or converted. Give the model "
            "in fp16, bf16, float32, or ComfyUI's fp8."
        )


def kind_of(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return the kind of quantised weights, with the name of one tensor; None if there are none."""
    for pattern, kind in _KINDS:
        for name in tensors:
            if found := re.fullmatch(pattern, name):
                return f"{kind.format(*found.groups())}: {name}"
    for name, info in tensors.items():
        if name.endswith((".weight", ".bias")) and info.count and info.dtype not in FLOATS:
            return f"no floating-point numbers: {name} is {info.dtype}"
    return None
