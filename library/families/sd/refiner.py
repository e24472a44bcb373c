"""The refiner of Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952, section 2.5): a U-Net for the last 200
timesteps, one text encoder, and conditioning on an aesthetic score. No torch at module level.

Source of names and sizes: Stability-AI/generative-models, configs/inference/sd_xl_refiner.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.checkpoints import sd_layout
from library.data.batch import TextInput
from library.families.clip import text_encoder as clip_text
from library.families.family import AS_TRAINED, Conditioning, TextSettings
from library.families.sd import unet
from library.families.sd.refiner_adapters import NAMES, REFINER_ADAPTERS
from library.families.sd.sdxl import BIG_G, CAPABILITIES, make_xl_family, xl_variant

if TYPE_CHECKING:
    from torch import Tensor

IDS = 5  # height and width of the file, top and left of the crop, score

_REFINER = xl_variant(
    layout=sd_layout.REFINER,
    marks=("conditioner.embedders.0.model.token_embedding.weight",),
    texts=(BIG_G,),
    pipeline="StableDiffusionXLImg2ImgPipeline",
    pipeline_facts={
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    },
    ids=IDS,
)


def encode_text(
    text_encoders: Mapping[str, Any],
    text_inputs: Mapping[str, TextInput],
    settings: TextSettings = AS_TRAINED,
) -> dict[str, Tensor]:
    """Encode ids (B, n, 77): "states" (B, 75n + 2, width) before the last layer, and "pooled" (B, width)."""
    encoder, text_input = text_encoders["text_encoder_2"], text_inputs["text_encoder_2"]
    states, pooled = clip_text.penultimate_and_pooled(encoder, text_input, settings)
    return {"states": states, "pooled": pooled}


def predict(backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Run the U-Net, conditioned on image size, crop position and aesthetic score too."""
    import torch

    ids = torch.cat([conditioning["sizes"][:, :4], conditioning["score"][:, None]], 1)
    return unet.predict_with_ids(backbone, noisy, timesteps, conditioning, ids)


REFINER = make_xl_family(
    _REFINER,
    NAMES,
    name="refiner",
    title="the refiner of Stable Diffusion XL",
    version="sdxl_refiner_v1-0",
    architecture="stable-diffusion-xl-v1-refiner",
    capabilities=CAPABILITIES | {"aesthetic_score"},
    adapters=REFINER_ADAPTERS,
    encode_text=encode_text,
    predict=predict,
    refines=True,
)
