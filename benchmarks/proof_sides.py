"""The two sides of benchmarks/proof.py's comparison: what the program's family gives, and what a pipeline of diffusers
gives that was loaded from the folder that the program wrote. One part of the model in memory at a time, fp32.

An image of an odd size is scaled and cropped, so that the model is told of a real crop: 1333 x 999 to 400 x 300, of
which 320 x 256 from left 41 and top 3. Each side does that by its own means, too. What a side found goes on to its next
part: its latents and text states are what its U-Net gets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]

PROMPTS = ["a photo of sks dog, sitting in a café by the sea", ""]
SIZE, SCALED, OFFSET, BUCKET = (1333, 999), (400, 300), (41, 3), (320, 256)  # (width, height) and (left, top)
SCORE = 6.5
TIMESTEPS = (11, 803)
SEED = 5


def write_image(path: Path) -> None:
    """A smooth image with some grain, of the odd size."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(SEED)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(SIZE)
    grain = random.normal(0, 6, (SIZE[1], SIZE[0], 3))
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path)


def our_text(model: Path, work: Path) -> Tensors:
    """Text states and pooled vectors by the family, and what stands for no negative prompt in its pipeline."""
    from library.families.empty_text import zero_empty
    from library.families.registry import open_model

    header, family = open_model(str(model))
    loaded = family.load(header, only=family.text_encoders)
    found = family.encode_text(loaded.text_encoders, loaded.tokenizer(PROMPTS))
    zeroed = family.variant.pipeline_facts["force_zeros_for_empty_prompt"]
    negative = zero_empty(found, PROMPTS) if zeroed else found
    return {**found, **{f"{name} of no negative prompt": tensor[1:] for name, tensor in negative.items()}}


def their_text(model: Path, work: Path) -> Tensors:
    """The same by the pipeline's encode_prompt."""
    pipeline = pipeline_of(work, "unet", "vae")
    names = ("states", "states of no negative prompt", "pooled", "pooled of no negative prompt")
    found = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    return {name: tensor[1:] if "no" in name.split() else tensor for name, tensor in zip(names, found, strict=True)}


def our_latents(model: Path, work: Path) -> Tensors:
    """Mean and a sample of the image's latents, and the image that they stand for, by the family."""
    import torch

    from library.data import images
    from library.families.registry import open_model

    header, family = open_model(str(model))
    loaded = family.load(header, only=("vae",))
    shown = images.Geometry(SCALED, OFFSET, BUCKET)
    pixels = torch.from_numpy(images.to_float(images.apply(images.load(work / "image.png"), shown)))[None]
    sample = family.encode_images(loaded.vae, pixels, [torch.Generator().manual_seed(SEED)])
    mean = loaded.vae.encode(pixels).latent_dist.mean
    return {"mean": mean, "sample": sample, "decoded": family.decode_latents(loaded.vae, sample)}


def their_latents(model: Path, work: Path) -> Tensors:
    """The same by the pipeline's VAE and image processor."""
    import cv2
    import numpy as np
    import torch
    from PIL import Image

    pipeline = pipeline_of(work, "unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scaled = cv2.resize(np.asarray(Image.open(work / "image.png")), SCALED, interpolation=cv2.INTER_AREA)
    left, top = OFFSET
    crop = Image.fromarray(scaled).crop((left, top, left + BUCKET[0], top + BUCKET[1]))
    # in the order of memory that torch counts as usual: with another one kernels add up in another order
    pixels = pipeline.image_processor.preprocess(crop).contiguous()
    posterior = pipeline.vae.encode(pixels).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(SEED))
    return {"mean": posterior.mean, "sample": sample, "decoded": pipeline.vae.decode(sample).sample}


