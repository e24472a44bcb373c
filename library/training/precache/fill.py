"""Fill a cache before training: load only the encoder (VAE or text encoders), and encode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.data.cache.latent_cache import LatentCacheBuild
from library.data.cache.text_cache import TextCacheBuild
from library.options.mistakes import Mistake, UserError
from library.runtime.device import Machine
from library.runtime.precision import Precision, torch_dtype
from library.runtime.stored_weights import compute_in_stored_dtype
from library.training.conditioning import Conditioner
from library.training.console import Console
from library.training.inputs import LatentEncoder, build_dataset, captions_to_encode, encode_captions, image_reader
from library.training.loading import load_model, text_settings
from library.training.memory import encoding_vae
from library.training.precache.plan import CachePlan, WorkerGroup

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.plan.facts import RunFacts


def fill_cache(plan: CachePlan, group: WorkerGroup, *, progress: bool) -> LatentCacheBuild | TextCacheBuild:
    """Fill the planned cache on this process's device. `progress`: log, and show progress bars. Raises UserError."""
    say = Console(plan.facts.options.run).say if progress else _say_nothing
    device = choose_device(plan.facts.machine, group)
    if device.type == "cpu" and group.count > 1 and group.local == group.number:  # all processes are on this machine
        torch.set_num_threads(max(1, torch.get_num_threads() // group.count))
    if plan.kind == "latents":
        return fill_latent_cache(plan.facts, device, say, group.share, progress=progress)
    return fill_caption_cache(plan.facts, device, say, group.share, progress=progress)


def _say_nothing(text: str) -> None:
    """Only the first process logs."""


def text_encoders(model: Model, precision: Precision, device: torch.device) -> dict[str, nn.Module]:
    """The model's text encoders, frozen, on the device and in the number format of the training."""
    encoders: dict[str, nn.Module] = {}
    for name, module in model.text_encoders.items():
        module.requires_grad_(requires_grad=False)
        if precision.frozen != "fp32":
            compute_in_stored_dtype(module)
            module.to(torch_dtype(precision.frozen))
        encoders[name] = module.to(device)
    return encoders


def choose_device(machine: Machine, group: WorkerGroup) -> torch.device:
    """The device of this process: with several GPUs, one GPU per process."""
    if machine.kind not in ("cuda", "xpu"):
        return torch.device(machine.kind)
    count = torch.get_device_module(machine.kind).device_count()
    return torch.device(machine.kind, group.local % count) if count else torch.device("cpu")


def fill_latent_cache(
    facts: RunFacts, device: torch.device, say: Callable[[str], None], share: tuple[int, int], *, progress: bool
) -> LatentCacheBuild:
    """Encode the latents of all images to disk. Loads only the VAE."""
    model = load_model(facts.options, facts.base_model, device, say, only=("vae",))
    model.vae.requires_grad_(requires_grad=False)
    vae = encoding_vae(model.vae, facts.precision, device)
    encoder = LatentEncoder(model, vae, facts.precision.vae, facts.options.cache)
    return encoder.encode(image_reader(facts.images), share, progress=progress)


def fill_caption_cache(
    facts: RunFacts, device: torch.device, say: Callable[[str], None], share: tuple[int, int], *, progress: bool
) -> TextCacheBuild:
    """Encode all captions that the training will use to disk. Loads only the text encoders.

    Raises UserError if there are more captions than a cache holds and no --seed decides which of them come first.
    """
    dataset = build_dataset(facts)
    texts, complete = captions_to_encode(facts, dataset)
    if not complete and facts.options.run.seed is None:
        what = f"more than {len(texts)} different captions occur, and which of them come first depends on the seed"
        raise UserError([Mistake(what, "use the same --seed here and for the training")])
    family = facts.base_model.family
    base = facts.precision.base if facts.options.adapter.network_module else "fp32"  # as the training loads it
    model = load_model(
        facts.options,
        facts.base_model,
        device,
        say,
        only=family.text_encoders,
        base=base,
        quantisation=facts.quantisation,
    )
    conditioner = Conditioner(
        family=family,
        text_encoders=text_encoders(model, facts.precision, device),
        tokenize=facts.base_model.tokenizer,
        settings=text_settings(facts.options, facts.base_model),
        device=device,
    )
    return encode_captions(facts, texts, conditioner, share, progress=progress)
