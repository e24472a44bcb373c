"""Convert original files of Stable Diffusion 1, 2, XL and XL's refiner to diffusers' and transformers' names and back.

Levels, blocks, attentions and depth are read from the names, so that miniature models work too. Parts are named like
diffusers' folders. Text encoder names always have the `text_model.` level here.
Counts of the real models: formats of CompVis/stable-diffusion and Stability-AI/stablediffusion (686 + 248 + 196 or 294
keys), Stability-AI/generative-models (SDXL 1680 + 248 + 196 + 390, refiner 1220 + 248 + 390).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from library.checkpoints import keymap
from library.checkpoints.files import TensorReader
from library.checkpoints.header import CheckpointError, Header, TensorInfo
from library.checkpoints.keymap import Row, Rule, Sizes, expand, flat_shape
from library.checkpoints.lazy import LazyTensor, torch_dtype
from library.checkpoints.position_ids import faults, mended
from library.checkpoints.tables import clip_hf, clip_open, unet_sd, vae_sd
from library.messages import counted, listed

if TYPE_CHECKING:
    from torch import Tensor

Side = str  # "original" or "diffusers"
_MOST = 100  # blocks or layers of a part; OpenCLIP's bigG has 32


def _count(names: Iterable[str], pattern: str) -> int:
    """Return the highest number that the pattern finds, plus 1; 0 if it finds none. Numbers of no model are passed
    over: their tensors have no rule."""
    numbers = (int(found[1]) for name in names if (found := re.match(pattern, name)))
    return max((number + 1 for number in numbers if number < _MOST), default=0)


def unet_sizes(names: Iterable[str], side: Side) -> Sizes:
    """Sizes for tables.unet_sd, from the names of either layout."""
    names = list(names)
    if side == "original":
        blocks = _count(names, r"input_blocks\.(\d+)\.")
        first_down = min(
            (int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))), default=blocks
        )
        s = max(first_down, 1)
        levels = blocks // s
        upsampler = [1 if f"output_blocks.{s * i + s - 1}.1.conv.weight" in names else 2 for i in range(levels)]
    else:
        s = _count(names, r"up_blocks\.\d+\.resnets\.(\d+)\.")
        levels = _count(names, r"down_blocks\.(\d+)\.")
        attended = {int(m[1]) for name in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
        upsampler = [2 if i in attended else 1 for i in range(levels)]
    depth = _count(names, r".*\.transformer_blocks\.(\d+)\.")
    return Sizes({"i": levels, "j": s - 1, "k": s, "d": depth}, {"s": s, "u": upsampler})


def vae_sizes(names: Iterable[str], side: Side) -> Sizes:
    """Sizes for tables.vae_sd, from the names of either layout."""
    names = list(names)
    down, block, up = ("down", "block", "up") if side == "original" else ("down_blocks", "resnets", "up_blocks")
    levels = _count(names, rf"encoder\.{down}\.(\d+)\.")
    j = _count(names, rf"encoder\.{down}\.\d+\.{block}\.(\d+)\.")
    k = _count(names, rf"decoder\.{up}\.\d+\.{block}\.(\d+)\.")
    return Sizes({"i": levels, "j": j, "k": k}, {"t": levels})


def clip_sizes(names: Iterable[str], side: Side) -> Sizes:
    """Sizes for tables.clip_hf and tables.clip_open, from the names of any layout."""
    layers = _count(names, r"(?:text_model\.encoder\.layers|transformer\.resblocks)\.(\d+)\.")
    return Sizes({"n": layers}, {})


_POSITION_IDS = r"(?:.*\.)?position_ids"


def with_text_model(name: str) -> str:
    """Add the `text_model.` level to a text encoder's name; transformers 5 and some files lack it."""
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else name


def modern_text_name(name: str) -> str | None:
    """Add the `text_model.` level to a text encoder's name; None for position ids, which are no weights."""
    return None if re.fullmatch(_POSITION_IDS, name) else with_text_model(name)


def modern_vae_name(name: str) -> str:
    """Return a VAE tensor's name with diffusers' current attention names (to_q, ...)."""
    *path, module, leaf = name.split(".")
    if path and path[-1].isdigit() and "attentions" in path:
        module = vae_sd.OLD_DIFFUSERS.get(module, module)
    return ".".join([*path, module, leaf])


