"""Make a family of Stable Diffusion from its variant. No torch at module level."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.files import TensorReader
from library.checkpoints.header import Header
from library.checkpoints.lazy import LazyTensor
from library.families.clip.text_inputs import ClipTokenizers
from library.families.clip.tokenizer import ClipTokenizer, cached_tokenizer
from library.families.family import Family, LatentSpace, Model, PartSizes, Tokenizer
from library.families.sd import vae
from library.families.sd.checkpoint_parts import split_checkpoint
from library.families.sd.passes import footprint_of
from library.families.sd.variant import recognise
from library.objective.process import VariancePreserving

if TYPE_CHECKING:
    from library.families.sd.variant import TextKind, Variant

# Norms are vectors. The first and last layers, and those of the timestep, pass on everything there is, and are small.
_NOT_QUANTISED_UNET = (r"conv_in\.", r"conv_out\.", r"time_embedding\.", r"add_embedding\.")
_NOT_QUANTISED_TEXT = (r".*embeddings\.", r"text_projection\.")
_CONTAINER = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)"
_UNET_BLOCKS = (rf"{_CONTAINER}\.resnets\.\d+", rf"{_CONTAINER}\.attentions\.\d+\.transformer_blocks\.\d+")
_TEXT_BLOCKS = (r"(text_model\.)?encoder\.layers\.\d+",)


def make_family(variant: Variant, latent: LatentSpace, **facts: Any) -> Family:
    """Return the family of a variant; `facts` are further fields of Family."""

    def sizes_of(source: Header, vae: Path | str | None = None) -> PartSizes:
        return sizes(family, variant, source, vae)

    def load(source: Header, **options: Any) -> Model:
        from library.families.sd import load as sd_load

        return sd_load.load(family, variant, source, sd_load.LoadOptions(**options))

    def save(model: Model, path: Path, **options: Any) -> tuple[str, ...]:
        from library.families.sd import save as sd_save

        return sd_save.save(variant, model, path, sd_save.SaveOptions(**options))

    def tokenizer_of(source: Header | None = None, tokenizer_cache_dir: Path | None = None) -> Tokenizer:
        return tokenizer(variant, source, tokenizer_cache_dir)

    family = Family(
        backbone="unet",
        backbone_title="U-Net",
        latent=latent,
        process=VariancePreserving.scaled_linear(),
        recognise=partial(recognise, variant),
        sizes=sizes_of,
        tokenizer=tokenizer_of,
        load=load,
        save=save,
        encode_images=vae.encode_images,
        decode_latents=vae.decode_latents,
        text_encoders=tuple(text.name for text in variant.texts),
        not_quantised={"unet": _NOT_QUANTISED_UNET} | {text.name: _NOT_QUANTISED_TEXT for text in variant.texts},
        shard_units={"unet": _UNET_BLOCKS} | {text.name: _TEXT_BLOCKS for text in variant.texts},
        footprint=footprint_of(variant),
        variant=variant,
        **facts,
    )
    return family


def sizes(family: Family, variant: Variant, source: Header, vae: Path | str | None = None) -> PartSizes:
    """Count the parameters of each part from headers. Raises CheckpointError if the checkpoint cannot be loaded."""
    split = split_checkpoint(family, variant, TensorReader(source), vae)
    return PartSizes(
        parameters={part: _count(split.parts[part]) for part in variant.parts},
        kept_bytes=sum(tensor.info.nbytes for tensor in split.kept.values()),
        shapes={part: {name: tensor.shape for name, tensor in split.parts[part].items()} for part in variant.parts},
    )


def _count(tensors: Mapping[str, LazyTensor]) -> int:
    return sum(tensor.info.count for tensor in tensors.values())


def tokenizer(variant: Variant, source: Header | None = None, tokenizer_cache_dir: Path | None = None) -> Tokenizer:
    """Return a diffusers folder's own tokenizers, those of --tokenizer_cache_dir, or the built-in one."""
    return ClipTokenizers({text.name: _tokenizer(text, source, tokenizer_cache_dir) for text in variant.texts})


def _tokenizer(text: TextKind, source: Header | None, cache: Path | None) -> ClipTokenizer:
    if source is not None and source.kind == "diffusers" and (source.path / text.tokenizer_folder).is_dir():
        return ClipTokenizer.from_folder(source.path / text.tokenizer_folder, text.pad_id)
    return cached_tokenizer(cache, text.tokenizer_id, text.pad_id)