def our_unet(model: Path, work: Path) -> Tensors:
    """The family's prediction for noisy latents, with the data's size conditioning."""
    import torch

    from library.data import images, size_conditioning
    from library.families.registry import open_model

    header, family = open_model(str(model))
    loaded = family.load(header, only=("unet",))
    sizes = size_conditioning.sizes_of(images.Geometry(SCALED, OFFSET, BUCKET), SIZE)
    text = read(work, "ours", "text")
    given = {
        "states": text["states"],
        "pooled": text["pooled"],
        "sizes": torch.tensor([sizes] * 2, dtype=torch.float32),
        "score": torch.full((2,), SCORE),
    }
    noisy = noised(read(work, "ours", "latents")["mean"], family.latent.scale)
    return {"output": family.predict(loaded.backbone, noisy, torch.tensor(TIMESTEPS), given)}


def their_unet(model: Path, work: Path) -> Tensors:
    """The same by the pipeline's U-Net, with the pipeline's size conditioning."""
    import torch

    pipeline = pipeline_of(work, "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    sizes: list[Any] = [SIZE[::-1], OFFSET[::-1], BUCKET[::-1]]
    text = read(work, "diffusers", "text")
    facts = {"dtype": torch.float32, "text_encoder_projection_dim": text["pooled"].shape[1]}
    if pipeline.config.get("requires_aesthetics_score"):
        ids, _ = pipeline._get_add_time_ids(*sizes, SCORE, SCORE, *sizes, **facts)
    else:
        ids = pipeline._get_add_time_ids(*sizes, **facts)
    vae_scale = 0.13025  # of the published models' VAE (config.json)
    output = pipeline.unet(
        noised(read(work, "diffusers", "latents")["mean"], vae_scale),
        torch.tensor(TIMESTEPS),
        encoder_hidden_states=text["states"],
        added_cond_kwargs={"text_embeds": text["pooled"], "time_ids": ids.repeat(2, 1)},
        return_dict=False,
    )
    return {"output": output[0]}


def noised(latents: Tensor, scale: float) -> Tensor:
    """Two samples of the latents with noise of their own."""
    import torch

    noise = torch.randn((2, *latents.shape[1:]), generator=torch.Generator().manual_seed(SEED))
    return latents * scale + noise / 2


def pipeline_of(work: Path, *without: str) -> Any:
    """The diffusers pipeline of the folder, by its own account of itself, without some of its parts."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    load: Any = DiffusionPipeline.from_pretrained
    return load(work / "diffusers", dtype=torch.float32, local_files_only=True, **dict.fromkeys(without))


SIDES: dict[str, dict[str, Callable[[Path, Path], Tensors]]] = {
    "text": {"ours": our_text, "diffusers": their_text},
    "latents": {"ours": our_latents, "diffusers": their_latents},
    "unet": {"ours": our_unet, "diffusers": their_unet},
}


def find(part: str, side: str, model: Path, work: Path) -> None:
    """Let one side do one part, and leave what it found for the comparison."""
    import logging

    import torch
    from safetensors.torch import save_file

    logging.disable(logging.WARNING)
    with torch.no_grad():
        found = SIDES[part][side](model, work)
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, path(work, side, part))


def read(work: Path, side: str, part: str) -> Tensors:
    """What a side found."""
    from safetensors.torch import load_file

    return load_file(path(work, side, part))


def path(work: Path, side: str, part: str) -> Path:
    """Where that lies."""
    return work / f"{side}.{part}.safetensors"


def differences(work: Path, part: str) -> dict[str, float]:
    """Of all that the sides found: the greatest difference, in units of the standard deviation of diffusers' values (of
    1 where those are all alike). Infinite where anything is not finite or not of the same shape."""
    import torch

    ours, theirs = read(work, "ours", part), read(work, "diffusers", part)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{part}: {sorted(ours)} and {sorted(theirs)} cannot be compared")
    found = {}
    for name, value in theirs.items():
        alike = ours[name].shape == value.shape and bool(torch.isfinite(ours[name]).all() and value.isfinite().all())
        scale = float(value.double().std()) or 1.0
        found[name] = float((ours[name].double() - value.double()).abs().max()) / scale if alike else float("inf")
    return found
