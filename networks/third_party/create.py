"""Create and merge networks of third-party modules (--network_module lycoris.kohya, a user's own file).

The modules receive stand-ins (stand_ins.py) and work unmodified; the base model keeps its modules and its state dict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.checkpoints.adapter_key_names import AdapterPart
from networks.adapter import AdapterError
from networks.third_party.arguments import check_arguments, read_module_arguments
from networks.third_party.modules import call_if_there, import_network_module, read_arguments, wrap_errors
from networks.third_party.network import ThirdPartyNetwork
from networks.third_party.stand_ins import Model, is_text, stand_ins

__all__ = ["ThirdPartyNetwork", "create_third_party", "import_network_module", "merge_third_party"]

_DUPLICATE = re.compile(r"duplicate.*?\b((?:lora|oft)_\w+)", re.IGNORECASE | re.DOTALL)
_ATTEMPTS = 8


def create_third_party(  # noqa: PLR0913 - kohya's create_network takes these
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
) -> ThirdPartyNetwork:
    """Create a network with the module `name` and attach it to the model.

    `arguments`: --network_args. `train`: modules of the model that get adapters (None: all). `weights`: a file that
    sets the ranks (--dim_from_weights). `settings`: the argument of `prepare_network`. Raises AdapterError.
    """
    module = import_network_module(name)
    network_args: dict[str, Any] = {**read_arguments(arguments)}
    source = getattr(module, "__file__", None)
    mistakes, notes = check_arguments(name, read_module_arguments(Path(source) if source else None), network_args)
    if mistakes:
        raise AdapterError(*mistakes[0])
    alpha = 1 if alpha is None else int(alpha) if float(alpha).is_integer() else alpha
    if weights is None:
        network_args = {"dropout": dropout} | network_args  # as kohya passes it, None too

    def build(stand_in: Model) -> Any:
        modules = (vae, stand_in.text_encoder, stand_in.unet)
        if weights is None:
            return module.create_network(1.0, dim, alpha, *modules, neuron_dropout=dropout, **network_args)
        return _create_from_weights(module, weights, modules, network_args)[0]

    network, stand_in = _build_network(name, build, model, parts)
    trained = frozenset(part.module for part in parts) if train is None else frozenset(train)
    result = ThirdPartyNetwork(name, network, stand_in, trained, notes)
    if settings is not None:
        call_if_there(network, "prepare_network", settings)
    _apply(result)
    result.attach()
    return result


def merge_third_party(
    name: str,
    path: Path,
    model: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    *,
    ratio: float = 1.0,
    vae: nn.Module | None = None,
) -> None:
    """Add `ratio` times the ΔW of a file of the module `name` to the base's weights (--base_weights).

    The module merges at 1 and the ratio is applied here, as LyCORIS's merge_to ignores it. AdapterError.
    """
    module = import_network_module(name)
    weights: list[Any] = []

    def build(stand_in: Model) -> Any:
        network, state = _create_from_weights(module, path, (vae, stand_in.text_encoder, stand_in.unet), {})
        weights[:] = [state]  # of the last attempt
        return network

    network, stand_in = _build_network(name, build, model, parts)
    layers = [(real, copy) for real, copy in stand_in.pairs if real._parameters]
    for _, copy in layers:  # the module merges into copies of the weights, so that the ratio can be applied afterwards
        for key, parameter in copy._parameters.items():
            if parameter is not None:
                wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
                copy._parameters[key] = nn.Parameter(wide, requires_grad=False)
    with torch.no_grad():
        with wrap_errors(f"merge_to of {name} with {path}"):
            network.merge_to(stand_in.text_encoder, stand_in.unet, weights[0], torch.float32, "cpu")
        for real, copy in layers:
            _add_difference(real, copy, ratio)


def _add_difference(real: nn.Module, merged: nn.Module, ratio: float) -> None:
    """Add `ratio` times the difference to its merged copy to a layer's parameters, rounding once."""
    for key, after in merged._parameters.items():
        before = real._parameters.get(key)
        if before is None and after is not None:
            what = f"the file has a {key} for a layer of {tuple(merged._parameters['weight'].shape)} without one"  # type: ignore[union-attr]
            raise AdapterError(what, "use a file that was trained on this kind of model")
        if before is not None and after is not None:
            wide = before.to(after.dtype)
            if not torch.equal(wide, after):
                before.copy_(wide + ratio * (after - wide))


def _create_from_weights(
    module: ModuleType, path: Path, modules: tuple[Any, ...], network_args: Mapping[str, Any]
) -> tuple[Any, Any]:
    """(network, its weights), by the module's `create_network_from_weights`. AdapterError if it has none."""
    if not hasattr(module, "create_network_from_weights"):
        what = f"{module.__name__} has no create_network_from_weights, which --dim_from_weights and --base_weights need"
        raise AdapterError(what, "remove these flags")
    result: tuple[Any, Any] = module.create_network_from_weights(1.0, str(path), *modules, **network_args)
    return result


def _build_network(
    name: str, build: Callable[[Model], Any], model: Mapping[str, nn.Module], parts: Sequence[AdapterPart]
) -> tuple[Any, Model]:
    """The network, and the stand-ins it was created for.

    LyCORIS 4.1.3 with its default preset matches some layers twice, by their own name and by the class of a module
    around them, and fails. Then that class is hidden, so that the layer is matched by its name only.
    """
    hidden: list[str] = []
    for attempt in range(_ATTEMPTS):
        stand_in = stand_ins(model, parts, hidden)
        state = torch.get_rng_state()
        try:
            with wrap_errors(f"create_network of {name}"), torch.no_grad():  # some write into new parameters in place
                network = build(stand_in)
        except AdapterError as error:
            outer = _outer_class(str(error), model, parts)
            if outer is None or outer in hidden or attempt == _ATTEMPTS - 1:
                raise
            hidden.append(outer)
            torch.set_rng_state(state)
        else:
            break
    if network is None:
        raise AdapterError(
            f"create_network of {name} returned no network", "check --network_args and the messages of the module"
        )
    return network, stand_in


def _outer_class(message: str, model: Mapping[str, nn.Module], parts: Sequence[AdapterPart]) -> str | None:
    """The class of the module around the layer that an error message calls a duplicate."""
    match = _DUPLICATE.search(message)
    if match is None:
        return None
    for part in parts:
        for path, layer in model[part.module].named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and part.name(path) == match[1]:
                return type(model[part.module].get_submodule(path.rpartition(".")[0])).__name__
    return None


def _apply(network: ThirdPartyNetwork) -> None:
    """Let the module patch the stand-ins. AdapterError if it adapts no layer."""
    trained = [part for part in network.model.parts if part.module in network.trained]
    text, unet = any(map(is_text, trained)), not all(map(is_text, trained))
    with wrap_errors(f"apply_to of {network.name}"):
        network.network.apply_to(network.model.text_encoder, network.model.unet, text, unet)
    patched = network.model.attach()
    network.model.detach()
    if not patched or not any(True for _ in network.network.parameters()):
        raise AdapterError(
            f"--network_module {network.name} has nothing to train: its targets match no layer of this model",
            "check the targets and the preset in --network_args; instead of LyCORIS's preset ia3, which matches no "
            "layer, use --network_module networks.ia3",
        )
    counts = network.counts()
    empty = [part.module for part in trained if part not in counts]
    if counts and empty:
        network.notes += (f"{network.name} has nothing to train in: {', '.join(empty)}",)
