"""What tells the kinds of Stable Diffusion apart: data that recognising, loading and saving read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.checkpoints import sd_layout
from library.checkpoints.header import Header

# what users are told of parts
TITLES = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


@dataclass(frozen=True)
class TextKind:
    """A text encoder by its name in diffusers' folders (text_encoder, text_encoder_2).

    `projects`: it has a projection behind its pooled vector (CLIPTextModelWithProjection), else it is a CLIPTextModel.
    `pad_id` fills its ids up, where a folder's own tokenizer says nothing else.
    """

    name: str
    activation: str
    tokenizer_id: str
    pad_id: int
    projects: bool = False

    @property
    def tokenizer_folder(self) -> str:
        """The folder of its tokenizer in a diffusers folder."""
        return self.name.replace("text_encoder", "tokenizer")

    @property
    def class_name(self) -> str:
        """Its class in transformers."""
        return "CLIPTextModelWithProjection" if self.projects else "CLIPTextModel"

    def module_name(self, name: str) -> str:
        """The name of a tensor in the module of transformers 5, from its name in files: CLIPTextModel has lost the
        `text_model.` level."""
        return name if self.projects else name.removeprefix("text_model.")

    def file_name(self, name: str) -> str:
        """The inverse of `module_name`: what every reader takes."""
        return name if self.projects else f"text_model.{name}"


@dataclass(frozen=True)
class Variant:
    """Where the kinds of Stable Diffusion differ.

    `marks`: a single file of the kind has one of these keys; `texts` its text encoders in order. `linear`: the U-Net's
    projections in a diffusers folder are Linear and not 1x1 convolutions. Heads: `heads` at every level, else
    width / `head_size`. `marks_prediction`: programs read from keys of its single files what the U-Net predicts. `ids`:
    numbers that the U-Net is told beside the text (0: none). `pipeline` is the class of its diffusers folders, and
    `pipeline_facts` what else stands in their model_index.json.
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
        """All parts of a model, in the order in which they are loaded."""
        return ("unet", "vae", *(text.name for text in self.texts))


_UNET_IN, _FOLDER_UNET_IN = "model.diffusion_model.input_blocks.0.0.weight", "unet/conv_in.weight"


def unet_channels(header: Header) -> int | None:
    """The channels that a checkpoint's U-Net takes; None: it has none."""
    info = header.tensors.get(_FOLDER_UNET_IN if header.kind == "diffusers" else _UNET_IN)
    return info.shape[1] if info is not None and len(info.shape) == 4 else None


def folder_kind(header: Header, variant: Variant) -> bool:
    """Whether a diffusers folder holds the text encoders of this variant, and no others."""
    found = {name.partition("/")[0] for name in header.tensors if name.startswith("text_encoder")}
    said = {name for name, value in header.configs.get("model_index", {}).items() if name.startswith("text_encoder")
            and isinstance(value, list) and value[:1] != [None]}  # fmt: skip
    return found | said == {text.name for text in variant.texts}


def recognise(variant: Variant, header: Header) -> bool:
    """Whether a checkpoint is of this variant: a U-Net of its channels that is told as much, with its text encoders.
    The VAE may be absent.

    Models of the same layers whose noise is another are none: trained as this one they would be spoilt.
    """
    names = header.tensors
    if unet_channels(header) != variant.channels or has_edm_noise(header):
        return False
    if header.kind != "diffusers":
        told = any(name.startswith("model.diffusion_model.label_emb.") for name in names)
        return told == bool(variant.ids) and any(mark in names for mark in variant.marks)
    told = any(name.startswith("unet/add_embedding.") for name in names)
    ranks = {len(info.shape) for name, info in names.items() if name.endswith(".attentions.0.proj_in.weight")}
    return (
        folder_kind(header, variant)
        and told == bool(variant.ids)
        and ranks == {2 if variant.linear else 4}
        and not any(name.startswith("unet/class_embedding.") for name in names)
    )


def has_edm_noise(header: Header) -> bool:
    """Whether a model was trained with the noise of EDM (arXiv 2206.00364), as Playground v2.5 and CosXL were: by keys
    of its file that programs go by (edm_mean, edm_vpred.sigma_max, …), or by its folder's scheduler."""
    scheduler = str(header.configs.get("scheduler", {}).get("_class_name", ""))
    return scheduler.startswith("EDM") or any(name.startswith("edm_") for name in header.tensors)