def original_vae_name(name: str) -> str:
    """Return a VAE tensor's name of an original file with the original attention names (q, ...): some converters left
    those of diffusers."""
    *path, module, leaf = name.split(".")
    if path[-1:] != ["attn_1"] and path[-2:] == ["attn_1", "to_out"]:
        path, module = path[:-1], "to_out.0"
    if path[-1:] == ["attn_1"]:
        module = vae_sd.ORIGINAL_ATTENTION.get(vae_sd.OLD_DIFFUSERS.get(module, module), module)
    return ".".join([*path, module, leaf])


@dataclass(frozen=True)
class Part:
    """A part of an original file.

    name, prefix  its folder in a diffusers model; the prefix of its keys in an original file
    rows          its table; `variants`: other names of some tensors, used in a few files
    kept          pattern of keys that belong to no module but are kept in files
    modern        name of any diffusers or transformers version -> current name; None: left out
    original      name in any original file -> the table's name (the `text_model.` level, the VAE's attention)
    spare_layer   the file has one layer more than the model (SD2 uses the second to last layer's output)
    """

    name: str
    prefix: str
    rows: tuple[Row, ...]
    sizes: Callable[[Iterable[str], Side], Sizes]
    kept: str = r"(?!)"
    variants: tuple[Row, ...] = ()
    modern: Callable[[str], str | None] = str
    original: Callable[[str], str] = str
    spare_layer: bool = False

    def rules(self, names: Iterable[str], side: Side, known: Collection[str] = ()) -> tuple[Rule, ...]:
        """Return the rules for a model with these names (of one layout, without prefix).

        `known`: the full names of an original file, which decide between alternative names.
        """
        sizes = self.sizes(names, side)
        spelled = {
            rule.diffusers: rule for rule in expand(self.variants, sizes) if self.prefix + rule.original in known
        }
        return tuple(spelled.get(rule.diffusers, rule) for rule in expand(self.rows, sizes))


