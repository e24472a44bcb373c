"""The adapter of a run: made beside the model, begun from a file if one is named, trained, and written by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from networks.network import Network
from torch import nn

from library.checkpoints.header import CheckpointError
from library.options.mistakes import Mistake, UserError
from library.runtime.precision import torch_dtype
from library.training.adapter_metadata import adapter_metadata
from library.training.parts import Group, LossTags, Part, Trained
from networks import files
from networks.adapter import AdapterError
from networks.foreign import ForeignNetwork, create_foreign

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.plan.adapter import AdapterPlan
    from library.training.plan.plan import Plan
    from library.training.recipe import Say

AnyNetwork = Network | ForeignNetwork

# as TensorBoard shows the runs of sd-scripts' train_network.py
TAGS = LossTags(step="loss/current", average="loss/average", epoch="loss/epoch_average")


def make_adapter(model: Model, plan: Plan, say: Say) -> Trained:
    """The adapter that the plan asks for, in the forward pass of the model, and how it is trained and written.

    Raises UserError for files that do not fit and for what the adapter's own module refuses.
    """
    chosen = plan.adapter
    assert chosen is not None, "train_network.py plans with --network_module"
    modules: dict[str, nn.Module] = {part.module: getattr(model, part.module) for part in model.family.adapters}
    for path, multiplier in chosen.base:
        with told(f"--base_weights {path}"):
            tensors = files.read(path).tensors
            Network.from_tensors(modules, model.family.adapters, tensors).merge(multiplier)
            say(f"merged into the model: {path}, times {multiplier:g}")
    with told(f"--network_module {chosen.module}"):
        network = make_network(modules, plan, chosen)
        network.attach()
        if chosen.weights is not None and isinstance(network, ForeignNetwork):
            network.load(chosen.weights)
        for line in network.describe():
            say(line)
        return trained(network, plan, chosen)


def make_network(modules: dict[str, nn.Module], plan: Plan, chosen: AdapterPlan) -> AnyNetwork:
    """A new network, or the one of --network_weights. Raises AdapterError."""
    parts = plan.source.family.adapters
    if chosen.settings is None:
        return create_foreign(
            chosen.module,
            modules,
            parts,
            dim=plan.options.adapter.network_dim,
            alpha=plan.options.adapter.network_alpha,
            dropout=plan.options.adapter.network_dropout,
            arguments=plan.options.adapter.network_args,
            train=chosen.reaches,
            weights=chosen.weights if plan.options.adapter.dim_from_weights else None,
        )
    if chosen.weights is None:
        return Network.create(modules, parts, chosen.settings, train=chosen.reaches, seed=plan.seed)
    tensors = files.read(chosen.weights).tensors
    if plan.options.adapter.dim_from_weights:
        return Network.from_tensors(modules, parts, tensors, settings=chosen.settings)
    network = Network.create(modules, parts, chosen.settings, train=chosen.reaches, seed=plan.seed)
    network.load_tensors(tensors)
    return network


def trained(network: AnyNetwork, plan: Plan, chosen: AdapterPlan) -> Trained:
    """What the optimiser gets of a network, and what is done with it around each step."""
    rates = {"unet": plan.rates.unet or 0.0, "text_encoder1": plan.rates.text_encoder or 0.0}
    groups = tuple(
        Group(group.description or group.name, group.parameters, group.learning_rate)
        for group in network.groups({name: rate for name, rate in rates.items() if rate})
    )
    module = network if isinstance(network, Network) else network.module
    limit = plan.options.adapter.scale_weight_norms
    foreign = network if isinstance(network, ForeignNetwork) else None
    if foreign is not None:
        foreign.start()
        if plan.options.memory.gradient_checkpointing:
            foreign.enable_gradient_checkpointing()
    more: dict[str, Any] = {}
    if foreign is not None:
        more = {"step_begins": foreign.on_step_start, "epoch_begins": foreign.on_epoch_start}
    return Trained(
        parts=(Part("network", module, plan.rates.unet or plan.rates.text_encoder or 0.0, groups=groups),),
        active=active_modules(network, chosen),
        write=partial(write_adapter, network, plan, time.time()),
        whole_model=False,
        tags=TAGS,
        step_ended=partial(measure, network, limit),
        **more,
    )


def active_modules(network: AnyNetwork, chosen: AdapterPlan) -> frozenset[str]:
    """The modules that gradients go through: a text encoder that an adapter sits in, and the U-Net behind it always."""
    return frozenset({"unet", *chosen.reaches})


def measure(network: AnyNetwork, limit: float | None) -> dict[str, float]:
    """After a step: --scale_weight_norms, and what logs show of it."""
    if limit is None:
        return {}
    report = network.scale_norms(limit)
    return {
        "max_norm/keys_scaled": float(report.scaled),
        "max_norm/max_key_norm": report.largest,
        "norm/avg_key_norm": report.mean,
    }


def write_adapter(network: AnyNetwork, plan: Plan, started: float, path: Path, step: int, epoch: int) -> None:
    """Write the adapter as it is after `step` optimiser steps, whole or not at all. Raises CheckpointError, OSError."""
    options = plan.options
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype: torch.dtype | None = None
    if options.saving.save_precision:
        dtype = torch_dtype(options.saving.save_precision)
    finished = time.time() if step >= plan.duration.steps else None
    try:
        network.write(path, dtype, adapter_metadata(plan, step=step, epoch=epoch, started=started, finished=finished))
    except AdapterError as error:
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def told(flag: str) -> Iterator[None]:
    """Turn what an adapter refuses into a message for the user."""
    try:
        yield
    except AdapterError as error:
        raise UserError((Mistake(f"{flag}: {error}", error.remedy),)) from error
    except CheckpointError as error:
        raise UserError((Mistake(f"{flag}: {error}"),)) from error
