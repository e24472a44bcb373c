"""Convert LoRA keys between the formats of kohya, diffusers and PEFT, in both directions and bit for bit.

kohya      one file: `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`, `.lora_up.weight`, `.alpha`,
           `.dora_scale`
diffusers  one file: `unet.mid_block.attentions.0.proj_in.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector`;
           the alphas in its metadata (`lora_adapter_metadata`, as diffusers' save_lora_weights writes it)
PEFT       a folder for each module of the model: adapter_model.safetensors with `base_model.model.` before each name,
           adapter_config.json with the alphas

Files of other programs are first brought under kohya's names (layer_names.py). Keys that the other format cannot hold
are an error that lists all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from library.messages import counted, listed
from networks.adapter import AdapterError
from networks.formats import peft_config
from networks.formats.layer_names import LayerTable, Place

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["kohya", "diffusers", "peft"]
Found = Literal["kohya", "diffusers", "peft", "other"]  # other: under names of another program
BASE = "base_model.model."
_MOST_LISTED = 8
_KOHYA = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
# Only the first line is written; the other names come from older training scripts of diffusers.
_PEFT = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude",
    "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_PEFT_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_MODULES = ("unet", "text_encoder", "text_encoder_2")  # the first part of keys in diffusers' files


@dataclass
class LoraLayer:
    """One layer of a LoRA. `magnitude`: DoRA's, (out,). `alpha_form`: how a kohya file stores alpha (peft_config)."""

    place: Place
    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    alpha_form: str = ""

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return int(self.down.shape[0])


@dataclass
class Lora:
    """A LoRA independent of the format. `metadata`: that of a kohya file; `notes`: what to know of how it was read."""

    layers: list[LoraLayer]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def is_diffusers(keys: Collection[str]) -> bool:
    """Whether all keys are in diffusers' current format."""
    return all(key.partition(".")[0] in _MODULES and split(key)[1] is not None for key in keys)


# --- kohya -----------------------------------------------------------------------------------------------------------


def from_kohya(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], table: LayerTable) -> Lora:
    """Convert from kohya's format. AdapterError lists every key that is not of a LoRA of this family."""
    by_name = {place.name: place for place in table.places}
    found, wrong = _LayerTensors(), []
    for key, tensor in tensors.items():
        name, _, leaf = key.partition(".")
        if name in by_name and leaf in _KOHYA:
            found.add(by_name[name], _KOHYA[leaf], tensor, key)
        else:
            wrong.append(key)
    _raise_unknown(wrong)
    layers = []
    for place, slots in found.complete():
        rank = int(slots["down"].shape[0])
        alpha, form = peft_config.read_alpha(slots.get("alpha"), rank)
        magnitude = slots.get("magnitude")
        if magnitude is not None and tuple(magnitude.shape) != _magnitude_shape(slots):
            raise AdapterError(
                f"{place.name}.dora_scale is {tuple(magnitude.shape)}: magnitudes of inputs, not of outputs",
                "diffusers and PEFT do not support it: train with --network_args wd_on_output=True for them, or merge "
                "it into a model with tools/merge_lora.py",
            )
        magnitude = None if magnitude is None else magnitude.reshape(-1)
        layers.append(LoraLayer(place, slots["down"], slots["up"], alpha, magnitude, form))
    return Lora(layers, {key: value for key, value in metadata.items() if not key.startswith("sshs_")})


