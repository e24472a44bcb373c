"""Stable Diffusion 1, 2, XL and XL's refiner: one original file <-> U-Net, VAE and text encoders as diffusers and
transformers name them.

Levels, blocks, attentions and depth are read from the names, so a miniature takes the path of the real model.
Parts are called as diffusers calls their folders. Text encoder names have the `text_model.` level here, whatever the
file has.
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
from library.checkpoints.tables import clip_hf, clip_open, unet_sd, vae_sd

if TYPE_CHECKING:
    from torch import Tensor

Side = str  # "original" or "diffusers"


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number that the pattern finds; 0 if it finds none."""
    return max((int(found[1]) + 1 for name in names if (found := re.match(pattern, name))), default=0)


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
    """A text encoder's name with the `text_model.` level, which transformers 5 and some files leave out."""
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else name


def modern_text_name(name: str) -> str | None:
    """A text encoder's diffusers name with the `text_model.` level; None for a buffer that is no weight."""
    return None if re.fullmatch(_POSITION_IDS, name) else with_text_model(name)


def modern_vae_name(name: str) -> str:
    """A diffusers VAE name with today's names of the attention layers (to_q, ...)."""
    *path, module, leaf = name.split(".")
    if path and path[-1].isdigit() and "attentions" in path:
        module = vae_sd.OLD_DIFFUSERS.get(module, module)
    return ".".join([*path, module, leaf])


@dataclass(frozen=True)
class Part:
    """A part of an original file.

    name, prefix  its folder in a diffusers model; what its keys begin with in an original file
    rows          its table; `variants` spells some of the same tensors as a few files do
    kept          pattern of keys that no module takes but files keep
    modern        a name of any diffusers or transformers version -> today's; None is left out
    bare          its original keys may lack the `text_model.` level
    spare_layer   it has one layer more in the file than in the model (SD2 uses the penultimate one's output)
    """

    name: str
    prefix: str
    rows: tuple[Row, ...]
    sizes: Callable[[Iterable[str], Side], Sizes]
    kept: str = r"(?!)"
    variants: tuple[Row, ...] = ()
    modern: Callable[[str], str | None] = str
    bare: bool = False
    spare_layer: bool = False

    def rules(self, names: Iterable[str], side: Side, known: Collection[str] = ()) -> tuple[Rule, ...]:
        """The renames for a model with these names (of one layout, without prefix).

        `known`: the full names of an original file, whose spelling is taken where there are two.
        """
        sizes = self.sizes(names, side)
        spelled = {
            rule.diffusers: rule for rule in expand(self.variants, sizes) if self.prefix + rule.original in known
        }
        return tuple(spelled.get(rule.diffusers, rule) for rule in expand(self.rows, sizes))


@dataclass(frozen=True)
class Layout:
    """A kind of original file.

    kept      pattern of keys outside the parts that every file of the kind may have; others are kept too, but noted
    ignored   pattern of keys that are left out (counted in a note)
    """

    parts: tuple[Part, ...]
    kept: str
    ignored: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its parts."""
        return tuple(part.name for part in self.parts)


def _clip_hf(prefix: str) -> Part:
    """OpenAI's CLIP behind transformers' names."""
    kept = rf"{_POSITION_IDS}|text_projection\.weight|logit_scale"
    return Part("text_encoder", prefix, clip_hf.ROWS, clip_sizes, kept, modern=modern_text_name, bare=True)


def _open_clip(prefix: str) -> Part:
    """OpenCLIP with the projection of its pooled state, as SDXL and its refiner use it."""
    return Part(
        "text_encoder_2",
        prefix,
        clip_open.PROJECTED_ROWS,
        clip_sizes,
        kept=rf"{_POSITION_IDS}|logit_scale|attn_mask",  # the position_ids are ComfyUI's
        variants=clip_open.LINEAR_PROJECTION,
        modern=modern_text_name,
    )


UNET = Part("unet", "model.diffusion_model.", unet_sd.ROWS, unet_sizes)
UNET_XL = replace(UNET, rows=unet_sd.XL_ROWS)
VAE = Part("vae", "first_stage_model.", vae_sd.ROWS, vae_sizes, modern=modern_vae_name)
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
    r"|v_pred|ztsnr"  # marks of what the U-Net predicts (prediction_marks.py)
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
    """A checkpoint taken apart.

    parts: part -> diffusers name -> tensor; kept: original name -> tensor; notes: for the user.
    """

    parts: dict[str, dict[str, LazyTensor]]
    kept: dict[str, LazyTensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """An original file put together: original name -> tensor, and notes for the user."""

    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...]


def to_diffusers(reader: TensorReader, layout: Layout, parts: Iterable[str] | None = None) -> Split:
    """Take a checkpoint apart by names, all of it or some parts; no tensor is read before its load() is called.

    The reader may be of an original file or of a diffusers folder. Shapes are those of diffusers' modules, with one
    exception: the U-Net's proj_in and proj_out stay 4-D or 2-D as the file has them. Raises CheckpointError if a wanted
    part is missing or a key of a part has no rule.
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
            kept.update({part.prefix + name: tensor for name, tensor in extra.items()})
    notes = []
    if ignored:
        notes.append(f"{len(ignored)} tensors of EMA copies or of VAE training are left out ({ignored[0]}, ...)")
    if unknown := [name for name in lazy if not re.fullmatch(layout.kept, name)]:
        notes.append(
            f"{len(unknown)} tensors of the file have no use here and are kept as they are: {', '.join(unknown[:5])}"
        )
    return Split(found, {**kept, **lazy}, tuple(notes))