@dataclass(frozen=True)
class Layout:
    """A kind of original file.

    kept      pattern of usual keys outside the parts; other keys are kept too, with a note
    ignored   pattern of keys that are left out, with a note
    """

    parts: tuple[Part, ...]
    kept: str
    ignored: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its parts."""
        return tuple(part.name for part in self.parts)


def _clip_hf(prefix: str) -> Part:
    """OpenAI's CLIP, with transformers' names."""
    kept = rf"{_POSITION_IDS}|text_projection\.weight|logit_scale"
    return Part(
        "text_encoder", prefix, clip_hf.ROWS, clip_sizes, kept, modern=modern_text_name, original=with_text_model
    )


def _open_clip(prefix: str) -> Part:
    """OpenCLIP with a projection of the pooled state, as in SDXL and its refiner."""
    return Part(
        "text_encoder_2",
        prefix,
        clip_open.PROJECTED_ROWS,
        clip_sizes,
        kept=rf"{_POSITION_IDS}|logit_scale|attn_mask",  # position_ids: written by ComfyUI
        variants=clip_open.LINEAR_PROJECTION,
        modern=modern_text_name,
    )


UNET = Part("unet", "model.diffusion_model.", unet_sd.ROWS, unet_sizes)
UNET_XL = replace(UNET, rows=unet_sd.XL_ROWS)
VAE = Part("vae", "first_stage_model.", vae_sd.ROWS, vae_sizes, modern=modern_vae_name, original=original_vae_name)
CLIP_OPEN = Part(
    "text_encoder",
    "cond_stage_model.model.",
    clip_open.ROWS,
    clip_sizes,
    kept=r"text_projection|logit_scale|attn_mask",
    modern=modern_text_name,
    spare_layer=True,
)

_BUFFERS = (
    r"betas|(?:sqrt_|log_)?(?:one_minus_)?alphas_cumprod(?:_prev)?|sqrt_recip(?:m1)?_alphas_cumprod|posterior_\w+|logvar|log_var"
    r"|cond_stage_model\.logit_scale|lvlb_weights|scale_factor|denoiser\.(?:log_)?sigmas"
    r"|v_pred|ztsnr"  # marks of the prediction type (prediction_marks.py)
)
_LEFT_OUT = r"model_ema\..*|first_stage_model\.loss\..*|loss\..*"
SD1 = Layout((UNET, VAE, _clip_hf("cond_stage_model.transformer.")), _BUFFERS, _LEFT_OUT)
SD2 = Layout((UNET, VAE, CLIP_OPEN), _BUFFERS, _LEFT_OUT)
SDXL = Layout(
    (
        UNET_XL,
        VAE,
        _clip_hf("conditioner.embedders.0.transformer."),
        _open_clip("conditioner.embedders.1.model."),
    ),
    _BUFFERS,
    _LEFT_OUT,
)
REFINER = Layout((UNET_XL, VAE, _open_clip("conditioner.embedders.0.model.")), _BUFFERS, _LEFT_OUT)


@dataclass(frozen=True)
class Split:
    """A checkpoint split into parts.

    parts: part -> diffusers name -> tensor; kept: original name -> tensor; notes: for the user.
    """

    parts: dict[str, dict[str, LazyTensor]]
    kept: dict[str, LazyTensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """The tensors of an original file by name, and notes for the user."""

    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...]


def to_diffusers(reader: TensorReader, layout: Layout, parts: Iterable[str] | None = None) -> Split:
    """Split an original file or diffusers folder into parts, all or those named, with lazy tensors.

    Shapes are those of diffusers' modules, except that the U-Net's proj_in and proj_out stay 4-D or 2-D as in the file.
    Raises CheckpointError if a part is missing or one of its keys has no rule.
    """
    lazy = {name: reader.lazy(name) for name in reader.header.tensors}
    wanted = set(layout.names if parts is None else parts)
    if reader.header.kind == "diffusers":
        return Split(
            {part.name: _from_folder(lazy, part, reader.header) for part in layout.parts if part.name in wanted}, {}, ()
        )
    ignored = [name for name in lazy if re.fullmatch(layout.ignored, name)]
    for name in ignored:
        del lazy[name]
    found: dict[str, dict[str, LazyTensor]] = {}
    kept: dict[str, LazyTensor] = {}
    for part in layout.parts:
        inner = {name.removeprefix(part.prefix): lazy.pop(name) for name in list(lazy) if name.startswith(part.prefix)}
        if part.name in wanted:
            found[part.name], extra = _from_original(inner, part, str(reader.header.path))
            kept.update({part.prefix + name: mended(name, tensor) for name, tensor in extra.items()})
    notes = [f"{fault}: mended in files that are written" for fault in faults(reader.header)]
    if ignored:
        notes.append(f"left out: {counted(len(ignored), 'tensor')} of EMA copies or VAE training ({ignored[0]}, ...)")
    if unknown := [name for name in lazy if not re.fullmatch(layout.kept, name)]:
        notes.append(f"kept unchanged: {counted(len(unknown), 'tensor')} of no part of the model: {listed(unknown, 5)}")
    return Split(found, {**kept, **lazy}, tuple(notes))


def _from_original(
    inner: dict[str, LazyTensor], part: Part, where: str
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Return (diffusers name -> tensor, kept: name in the file -> tensor) of one part."""
    if not inner:
        raise CheckpointError(
            f"{where}: has no {part.name} (no key starts with {part.prefix}). Give a file of the whole model."
        )
    spare = ""
    if part.spare_layer:
        spare = f"transformer.resblocks.{part.sizes(inner, 'original').counters['n'] - 1}."
    extra = {
        name: tensor
        for name, tensor in inner.items()
        if re.fullmatch(part.kept, name) or (spare and name.startswith(spare))
    }
    named = {name: tensor for name, tensor in inner.items() if name not in extra}
    named = {part.original(name): tensor for name, tensor in named.items()}
    rules = part.rules(named, "original", [part.prefix + name for name in named])
    return keymap.to_diffusers(named, rules, f"{where}: {part.name}"), extra


def _from_folder(lazy: Mapping[str, LazyTensor], part: Part, header: Header) -> dict[str, LazyTensor]:
    """Return one part of a diffusers folder, with current names, checked against the table."""
    prefix = f"{part.name}/"
    named = {name.removeprefix(prefix): tensor for name, tensor in lazy.items() if name.startswith(prefix)}
    return diffusers_names(named, part, f"{header.path}: {part.name}")