def to_kohya(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a kohya file."""
    tensors: dict[str, Tensor] = {}
    for layer in lora.layers:
        name = layer.place.name
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        alpha = peft_config.alpha_tensor(layer.alpha, layer.alpha_form, layer.rank, layer.down.dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = alpha
        if layer.magnitude is not None:
            shape = _magnitude_shape({"down": layer.down, "up": layer.up})
            tensors[f"{name}.dora_scale"] = layer.magnitude.reshape(shape)
    return tensors, dict(lora.metadata)


# --- PEFT and diffusers ----------------------------------------------------------------------------------------------


def from_peft(
    tensors: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, str],
    table: LayerTable,
) -> Lora:
    """Convert from PEFT's names without prefixes, by module of the model, with PEFT's configuration of each.

    A module without a configuration has alpha = rank, as in diffusers. AdapterError lists every key that is not of a
    LoRA of this family.
    """
    found, wrong = _LayerTensors(), []
    for module, of_module in tensors.items():
        for key, tensor in of_module.items():
            path, leaf = split(key)
            place = table.find(f"{module}.{path}")
            if place is None or leaf is None:
                wrong.append(f"{module}.{key}")
            else:
                found.add(place, _PEFT[leaf], tensor, f"{module}.{key}")
    _raise_unknown(wrong)
    forms = peft_config.read_forms(metadata)
    alphas = {module: peft_config.read_alphas(config) for module, config in configs.items()}
    layers = []
    for place, slots in found.complete():
        rank, magnitude = int(slots["down"].shape[0]), slots.get("magnitude")
        given = alphas.get(place.part.module)
        alpha = float(rank) if given is None else given.of((place.path, place.bare), rank)
        magnitude = None if magnitude is None else magnitude.reshape(-1)
        layers.append(LoraLayer(place, slots["down"], slots["up"], alpha, magnitude, forms(place.name)))
    own = {key: value for key, value in metadata.items() if key not in peft_config.NOT_KOHYAS}
    return Lora(layers, {key: value for key, value in own.items() if not key.startswith("sshs_")})


def to_peft(
    lora: Lora, *, text_level: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]], dict[str, str]]:
    """Tensors and configurations by module of the model, and the metadata.

    `text_level`: whether names contain `text_model.`. diffusers needs it (and removes it for transformers 5); PEFT uses
    names unchanged. AdapterError if only some layers of a module have DoRA.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    by_module: dict[str, list[LoraLayer]] = {}
    for layer in lora.layers:
        part = layer.place.part
        by_module.setdefault(part.module, []).append(layer)
        of_module = tensors.setdefault(part.module, {})
        for slot, tensor in (("down", layer.down), ("up", layer.up), ("magnitude", layer.magnitude)):
            if tensor is not None:
                path = layer.place.path if text_level else layer.place.bare
                # transformers 5 silently ignores a text encoder's magnitude under another name
                is_text = part.group.startswith("text_encoder")
                leaf = ".weight" if slot == "magnitude" and text_level and is_text else ""
                of_module[f"{path}.{_PEFT_NAMES[slot]}{leaf}"] = _peft_magnitude(layer, slot, tensor)
    configs = {}
    for module, layers in by_module.items():
        without = [layer.place.name for layer in layers if layer.magnitude is None]
        if without and len(without) < len(layers):
            names = listed(without, _MOST_LISTED)
            what = f"no dora_scale in {len(without)} of {counted(len(layers), 'layer')} of {module}: {names}"
            raise AdapterError(
                what, "convert another file: in diffusers and PEFT all layers of a module have DoRA, or none"
            )
        alphas = {layer.place.bare: (layer.rank, layer.alpha) for layer in layers}
        configs[module] = peft_config.make_config(alphas, use_dora=not without)
    forms = {layer.place.name: layer.alpha_form for layer in lora.layers}
    return tensors, configs, lora.metadata | peft_config.write_forms(forms)


def split(key: str) -> tuple[str, str | None]:
    """(path, tensor name) of a key; None for an unknown tensor name."""
    for leaf in _PEFT:
        if key.endswith(f".{leaf}"):
            return key.removesuffix(f".{leaf}"), leaf
    return key, None


def _peft_magnitude(layer: LoraLayer, slot: str, tensor: Tensor) -> Tensor:
    """PEFT stores the magnitude of a convolution as (1, out, 1, 1)."""
    return tensor.reshape(1, -1, 1, 1) if slot == "magnitude" and layer.up.ndim == 4 else tensor


def _magnitude_shape(slots: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of DoRA's magnitude in kohya-style files: (out, 1) or (out, 1, 1, 1)."""
    up = slots["up"]
    return (int(up.shape[0]), *(1 for _ in up.shape[1:]))


# --- all formats -----------------------------------------------------------------------------------------------------


class _LayerTensors:
    """Collects the tensors of a file by layer, in any order."""

    def __init__(self) -> None:
        self._layers: dict[Place, dict[str, Tensor]] = {}

    def add(self, place: Place, slot: str, tensor: Tensor, key: str) -> None:
        slots = self._layers.setdefault(place, {})
        if slot in slots:
            raise AdapterError(f"{key} is in the file under another name too", "get the file again: it is damaged")
        slots[slot] = tensor

    def complete(self) -> list[tuple[Place, dict[str, Tensor]]]:
        """The layers with their tensors. AdapterError lists missing factors."""
        missing = [
            f"{place.part.module}.{place.path}: {slot}"
            for place, slots in self._layers.items()
            for slot in ("down", "up")
            if slot not in slots
        ]
        if missing:
            what = f"the file is incomplete, {counted(len(missing), 'factor')} missing: {listed(missing, _MOST_LISTED)}"
            raise AdapterError(what, "get the file again")
        return list(self._layers.items())


def _raise_unknown(keys: Sequence[str]) -> None:
    if keys:
        raise AdapterError(
            f"{counted(len(keys), 'key')} cannot be converted: {listed(sorted(keys), _MOST_LISTED)}",
            "convert only LoRA and DoRA (lora_down, lora_up, alpha, dora_scale) of a supported model",
        )
