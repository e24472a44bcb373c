"""Stable Diffusion 1.x and 2.x: what they are, and where the two differ. No torch at module level.

Sources: CompVis/stable-diffusion (v1), Stability-AI/stablediffusion (v2); sizes are read from the tensors, so that a
miniature takes the path of the real model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import sd_layout
from library.checkpoints.files import TensorReader
from library.checkpoints.header import Header
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.vae_file import read_vae
from library.families import clip_text, unet, vae
from library.families.clip_tokenizer import ClipTokenizer, cached_tokenizer
from library.families.family import Family, LatentSpace, Model, PartSizes
from library.families.sd_adapters import SD_ADAPTERS
from library.families.sd_configs import read_configs
from library.families.sd_variant import Variant, without_text_model
from library.objective.process import ForwardProcess

if TYPE_CHECKING:
    from library.families.sd_load import LoadOptions

_UNET_IN, _FOLDER_UNET_IN = "model.diffusion_model.input_blocks.0.0.weight", "unet/conv_in.weight"
_FOLDER_TEXT = ("text_encoder/text_model.embeddings.", "text_encoder/embeddings.")


_SD1 = Variant(
    layout=sd_layout.SD1,
    text_keys=(
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.embeddings.token_embedding.weight",
    ),
    linear=False,
    activation="quick_gelu",
    heads=8,
    head_size=None,
    tokenizer_id="openai/clip-vit-large-patch14",
    pad_id=49407,
)

_SD2 = Variant(
    layout=sd_layout.SD2,
    text_keys=("cond_stage_model.model.token_embedding.weight",),
    linear=True,
    activation="gelu",
    heads=None,
    head_size=64,
    tokenizer_id="stabilityai/stable-diffusion-2",
    pad_id=0,
)


def recognise(variant: Variant, header: Header) -> bool:
    """Whether a header is of this variant: a U-Net of 4 channels with its text encoder. The VAE may be absent."""
    tensors = header.tensors
    if header.kind == "diffusers":
        if not any(name.startswith(_FOLDER_TEXT) for name in tensors) or "text_encoder_2" in _pipeline(header):
            return False
        if any(name.startswith(("unet/add_embedding.", "unet/class_embedding.")) for name in tensors):
            return False
        ranks = {len(info.shape) for name, info in tensors.items() if name.endswith(".attentions.0.proj_in.weight")}
        return _channels(header, _FOLDER_UNET_IN) == variant.channels and ranks == {2 if variant.linear else 4}
    if any(name.startswith("model.diffusion_model.label_emb.") for name in tensors):
        return False
    return _channels(header, _UNET_IN) == variant.channels and any(key in tensors for key in variant.text_keys)


def _pipeline(header: Header) -> dict[str, Any]:
    return dict(header.configs.get("model_index", {}))


def _channels(header: Header, name: str) -> int | None:
    info = header.tensors.get(name)
    return info.shape[1] if info is not None and len(info.shape) == 4 else None


def sizes(variant: Variant, source: Header, vae: Path | str | None = None) -> PartSizes:
    """Parameters of each part, from headers only. CheckpointError for whatever in them would not load."""
    wanted = ("unet", "text_encoder") if vae is not None else ("unet", "vae", "text_encoder")
    split = sd_layout.to_diffusers(TensorReader(source), variant.layout, wanted)
    parts = split.parts if vae is None else {**split.parts, "vae": read_vae(vae).tensors}
    parts["text_encoder"] = without_text_model(parts["text_encoder"])
    # to refuse now what would not load
    read_configs(variant, family_of(variant), source, parts, "epsilon", foreign_vae=vae is not None)
    return PartSizes(
        **{name: _count(parts[name]) for name in ("unet", "text_encoder", "vae")},
        kept_bytes=sum(tensor.info.nbytes for tensor in split.kept.values()),
    )


def _count(tensors: dict[str, LazyTensor]) -> int:
    return sum(tensor.info.count for tensor in tensors.values())


def tokenizer(variant: Variant, source: Header | None = None, tokenizer_cache_dir: Path | None = None) -> ClipTokenizer:
    """A diffusers folder's own tokenizer, else that of --tokenizer_cache_dir, else the shipped one."""
    if source is not None and source.kind == "diffusers" and (source.path / "tokenizer").is_dir():
        return ClipTokenizer.from_folder(source.path / "tokenizer", variant.pad_id)
    return cached_tokenizer(tokenizer_cache_dir, variant.tokenizer_id, variant.pad_id)


def load(variant: Variant, source: Header, **options: Any) -> Model:
    """See families.family.Load."""
    from library.families import sd_load

    chosen: LoadOptions = sd_load.LoadOptions(**options)
    return sd_load.load(family_of(variant), variant, source, chosen)


def save(variant: Variant, model: Model, path: Path, **options: Any) -> tuple[str, ...]:
    """See families.family.Save."""
    from library.families import sd_save

    return sd_save.save(variant, model, path, sd_save.SaveOptions(**options))


def family_of(variant: Variant) -> Family:
    """SD1 or SD2."""
    return SD1 if variant is _SD1 else SD2


def _family(variant: Variant, **facts: Any) -> Family:
    return Family(
        latent=LatentSpace(channels=variant.channels, stride=8, scale=variant.scale, cache_suffix="_sd.npz"),
        process=ForwardProcess.scaled_linear(),
        adapters=SD_ADAPTERS,
        recognise=partial(recognise, variant),
        sizes=partial(sizes, variant),
        tokenizer=partial(tokenizer, variant),
        load=partial(load, variant),
        save=partial(save, variant),
        encode_text=clip_text.encode_text,
        predict=unet.predict,
        encode_images=vae.encode_images,
        decode_latents=vae.decode_latents,
        **facts,
    )


SD1 = _family(
    _SD1,
    name="sd1",
    title="Stable Diffusion 1.x",
    version="sd_v1",
    # v-prediction SD1 models exist (fine-tunes); modelspec has one name for all of them
    architectures={"epsilon": "stable-diffusion-v1", "v": "stable-diffusion-v1"},
    capabilities=frozenset({"snr", "v_prediction", "clip_skip", "chunks", "weighted_captions"}),
    preview={"epsilon": (512, 512), "v": (512, 512)},
)

SD2 = _family(
    _SD2,
    name="sd2",
    title="Stable Diffusion 2.x",
    version="sd_v2",
    architectures={"epsilon": "stable-diffusion-v2-512", "v": "stable-diffusion-v2-768-v"},
    capabilities=frozenset({"snr", "v_prediction", "clip_skip", "chunks", "weighted_captions", "inference_yaml", "v2"}),
    preview={"epsilon": (512, 512), "v": (768, 768)},
)
