"""Describe a checkpoint of an unsupported family, with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from library.checkpoints.header import Header
from library.families.sd.variant import has_edm_noise
from library.messages import listed

_UNET = "model.diffusion_model."
Test = Callable[[Header], bool]


def starts(*prefixes: str) -> Test:
    """A tensor name starts with one of these."""
    return lambda header: any(name.startswith(prefixes) for name in header.tensors)


def holds(*parts: str) -> Test:
    """A tensor name contains one of these."""
    return lambda header: any(part in name for name in header.tensors for part in parts)


def pipeline(*words: str) -> Test:
    """A diffusers folder whose pipeline class name contains one of these words."""
    return lambda header: any(
        word in str(header.configs.get("model_index", {}).get("_class_name", "")) for word in words
    )


def channels(count: int) -> Test:
    """The U-Net has this many input channels."""
    names = (_UNET + "input_blocks.0.0.weight", "unet/conv_in.weight")
    return lambda header: any(name in header.tensors and header.tensors[name].shape[1:2] == (count,) for name in names)


def lacks(prefix: str) -> Test:
    """No tensor name starts with this."""
    return lambda header: not any(name.startswith(prefix) for name in header.tensors)


def every(*tests: Test) -> Test:
    """All of these tests pass."""
    return lambda header: all(test(header) for test in tests)


_OTHER_MODEL = ""  # stands for the list of supported families
_OTHER_CHANNELS = "only models with 4 channels are supported"
_ITS_MODEL = "give the model it was trained for"
_NOT_WHOLE = (
    "give the whole model: U-Net, VAE and every text encoder in one .safetensors or .ckpt file, or a diffusers folder"
)

# The first row whose test passes describes the file. Parts of models come after whole models.
KINDS: Sequence[tuple[Test, str, str]] = (
    (holds(".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1", ".lokr_w", ".oft_"),
     "a LoRA or another adapter, not a model", _ITS_MODEL),
    (starts("lora_unet_", "lora_te"), "a LoRA or another adapter, not a model", _ITS_MODEL),
    (holds("joint_blocks.", "joint_transformer_blocks."), "Stable Diffusion 3", _OTHER_MODEL),
    (pipeline("StableDiffusion3"), "Stable Diffusion 3", _OTHER_MODEL),
    (holds("double_blocks.", "single_transformer_blocks."), "Flux", _OTHER_MODEL),
    (pipeline("Flux"), "Flux", _OTHER_MODEL),
    (pipeline("Kolors"), "Kolors", _OTHER_MODEL),
    (starts("control_model.", "controlnet_"), "a ControlNet", _OTHER_MODEL),
    (has_edm_noise, "Playground v2.5, CosXL or another model with EDM noise", _OTHER_MODEL),
    (channels(9), "an inpainting model (9 channels)", _OTHER_CHANNELS),
    (channels(5), "a depth model (5 channels)", _OTHER_CHANNELS),
    (channels(8), "an instruction or upscaling model (8 channels)", _OTHER_CHANNELS),
    (channels(7), "an upscaling model (7 channels)", _OTHER_CHANNELS),
    (every(starts(_UNET + "label_emb."), starts("cond_stage_model.", "embedder.")),
     "a model with image conditioning (unCLIP)", _OTHER_MODEL),
    (starts("unet/class_embedding."), "a model with image conditioning (unCLIP)", _OTHER_MODEL),
    (starts("emb_params", "string_to_param", "clip_l", "clip_g"), "a textual inversion, not a model", _ITS_MODEL),
    (every(starts("model_ema.", "ema."), lacks(_UNET)), "the EMA copies of a U-Net without the model", _NOT_WHOLE),
    (every(starts(_UNET), starts("conditioner.")), "Stable Diffusion XL without its second text encoder", _NOT_WHOLE),
    (starts(_UNET + "label_emb."), "a U-Net of Stable Diffusion XL or its refiner without text encoders", _NOT_WHOLE),
    (starts(_UNET), "a U-Net without the text encoder of Stable Diffusion 1.x or 2.x", _NOT_WHOLE),
    (starts("unet/add_embedding."), "a folder of Stable Diffusion XL with other text encoders than those of its base "
     "or refiner", _NOT_WHOLE),
    (starts("unet/"), "a folder whose text encoder does not fit its U-Net", _NOT_WHOLE),
    (starts("input_blocks.", "down_blocks."), "a U-Net alone", _NOT_WHOLE),
    (starts("first_stage_model.", "encoder.conv_in.", "decoder.conv_in.", "encoder.down"), "a VAE alone",
     "use it with --vae, and give a whole model here"),
    (starts("text_model.", "transformer.resblocks.", "cond_stage_model.", "conditioner.", "embeddings."),
     "a text encoder alone", _NOT_WHOLE),
)  # fmt: skip


def explain(header: Header, titles: Sequence[str]) -> str:
    """Return one sentence: what the checkpoint looks like and what to give instead. `titles`: supported families."""
    known = f"supported are {', '.join(titles[:-1])} and {titles[-1]}"
    for test, kind, remedy in KINDS:
        if test(header):
            return f"this looks like {kind}; {remedy or known}."
    return f"unknown kind of model (with tensors {listed(header.tensors)}); {known}."
