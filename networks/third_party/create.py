"""Networks of other programs' modules (--network_module lycoris.kohya, a file of the user's own), made and merged.

The modules see stand-ins (stand_ins.py) and work unmodified; the base model keeps its modules and its state dict.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.checkpoints.adapter_names import AdapterPart
from networks.adapter import AdapterError
from networks.third_party.modules import call_if_there, check_arguments, import_network_module, read_arguments, told
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
    """Make a network by the module `name` and put it into the model.

    `arguments`: --network_args. `train`: modules of the model that get adapters (None: all). `weights`: a file whose
    ranks are taken (--dim_from_weights). `settings`: what `prepare_network` gets. Raises AdapterError.
    """
    module = import_network_module(name)
    given = read_arguments(arguments)
    notes = check_arguments(module, given)
    alpha = 1 if alpha is None else int(alpha) if float(alpha).is_integer() else alpha
    if weights is None:
        given = {"dropout": dropout} | given  # type: ignore[assignment]  # as kohya passes it, None too

    def make(seen: Model) -> Any:
        places = (vae, seen.text_encoder, seen.unet)
        if weights is None:
            return module.create_network(1.0, dim, alpha, *places, neuron_dropout=dropout, **given)
        return _from_weights(module, 1.0, weights, places, given)[0]

    network, seen = _make(name, make, model, parts)
    trained = frozenset(part.module for part in parts) if train is None else frozenset(train)
    made = ThirdPartyNetwork(name, network, seen, trained, notes)
    if settings is not None:
        call_if_there(network, "prepare_network", settings)
    _apply(made)
    made.attach()
    return made


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

    The module merges at 1 and the ratio is applied here, as LyCORIS's merge_to takes no notice of it. AdapterError.
    """
    module = import_network_module(name)
    state: list[Any] = []

    def make(seen: Model) -> Any:
        network, weights = _from_weights(module, 1.0, path, (vae, seen.text_encoder, seen.unet), {})
        state[:] = [weights]
        return network

    network, seen = _make(name, make, model, parts)
    layers = [(real, stand_in) for real, stand_in in seen.pairs if real._parameters]
    for _, stand_in in layers:  # the module writes into copies, so that what it adds can be weighed
        for key, parameter in stand_in._parameters.items():
            if parameter is not None:
                wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
                stand_in._parameters[key] = nn.Parameter(wide, requires_grad=False)
    with torch.no_grad():
        with told(f"merge_to of {name} with {path}"):
            network.merge_to(seen.text_encoder, seen.unet, state[0], torch.float32, "cpu")
        for real, stand_in in layers:
            _add(real, stand_in, ratio)


def _add(real: nn.Module, merged: nn.Module, ratio: float) -> None:
    """Bring a layer's parameters by `ratio` of the way to those of its merged copy, rounding once."""
    for key, after in merged._parameters.items():
        before = real._parameters.get(key)
        if before is None and after is not None:
            what = f"the file gives a {key} to a layer of {tuple(merged._parameters['weight'].shape)} that has none"  # type: ignore[union-attr]
            raise AdapterError(what, "It cannot be merged into this model.")
        if before is not None and after is not None:
            wide = before.to(after.dtype)
            if not torch.equal(wide, after):
                before.copy_(wide + ratio * (after - wide))


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
        for path, layer in model[part.module].named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and part.name(path) == found[1]:
                return type(model[part.module].get_submodule(path.rpartition(".")[0])).__name__
    return None


def _apply(made: ThirdPartyNetwork) -> None:
    trained = [part for part in made.model.parts if part.module in made.trained]
    text, unet = any(map(is_text, trained)), not all(map(is_text, trained))
    with told(f"apply_to of {made.name}"):
        made.network.apply_to(made.model.text_encoder, made.model.unet, text, unet)
    patched = made.model.attach()
    made.model.detach()
    if not patched or not any(True for _ in made.network.parameters()):
        raise AdapterError(
            f"--network_module {made.name} has nothing to train: no layer of this model is what it looks for",
            "Check the targets and the preset in --network_args. LyCORIS's preset ia3 reaches nothing, as it looks for "
            "its names at the beginning of paths: take --network_module networks.ia3.",
        )
    counts = made.counts()
    empty = [part.module for part in trained if part not in counts]
    if counts and empty:
        made.notes += (f"{made.name} has nothing to train in: {', '.join(empty)}",)
