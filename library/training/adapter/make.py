"""The adapter of a run: made beside the model, begun from a file if one is named, trained, and written by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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
from networks.third_party.create import ThirdPartyNetwork, create_third_party, merge_third_party

if TYPE_CHECKING:
    from library.checkpoints.adapter_names import AdapterPart
    from library.families.family import Family, Model
    from library.options.groups.adapter import AdapterOptions
    from library.options.groups.saving import SaveModelAs, SavingOptions
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.learning_rates import LearningRates, Optimization
    from library.training.plan.facts import RunFacts
    from library.training.recipe import Say

AnyNetwork = Network | ThirdPartyNetwork

# as TensorBoard shows the runs of sd-scripts' train_network.py
TAGS = LossTags(step="loss/current", average="loss/average", epoch="loss/epoch_average")


def make_adapter(
    model: Model, facts: RunFacts, optimization: Optimization, adapter: AdapterPlan, say: Say
) -> Trainable:
    """The adapter of the plan, attached to the model's forward pass, and how it is trained and written.

    Raises UserError for files that do not fit and for what the adapter's own module refuses.
    """
    loaded, options = model.modules(), facts.options.adapter
    modules: dict[str, nn.Module] = {part.module: loaded[part.module] for part in model.family.adapters}
    for path, multiplier in adapter.base:
        with told(f"--base_weights {path}"):
            merge(path, multiplier, modules, model.family.adapters, adapter)
            say(f"merged into the model: {path}, times {multiplier:g}")
    with told(f"--network_module {adapter.module}"):
        made = make_network(modules, model.family.adapters, adapter, options, facts.seed)
        made.attach()
        for line in made.describe():
            say(line)
        metadata = AdapterMetadata(facts, optimization, adapter)
        trainable = trainable_network(made, model.family, optimization.learning_rates, adapter)
        if isinstance(made, ThirdPartyNetwork):
            made.start()
            if facts.options.memory.gradient_checkpointing:
                made.enable_gradient_checkpointing()
            trainable = replace(trainable, step_begins=made.on_step_start, epoch_begins=made.on_epoch_start)
        return replace(
            trainable,
            write=partial(write_adapter, made, facts.options.saving, metadata),
            step_ended=partial(measure, made, options.scale_weight_norms, metadata),
        )


def merge(
    path: Path, multiplier: float, modules: dict[str, nn.Module], parts: Sequence[AdapterPart], adapter: AdapterPlan
) -> None:
    """Add an adapter's file to the weights of the model, by the module that trains. Raises AdapterError."""
    if adapter.settings is None:
        merge_third_party(adapter.module, path, modules, parts, ratio=multiplier)
    else:
        network.from_tensors(modules, parts, adapter_files.read(path).tensors).merge(multiplier)


def make_network(
    modules: dict[str, nn.Module],
    parts: Sequence[AdapterPart],
    adapter: AdapterPlan,
    options: AdapterOptions,
    seed: int,
) -> AnyNetwork:
    """A new network, or the one of --network_weights. Raises AdapterError."""
    if adapter.settings is None:
        foreign = create_third_party(
            adapter.module,
            modules,
            parts,
            dim=options.network_dim,
            alpha=options.network_alpha,
            dropout=options.network_dropout,
            arguments=options.network_args,
            train=adapter.reaches,
            weights=adapter.weights if options.dim_from_weights else None,
        )
        if adapter.weights is not None:
            foreign.load(adapter.weights)
        return foreign
    if adapter.weights is not None and options.dim_from_weights:
        tensors = adapter_files.read(adapter.weights).tensors
        return network.from_tensors(modules, parts, tensors, settings=adapter.settings, train=adapter.reaches)
    own = network.create(modules, parts, adapter.settings, train=adapter.reaches, generator=_generator(seed))
    if adapter.weights is not None:
        own.load(adapter_files.read(adapter.weights).tensors)
    return own


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % 2**63)


def trainable_network(made: AnyNetwork, family: Family, rates: LearningRates, adapter: AdapterPlan) -> Trainable:
    """The groups of a network with their learning rates, and the modules that gradients go through."""
    by_group = {part.group: rates.modules.get(part.module, 0.0) for part in family.adapters}
    groups = learning_groups(made, {name: rate for name, rate in by_group.items() if rate})
    module = made if isinstance(made, Network) else made.module
    rate = next(filter(None, rates.modules.values()), 0.0)
    return Trainable(
        parts=(Part("network", module, rate, groups=groups),),
        # text encoders that an adapter sits in, and the backbone behind them in any case
        active=frozenset({family.backbone, *adapter.reaches}),
        whole_model=False,
        tags=TAGS,
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


def measure(made: AnyNetwork, limit: float | None, metadata: AdapterMetadata) -> dict[str, float]:
    """After a step: --scale_weight_norms, and what logs show of it. The model's files are hashed beside the training,
    but not before its first step, which users wait for."""
    metadata.begin_hashing()
    if limit is None:
        return {}
    report = made.scale_norms(limit)
    return {
        "max_norm/keys_scaled": float(report.scaled),
        "max_norm/max_key_norm": report.largest,
        "norm/avg_key_norm": report.mean,
    }


def write_adapter(
    made: AnyNetwork,
    saving: SavingOptions,
    metadata: AdapterMetadata,
    path: Path,
    save_as: SaveModelAs,
    step: int,
    epoch: int,
) -> None:
    """Write the adapter as it is after `step` optimiser steps, whole or not at all. Raises CheckpointError, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    precision = saving.save_precision
    try:
        made.write(path, torch_dtype(precision) if precision else None, metadata.at(step))
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
