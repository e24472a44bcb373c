"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): two text encoders, a pooled text vector, and conditioning
on image size and crop. No torch at module level.

Source of names and sizes: Stability-AI/generative-models, configs/inference/sd_xl_base.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from library.checkpoints import sd_layout
from library.data.batch import TextInput
from library.families.clip import text_encoder as clip_text
from library.families.family import AS_TRAINED, Conditioning, Family, LatentSpace, TextSettings
from library.families.sd import unet
from library.families.sd.layer_names import UnetNames
from library.families.sd.make_family import make_family
from library.families.sd.sdxl_adapters import NAMES, SDXL_ADAPTERS
from library.families.sd.variant import TextKind, Variant
from library.options.flag import Capability

if TYPE_CHECKING:
    from torch import Tensor

IDS = 6  # height and width of the file, top and left of the crop, height and width of the crop

CAPABILITIES: frozenset[Capability] = frozenset(
    {
        *("snr", "rollout", "v_prediction", "chunks", "weighted_captions", "pooled", "size_conditioning"),
        *("hand_over", "block_lr"),
    }
)
# OpenCLIP's ViT-bigG/14, used by both the base and the refiner
BIG_G = TextKind("text_encoder_2", "gelu", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", 0, projects=True)

xl_variant = partial(Variant, linear=True, heads=None, head_size=64, marks_prediction=True)

_SDXL = xl_variant(
    layout=sd_layout.SDXL,
    marks=("conditioner.embedders.1.model.token_embedding.weight",),
    texts=(TextKind("text_encoder", "quick_gelu", "openai/clip-vit-large-patch14", 49407), BIG_G),
    pipeline="StableDiffusionXLPipeline",
    pipeline_facts={"force_zeros_for_empty_prompt": True},
    ids=IDS,
)


def encode_text(
    text_encoders: Mapping[str, Any],
    text_inputs: Mapping[str, TextInput],
    settings: TextSettings = AS_TRAINED,
) -> dict[str, Tensor]:
    """Encode ids (B, n, 77): "states" of both encoders side by side (B, 75n + 2, sum of widths), each before its last
    layer, and "pooled" of the second   (arXiv 2307.01952, section 2.1)."""
    import torch

    narrow = clip_text.penultimate(text_encoders["text_encoder"], text_inputs["text_encoder"])
    larger, larger_input = text_encoders["text_encoder_2"], text_inputs["text_encoder_2"]
    wide, pooled = clip_text.penultimate_and_pooled(larger, larger_input, settings)
    return {"states": torch.cat([narrow, wide], -1), "pooled": pooled}


def predict(backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Run the U-Net, conditioned on image size and crop too   (arXiv 2307.01952, section 2.2)."""
    return unet.predict_with_ids(backbone, noisy, timesteps, conditioning, conditioning["sizes"])


def make_xl_family(variant: Variant, names: UnetNames, *, version: str, architecture: str, **facts: Any) -> Family:
    """Return the family of SDXL or its refiner: both predictions have the same names and image size, and blocks and
    adapters are named as in the original U-Net."""
    return make_family(
        variant,
        LatentSpace(channels=4, stride=8, scale=0.13025, cache_suffix="_sdxl.npz", fp16=False),
        versions={"epsilon": version, "v": version},
        architectures={"epsilon": architecture, "v": architecture},
        preview={"epsilon": (1024, 1024), "v": (1024, 1024)},
        block_of=names.block_of,
        blocks=names.blocks,
        adapter_names="original",
        **facts,
    )


SDXL = make_xl_family(
    _SDXL,
    NAMES,
    name="sdxl",
    title="Stable Diffusion XL",
    version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base",
    capabilities=CAPABILITIES | {"text_encoder_rates"},
    adapters=SDXL_ADAPTERS,
    encode_text=encode_text,
    predict=predict,
)
