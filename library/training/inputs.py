"""What the batches of a run are made from: images or their latents, captions or their encoded states."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.data.cache import latent_cache
from library.data.cache.text_cache import TextCacheBuild, build_text_cache, texts_of
from library.data.captions import vary_with_seed
from library.data.dataset import TrainingDataset
from library.data.reading import ImageReader
from library.data.scan.dataset_specs import cache_folder
from library.objective.masking import MaskSettings
from library.training.conditioning import FEW, MOST_IN_MEMORY, MOST_ON_DISK, Conditioner
from library.training.run import LOGGER
from library.training.validation.plan import texts_asked

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.plan.plan import Plan
    from library.training.precache.plan import AnyPlan


def image_reader(plan: AnyPlan) -> ImageReader:
    """Reads the images of the plan; those set aside for validation come last."""
    images, found = plan.images, plan.images.scan
    return ImageReader(images.all_records, images.all_placements, found.subsets, found.datasets)


def fill_latents(plan: Plan, model: Model, vae: Any, reader: ImageReader) -> latent_cache.LatentStore | None:
    """The latents of all images, or None when they are made on the way. `vae` is the one that computes."""
    if not plan.options.cache.cache_latents:
        return None
    filled = encode_latents(plan, model, vae, reader)
    LOGGER.info(str(filled))
    return filled.store


def encode_latents(
    plan: AnyPlan,
    model: Model,
    vae: Any,
    reader: ImageReader,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> latent_cache.LatentCacheBuild:
    """The latents of all images. `share`: (number, of how many processes) that do this at once."""
    options, family = plan.options.cache, plan.base_model.family
    to_disk = options.cache_latents_to_disk
    exact = plan.precision.vae == "fp32"
    return latent_cache.build_latent_cache(
        reader.records,
        reader.placements,
        reader.for_cache,
        partial(family.encode_images, vae),
        vae=f"{module_name(vae, without=('decoder.', 'post_quant_conv.'))} {plan.precision.vae}" if to_disk else "",
        suffix=family.latent.cache_suffix,
        to_disk=to_disk,
        flip=[not record.held_out and reader.settings(index).flip for index, record in enumerate(reader.records)],
        source=reader.source,
        batch_size=options.vae_batch_size,
        cache_format="npz" if options.cache_format == "npz" else "safetensors",
        encode_exactly=None if exact else partial(family.encode_images, model.vae),
        skip_check=options.skip_cache_check,
        channels=family.latent.channels,
        stride=family.latent.stride,
        share=share,
        progress=progress,
    )


def fill_captions(plan: Plan, dataset: TrainingDataset, conditioning: Conditioner, frozen: bool) -> bool:
    """Encode all captions that can occur, as far as there is room, and let `conditioning` use them. True if the text
    encoder has nothing left to do in the training.

    Without --cache_text_encoder_outputs this is done where it costs nothing: for a text encoder that is `frozen`, and
    captions that are few and always the same.
    """
    asked = plan.options.cache.cache_text_encoder_outputs
    if not asked and not (frozen and _captions_are_few(plan, conditioning)):
        return False
    texts, complete = captions_to_come(plan, dataset)
    filled = encode_captions(plan, texts, conditioning, progress=asked)
    if asked:
        LOGGER.info(str(filled))
    if not complete:
        LOGGER.info(f"more than {len(texts)} different captions will occur; those beyond are encoded when they come")
    conditioning.store = filled.store
    return complete


def _captions_are_few(plan: Plan, conditioning: Conditioner) -> bool:
    """Whether all captions are known at once. The length of the run has no say, or a run made longer would compute
    otherwise than one of that length."""
    if not conditioning.tokenize.padded or not _captions_stay(plan):
        return False
    return len({record.caption for record in plan.images.records}) <= FEW


def _captions_stay(plan: AnyPlan) -> bool:
    """Whether every image has one text in all epochs."""
    chosen = [subset.captions for subset in plan.images.scan.subsets]
    return not any(vary_with_seed(each) or each.dropout_every_n_epochs for each in chosen)


def captions_to_come(plan: AnyPlan, dataset: TrainingDataset) -> tuple[list[str], bool]:
    """The captions of the run that are encoded beforehand, each once, and whether that is all of them."""
    most = MOST_ON_DISK if plan.options.cache.cache_text_encoder_outputs_to_disk else MOST_IN_MEMORY
    epochs = 1 if _captions_stay(plan) else plan.duration.epochs  # else every epoch has all of them
    requests = (request for epoch in range(1, epochs + 1) for request in plan.order.requests(epoch))
    texts, complete = texts_of(dataset.texts(requests), most)
    # last, so that the others are encoded in the same batches with a validation and without one
    return list(dict.fromkeys([*texts, *texts_asked(plan.validation, plan.images)])), complete


def encode_captions(
    plan: AnyPlan,
    texts: Sequence[str],
    conditioning: Conditioner,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> TextCacheBuild:
    """The encoded states of captions. `share`: (number, of how many processes) that do this at once."""
    options = plan.options
    to_disk = options.cache.cache_text_encoder_outputs_to_disk
    facts = (
        plan.precision.frozen,
        conditioning.settings.clip_skip or 1,
        conditioning.settings.kohya_projection,
        conditioning.tokenize.cache_key,
    )
    names = [module_name(encoder) for encoder in conditioning.text_encoders.values()] if to_disk else []
    return build_text_cache(
        texts,
        conditioning.encode,
        encoder=" ".join(map(str, (*names, *facts))) if to_disk else "",
        folder=cache_folder(options.dataset) / "captions" if to_disk else None,
        # unpadded captions differ in length from batch to batch
        batch_size=16 if conditioning.tokenize.padded else 1,
        share=share,
        progress=progress,
    )


def module_name(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """A name for the exact weights of a module: other weights, another name. `without` are beginnings of the names of
    tensors that do not matter: a finer decoder alone leaves latents as they are, and their name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        if name.startswith(without):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def training_set(plan: AnyPlan, reader: ImageReader, latents: latent_cache.LatentStore | None) -> TrainingDataset:
    """The dataset of the plan, with latents or with pixels."""
    return TrainingDataset(
        images=reader,
        tokenize=plan.base_model.tokenizer,
        seed=plan.seed,
        steps=plan.duration.steps,
        stride=plan.base_model.family.latent.stride,
        missing_mask=MaskSettings.of(plan.options.mask).missing,
        prior_loss_weight=plan.options.objective.prior_loss_weight,
        crop_conditioning=plan.options.dataset.crop_conditioning,
        score=plan.options.dataset.data_aesthetic_score,
        latents=latents,
    )
