"""How ComfyUI and A1111 read adapter files, as rules in NumPy: which names they look for, and what they compute.

Facts from ComfyUI's comfy/lora.py and comfy/weight_adapter/, and from A1111 1.10's extensions-builtin/Lora/. A model
here is its weights under the names that the program has for them (`held_by`); `read` returns the changed weights and
the keys of the file that the program leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests import tiny
from tests.tiny_original import openclip, unet_name

Array = NDArray[np.float64]
Arrays = Mapping[str, Array]
Program = Literal["ComfyUI", "A1111"]

CLIPS = {  # where the programs have the text encoders: ComfyUI's under transformers' names, A1111's as in the files
    "ComfyUI": {
        ("sd1", "text_encoder"): "clip_l.transformer.text_model.",
        ("sd2", "text_encoder"): "clip_h.transformer.text_model.",
        ("sdxl", "text_encoder"): "clip_l.transformer.text_model.",
        ("sdxl", "text_encoder_2"): "clip_g.transformer.text_model.",
        ("refiner", "text_encoder_2"): "clip_g.transformer.text_model.",
    },
    "A1111": {
        ("sd1", "text_encoder"): "transformer.text_model.",
        ("sd2", "text_encoder"): "model.",
        ("sdxl", "text_encoder"): "0.transformer.text_model.",
        ("sdxl", "text_encoder_2"): "1.model.",
        ("refiner", "text_encoder_2"): "0.model.",
    },
}


def held_by(program: Program, family: str, modules: tiny.TinyModules) -> dict[str, Array]:
    """The matrices and kernels of a model under the program's names."""
    upsampler = 2 if family == "sdxl" else 1
    held = {f"diffusion_model.{unet_name(key, upsampler)}": value for key, value in modules.unet.state_dict().items()}
    for name, module in modules.text_encoders.items():
        text = {key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
        if program == "A1111" and (family == "sd2" or name == "text_encoder_2"):
            text = openclip(text)
        held |= {CLIPS[program][family, name] + key: value for key, value in text.items()}
    return {
        key: value.double().numpy() for key, value in held.items() if value.ndim in (2, 4) and not key.endswith("_bias")
    }


@dataclass
class Reading:
    """The weights after the file was applied, and the file's keys that were left out."""

    weights: dict[str, Array]
    unread: set[str]


def read(program: Program, family: str, held: Arrays, file: Mapping[str, Any], strength: float = 1.0) -> Reading:
    """What the program makes of a file."""
    find = comfyui_names(held) if program == "ComfyUI" else A1111Names(held, is_sd2=family == "sd2")
    weights, unread = dict(held), set()
    layers: dict[str, dict[str, Array]] = {}
    for key, value in file.items():
        name, _, role = key.partition(".")
        layers.setdefault(name, {})[role] = np.asarray(value, dtype=np.float64)
    for name, tensors in layers.items():
        place = find.get(name)
        delta = None if place is None else DELTAS[program](tensors)
        if place is None or delta is None:
            unread |= {f"{name}.{role}" for role in tensors}
        else:
            key, rows = place
            weights[key] = weights[key].copy()
            weights[key][rows] = apply(program, held[key][rows], tensors, delta, strength)
    if program == "A1111":  # torch's attention is changed as a whole or not at all
        for key in [key for key in held if key.endswith("in_proj_weight")]:
            block = key.removesuffix("in_proj_weight").replace(".", "_")
            if not {f"{block}{part}_proj" for part in ("q", "k", "v", "out")} <= {
                find.compvis(name) for name in layers
            }:
                for changed in (key, key.replace("in_proj_weight", "out_proj.weight")):
                    weights[changed] = held[changed]
    return Reading(weights, unread)


# --- names: file -> (weight, its rows) ------------------------------------------------------------------------------

Place = tuple[str, slice]
WHOLE = slice(None)


def comfyui_names(held: Arrays) -> dict[str, Place]:
    """Every name that ComfyUI looks for (model_lora_keys_unet, model_lora_keys_clip)."""
    names = {}
    for key in held:
        bare = key.removesuffix(".weight")
        if bare.startswith("diffusion_model."):
            path = bare.removeprefix("diffusion_model.")
            for one in (path, diffusers_path(path, held)):
                names[f"lora_unet_{one.replace('.', '_')}"] = (key, WHOLE)
        elif ".encoder.layers." in bare:
            clip, _, path = bare.partition(".transformer.text_model.")
            two = clip == "clip_g" and any(other.startswith("clip_l.") for other in held)
            for prefix in ("lora_te2",) if two else ("lora_te",) if clip == "clip_g" else ("lora_te", "lora_te1"):
                names[f"{prefix}_text_model_{path.replace('.', '_')}"] = (key, WHOLE)
    return names


RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def diffusers_path(path: str, held: Arrays) -> str:
    """diffusers' name of a layer of an original U-Net (utils.unet_to_diffusers)."""
    match = re.match(r"(input|output|middle)_blocks?\.(\d+)\.?(\d*)\.(.*)", path)
    if match is None:
        return path
    side, number, place, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle":
        is_resnet = number != 1
        return f"mid_block.{'resnets' if is_resnet else 'attentions'}.{number // 2 if is_resnet else 0}." + (
            RESNET.get(rest, rest)
        )
    level, layer = divmod(number - 1 if side == "input" else number, 3)
    stem = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest == "op":
        return f"{stem}.downsamplers.0.conv"
    if rest == "conv":
        return f"{stem}.upsamplers.0.conv"
    kind = "resnets" if place == "0" else "attentions"
    return f"{stem}.{kind}.{layer}.{RESNET.get(rest, rest)}"


class A1111Names:
    """The names that A1111 finds: its own, and sd-scripts' turned into its own (convert_diffusers_name_to_compvis)."""

    def __init__(self, held: Arrays, *, is_sd2: bool) -> None:
        self.is_sd2 = is_sd2
        self.places: dict[str, Place] = {}
        for key, value in held.items():
            if key.endswith(".in_proj_weight"):
                size = value.shape[0] // 3
                for index, letter in enumerate("qkv"):
                    name = key.removesuffix("in_proj_weight").replace(".", "_") + f"{letter}_proj"
                    self.places[name] = (key, slice(index * size, (index + 1) * size))
            else:
                self.places[key.removesuffix(".weight").replace(".", "_")] = (key, WHOLE)

    def get(self, name: str) -> Place | None:
        """The weight of a layer of the file."""
        return self.places.get(self.compvis(name))

    def compvis(self, name: str) -> str:
        """A name of the file in A1111's own spelling."""
        if match := re.match(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", name):
            if self.is_sd2:
                return f"model_transformer_resblocks_{match[1]}_{_openclip_name(match[2])}"
            return f"transformer_text_model_encoder_layers_{match[1]}_{match[2]}"
        if match := re.match(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", name):
            return f"1_model_transformer_resblocks_{match[1]}_{_openclip_name(match[2])}"
        name = name.replace("lora_te1_text_model", "0_transformer_text_model")
        return _compvis_unet(name).replace("lora_unet", "diffusion_model")


def _openclip_name(rest: str) -> str:
    for old, new in (("mlp_fc1", "mlp_c_fc"), ("mlp_fc2", "mlp_c_proj"), ("self_attn", "attn")):
        rest = rest.replace(old, new)
    return rest


def _compvis_unet(name: str) -> str:
    resnet = {new: old.replace(".", "_") for old, new in RESNET.items()}
    if match := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        side, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        number = 3 * level + layer + (side == "down")
        where = f"{'input' if side == 'down' else 'output'}_blocks_{number}_{int(kind == 'attentions')}"
        return f"diffusion_model_{where}_{resnet.get(match[5], match[5])}"
    if match := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"diffusion_model_middle_block_{number}_{resnet.get(match[3], match[3])}"
    if match := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"diffusion_model_input_blocks_{3 + 3 * int(match[1])}_0_op"
    if match := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        return f"diffusion_model_output_blocks_{2 + 3 * int(match[1])}_{2 if int(match[1]) else 1}_conv"
    return name


# --- what they compute ----------------------------------------------------------------------------------------------

Delta = Callable[[Array], Array]
"""From a layer's weight to the change at strength 1, before DoRA."""


def _scale(tensors: Arrays, dim: int | None) -> float:
    return float(tensors["alpha"]) / dim if "alpha" in tensors and dim else 1.0


def _lora(tensors: Arrays) -> Delta:
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    scale = _scale(tensors, down.shape[0])
    return lambda weight: scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(weight.shape)


def _tucker(core: Array, a: Array, b: Array) -> Array:
    found: Array = np.einsum("ijkl,jr,ip->prkl", core, b, a)
    return found


def _loha(tensors: Arrays) -> Delta:
    halves = []
    for half in "12":
        a, b = tensors[f"hada_w{half}_a"], tensors[f"hada_w{half}_b"]
        halves.append(_tucker(tensors[f"hada_t{half}"], a, b) if f"hada_t{half}" in tensors else a @ b)
    scale = _scale(tensors, tensors["hada_w1_b"].shape[0])
    return lambda weight: scale * (halves[0] * halves[1]).reshape(weight.shape)


def _lokr(tensors: Arrays) -> Delta:
    dim, halves = None, []
    for half in "12":  # both programs take the rank of the second half where both have one
        if f"lokr_w{half}" in tensors:
            halves.append(tensors[f"lokr_w{half}"])
            continue
        a, b = tensors[f"lokr_w{half}_a"], tensors[f"lokr_w{half}_b"]
        dim = b.shape[0]
        halves.append(_tucker(tensors["lokr_t2"], a, b) if half == "2" and "lokr_t2" in tensors else a @ b)
    first, second = halves
    first = first.reshape(*first.shape, *(1 for _ in second.shape[2:]))
    scale = _scale(tensors, dim)
    return lambda weight: scale * np.kron(first, second).reshape(weight.shape)


def _oft(tensors: Arrays, *, times_outputs: bool) -> Delta | None:
    blocks = tensors["oft_blocks"]
    if blocks.ndim != 3:
        return None
    skew = blocks - blocks.swapaxes(1, 2)
    limit = float(tensors.get("alpha", np.zeros(()))) * (blocks.shape[0] * blocks.shape[1] if times_outputs else 1)
    if limit and np.linalg.norm(skew) > limit:
        skew = skew * limit / np.linalg.norm(skew)
    one = np.eye(blocks.shape[1])
    rotations = (one + skew) @ np.linalg.inv(one - skew)

    def delta(weight: Array) -> Array:
        rows = weight.reshape(*blocks.shape[:2], *weight.shape[1:])
        rotated: Array = np.einsum("knm,kn...->km...", rotations, rows)
        return rotated.reshape(weight.shape) * tensors.get("rescale", np.ones(())) - weight

    return delta


def _ia3(tensors: Arrays) -> Delta:
    factors = tensors["weight"]
    factors = factors if tensors["on_input"] else factors.reshape(-1, 1)
    return lambda weight: weight * factors


def comfyui_delta(tensors: Arrays) -> Delta | None:
    """By the first tensors that ComfyUI recognises; it does not know (IA)³."""
    if "lora_up.weight" in tensors:
        return _lora(tensors)
    if "hada_w1_a" in tensors:
        return _loha(tensors)
    if {"lokr_w1", "lokr_w1_a"} & tensors.keys():
        return _lokr(tensors)
    return _oft(tensors, times_outputs=False) if "oft_blocks" in tensors else None


def a1111_delta(tensors: Arrays) -> Delta | None:
    """By the first tensors that A1111 recognises."""
    if "on_input" in tensors:
        return _ia3(tensors)
    return _oft(tensors, times_outputs=True) if "oft_blocks" in tensors else comfyui_delta(tensors)


DELTAS: dict[Program, Callable[[Arrays], Delta | None]] = {"ComfyUI": comfyui_delta, "A1111": a1111_delta}


def apply(program: Program, weight: Array, tensors: Arrays, delta: Delta, strength: float) -> Array:
    """The layer's weight with the adapter."""
    if program == "ComfyUI" and "oft_blocks" in tensors:
        strength = strength**2  # it multiplies by the strength twice
    change = delta(weight)
    if "dora_scale" not in tensors:
        return weight + strength * change
    scale = tensors["dora_scale"]
    if program == "ComfyUI" and scale.shape[0] == weight.shape[0]:  # the length of the base, where DoRA has the sum's
        length = np.linalg.norm(weight.reshape(len(weight), -1), axis=1).reshape(-1, *(1 for _ in weight.shape[1:]))
    else:  # A1111 knows no other
        columns = (weight + change).swapaxes(0, 1).reshape(weight.shape[1], -1)
        length = np.linalg.norm(columns, axis=1).reshape(1, -1, *(1 for _ in weight.shape[2:]))
    whole: Array = (weight + change) * (scale / length)
    return weight + strength * (whole - weight)
