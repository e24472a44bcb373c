"""The adapter of a run: made beside the model, begun from a file if one is named, trained, and written by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.checkpoints.header import CheckpointError
from library.options.mistakes import Mistake, UserError
from library.runtime.precision import torch_dtype
from library.training.adapter.metadata import AdapterMetadata
from library.training.trainable import Group, LossTags, Part, Trainable, named_parameters
from networks import adapter_files, network
from networks.adapter import AdapterError
from networks.network import Network
from networks.third_party.create import ForeignNetwork, create_foreign, merge_foreign

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.adapter.plan import AdapterPlan
    from library.training.plan.plan import Plan
    from library.training.recipe import Say

AnyNetwork = Network | ForeignNetwork

# as TensorBoard shows the runs of sd-scripts' train_network.py
TAGS = LossTags(step="loss/current", average="loss/average", epoch="loss/epoch_average")


def make_adapter(model: Model, plan: Plan, say: Say) -> Trainable:
    """The adapter that the plan asks for, in the forward pass of the model, and how it is trained and written.

    Raises UserError for files that do not fit and for what the adapter's own module refuses.
    """
    chosen = plan.adapter
    if chosen is None:
        raise ValueError("the plan has no adapter")
    loaded = model.modules()
    modules: dict[str, nn.Module] = {part.module: loaded[part.module] for part in model.family.adapters}
    for path, multiplier in chosen.base:
        with told(f"--base_weights {path}"):
            merge(path, multiplier, modules, plan, chosen)
            say(f"merged into the model: {path}, times {multiplier:g}")
    with told(f"--network_module {chosen.module}"):
        made = make_network(modules, plan, chosen)
        made.attach()
        for line in made.describe():
            say(line)
        return trained(made, plan, chosen)


def merge(path: Path, multiplier: float, modules: dict[str, nn.Module], plan: Plan, chosen: AdapterPlan) -> None:
    """Add an adapter's file to the weights of the model, by the module that trains. Raises AdapterError."""
    parts = plan.base_model.family.adapters
    if chosen.settings is None:
        merge_foreign(chosen.module, path, modules, parts, ratio=multiplier)
    else:
        network.from_tensors(modules, parts, adapter_files.read(path).tensors).merge(multiplier)


def make_network(modules: dict[str, nn.Module], plan: Plan, chosen: AdapterPlan) -> AnyNetwork:
    """A new network, or the one of --network_weights. Raises AdapterError."""
    parts, asked = plan.base_model.family.adapters, plan.options.adapter
    if chosen.settings is None:
        foreign = create_foreign(
            chosen.module,
            modules,
            parts,
            dim=asked.network_dim,
            alpha=asked.network_alpha,
            dropout=asked.network_dropout,
            arguments=asked.network_args,
            train=chosen.reaches,
            weights=chosen.weights if asked.dim_from_weights else None,
        )
        if chosen.weights is not None:
            foreign.load(chosen.weights)
        return foreign
    if chosen.weights is not None and asked.dim_from_weights:
        tensors = adapter_files.read(chosen.weights).tensors
        return network.from_tensors(modules, parts, tensors, settings=chosen.settings, train=chosen.reaches)
    own = network.create(modules, parts, chosen.settings, train=chosen.reaches, generator=_generator(plan.seed))
    if chosen.weights is not None:
        own.load(adapter_files.read(chosen.weights).tensors)
    return own


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % 2**63)


def trained(made: AnyNetwork, plan: Plan, chosen: AdapterPlan) -> Trainable:
    """What the optimiser gets of a network, and what is done with it around each step."""
    family, by_module = plan.base_model.family, plan.learning_rates.modules
    rates = {part.group: by_module.get(part.module, 0.0) for part in family.adapters}
    groups = learning_groups(made, {name: rate for name, rate in rates.items() if rate})
    facts = AdapterMetadata(plan)
    shared: dict[str, Any] = {
        # text encoders that an adapter sits in, and the backbone behind them in any case
        "active": frozenset({family.backbone, *chosen.reaches}),
        "write": partial(write_adapter, made, plan, facts),
        "whole_model": False,
        "tags": TAGS,
        "step_ended": partial(measure, made, plan.options.adapter.scale_weight_norms, facts),
    }
    rate = next(filter(None, by_module.values()), 0.0)
    if isinstance(made, Network):
        return Trainable(parts=(Part("network", made, rate, groups=groups),), **shared)
    made.start()
    if plan.options.memory.gradient_checkpointing:
        made.enable_gradient_checkpointing()
    return Trainable(
        parts=(Part("network", made.module, rate, groups=groups),),
        step_begins=made.on_step_start,
        epoch_begins=made.on_epoch_start,
        **shared,
    )


def learning_groups(made: AnyNetwork, rates: dict[str, float]) -> tuple[Group, ...]:
    """The groups of a network for {"unet": rate, "text_encoder1": rate}. Raises AdapterError if it has nothing to
    train, or trains what is no parameter of its own and so would be in no training state."""
    module = made if isinstance(made, Network) else made.module
    names = {parameter: name for name, parameter in named_parameters(module).items()}
    groups = []
    for group in made.groups(rates):
        if not all(parameter in names for parameter in group.parameters):
            what = f'the group "{group.description or group.name}" holds parameters that are not in the network'
            raise AdapterError(what, "Register them as parameters of the network's module.")
        own = tuple(names[parameter] for parameter in group.parameters)
        groups.append(Group(group.description or group.name, own, group.learning_rate))
    return tuple(groups)


def measure(made: AnyNetwork, limit: float | None, facts: AdapterMetadata) -> dict[str, float]:
    """After a step: --scale_weight_norms, and what logs show of it. The model's files are hashed beside the training,
    but not before its first step, which users wait for."""
    facts.begin_hashing()
    if limit is None:
        return {}
    report = made.scale_norms(limit)
    return {
        "max_norm/keys_scaled": float(report.scaled),
        "max_norm/max_key_norm": report.largest,
        "norm/avg_key_norm": report.mean,
    }


def write_adapter(made: AnyNetwork, plan: Plan, facts: AdapterMetadata, path: Path, step: int, epoch: int) -> None:
    """Write the adapter as it is after `step` optimiser steps, whole or not at all. Raises CheckpointError, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    precision = plan.options.saving.save_precision
    try:
        made.write(path, torch_dtype(precision) if precision else None, facts.at(step))
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