def diffusers_names(named: Mapping[str, LazyTensor], part: Part, where: str) -> dict[str, LazyTensor]:
    """Rename a part from any diffusers version to current names. Raises CheckpointError for keys without a rule."""
    named = _modern(named, part)
    rules = part.rules(named, "diffusers")
    keymap.to_original(named, rules, where)  # only checks that every key has a rule
    flat = {rule.diffusers[0] for rule in rules if rule.form == "conv 1x1"}
    return {
        name: tensor.reshape(flat_shape(tensor.shape)) if name in flat else tensor for name, tensor in named.items()
    }


def _modern(named: Mapping[str, LazyTensor], part: Part) -> dict[str, LazyTensor]:
    return {name: tensor for old_name, tensor in named.items() if (name := part.modern(old_name)) is not None}


def to_original(
    parts: Mapping[str, Mapping[str, Tensor | LazyTensor]],
    kept: Mapping[str, Tensor | LazyTensor],
    layout: Layout,
    like: Header | None = None,
    dtype: str | None = None,
) -> Joined:
    """Join parts to an original file, the inverse of to_diffusers.

    like    header of the model's source file, whose conventions are kept (4-D or 2-D projections, the `text_model.`
    level, a projection as a Linear's weight)
    dtype   "F32", "F16" or "BF16" for floating-point tensors of the parts; None: unchanged. Kept tensors are unchanged
    For SD2 from a diffusers folder the text encoder's last layer, text_projection and logit_scale are made up, with a
    note.
    """
    known = like.tensors if like is not None and like.kind != "diffusers" else {}
    tensors: dict[str, LazyTensor] = {}
    notes: tuple[str, ...] = ()
    for part in layout.parts:
        if part.name not in parts:
            continue
        named = _modern({name: LazyTensor.of(tensor) for name, tensor in parts[part.name].items()}, part)
        original = keymap.to_original(named, part.rules(named, "diffusers", known), part.name)
        if part.spare_layer:
            made = _spare_text_tensors(original, part, kept)
            notes = (_MADE_NOTE.format(len(made)),) if made else ()
            original.update(made)
        for name, tensor in original.items():
            if dtype is not None:
                tensor = tensor.cast(dtype)
            full = _spelling(part.prefix, name, known)
            tensors[full] = _conform(tensor, known.get(full))
    tensors.update({name: replace(LazyTensor.of(tensor), may_be_infinite=True) for name, tensor in kept.items()})
    return Joined(tensors, notes)


_MADE_NOTE = (
    "added {} tensors that SD2 files have and diffusers folders lack: the text encoder's last layer "
    "(a copy of the one before), text_projection (ones) and logit_scale (1). Inference does not use them"
)


def _spelling(prefix: str, name: str, known: Mapping[str, TensorInfo]) -> str:
    """Return the full name, without the `text_model.` level if the source file lacks it."""
    full = prefix + name
    short = prefix + name.removeprefix("text_model.")
    return short if short in known and full not in known else full


def _conform(tensor: LazyTensor, info: TensorInfo | None) -> LazyTensor:
    """Reshape a 1x1 convolution's weight to 4-D or 2-D as in the source."""
    if info is None or info.shape == tensor.shape or flat_shape(info.shape) != flat_shape(tensor.shape):
        return tensor
    return tensor.reshape(info.shape)


def _spare_text_tensors(
    original: Mapping[str, LazyTensor], part: Part, kept: Mapping[str, object]
) -> dict[str, LazyTensor]:
    """Return the tensors of SD2 files beyond the layers in use, unless kept from the source."""
    last = part.sizes(original, "original").counters["n"] - 1
    before, spare = f"transformer.resblocks.{last}.", f"transformer.resblocks.{last + 1}."
    made = {spare + name.removeprefix(before): tensor for name, tensor in original.items() if name.startswith(before)}
    embedding = original["token_embedding.weight"]
    width = embedding.shape[1]
    made["text_projection"] = _ones((width, width), embedding.dtype)
    made["logit_scale"] = _ones((), embedding.dtype)
    return {name: tensor for name, tensor in made.items() if part.prefix + name not in kept}


def _ones(shape: tuple[int, ...], dtype: str) -> LazyTensor:
    def load() -> Tensor:
        import torch

        return torch.ones(shape, dtype=torch_dtype(dtype))

    return LazyTensor(TensorInfo(dtype, shape), load)
