"""Creates the adapter of a run and attaches it to the model, and writes it to its own file."""

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
from library.messages import readable_bytes
from library.options.mistakes import Mistake, UserError
from library.runtime.precision import torch_dtype
from library.training.adapter.metadata import AdapterMetadata
from library.training.quantised.packer import quantise
from library.training.trainable import Group, LossTags, Part, SavedAt, Trainable, named_parameters
from networks import network, registry
from networks.adapter import AdapterError
from networks.formats.read_write import read_adapter
from networks.loading import is_read_here
from networks.network import Network
from networks.third_party.create import ThirdPartyNetwork, create_third_party, merge_third_party

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.adapter_key_names import AdapterPart
    from library.families.family import Family, Model
    from library.options.groups.adapter import AdapterOptions
    from library.options.groups.saving import SaveModelAs, SavingOptions
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.learning_rates import LearningRates, Optimization
    from library.training.plan.facts import RunFacts
    from library.training.recipe import Say

AnyNetwork = Network | ThirdPartyNetwork

# the log names of sd-scripts' train_network.py
TAGS = LossTags(step="loss/current", average="loss/average", epoch="loss/epoch_average")


def make_adapter(
    model: Model, facts: RunFacts, optimization: Optimization, adapter: AdapterPlan, say: Say
) -> Trainable:
    """Create the adapter of the plan, attach it to the model, and return it with its groups and the functions of the
    loop.

    Raises UserError for files that do not fit, and for errors of the network module.
    """
    all_modules, options = model.modules(), facts.options.adapter
    modules: dict[str, nn.Module] = {part.module: all_modules[part.module] for part in model.family.adapters}
    for path, multiplier in adapter.base:
        with as_user_errors(f"--base_weights {path}"):
            merge(path, multiplier, modules, model.family.adapters, adapter, say)
            say(f"merged into the base model: {path}, multiplier {multiplier:g}")
    if adapter.base and facts.quantisation is not None:
        quantise(model, facts.quantisation)
    with as_user_errors(f"--network_module {adapter.module}"):
        adapter_network = make_network(modules, model.family.adapters, adapter, options, facts.seed, say)
        adapter_network.attach()
        for line in adapter_network.describe():
            say(line)
        say(f"each saved file has {readable_bytes(file_size(adapter_network, facts.options.saving))}")
        written = replace(adapter, module=module_of_file(adapter_network, adapter.module))
        metadata = AdapterMetadata(facts, optimization, written)
        trainable = trainable_network(adapter_network, model.family, optimization.learning_rates, adapter)
        if isinstance(adapter_network, ThirdPartyNetwork):
            adapter_network.start()
            if facts.options.memory.gradient_checkpointing:
                adapter_network.enable_gradient_checkpointing()
            trainable = replace(
                trainable, step_begins=adapter_network.on_step_start, epoch_begins=adapter_network.on_epoch_start
            )
        return replace(
            trainable,
            write=partial(write_adapter, adapter_network, facts.options.saving, metadata),
            step_ended=partial(end_step, adapter_network, options.scale_weight_norms, metadata),
        )


def merge(
    path: Path,
    multiplier: float,
    modules: dict[str, nn.Module],
    parts: Sequence[AdapterPart],
    adapter: AdapterPlan,
    say: Say,
) -> None:
    """Merge the file of an adapter into the weights of the model. Raises AdapterError.

    A third-party network module merges its own files, unless they are of kinds that this project reads.
    """
    tensors = _read(path, parts, say)
    if is_read_here(adapter.module, tensors):
        network.from_tensors(modules, parts, tensors).merge(multiplier)
    else:
        merge_third_party(adapter.module, path, modules, parts, ratio=multiplier)


def _read(path: Path, parts: Sequence[AdapterPart], say: Say) -> dict[str, Tensor]:
    """The tensors of an adapter file of any program, under kohya's names."""
    file = read_adapter(path, parts)
    for note in file.notes:
        say(f"{path}: {note}")
    return file.tensors


def make_network(
    modules: dict[str, nn.Module],
    parts: Sequence[AdapterPart],
    adapter: AdapterPlan,
    options: AdapterOptions,
    seed: int,
    say: Say,
) -> AnyNetwork:
    """Create a new network, or load that of --network_weights. Raises AdapterError."""
    if adapter.settings is None:
        foreign = create_third_party(
            adapter.module,
            modules,
            parts,
            dim=options.network_dim,
            alpha=options.network_alpha,
            dropout=options.network_dropout,
            arguments=options.network_args,
            train=adapter.trained_modules,
            weights=adapter.weights if options.dim_from_weights else None,
        )
        if adapter.weights is not None:
            foreign.load(adapter.weights)
        return foreign
    if adapter.weights is not None and options.dim_from_weights:
        tensors = _read(adapter.weights, parts, say)
        return network.from_tensors(modules, parts, tensors, settings=adapter.settings, train=adapter.trained_modules)
    own = network.create(modules, parts, adapter.settings, train=adapter.trained_modules, generator=_generator(seed))
    if adapter.weights is not None:
        own.load(_read(adapter.weights, parts, say))
    return own


