"""The network that a module of another program has made (kohya's `create_network` protocol), with the surface of
networks/network.py.

The order of calls and their arguments are sd-scripts' (train_network.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints.adapter_names import AdapterPart
from library.checkpoints.header import CheckpointError
from networks import adapter_files
from networks.adapter import AdapterError
from networks.third_party.modules import call_if_there, told
from networks.third_party.stand_ins import Model, is_text

if TYPE_CHECKING:
    from networks.network import NormReport
    from networks.parameter_groups import Group


SEVERAL = "prepare_optimizer_params_with_multiple_te_lrs"  # what a module has that takes a rate for each text encoder


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
class ThirdPartyNetwork:
    """A network made by a foreign module. `notes`: what the user should know about it.

    `module` holds its parameters (to, train, eval, parameters, exact state); the files are its own affair (`write`).
    """

    name: str
    network: Any
    model: Model
    trained: frozenset[str]
    notes: tuple[str, ...] = ()
    multiplier: float = 1.0
    is_attached: bool = False
    module: RawState = field(init=False)

    def __post_init__(self) -> None:
        self.module = RawState(self.network)

    def attach(self) -> None:
        """Put the network into the forward pass of the base model."""
        self.is_attached = True
        self._place()

    def detach(self) -> None:
        """Take the network out of the forward pass: the base model as it was."""
        self.is_attached = False
        self._place()

    def set_multiplier(self, multiplier: float) -> None:
        """Scale what the network adds while attached; at 0 it is taken out, so that the output is the base's, exactly.
        AdapterError if the module cannot."""
        if multiplier not in (0.0, 1.0) and not hasattr(self.network, "set_multiplier"):
            raise AdapterError(f"{self.name} has no set_multiplier", "Use a multiplier of 0 or 1 with it.")
        self.multiplier = multiplier
        if multiplier:
            call_if_there(self.network, "set_multiplier", multiplier)
        self._place()

    def _place(self) -> None:
        if self.is_attached and self.multiplier:
            self.model.attach()
        else:
            self.model.detach()

    def groups(self, rates: Mapping[str, float], default: float | None = None) -> list[Group]:
        """Parameter groups as the module makes them, in its order. `rates`: learning rate by the parts' groups, 0 for
        those that are not there; `default`: for groups without one (not set: the largest rate). Of a module that knows
        one rate for all text encoders the groups are divided where theirs differ.

        AdapterError if the module fails, trains nothing, or asks for more than rates.
        """
        from networks.parameter_groups import Group

        default = max(rates.values(), default=0.0) if default is None else default
        made, descriptions = self._optimizer_groups(rates, default)
        groups: list[Group] = []
        homes, shares = self._homes(), self._shares(rates)
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
            for home, members in _divided(parameters, homes, shares).items():
                called = f"{description} {home.removeprefix('text_encoder')}" if home in shares else description
                if share := shares.get(home, 1.0):
                    groups.append(Group(home or description, called, members, float(rate) * share))
        if not groups:
            raise AdapterError(
                f"--network_module {self.name} has nothing to train with these rates",
                "Give a learning rate above 0 for what it trains.",
            )
        return groups

    def _homes(self) -> dict[nn.Parameter, str]:
        """The groups of the model that parameters belong to, as far as the module names its layers in kohya's way."""
        children = [*self.network.named_children()]
        found = [
            (part.group, child) for part in self.model.parts for name, child in children if name.startswith(part.prefix)
        ]
        return {parameter: group for group, child in found for parameter in child.parameters()}

    def _shares(self, rates: Mapping[str, float]) -> dict[str, float]:
        """What each text encoder's rate is of the one that the module is told; nothing where they do not differ, or if
        it takes them all."""
        text = {part.group: rates.get(part.group, 0.0) for part in self.model.parts if is_text(part)}
        if hasattr(self.network, SEVERAL) or len(set(text.values())) < 2:
            return {}
        return {group: rate / max(text.values()) for group, rate in text.items()}

    def _optimizer_groups(self, rates: Mapping[str, float], default: float) -> tuple[list[dict[str, Any]], list[str]]:
        text = [rates.get(part.group, 0.0) for part in self.model.parts if is_text(part)]
        unet = next((rates.get(part.group, 0.0) for part in self.model.parts if not is_text(part)), default)
        several = getattr(self.network, SEVERAL, None)
        one = max(text, default=0.0)
        with told(f"prepare_optimizer_params of {self.name}", "Its error is in that module."):
            try:
                if several is not None:
                    made = several(text, unet, default)
                else:
                    made = self.network.prepare_optimizer_params(one, unet, default)
            except TypeError:  # older modules take two rates
                made = self.network.prepare_optimizer_params(one, unet)
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
        if not call_if_there(self.network, "prepare_grad_etc", self.model.text_encoder, self.model.unet):
            self.network.requires_grad_(requires_grad=True)

    def on_epoch_start(self) -> None:
        """At the beginning of an epoch; leaves the network in training mode."""
        call_if_there(self.network, "on_epoch_start", self.model.text_encoder, self.model.unet)
        self.network.train()

    def on_step_start(self) -> None:
        """Before each micro-step."""
        call_if_there(self.network, "on_step_start", self.model.text_encoder, self.model.unet)

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
        in_file = set(adapter_files.read(path).tensors)
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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                made = self._written(Path(folder), dtype, metadata, path.suffix)
        except OSError as error:
            what = f"{path}: could not be written ({error.strerror or error}). Nothing was changed."
            raise CheckpointError(f"{what} Check the path and its permissions.") from error
        kept = {key: value for key, value in made.metadata.items() if not key.startswith("sshs_")}
        adapter_files.write(path, made.tensors, dict(metadata) | kept)

    def _written(
        self, folder: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], suffix: str = ".safetensors"
    ) -> adapter_files.AdapterFile:
        place = folder / f"network{suffix}"
        with told(f"save_weights of {self.name}", "Its error is in that module."):
            self.network.save_weights(str(place), dtype, dict(metadata))
        return adapter_files.read(place)

    def describe(self) -> list[str]:
        """Lines for the user: adapters by part, parameters, notes."""
        count = sum(parameter.numel() for parameter in self.network.parameters())
        parts = ", ".join(f"{part.module} {number}" for part, number in self.counts().items())
        return [f"{self.name}: {parts or 'its own layers'}; {count:,} parameters", *self.notes]

    def counts(self) -> dict[AdapterPart, int]:
        """Adapters by part, as far as the module names them in kohya's way."""
        names = [name for name, _ in self.network.named_children()]
        found = {part: sum(name.startswith(part.prefix + "_") for name in names) for part in self.model.parts}
        return {part: number for part, number in found.items() if number}


def _divided(
    parameters: Sequence[nn.Parameter], homes: Mapping[nn.Parameter, str], shares: Mapping[str, float]
) -> dict[str, list[nn.Parameter]]:
    """Parameters by the group of the model they belong to, as far as those in `shares` are among them; else together
    under the first one's."""
    found = [homes.get(parameter, "") for parameter in parameters]
    divided: dict[str, list[nn.Parameter]] = {}
    for parameter, home in zip(parameters, found, strict=True):
        divided.setdefault(home if home in shares else found[0], []).append(parameter)
    return divided


def _listed(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
