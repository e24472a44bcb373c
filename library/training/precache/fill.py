"""What a process does that fills caches ahead of a training: load the part that encodes, and encode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from library.data.cache.latent_cache import LatentCacheBuild
from library.data.cache.text_cache import TextCacheBuild
from library.options.mistakes import Mistake, UserError
from library.runtime.device import Machine
from library.runtime.half_weights import compute_as_stored
from library.runtime.precision import torch_dtype
from library.training.conditioning import Conditioner
from library.training.inputs import captions_to_come, encode_captions, encode_latents, image_reader, training_set
from library.training.loading import load_model, text_settings
from library.training.memory import image_encoder, loading_device
from library.training.precache.plan import CachePlan, WorkerGroup

if TYPE_CHECKING:
    from library.families.family import Model


def fill_ahead(plan: CachePlan, group: WorkerGroup, *, progress: bool) -> LatentCacheBuild | TextCacheBuild:
    """Fill the plan's cache on this process's device. Raises UserError."""
    device = device_of(plan.machine, group)
    if device.type == "cpu" and group.count > 1 and group.local == group.number:  # all of them on this machine
        torch.set_num_threads(max(1, torch.get_num_threads() // group.count))
    fill = fill_latents if plan.kind == "latents" else fill_captions
    return fill(plan, device, group, progress=progress)


def text_encoders(model: Model, plan: CachePlan, device: torch.device) -> dict[str, nn.Module]:
    """The model's text encoders, on the device and in the format that the training encodes with."""
    found: dict[str, nn.Module] = {}
    for name, module in model.text_encoders.items():
        module.requires_grad_(requires_grad=False)
        if plan.precision.frozen != "fp32":
            compute_as_stored(module)
            module.to(torch_dtype(plan.precision.frozen))
        found[name] = module.to(device)
    return found


def device_of(machine: Machine, group: WorkerGroup) -> torch.device:
    """The device of a training, and with several graphics cards one for each process."""
    if machine.kind == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", group.local % torch.cuda.device_count())
    return torch.device(machine.kind if machine.kind != "cuda" else "cpu")


def fill_latents(plan: CachePlan, device: torch.device, group: WorkerGroup, *, progress: bool) -> LatentCacheBuild:
    """The latents of all images, in files. Only the VAE is loaded."""
    model = load_model(plan, loading_device(plan.options.memory, device), only=("vae",))
    model.vae.requires_grad_(requires_grad=False)
    vae = image_encoder(model.vae, plan.precision, device)
    return encode_latents(plan, model, vae, image_reader(plan), group.share, progress)


def fill_captions(plan: CachePlan, device: torch.device, group: WorkerGroup, *, progress: bool) -> TextCacheBuild:
    """The states of all captions that the training will ask for, in files. Only the text encoders are loaded.

    Raises UserError for more captions than are encoded beforehand when no seed says which.
    """
    dataset = training_set(plan, image_reader(plan), None)
    texts, complete = captions_to_come(plan, dataset)
    if not complete and plan.options.run.seed is None:
        what = f"more than {len(texts)} different captions will occur: which of them come first depends on the seed"
        raise UserError([Mistake(what, "give --seed here and to the training")])
    base = plan.precision.base if plan.options.adapter.network_module else "fp32"  # as the training loads it
    model = load_model(
        plan, loading_device(plan.options.memory, device), only=plan.base_model.family.text_encoders, base=base
    )
    conditioning = Conditioner(
        family=plan.base_model.family,
        text_encoders=text_encoders(model, plan, device),
        tokenize=dataset.tokenize,
        settings=text_settings(plan),
        device=device,
    )
    return encode_captions(plan, texts, conditioning, group.share, progress)
