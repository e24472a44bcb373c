"""Adapter files of other programs under the names of this one's: `<layer as in kohya's files>.<tensor>`.

A layer is one place in the model, however a file spells it. Layers are looked up in a table of the family, with dots
and underscores alike; what is not in it keeps its name, and whoever loads the file reports it.

kohya, LyCORIS        lora_unet_down_blocks_0_…, lora_unet_input_blocks_1_…, lora_te_text_model_…; oft_unet_…
SimpleTuner           lycoris_down_blocks_0_…
diffusers             unet.down_blocks.0.….lora_A.weight, text_encoder.text_model.….lora_linear_layer.down.weight;
                      before 0.21 down_blocks.0.….attn1.processor.to_q_lora.down.weight
PEFT                  base_model.model.down_blocks.0.….lora_A.weight
ComfyUI               diffusion_model.input_blocks.1.….lora_up.weight, text_encoders.clip_l.transformer.text_model.…
OneTrainer            kohya's, and bundle_emb.<word>.…: embeddings, which are left out
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from library.checkpoints.adapter_key_names import AdapterPart
from library.messages import counted, listed
from networks.adapter import AdapterError
from networks.formats import peft_config
from networks.registry import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from networks.adapter_files import AdapterFile

DOWN, UP, ALPHA, MAGNITUDE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
_BUNDLED = "bundle_emb."
# endings in files of other programs -> the tensor's name in kohya's
_ENDINGS: Mapping[str, str] = {
    f"{ending}{more}": tensor
    for more in (".weight", ".default.weight")
    for ending, tensor in {
        ".lora_A": DOWN,
        ".lora_B": UP,
        ".lora.down": DOWN,
        ".lora.up": UP,
        "_lora.down": DOWN,
        "_lora.up": UP,
        ".lora_linear_layer.down": DOWN,
        ".lora_linear_layer.up": UP,
        ".lora_magnitude_vector": MAGNITUDE,
        ".oft_R": "oft_R.weight",
    }.items()
} | {".lora_magnitude_vector": MAGNITUDE, ".lora_magnitude_vector.default": MAGNITUDE}
_TENSORS = sorted(
    {ALPHA, MAGNITUDE, "rescale", "hada_t1", "hada_t2", "lokr_w1_b", "lokr_w2_b", "lokr_t2", "weight"}.union(
        *(kind.key_suffixes for kind in KINDS)
    ),
    key=len,
    reverse=True,  # lora_down.weight before weight
)
# what stands before a layer's path, by module of the model; longer ones first
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("model_diffusion_model_", "diffusion_model_", "lycoris_unet_", "lycoris_", "unet_", ""),
    "text_encoder": (
        "text_encoders_clip_l_transformer_", "text_encoders_clip_h_transformer_", "lycoris_text_encoder_",
        "text_encoder_", "",
    ),
    "text_encoder_2": ("text_encoders_clip_g_transformer_", "lycoris_text_encoder_2_", "text_encoder_2_", ""),
}  # fmt: skip
_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out_0": "to_out"}


@dataclass(frozen=True)
class Place:
    """A layer of the model: its part (`unet`), its path in the module, with dots, and its name in kohya's files."""

    part: AdapterPart
    bare: str
    name: str

    @property
    def path(self) -> str:
        """The path with the level that transformers 5 dropped, as in diffusers' files. PEFT compares endings."""
        return self.part.level + self.bare


@dataclass(frozen=True)
class LayerTable:
    """All layers of a family, found by any of their spellings."""

    places: tuple[Place, ...]

    @cached_property
    def _by_stem(self) -> Mapping[str, Mapping[str, Place]]:
        """Module -> path with underscores -> layer."""
        table: dict[str, dict[str, Place]] = {}
        for place in self.places:
            part = place.part
            paths = {place.bare, place.path, part.to_file(place.bare), part.original(place.bare)}
            stems = {path.replace(".", "_") for path in paths}
            for new, old in _OLD_ATTENTION.items():
                stems |= {stem.removesuffix(new) + old for stem in stems if stem.endswith(f"_{new}")}
            table.setdefault(part.module, {}).update(dict.fromkeys(stems, place))
        return table

    @cached_property
    def _prefixes(self) -> Sequence[tuple[str, str]]:
        """(prefix, module) of all spellings."""
        own = {place.part.module: place.part.prefix for place in self.places}
        others = [kind.other_prefix for kind in KINDS if kind.other_prefix]
        named = [(f"{start}{prefix.removeprefix('lora')}_", module)
                 for module, prefix in own.items() for start in ("lora", *others)]  # fmt: skip
        alone = len(own) <= 2  # a path without a prefix is of the only text encoder
        return named + [(prefix, module) for module in own for prefix in _PREFIXES[module]
                        if prefix or module == "unet" or alone]  # fmt: skip

    def find(self, layer: str) -> Place | None:
        """The layer with this spelling."""
        flat = layer.replace(".processor.", ".").replace(".", "_").removeprefix("base_model_model_")
        for prefix, module in self._prefixes:
            if flat.startswith(prefix) and (place := self._by_stem[module].get(flat[len(prefix) :])):
                return place
        return None