def file_size(adapter_network: AnyNetwork, saving: SavingOptions) -> int:
    """Bytes of the tensors of a saved file."""
    if isinstance(adapter_network, Network):
        tensors = adapter_network.tensors(None)
    else:
        tensors = adapter_network.module.state_dict()
    width = torch_dtype(saving.save_precision).itemsize if saving.save_precision else None
    return sum(tensor.numel() * (width or tensor.element_size()) for tensor in tensors.values())


def module_of_file(adapter_network: AnyNetwork, chosen: str) -> str:
    """The network module for the metadata: that of the layers where --dim_from_weights has read another kind than that
    of the `chosen` module."""
    if not isinstance(adapter_network, Network):
        return chosen
    kinds = list(dict.fromkeys(layer.kind for layer in adapter_network.layers))
    named = registry.find_kind(chosen)
    own = named is None or not kinds or any(kind.name in (named.name, named.file_kind) for kind in kinds)
    return chosen if own else kinds[0].module


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % 2**63)


def trainable_network(
    adapter_network: AnyNetwork, family: Family, rates: LearningRates, adapter: AdapterPlan
) -> Trainable:
    """The parameter groups of a network with their learning rates, and the modules that gradients pass through."""
    by_group = {part.group: rates.modules.get(part.module, 0.0) for part in family.adapters}
    groups = learning_groups(adapter_network, {name: rate for name, rate in by_group.items() if rate})
    module = adapter_network if isinstance(adapter_network, Network) else adapter_network.module
    rate = next(filter(None, rates.modules.values()), 0.0)
    return Trainable(
        parts=(Part("network", module, rate, groups=groups),),
        # text encoders with an adapter, and always the backbone, through which their gradients pass
        active=frozenset({family.backbone, *adapter.trained_modules}),
        whole_model=False,
        products=tuple(adapter_network.products()) if isinstance(adapter_network, Network) else (),
        tags=TAGS,
        switched_off=adapter_network.switched_off,
    )


def learning_groups(adapter_network: AnyNetwork, rates: dict[str, float]) -> tuple[Group, ...]:
    """The parameter groups of a network for {"unet": rate, "text_encoder1": rate}.

    Raises AdapterError if there is nothing to train, or if a group contains parameters that are not registered in the
    network and so would be missing in a training state.
    """
    module = adapter_network if isinstance(adapter_network, Network) else adapter_network.module
    names = {parameter: name for name, parameter in named_parameters(module).items()}
    groups = []
    for group in adapter_network.groups(rates):
        if not all(parameter in names for parameter in group.parameters):
            what = f'the group "{group.description or group.name}" contains parameters that are not in the network'
            raise AdapterError(what, "Register them as parameters of the network's module.")
        own = tuple(names[parameter] for parameter in group.parameters)
        groups.append(Group(group.description or group.name, own, group.learning_rate))
    return tuple(groups)


def end_step(adapter_network: AnyNetwork, limit: float | None, metadata: AdapterMetadata) -> dict[str, float]:
    """Apply --scale_weight_norms after an optimizer step and return its log values.

    Also starts hashing the files of the model in the background; starting earlier would delay the first step.
    """
    metadata.begin_hashing()
    if limit is None:
        return {}
    report = adapter_network.scale_norms(limit)
    return {
        "max_norm/keys_scaled": float(report.scaled),
        "max_norm/max_key_norm": report.largest,
        "norm/avg_key_norm": report.mean,
    }


def write_adapter(
    adapter_network: AnyNetwork,
    saving: SavingOptions,
    metadata: AdapterMetadata,
    path: Path,
    save_as: SaveModelAs,
    at: SavedAt,
) -> None:
    """Write the adapter, completely or not at all. Raises CheckpointError, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    precision = saving.save_precision
    try:
        adapter_network.write(path, torch_dtype(precision) if precision else None, metadata.at(at.step, at.about))
    except AdapterError as error:
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def as_user_errors(flag: str) -> Iterator[None]:
    """Turn errors of an adapter into user errors about `flag`."""
    try:
        yield
    except AdapterError as error:
        raise UserError((Mistake(f"{flag}: {error}", error.remedy),)) from error
    except CheckpointError as error:
        raise UserError((Mistake(f"{flag}: {error}"),)) from error
