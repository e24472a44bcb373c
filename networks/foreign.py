"""A network of another program's module (kohya's `create_network` protocol) with the surface of networks/network.py.

The order of calls and their arguments are sd-scripts' (train_network.py). The module sees stand-ins (stand_ins.py) and
works unmodified; the base model keeps its modules and its state dict.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints.adapter_names import AdapterPart
from networks import files
from networks.adapter import AdapterError
from networks.foreign_modules import call_if_there, check_arguments, load_foreign, read_arguments, told
from networks.stand_ins import Model, stand_ins

if TYPE_CHECKING:
    from networks.groups import Group
    from networks.network import NormReport

_DUPLICATE = re.compile(r"duplicate.*?\b((?:lora|oft)_\w+)", re.IGNORECASE | re.DOTALL)
_ATTEMPTS = 8


class RawState(nn.Module):
    """A module whose state dict is all of its parameters and buffers as they are, for an exact resume.

    Foreign networks may override `state_dict` with what goes into files, from which training cannot go on exactly
    (LyCORIS writes differences to the base, and leaves out scales).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def state_dict(self, *values: Any, **named: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Name -> tensor, not copied."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor], *values: Any, **named: Any) -> Any:  # type: ignore[override]
        """Copy the tensors of `state_dict` in. AdapterError if they are those of another network."""
        own = self._tensors()
        if wrong := sorted(own.keys() ^ state.keys()):
            raise AdapterError(f"the saved state is of another network: {_listed(wrong)}", "Use the same arguments.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers())


@dataclass
class ForeignNetwork:
    """A network made by a foreign module. `notes`: what the user should know about it.

    `module` holds its parameters (to, train, eval, parameters, exact state); the files are its own affair (`write`).
    """

    name: str
    network: Any
    model: Model
    parts: tuple[AdapterPart, ...]
    trained: frozenset[str]
    notes: tuple[str, ...] = ()
    multiplier: float = 1.0
    module: RawState = field(init=False)

    def __post_init__(self) -> None:
        self.module = RawState(self.network)

    def attach(self) -> None:
        """Put the network into the forward pass of the base model."""
        if self.multiplier:
            self.model.attach()

    def detach(self) -> None:
        """Take the network out of the forward pass: the base model as it was."""
        self.model.detach()

    def set_multiplier(self, multiplier: float) -> None:
        """Scale what the network adds; at 0 it is taken out, so that the base's output is exact. AdapterError."""
        if multiplier not in (0.0, 1.0) and not hasattr(self.network, "set_multiplier"):
            raise AdapterError(f"{self.name} has no set_multiplier", "Use a multiplier of 0 or 1 with it.")
        self.multiplier = multiplier
        if multiplier == 0:
            self.model.detach()
            return
        call_if_there(self.network, "set_multiplier", multiplier)
        self.model.attach()

    def groups(self, rates: Mapping[str, float], default: float | None = None) -> list[Group]:
        """Parameter groups as the module makes them, in its order. `rates`: learning rate by the parts' groups.

        AdapterError if the module fails, trains nothing, or asks for more than rates.
        """
        from networks.groups import Group

        made, descriptions = self._optimizer_groups(rates, default)
        groups: list[Group] = []
        homes = self._homes()
        for index, group in enumerate(made):
            if extra := sorted(set(group) - {"params", "lr", "name"}):
                what = f"{self.name} asks for optimizer settings by group: {', '.join(extra)}"
                raise AdapterError(what, "Only learning rates by group are supported.")
            given = group["params"]
            parameters = [*(given.values() if isinstance(given, Mapping) else given)]
            rate = group.get("lr", default)
            if not parameters or not rate:
                continue
            description = (descriptions[index] if index < len(descriptions) else "") or f"group{index}"
            groups.append(Group(homes.get(parameters[0], description), description, parameters, float(rate)))
        if not groups:
            raise AdapterError(
                f"--network_module {self.name} has nothing to train with these rates",
                "Give a learning rate above 0 for what it trains.",
            )
        return groups

    def _homes(self) -> dict[nn.Parameter, str]:
        """The groups of the model that parameters belong to, as far as the module names its layers in kohya's way."""
        children = [*self.network.named_children()]
        found = [(part.group, child) for part in self.parts for name, child in children if name.startswith(part.prefix)]
        return {parameter: group for group, child in found for parameter in child.parameters()}

    def _optimizer_groups(
        self, rates: Mapping[str, float], default: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        text = [rates.get(part.group, default) for part in self.parts if _is_text(part)]
        unet = next((rates.get(part.group, default) for part in self.parts if not _is_text(part)), default)
        several = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        first = text[0] if text else default
        with told(f"prepare_optimizer_params of {self.name}", "Its error is in that module."):
            try:
                if several is not None:
                    made = several(text, unet, default)
                else:
                    made = self.network.prepare_optimizer_params(first, unet, default)
            except TypeError:  # older modules take two rates
                made = self.network.prepare_optimizer_params(first, unet)
        groups, descriptions = made if isinstance(made, tuple) else (made, None)
        if isinstance(groups, nn.Parameter | Mapping):
            groups = [groups]
        groups = list(groups)
        if groups and not isinstance(groups[0], Mapping):  # bare parameters, as torch's optimizers take them
            groups = [{"params": groups}]
        return groups, list(descriptions or ())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What gradient clipping goes over."""
        given = getattr(self.network, "get_trainable_params", None)
        return [*(given() if given is not None else self.network.parameters())]

    def start(self) -> None:
        """Before the first step: gradients on, as the module does it."""
        if not call_if_there(self.network, "prepare_grad_etc", self._text_encoder, self._unet):
            self.network.requires_grad_(True)

    def on_epoch_start(self) -> None:
        """At the beginning of an epoch; leaves the network in training mode."""
        call_if_there(self.network, "on_epoch_start", self._text_encoder, self._unet)
        self.network.train()

    def on_step_start(self) -> None:
        """Before each micro-step."""
        call_if_there(self.network, "on_step_start", self._text_encoder, self._unet)

    def enable_gradient_checkpointing(self) -> None:
        """Tell the module that activations of the base are checkpointed."""
        call_if_there(self.network, "enable_gradient_checkpointing")

    def scale_norms(self, limit: float) -> NormReport:
        """Hold the norm of each layer's ΔW to `limit` (--scale_weight_norms). AdapterError if it cannot."""
        from networks.network import NormReport

        if not hasattr(self.network, "apply_max_norm_regularization"):
            what = f"--scale_weight_norms: {self.name} has no apply_max_norm_regularization"
            raise AdapterError(what, "Leave it out with this module.")
        device = next(self.network.parameters()).device
        with told(f"apply_max_norm_regularization of {self.name}"):
            scaled, mean, largest = self.network.apply_max_norm_regularization(limit, device)
        return NormReport(int(scaled), float(mean), float(largest))

    def load(self, path: Path) -> None:
        """Read weights (--network_weights) into the attached network. AdapterError lists keys that do not fit."""
        in_file = set(files.read(path).tensors)
        own = set(self.network.state_dict())
        wrong = [("unknown", sorted(in_file - own)), ("missing", sorted(own - in_file))]
        if any(keys for _, keys in wrong):
            what = "; ".join(f"{len(keys)} {word} keys ({_listed(keys)})" for word, keys in wrong if keys)
            raise AdapterError(
                f"--network_weights {path} does not fit this network of {self.name}: {what}",
                "Give the arguments it was trained with, or --dim_from_weights.",
            )
        with told(f"load_weights of {self.name}"), torch.no_grad():
            self.network.load_weights(str(path))

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What the module writes into a file, on the CPU."""
        with tempfile.TemporaryDirectory() as folder:
            return self._written(Path(folder), dtype, {}).tensors

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the weights as the module does, whole or not at all. CheckpointError: a NaN, a full disk."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            made = self._written(Path(folder), dtype, metadata, path.suffix)
        kept = {key: value for key, value in made.metadata.items() if not key.startswith("sshs_")}  # files.write's part
        files.write(path, made.tensors, dict(metadata) | kept)

    def _written(
        self, folder: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], suffix: str = ".safetensors"
    ) -> files.AdapterFile:
        place = folder / f"network{suffix}"
        with told(f"save_weights of {self.name}", "Its error is in that module."):
            self.network.save_weights(str(place), dtype, dict(metadata))
        return files.read(place)

    def describe(self) -> list[str]:
        """Lines for the user: adapters by part, parameters, notes."""
        count = sum(parameter.numel() for parameter in self.network.parameters())
        parts = ", ".join(f"{part.module} {number}" for part, number in self.counts().items())
        return [f"{self.name}: {parts or 'its own layers'}; {count:,} parameters", *self.notes]

    def counts(self) -> dict[AdapterPart, int]:
        """Adapters by part, as far as the module names them in kohya's way."""
        names = [name for name, _ in self.network.named_children()]
        found = {part: sum(name.startswith(part.prefix + "_") for name in names) for part in self.parts}
        return {part: number for part, number in found.items() if number}

    @property
    def _text_encoder(self) -> Any:
        return _text_encoders(self.model, self.parts)

    @property
    def _unet(self) -> Any:
        return _unet(self.model, self.parts)


def create_foreign(
    name: str,
    model: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    *,
    dim: int | None,
    alpha: float | None,
    dropout: float | None = None,
    arguments: Sequence[str] = (),
    train: Collection[str] | None = None,
    vae: nn.Module | None = None,
    weights: Path | None = None,
    settings: object = None,
) -> ForeignNetwork:
    """Make a network by the module `name` and put it into the model.

    `arguments`: --network_args. `train`: modules of the model that get adapters (None: all). `weights`: a file whose
    ranks are taken (--dim_from_weights). `settings`: what `prepare_network` gets. Raises AdapterError.
    """
    module = load_foreign(name)
    given = read_arguments(arguments)
    notes = check_arguments(module, given)
    alpha = 1 if alpha is None else int(alpha) if float(alpha).is_integer() else alpha
    if weights is None:
        given = {"dropout": dropout} | given  # type: ignore[assignment]  # as kohya passes it, None too

    def make(seen: Model) -> Any:
        places = (vae, _text_encoders(seen, parts), _unet(seen, parts))
        if weights is None:
            return module.create_network(1.0, dim, alpha, *places, neuron_dropout=dropout, **given)
        return _from_weights(module, 1.0, weights, places, given)[0]

    network, seen = _make(name, make, model, parts)
    trained = frozenset(part.module for part in parts) if train is None else frozenset(train)
    made = ForeignNetwork(name, network, seen, tuple(parts), trained, notes)
    if settings is not None:
        call_if_there(network, "prepare_network", settings)
    _apply(made)
    return made


def merge_foreign(
    name: str,
    path: Path,
    model: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    *,
    ratio: float = 1.0,
    vae: nn.Module | None = None,
) -> None:
    """Add `ratio` times the ΔW of a file of the module `name` to the base's weights (--base_weights).

    The module merges at 1 and the ratio is applied here, as LyCORIS's merge_to takes no notice of it. AdapterError.
    """
    module = load_foreign(name)
    state: list[Any] = []

    def make(seen: Model) -> Any:
        network, weights = _from_weights(module, 1.0, path, (vae, _text_encoders(seen, parts), _unet(seen, parts)), {})
        state[:] = [weights]
        return network

    network, seen = _make(name, make, model, parts)
    layers = [(real, stand_in) for real, stand_in in seen.pairs if real._parameters]
    for _, stand_in in layers:  # the module writes into copies, so that what it adds can be weighed
        for key, parameter in stand_in._parameters.items():
            if parameter is not None:
                stand_in._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    with told(f"merge_to of {name} with {path}"), torch.no_grad():
        network.merge_to(_text_encoders(seen, parts), _unet(seen, parts), state[0], torch.float32, "cpu")
        for real, stand_in in layers:
            for key, parameter in real._parameters.items():
                merged = stand_in._parameters.get(key)
                if parameter is not None and merged is not None and not torch.equal(parameter, merged):
                    wide = parameter.double()
                    parameter.copy_(wide + ratio * (merged.double() - wide))


def _from_weights(
    module: ModuleType, multiplier: float, path: Path, places: tuple[Any, ...], given: Mapping[str, Any]
) -> tuple[Any, Any]:
    if not hasattr(module, "create_network_from_weights"):
        what = f"{module.__name__} has no create_network_from_weights, which --dim_from_weights and --base_weights need"
        raise AdapterError(what, "Leave them out with this module.")
    made: tuple[Any, Any] = module.create_network_from_weights(multiplier, str(path), *places, **given)
    return made


def _make(name: str, make: Any, model: Mapping[str, nn.Module], parts: Sequence[AdapterPart]) -> tuple[Any, Model]:
    """The network, and the stand-ins it was made for.

    A layer that is reached both by its own name and by the class of a module around it is made twice, and refused
    (LyCORIS 4.1.3 with its default preset). Then that class is hidden, and the layer is reached by its name.
    """
    hidden: list[str] = []
    for attempt in range(_ATTEMPTS):
        seen = stand_ins(model, parts, hidden)
        state = torch.get_rng_state()
        try:
            with told(f"create_network of {name}"), torch.no_grad():  # some write into new parameters in place
                network = make(seen)
        except AdapterError as error:
            around = _class_around(str(error), model, parts)
            if around is None or around in hidden or attempt == _ATTEMPTS - 1:
                raise
            hidden.append(around)
            torch.set_rng_state(state)
        else:
            break
    if network is None:
        raise AdapterError(
            f"create_network of {name} returned no network", "See what the module printed; check --network_args."
        )
    return network, seen


def _class_around(message: str, model: Mapping[str, nn.Module], parts: Sequence[AdapterPart]) -> str | None:
    """The class of the module that holds the layer which an error calls a duplicate."""
    found = _DUPLICATE.search(message)
    if found is None:
        return None
    for part in parts:
        for path, _ in model[part.module].named_modules():
            if part.name(path) == found[1]:
                return type(model[part.module].get_submodule(path.rpartition(".")[0])).__name__
    return None


def _apply(made: ForeignNetwork) -> None:
    with told(f"apply_to of {made.name}"):
        text, unet = (any(part.module in made.trained for part in made.parts if _is_text(part) is is_text)
                      for is_text in (True, False))  # fmt: skip
        made.network.apply_to(made._text_encoder, made._unet, text, unet)
    if not made.model.attach() or not any(True for _ in made.network.parameters()):
        raise AdapterError(
            f"--network_module {made.name} has nothing to train: no layer of this model is what it looks for",
            "Check the targets and the preset in --network_args.",
        )
    counts = made.counts()
    empty = [part.module for part in made.parts if part.module in made.trained and part not in counts]
    if counts and empty:
        made.notes += (f"{made.name} has nothing to train in: {', '.join(empty)}",)


def _is_text(part: AdapterPart) -> bool:
    return part.group.startswith("text_encoder")


def _text_encoders(seen: Model, parts: Sequence[AdapterPart]) -> Any:
    """One text encoder as itself, several as a list: so the protocol has it."""
    found = [seen.seen[part.module] for part in parts if _is_text(part)]
    return found[0] if len(found) == 1 else found


def _unet(seen: Model, parts: Sequence[AdapterPart]) -> Any:
    return next((seen.seen[part.module] for part in parts if not _is_text(part)), None)


def _listed(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
