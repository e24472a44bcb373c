"""What the batches of a run are made from: images or their latents, captions or their encoded states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from library.training.validation.plan import texts_asked

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.plan.facts import RunFacts
    from library.training.plan.images import Images
    from library.training.trainable import Trainable


def image_reader(images: Images) -> ImageReader:
    """Reads the images of a run; those that are held out for validation come last."""
    return ImageReader(images.all_records, images.all_placements, images.scan.subsets, images.scan.datasets)


def encode_latents(
    facts: RunFacts,
    model: Model,
    vae: Any,
    reader: ImageReader,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> latent_cache.LatentCacheBuild:
    """The latents of all images. `share`: (number, of how many processes) that do this at once."""
    options, family = facts.options.cache, facts.base_model.family
    to_disk = options.cache_latents_to_disk
    exact = facts.precision.vae == "fp32"
    return latent_cache.build_latent_cache(
        reader.records,
        reader.placements,
        reader.for_cache,
        partial(family.encode_images, vae),
        vae=f"{module_name(vae, without=('decoder.', 'post_quant_conv.'))} {facts.precision.vae}" if to_disk else "",
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


def fill_captions(
    facts: RunFacts,
    dataset: TrainingDataset,
    conditioner: Conditioner,
    trainable: Trainable,
    say: Callable[[str], None],
) -> bool:
    """Encode all captions that can occur, as far as there is room, and let `conditioner` use them. True if the text
    encoders have nothing left to do in the training.

    Without --cache_text_encoder_outputs this is done where it costs nothing: for text encoders that are frozen, and
    captions that are few and always the same.
    """
    asked = facts.options.cache.cache_text_encoder_outputs
    frozen = trainable.active.isdisjoint(facts.base_model.family.text_encoders)
    if not asked and not (frozen and _captions_are_few(facts, conditioner)):
        return False
    texts, complete = captions_to_come(facts, dataset)
    built = encode_captions(facts, texts, conditioner, progress=asked)
    if asked:
        say(str(built))
    if not complete:
        say(f"more than {len(texts)} different captions will occur; those beyond are encoded when they come")
    conditioner.store = built.store
    return complete


def _captions_are_few(facts: RunFacts, conditioner: Conditioner) -> bool:
    """Whether all captions are known at once. The length of the run has no say, or a run made longer would compute
    otherwise than one of that length."""
    if not conditioner.tokenize.padded or not _captions_stay(facts):
        return False
    return len({record.caption for record in facts.images.records}) <= FEW


def _captions_stay(facts: RunFacts) -> bool:
    """Whether every image has one text in all epochs."""
    chosen = [subset.captions for subset in facts.images.scan.subsets]
    return not any(vary_with_seed(each) or each.dropout_every_n_epochs for each in chosen)


def captions_to_come(facts: RunFacts, dataset: TrainingDataset) -> tuple[list[str], bool]:
    """The captions of the run that are encoded beforehand, each once, and whether that is all of them."""
    most = MOST_ON_DISK if facts.options.cache.cache_text_encoder_outputs_to_disk else MOST_IN_MEMORY
    epochs = 1 if _captions_stay(facts) else facts.duration.epochs  # else every epoch has all of them
    requests = (request for epoch in range(1, epochs + 1) for request in facts.order.requests(epoch))
    texts, complete = texts_of(dataset.texts(requests), most)
    # last, so that the others are encoded in the same batches with a validation and without one
    return list(dict.fromkeys([*texts, *texts_asked(facts.validation, facts.images)])), complete


def encode_captions(
    facts: RunFacts,
    texts: Sequence[str],
    conditioner: Conditioner,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> TextCacheBuild:
    """The encoded states of captions. `share`: (number, of how many processes) that do this at once."""
    options = facts.options
    to_disk = options.cache.cache_text_encoder_outputs_to_disk
    parts = (
        facts.precision.frozen,
        conditioner.settings.clip_skip or 1,
        conditioner.settings.kohya_projection,
        conditioner.tokenize.cache_key,
    )
    names = [module_name(encoder) for encoder in conditioner.text_encoders.values()] if to_disk else []
    return build_text_cache(
        texts,
        conditioner.encode,
        encoder=" ".join(map(str, (*names, *parts))) if to_disk else "",
        folder=cache_folder(options.dataset) / "captions" if to_disk else None,
        # unpadded captions differ in length from batch to batch
        batch_size=16 if conditioner.tokenize.padded else 1,
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


def training_set(facts: RunFacts, model: Model, vae: Any, say: Callable[[str], None]) -> TrainingDataset:
    """The dataset of a run, with --cache_latents with the latents of all images. `vae` is the one that computes."""
    dataset = dataset_of(facts)
    if not facts.options.cache.cache_latents:
        return dataset
    built = encode_latents(facts, model, vae, dataset.images)
    say(str(built))
    return replace(dataset, latents=built.store)


def dataset_of(facts: RunFacts) -> TrainingDataset:
    """The dataset of a run, with pixels."""
    return TrainingDataset(
        images=image_reader(facts.images),
        tokenize=facts.base_model.tokenizer,
        seed=facts.seed,
        steps=facts.duration.steps,
        stride=facts.base_model.family.latent.stride,
        missing_mask=MaskSettings.from_options(facts.options.mask).missing,
        prior_loss_weight=facts.options.objective.prior_loss_weight,
        crop_conditioning=facts.options.dataset.crop_conditioning,
        score=facts.options.dataset.data_aesthetic_score,
    )