def _from_original(
    inner: dict[str, LazyTensor], part: Part, where: str
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """(diffusers name -> tensor, kept: name as in the file -> tensor) of one part."""
    if not inner:
        raise CheckpointError(
            f"{where}: has no {part.name} (no key begins with {part.prefix}). Give a file of the whole model."
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
    if part.bare:
        named = {with_text_model(name): tensor for name, tensor in named.items()}
    rules = part.rules(named, "original", [part.prefix + name for name in named])
    return keymap.to_diffusers(named, rules, f"{where}: {part.name}"), extra


def _from_folder(lazy: Mapping[str, LazyTensor], part: Part, header: Header) -> dict[str, LazyTensor]:
    """One part of a diffusers folder, its names made today's and checked against the table."""
    prefix = f"{part.name}/"
    named = {name.removeprefix(prefix): tensor for name, tensor in lazy.items() if name.startswith(prefix)}
    return diffusers_names(named, part, f"{header.path}: {part.name}")


def diffusers_names(named: Mapping[str, LazyTensor], part: Part, where: str) -> dict[str, LazyTensor]:
    """A part in any diffusers naming, old or new -> today's names. Raises CheckpointError for keys without a rule."""
    named = _modern(named, part)
    rules = part.rules(named, "diffusers")
    keymap.to_original(named, rules, where)  # only to refuse what has no rule
    flat = {rule.diffusers[0] for rule in rules if rule.form == "conv 1x1"}
    return {
        name: tensor.reshape(flat_shape(tensor.shape)) if name in flat else tensor for name, tensor in named.items()
    }


def _modern(named: Mapping[str, LazyTensor], part: Part) -> dict[str, LazyTensor]:
    return {name: tensor for given, tensor in named.items() if (name := part.modern(given)) is not None}


def to_original(
    parts: Mapping[str, Mapping[str, Tensor | LazyTensor]],
    kept: Mapping[str, Tensor | LazyTensor],
    layout: Layout,
    like: Header | None = None,
    dtype: str | None = None,
) -> Joined:
    """Put an original file together: the inverse of to_diffusers.

    like    header of the file that the model came from: its conventions are kept (4-D or 2-D projections, the
    `text_model.` level, a projection as a Linear's weight)
    dtype   "F32", "F16" or "BF16" for the floats of the parts; None leaves them. Kept tensors stay as they are
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
    "{} tensors that a diffusers folder of SD2 does not have were made for the file: the text encoder's last layer "
    "(a copy of the one before), text_projection (ones) and logit_scale (1). Nothing that draws images reads them"
)


def _spelling(prefix: str, name: str, known: Mapping[str, TensorInfo]) -> str:
    """The full name, without the `text_model.` level if the source file leaves it out."""
    full = prefix + name
    short = prefix + name.removeprefix("text_model.")
    return short if short in known and full not in known else full


def _conform(tensor: LazyTensor, info: TensorInfo | None) -> LazyTensor:
    """A 1x1 convolution's weight as the source has it: 4-D or 2-D."""
    if info is None or info.shape == tensor.shape or flat_shape(info.shape) != flat_shape(tensor.shape):
        return tensor
    return tensor.reshape(info.shape)


def _spare_text_tensors(
    original: Mapping[str, LazyTensor], part: Part, kept: Mapping[str, object]
) -> dict[str, LazyTensor]:
    """What SD2 files have beyond the layers in use, where the source did not bring it along."""
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
