"""The refiner of Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952, section 2.5): a U-Net of its own for the
last 200 timesteps, one text encoder, and a score of how beautiful an image is. No torch at module level.

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
from library.families.sd.make_family import make_family
from library.families.sd.refiner_adapters import NAMES, REFINER_ADAPTERS
from library.families.sd.sdxl import BIG_G, CAPABILITIES, LATENT
from library.families.sd.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor

IDS = 5  # height and width of the file, top and left of the crop, score

_REFINER = Variant(
    layout=sd_layout.REFINER,
    marks=("conditioner.embedders.0.model.token_embedding.weight",),
    texts=(BIG_G,),
    linear=True,
    heads=None,
    head_size=64,
    pipeline="StableDiffusionXLImg2ImgPipeline",
    pipeline_facts={
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    },
    ids=IDS,
    marks_prediction=True,
)


def encode_text(
    text_encoders: Mapping[str, Any],
    text_inputs: Mapping[str, TextInput],
    settings: TextSettings = AS_TRAINED,
) -> dict[str, Tensor]:
    """The "states" (B, 75n + 2, width) before the last layer, and "pooled" (B, width), from ids (B, n, 77)."""
    encoder, text_input = text_encoders["text_encoder_2"], text_inputs["text_encoder_2"]
    states, pooled = clip_text.penultimate_and_pooled(encoder, text_input, settings)
    return {"states": states, "pooled": pooled}


def predict(backbone: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The U-Net's output, told the file's size, the crop's place and the score of `conditioning` too."""
    import torch

    ids = torch.cat([conditioning["sizes"][:, :4], conditioning["score"][:, None]], 1)
    return unet.predict_with_ids(backbone, noisy, timesteps, conditioning, ids)


REFINER = make_family(
    _REFINER,
    LATENT,
    name="refiner",
    title="the refiner of Stable Diffusion XL",
    versions={"epsilon": "sdxl_refiner_v1-0", "v": "sdxl_refiner_v1-0"},
    architectures={"epsilon": "stable-diffusion-xl-v1-refiner", "v": "stable-diffusion-xl-v1-refiner"},
    capabilities=CAPABILITIES | {"aesthetic_score", "block_lr"},
    preview={"epsilon": (1024, 1024), "v": (1024, 1024)},
    adapters=REFINER_ADAPTERS,
    encode_text=encode_text,
    predict=predict,
    refines=True,
    block_of=NAMES.block_of,
    blocks=NAMES.blocks,
    adapter_names="original",
)
