"""Stable Diffusion 1.x and 2.x. No torch at module level.

Sources: CompVis/stable-diffusion (v1), Stability-AI/stablediffusion (v2). Sizes are read from the tensors, so that
miniature models work too.
"""

from __future__ import annotations

from library.checkpoints import sd_layout
from library.families.clip import text_encoder as clip_text
from library.families.family import LatentSpace
from library.families.sd import unet
from library.families.sd.make_family import make_family
from library.families.sd.sd_adapters import SD_ADAPTERS
from library.families.sd.variant import TextKind, Variant

_PIPELINE_FACTS = {"requires_safety_checker": False, "safety_checker": [None, None]}
_LATENT = LatentSpace(channels=4, stride=8, scale=0.18215, cache_suffix="_sd.npz")

_SD1 = Variant(
    layout=sd_layout.SD1,
    marks=(
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.embeddings.token_embedding.weight",
    ),
    texts=(TextKind("text_encoder", "quick_gelu", "openai/clip-vit-large-patch14", 49407),),
    linear=False,
    heads=8,
    head_size=None,
    pipeline_facts=_PIPELINE_FACTS,
)

_SD2 = Variant(
    layout=sd_layout.SD2,
    marks=("cond_stage_model.model.token_embedding.weight",),
    texts=(TextKind("text_encoder", "gelu", "stabilityai/stable-diffusion-2", 0),),
    linear=True,
    heads=None,
    head_size=64,
    pipeline_facts=_PIPELINE_FACTS,
    upcast_attention=True,
)


SD1 = make_family(
    _SD1,
    _LATENT,
    name="sd1",
    title="Stable Diffusion 1.x",
    versions={"epsilon": "sd_v1", "v": "sd_v1_v"},
    # v-prediction SD1 models exist (fine-tunes); modelspec has one name for all of them
    architectures={"epsilon": "stable-diffusion-v1", "v": "stable-diffusion-v1"},
    capabilities=frozenset({"snr", "rollout", "v_prediction", "clip_skip", "chunks", "weighted_captions", "unpadded"}),
    preview={"epsilon": (512, 512), "v": (512, 512)},
    adapters=SD_ADAPTERS,
    encode_text=clip_text.encode_text,
    predict=unet.predict,
)

SD2 = make_family(
    _SD2,
    _LATENT,
    name="sd2",
    title="Stable Diffusion 2.x",
    versions={"epsilon": "sd_v2", "v": "sd_v2_v"},
    architectures={"epsilon": "stable-diffusion-v2-512", "v": "stable-diffusion-v2-768-v"},
    capabilities=SD1.capabilities | {"inference_yaml", "v2"},
    preview={"epsilon": (512, 512), "v": (768, 768)},
    adapters=SD_ADAPTERS,
    encode_text=clip_text.encode_text,
    predict=unet.predict,
)