def known_places(parts: Iterable[AdapterPart]) -> tuple[Place, ...]:
    """All layers of a family with these parts."""
    return tuple(Place(part, path, part.name(path)) for part in parts for path in part.layers())


def table_of(parts: Iterable[AdapterPart]) -> LayerTable:
    """The table of a family with these parts."""
    return LayerTable(known_places(parts))


def best_table(candidates: Sequence[LayerTable], layers: Collection[str], others: Collection[str] = ()) -> LayerTable:
    """The table that knows most of a file's layers; of equals the one that knows most of the `others`, those of the
    files that are used together with it, then the one whose names in kohya's files they are, then the first."""

    def known(table: LayerTable, names: Collection[str]) -> int:
        return sum(table.find(name) is not None for name in names)

    def own(table: LayerTable) -> int:
        return len({place.name for place in table.places}.intersection(layers))

    return max(candidates, key=lambda table: (known(table, layers), known(table, others), own(table)))


def split(key: str) -> tuple[str, str]:
    """(layer, tensor) of a key, the tensor named as in kohya's files."""
    for ending, tensor in _ENDINGS.items():
        if key.endswith(ending):
            return key[: -len(ending)], tensor
    for tensor in _TENSORS:
        if key.endswith(f".{tensor}"):
            return key[: -len(tensor) - 1], tensor
    layer, _, tensor = key.partition(".")
    return layer, tensor


def is_bundled(key: str) -> bool:
    """Whether a key is of an embedding that OneTrainer put into an adapter's file."""
    return key.startswith(_BUNDLED)


def layers_in(tensors: Iterable[str]) -> set[str]:
    """The spellings of a file's layers."""
    return {split(key)[0] for key in tensors if not is_bundled(key)}


def in_kohyas_names(file: AdapterFile, table: LayerTable, config: Mapping[str, Any] | None = None) -> AdapterFile:
    """The file under the names of kohya's, with notes on what was left out or assumed. The tensors stay the same, but
    for the shape of PEFT's magnitudes.

    `config`: PEFT's adapter_config.json, for the alphas. AdapterError: a tensor stands under two names.
    """
    configs = peft_config.from_diffusers_metadata(file.metadata)
    tensors: dict[str, Tensor] = {}
    spelled: dict[str, str] = {}
    foreign: dict[str, Place] = {}  # layers of LoRA that are not named as in kohya's files
    for key, value in file.tensors.items():
        if is_bundled(key):
            continue
        layer, tensor = split(key)
        place = table.find(layer)
        name = key if place is None else f"{place.name}.{tensor}"
        if name in tensors:
            what = f"{key} is in the file under another name too: {spelled[name]}"
            raise AdapterError(what, "get the file again: it is damaged")
        tensors[name], spelled[name] = value, key
        if place is not None and tensor in (DOWN, UP) and not key.endswith((DOWN, UP)):
            foreign[place.name] = place
    alphas: dict[str, peft_config.Alphas | None] = {}  # by module
    assumed = 0
    for name, place in foreign.items():
        _reshape_magnitude(tensors, name)
        if f"{name}.{ALPHA}" in tensors or f"{name}.{DOWN}" not in tensors:
            continue
        rank = int(tensors[f"{name}.{DOWN}"].shape[0])
        module = place.part.module
        if module not in alphas:
            given = config or configs.get(module)
            alphas[module] = None if given is None else peft_config.read_alphas(given)
        own = alphas[module]
        assumed += own is None
        tensors[f"{name}.{ALPHA}"] = _alpha(float(rank) if own is None else own.of((place.path, place.bare), rank))
    notes = []
    if bundled := [key for key in file.tensors if is_bundled(key)]:
        notes.append(f"left out: {counted(len(bundled), 'tensor')} of bundled embeddings ({listed(bundled, 2)})")
    if assumed:
        notes.append(f"{counted(assumed, 'layer')} without alpha: taken as the rank, as ComfyUI and diffusers do")
    return replace(file, tensors=tensors, notes=tuple(notes))


def _alpha(value: float) -> Tensor:
    import torch

    return torch.tensor(value)


def _reshape_magnitude(tensors: dict[str, Tensor], name: str) -> None:
    """PEFT's magnitudes, (out,) or (1, out, 1, 1), in the shape of files: (out, 1) or (out, 1, 1, 1)."""
    magnitude, up = tensors.get(f"{name}.{MAGNITUDE}"), tensors.get(f"{name}.{UP}")
    if magnitude is not None and up is not None and magnitude.numel() == up.shape[0]:
        tensors[f"{name}.{MAGNITUDE}"] = magnitude.reshape(-1, *(1 for _ in up.shape[1:]))
