"""Build the inputs of a run: the dataset, its latents, and its encoded captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.data import retries
from library.data.cache import latent_cache
from library.data.cache.text_cache import MemoryTexts, TextCacheBuild, build_text_cache, texts_of
from library.data.dataset import TrainingDataset
from library.data.reading import ImageReader
from library.data.scan.dataset_specs import cache_folder
from library.messages import readable_bytes
from library.objective.masking import MaskSettings
from library.runtime.processes import ALONE, Processes
from library.training.conditioning import MOST_IN_MEMORY, MOST_ON_DISK, Conditioner
from library.training.memory import offload_text_encoders, release_memory
from library.training.plan.ahead import captions_are_fixed, encodes_captions_ahead
from library.training.plan.memory.tiles import TILE
from library.training.validation.plan import validation_captions

if TYPE_CHECKING:
    from library.families.family import Model
    from library.options.groups.cache import CacheOptions
    from library.options.train_options import TrainOptions
    from library.runtime.precision import FloatName
    from library.training.plan.facts import RunFacts
    from library.training.plan.images import Images
    from library.training.preview.drawing import PromptEncoder
    from library.training.trainable import Trainable

ON_DEVICE = 1 / 64  # share of the device's memory that encoded captions may take: no more than its use varies by


def image_reader(images: Images) -> ImageReader:
    """The reader of a run's images; held-out images come last."""
    return ImageReader(images.all_records, images.all_placements, images.scan.subsets, images.scan.datasets)


@dataclass(frozen=True)
class LatentEncoder:
    """Encodes images with the VAE of a model, or reads their cached latents.

    `vae` computes, in `vae_format`: the model's own, or a copy in half precision; None: all latents are cached. Images
    whose latents are not finite are encoded again by the model's own in fp32.
    """

    model: Model
    vae: Any
    vae_format: FloatName
    options: CacheOptions

    def encode(
        self,
        reader: ImageReader,
        share: tuple[int, int] = (0, 1),
        ranks: Processes = ALONE,
        *,
        progress: bool = True,
    ) -> latent_cache.LatentCacheBuild:
        """Encode all images of a reader. `share`: (number of this process, number of processes) of processes that do
        not talk to each other; `ranks`: those of a run."""
        options, family = self.options, self.model.family
        to_disk = options.cache_latents_to_disk
        name = weights_hash(self.vae, without=("decoder.", "post_quant_conv.")) if to_disk else ""
        tiles = f" tiles of {TILE}" if getattr(self.vae, "use_tiling", False) else ""
        return latent_cache.build_latent_cache(
            reader.records,
            reader.placements,
            reader.for_cache,
            partial(family.encode_images, self.vae),
            vae=f"{name} {self.vae_format}{tiles}" if to_disk else "",
            suffix=family.latent.cache_suffix,
            to_disk=to_disk,
            flip=[not record.held_out and reader.settings(index).flip for index, record in enumerate(reader.records)],
            source=reader.source,
            batch_size=options.vae_batch_size,
            cache_format="npz" if options.cache_format == "npz" else "safetensors",
            encode_in_fp32=None if self.vae_format == "fp32" else partial(family.encode_images, self.model.vae),
            skip_check=options.skip_cache_check,
            channels=family.latent.channels,
            stride=family.latent.stride,
            share=share,
            ranks=ranks,
            progress=progress,
        )

    def encode_some(
        self, reader: ImageReader, numbers: Sequence[int], *, progress: bool = True
    ) -> list[latent_cache.CachedLatents]:
        """The latents (C, h, w), unscaled, and masks of some records by their numbers, without mirror images."""
        some = replace(
            reader,
            records=[replace(reader.records[number], held_out=True) for number in numbers],
            placements=[reader.placements[number] for number in numbers],
        )
        store = self.encode(some, progress=progress).store
        return [store.get(place, False) for place in range(len(numbers))]


def encode_captions_ahead(
    facts: RunFacts,
    dataset: TrainingDataset,
    conditioner: Conditioner,
    trainable: Trainable,
    say: Callable[[str], None],
    ranks: Processes = ALONE,
) -> bool:
    """Encode all captions that can occur, up to a limit, and let `conditioner` use them. Returns True if the training
    no longer needs the text encoders.

    Without --cache_text_encoder_outputs this is done where it is cheap: for frozen text encoders with a few captions
    that never change.
    """
    by_flag = facts.options.cache.cache_text_encoder_outputs
    frozen = trainable.active.isdisjoint(facts.base_model.family.text_encoders)
    if not encodes_captions_ahead(facts, frozen=frozen):
        return False
    texts, complete = captions_to_encode(facts, dataset)
    built = encode_captions(facts, texts, conditioner, ranks=ranks, progress=by_flag)
    if by_flag:
        say(str(built))
    if not complete:
        say(f"more than {len(texts)} different captions occur: the others are encoded during training")
    conditioner.store = built.store
    of_device = facts.machine.memory_bytes
    if isinstance(built.store, MemoryTexts) and complete and of_device and built.store.size <= of_device * ON_DEVICE:
        conditioner.store = built.store.on(conditioner.device)
        say(f"encoded captions are kept on the device: {readable_bytes(built.store.size)}")
    return complete


