"""The variants of Stable Diffusion: data for recognising, loading and saving. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.checkpoints import sd_layout
from library.checkpoints.header import Header

# names of parts in messages
TITLES = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


@dataclass(frozen=True)
class TextKind:
    """A text encoder, named as in diffusers folders (text_encoder, text_encoder_2).

    `projects`: its pooled vector is projected (CLIPTextModelWithProjection), otherwise it is a CLIPTextModel.
    `pad_id`: the padding id, unless a folder's tokenizer has its own.
    """

    name: str
    activation: str
    tokenizer_id: str
    pad_id: int
    projects: bool = False

    @property
    def tokenizer_folder(self) -> str:
        """Name of its tokenizer's folder in a diffusers folder."""
        return self.name.replace("text_encoder", "tokenizer")

    @property
    def class_name(self) -> str:
        """Name of its class in transformers."""
        return "CLIPTextModelWithProjection" if self.projects else "CLIPTextModel"

    def module_name(self, name: str) -> str:
        """Return a tensor's name in the module of transformers 5 from its name in files: CLIPTextModel no longer has
        the `text_model.` level."""
        return name if self.projects else name.removeprefix("text_model.")

    def file_name(self, name: str) -> str:
        """Inverse of `module_name`."""
        return name if self.projects else f"text_model.{name}"


@dataclass(frozen=True)
class Variant:
    """The differences between the kinds of Stable Diffusion.

    `marks`: keys of which a single file has one. `texts`: text encoders in order. `linear`: the U-Net's projections in
    a diffusers folder are Linear instead of 1x1 convolutions. Heads: `heads` at every level, otherwise width /
    `head_size`. `marks_prediction`: other programs read the prediction type from keys of single files. `ids`: number of
    sizes and scores the U-Net is conditioned on (0: none). `pipeline`: pipeline class of diffusers folders;
    `pipeline_facts`: further entries of model_index.json.
    """

    layout: sd_layout.Layout
    marks: tuple[str, ...]
    texts: tuple[TextKind, ...]
    linear: bool
    heads: int | None
    head_size: int | None
    pipeline: str = "StableDiffusionPipeline"
    pipeline_facts: Mapping[str, Any] = field(default_factory=dict)
    ids: int = 0
    channels: int = 4
    upcast_attention: bool = False
    marks_prediction: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts of a model, in loading order."""
        return ("unet", "vae", *(text.name for text in self.texts))


_UNET_IN, _FOLDER_UNET_IN = "model.diffusion_model.input_blocks.0.0.weight", "unet/conv_in.weight"


def unet_channels(header: Header) -> int | None:
    """Number of input channels of a checkpoint's U-Net; None if it has no U-Net."""
    info = header.tensors.get(_FOLDER_UNET_IN if header.kind == "diffusers" else _UNET_IN)
    return info.shape[1] if info is not None and len(info.shape) == 4 else None


def has_text_encoders_of(header: Header, variant: Variant) -> bool:
    """Whether a diffusers folder contains exactly the text encoders of this variant."""
    found = {name.partition("/")[0] for name in header.tensors if name.startswith("text_encoder")}
    declared = {name for name, value in header.configs.get("model_index", {}).items() if name.startswith("text_encoder")
            and isinstance(value, list) and value[:1] != [None]}  # fmt: skip
    return found | declared == {text.name for text in variant.texts}


def recognise(variant: Variant, header: Header) -> bool:
    """Whether a checkpoint is of this variant: by the U-Net's channels and additional inputs, and the text encoders.
    The VAE may be missing.

    Models with the same layers but another noise process are excluded, as training would damage them.
    """
    names = header.tensors
    if unet_channels(header) != variant.channels or has_edm_noise(header):
        return False
    if header.kind != "diffusers":
        has_ids = any(name.startswith("model.diffusion_model.label_emb.") for name in names)
        return has_ids == bool(variant.ids) and any(mark in names for mark in variant.marks)
    has_ids = any(name.startswith("unet/add_embedding.") for name in names)
    ranks = {len(info.shape) for name, info in names.items() if name.endswith(".attentions.0.proj_in.weight")}
    return (
        has_text_encoders_of(header, variant)
        and has_ids == bool(variant.ids)
        and ranks == {2 if variant.linear else 4}
        and not any(name.startswith("unet/class_embedding.") for name in names)
    )


def has_edm_noise(header: Header) -> bool:
    """Whether a model was trained with EDM noise (arXiv 2206.00364), like Playground v2.5 and CosXL: by keys of its
    file (edm_mean, edm_vpred.sigma_max, …) or by its folder's scheduler."""
    scheduler = str(header.configs.get("scheduler", {}).get("_class_name", ""))
    return scheduler.startswith("EDM") or any(name.startswith("edm_") for name in header.tensors)
