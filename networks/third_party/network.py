"""The network of a third-party module (kohya's `create_network` protocol), with the interface of networks/network.py.

The order of calls and their arguments are those of sd-scripts' train_network.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints.adapter_key_names import AdapterPart
from library.checkpoints.header import CheckpointError
from library.messages import counted, listed
from networks import adapter_files
from networks.adapter import AdapterError
from networks.formats.read_write import read_adapter
from networks.third_party.modules import call_if_there, wrap_errors
from networks.third_party.stand_ins import Model, is_text

if TYPE_CHECKING:
    from networks.network import NormReport
    from networks.parameter_groups import Group


_MOST_LISTED = 8
_REPORT_THERE = "report it to the authors of the module"
MULTIPLE_TE_LRS = "prepare_optimizer_params_with_multiple_te_lrs"  # the method for a learning rate per text encoder


class RawState(nn.Module):
    """A module whose state dict has all parameters and buffers unchanged, for an exact resume.

    Third-party networks may override `state_dict` to return the contents of a file, which do not resume exactly
    (LyCORIS writes differences to the base, and omits scales).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def state_dict(self, *values: Any, **named: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Name -> tensor, not copied."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor], *values: Any, **named: Any) -> Any:  # type: ignore[override]
        """Copy in the tensors of `state_dict`. AdapterError if they belong to another network."""
        own = self._tensors()
        if wrong := sorted(own.keys() ^ state.keys()):
            raise AdapterError(
                f"the saved state is of another network: {listed(wrong, _MOST_LISTED)}",
                "resume with the same --network_module and --network_args",
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers())


@dataclass
class ThirdPartyNetwork:
    """A network created by a third-party module. `notes`: what the user should know about it.

    `module` holds the parameters (to, train, eval, parameters, exact state); the module itself writes its files.
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
        """Remove the network from the forward pass of the base model."""
        self.is_attached = False
        self._place()

    def set_multiplier(self, multiplier: float) -> None:
        """Scale the network's contribution while attached; at 0 it is removed, so that the output is exactly the base
        model's. AdapterError if the module does not support it."""
        if multiplier not in (0.0, 1.0) and not hasattr(self.network, "set_multiplier"):
            raise AdapterError(f"{self.name} has no set_multiplier", "use a multiplier of 0 or 1")
        self.multiplier = multiplier
        if multiplier:
            call_if_there(self.network, "set_multiplier", multiplier)
        self._place()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """While this is open, the network is out of the forward pass of the base model. Its own multiplier is left as
        it is: modules may have set another one."""
        attached = self.is_attached
        self.detach()
        try:
            yield
        finally:
            if attached:
                self.attach()

    def _place(self) -> None:
        if self.is_attached and self.multiplier:
            self.model.attach()
        else:
            self.model.detach()

    def groups(self, rates: Mapping[str, float], default: float | None = None) -> list[Group]:
        """The module's parameter groups, in its order.

        `rates`: learning rate by group of the model, 0 if missing. `default`: for groups without one (default: the
        largest rate). If the module supports a single text encoder rate, its groups are split where the rates differ.

        AdapterError if the module fails, trains nothing, or sets other optimizer options by group.
        """
        from networks.parameter_groups import Group

        default = max(rates.values(), default=0.0) if default is None else default
        module_groups, descriptions = self._optimizer_groups(rates, default)
        groups: list[Group] = []
        group_of, factors = self._groups_by_parameter(), self._text_encoder_factors(rates)
        for index, group in enumerate(module_groups):
            if extra := sorted(set(group) - {"params", "lr", "name"}):
                what = f"{self.name} sets optimizer options by group: {', '.join(extra)}"
                raise AdapterError(what, "use a module that sets only learning rates by group")
            params = group["params"]
            parameters = [*(params.values() if isinstance(params, Mapping) else params)]
            rate = group.get("lr", default)
            if not parameters or not rate:
                continue
            description = (descriptions[index] if index < len(descriptions) else "") or f"group{index}"
            for name, members in _split_by_group(parameters, group_of, factors).items():
                title = f"{description} {name.removeprefix('text_encoder')}" if name in factors else description
                if factor := factors.get(name, 1.0):
                    groups.append(Group(name or description, title, members, float(rate) * factor))
        if not groups:
            raise AdapterError(
                f"--network_module {self.name} has nothing to train with these learning rates",
                "set a learning rate above 0 for the modules that it trains",
            )
        return groups

    def _groups_by_parameter(self) -> dict[nn.Parameter, str]:
        """The group of the model that each parameter belongs to, if the module uses kohya's layer names."""
        children = [*self.network.named_children()]
        pairs = [
            (part.group, child) for part in self.model.parts for name, child in children if name.startswith(part.prefix)
        ]
        return {parameter: group for group, child in pairs for parameter in child.parameters()}

    def _text_encoder_factors(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Each text encoder's rate over the largest one, which the module receives. Empty if the rates are equal, or if
        the module supports a rate per text encoder."""
        text = {part.group: rates.get(part.group, 0.0) for part in self.model.parts if is_text(part)}
        if hasattr(self.network, MULTIPLE_TE_LRS) or len(set(text.values())) < 2:
            return {}
        return {group: rate / max(text.values()) for group, rate in text.items()}

    def _optimizer_groups(self, rates: Mapping[str, float], default: float) -> tuple[list[dict[str, Any]], list[str]]:
        text = [rates.get(part.group, 0.0) for part in self.model.parts if is_text(part)]
        unet = next((rates.get(part.group, 0.0) for part in self.model.parts if not is_text(part)), default)
        with_multiple_rates = getattr(self.network, MULTIPLE_TE_LRS, None)
        largest = max(text, default=0.0)
        with wrap_errors(f"prepare_optimizer_params of {self.name}", _REPORT_THERE):
            try:
                if with_multiple_rates is not None:
                    result = with_multiple_rates(text, unet, default)
                else:
                    result = self.network.prepare_optimizer_params(largest, unet, default)
            except TypeError:  # older modules take two rates
                result = self.network.prepare_optimizer_params(largest, unet)
        groups, descriptions = result if isinstance(result, tuple) else (result, None)
        if isinstance(groups, nn.Parameter | Mapping):
            groups = [groups]
        groups = list(groups)
        if groups and not isinstance(groups[0], Mapping):  # bare parameters, as torch's optimizers take them
            groups = [{"params": groups}]
        return groups, list(descriptions or ())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are clipped."""
        get_parameters = getattr(self.network, "get_trainable_params", None) or self.network.parameters
        return [*get_parameters()]

    def start(self) -> None:
        """Before the first step: let the module enable gradients."""
        if not call_if_there(self.network, "prepare_grad_etc", self.model.text_encoder, self.model.unet):
            self.network.requires_grad_(requires_grad=True)

    def on_epoch_start(self) -> None:
        """At the start of an epoch; leaves the network in training mode."""
        call_if_there(self.network, "on_epoch_start", self.model.text_encoder, self.model.unet)
        self.network.train()

    def on_step_start(self) -> None:
        """Before each batch."""
        call_if_there(self.network, "on_step_start", self.model.text_encoder, self.model.unet)

    def enable_gradient_checkpointing(self) -> None:
        """Tell the module that the base model uses gradient checkpointing."""
        call_if_there(self.network, "enable_gradient_checkpointing")

    def scale_norms(self, limit: float) -> NormReport:
        """Limit the norm of each layer's ΔW (--scale_weight_norms). AdapterError if the module does not support it."""
        from networks.network import NormReport

        if not hasattr(self.network, "apply_max_norm_regularization"):
            what = f"--scale_weight_norms: {self.name} has no apply_max_norm_regularization"
            raise AdapterError(what, "remove --scale_weight_norms")
        device = next(self.network.parameters()).device
        with wrap_errors(f"apply_max_norm_regularization of {self.name}"):
            scaled, mean, largest = self.network.apply_max_norm_regularization(limit, device)
        return NormReport(int(scaled), float(mean), float(largest))

    def load(self, path: Path) -> None:
        """Load a file (--network_weights) into the attached network; the layers may be named as another program names
        them. AdapterError that lists keys that do not fit."""
        own = self.network.state_dict().keys()
        if adapter_files.read(path).tensors.keys() == own:
            self._load_weights(path)
            return
        named = read_adapter(path, self.model.parts)
        in_file = named.tensors.keys()
        wrong = [("unknown", sorted(in_file - own)), ("missing", sorted(own - in_file))]
        if any(keys for _, keys in wrong):
            what = "; ".join(
                f"{counted(len(keys), f'{word} key')} ({listed(keys, _MOST_LISTED)})" for word, keys in wrong if keys
            )
            raise AdapterError(
                f"--network_weights {path} does not fit this network of {self.name}: {what}",
                "use the --network_args that it was trained with, or --dim_from_weights",
            )
        with tempfile.TemporaryDirectory() as folder:
            adapter_files.write(Path(folder) / "network.safetensors", named.tensors, named.metadata)
            self._load_weights(Path(folder) / "network.safetensors")

    def _load_weights(self, path: Path) -> None:
        with wrap_errors(f"load_weights of {self.name}"), torch.no_grad():
            self.network.load_weights(str(path))

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors that the module writes into a file, on the CPU."""
        with tempfile.TemporaryDirectory() as folder:
            return self._save(Path(folder), dtype, {}).tensors

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the module's weights to a file, completely or not at all. CheckpointError: a NaN, a full disk."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                saved = self._save(Path(folder), dtype, metadata, path.suffix)
        except OSError as error:
            what = f"{path}: could not be written ({error.strerror or error}). Nothing was changed."
            raise CheckpointError(f"{what} Check the path and its permissions.") from error
        own = {key: value for key, value in saved.metadata.items() if not key.startswith("sshs_")}
        adapter_files.write(path, saved.tensors, dict(metadata) | own)

    def _save(
        self, folder: Path, dtype: torch.dtype | None, metadata: Mapping[str, str], suffix: str = ".safetensors"
    ) -> adapter_files.AdapterFile:
        file = folder / f"network{suffix}"
        with wrap_errors(f"save_weights of {self.name}", _REPORT_THERE):
            self.network.save_weights(str(file), dtype, dict(metadata))
        return adapter_files.read(file)

    def describe(self) -> list[str]:
        """Lines for the log: adapters by module, parameters, notes."""
        count = sum(parameter.numel() for parameter in self.network.parameters())
        parts = ", ".join(f"{part.module} {number}" for part, number in self.counts().items())
        return [f"{self.name}: {parts or 'its own layers'}; {count:,} parameters", *self.notes]

    def counts(self) -> dict[AdapterPart, int]:
        """Number of adapters by part of the model, if the module uses kohya's layer names."""
        names = [name for name, _ in self.network.named_children()]
        counts = {part: sum(name.startswith(part.prefix + "_") for name in names) for part in self.model.parts}
        return {part: count for part, count in counts.items() if count}


def _split_by_group(
    parameters: Sequence[nn.Parameter], group_of: Mapping[nn.Parameter, str], split: Mapping[str, float]
) -> dict[str, list[nn.Parameter]]:
    """Parameters by group of the model. Only the groups in `split` are separated; all others count to the group of the
    first parameter."""
    names = [group_of.get(parameter, "") for parameter in parameters]
    groups: dict[str, list[nn.Parameter]] = {}
    for parameter, name in zip(parameters, names, strict=True):
        groups.setdefault(name if name in split else names[0], []).append(parameter)
    return groups