def leave_text_encoders(
    model: Model, conditioner: Conditioner, prompts: PromptEncoder, options: TrainOptions, *, keep: bool, draws: bool
) -> None:
    """Take the text encoders off the device, as training no longer needs them (see encode_captions_ahead).

    If previews are drawn, they come back for each prompt, as the prompt file may change during the run; with
    --highvram they stay. If the user wants their memory back, or nothing is drawn, they are freed, or kept in main
    memory (`keep`) to be saved.
    """
    if draws and not options.cache.cache_text_encoder_outputs:
        if not options.memory.highvram:
            prompts.rest(conditioner.device)
            release_memory(options.memory)
        return
    prompts.drop_text_encoders()
    conditioner.text_encoders = {}
    offload_text_encoders(model, options.memory, keep=keep)


def captions_to_encode(facts: RunFacts, dataset: TrainingDataset) -> tuple[list[str], bool]:
    """The distinct captions that are encoded before training, and whether these are all."""
    limit = MOST_ON_DISK if facts.options.cache.cache_text_encoder_outputs_to_disk else MOST_IN_MEMORY
    epochs = 1 if captions_are_fixed(facts.images) else facts.duration.epochs
    requests = (request for epoch in range(1, epochs + 1) for request in facts.order.requests(epoch))
    texts, complete = texts_of(dataset.texts(requests), limit)
    # these come last, so that the others are in the same batches with and without them
    further = (*validation_captions(facts.validation, facts.images), *facts.preservation.texts(texts))
    return list(dict.fromkeys([*texts, *further])), complete


def encode_captions(
    facts: RunFacts,
    texts: Sequence[str],
    conditioner: Conditioner,
    share: tuple[int, int] = (0, 1),
    ranks: Processes = ALONE,
    *,
    progress: bool = True,
) -> TextCacheBuild:
    """Encode captions, or read their cached outputs. `share`, `ranks`: see LatentEncoder.encode."""
    options = facts.options
    to_disk = options.cache.cache_text_encoder_outputs_to_disk
    settings = (
        facts.precision.frozen,
        conditioner.settings.clip_skip or 1,
        conditioner.settings.kohya_projection,
        conditioner.tokenize.cache_key,
    )
    hashes = [weights_hash(encoder) for encoder in conditioner.text_encoders.values()] if to_disk else []
    return build_text_cache(
        texts,
        conditioner.encode,
        encoder=" ".join(map(str, (*hashes, *settings))) if to_disk else "",
        folder=cache_folder(options.dataset) / "captions" if to_disk else None,
        # unpadded captions of different lengths cannot share a batch
        batch_size=16 if conditioner.tokenize.padded else 1,
        share=share,
        ranks=ranks,
        progress=progress,
    )


def weights_hash(module: nn.Module, without: tuple[str, ...] = ()) -> str:
    """A hash of a module's exact weights, for cache keys. `without`: prefixes of tensors that do not affect the cached
    values, such as the VAE's decoder, which fine-tuned VAEs change alone."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        if name.startswith(without):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def build_training_set(
    facts: RunFacts, encoder: LatentEncoder, say: Callable[[str], None], ranks: Processes = ALONE
) -> TrainingDataset:
    """The dataset of a run. With --cache_latents, all images are encoded now and the dataset returns latents."""
    dataset = build_dataset(facts)
    if not encoder.options.cache_latents:
        return dataset
    built = encoder.encode(dataset.images, ranks=ranks)
    say(str(built))
    return replace(dataset, latents=built.store)


def build_dataset(facts: RunFacts) -> TrainingDataset:
    """The dataset of a run, which returns pixels."""
    return TrainingDataset(
        images=image_reader(facts.images),
        tokenize=facts.base_model.tokenizer,
        seed=facts.seed,
        steps=facts.duration.steps,
        stride=facts.base_model.family.latent.stride,
        channels=facts.base_model.family.latent.channels,
        missing_mask=MaskSettings.from_options(facts.options.mask).missing,
        prior_loss_weight=facts.options.objective.prior_loss_weight,
        fixed_draws=facts.preservation.fixed_draws,
        crop_conditioning=facts.options.dataset.crop_conditioning,
        score=facts.options.dataset.data_aesthetic_score,
        retry_delays=retries.DELAYS,
    )
