"""What train_network.py is asked to train: the adapter's settings and what of the model it reaches. No torch."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from library.families.family import Family
from library.options.groups.adapter import AdapterOptions
from library.options.mistakes import Mistakes
from networks import registry
from networks.settings import NetworkSettings, read_settings


@dataclass(frozen=True)
class AdapterPlan:
    """`settings` None: a module of others (`module`), which reads `arguments` itself. `reaches` are the modules of the
    model that the adapter sits in: backbone and text encoders."""

    module: str
    settings: NetworkSettings | None
    arguments: dict[str, str]
    reaches: frozenset[str]
    weights: Path | None
    base: tuple[tuple[Path, float], ...]


def decide_adapter(options: AdapterOptions, family: Family | None, mistakes: Mistakes) -> AdapterPlan | None:
    """The adapter of the run; None where all weights are trained."""
    if options.network_module is None:
        return None
    _check_files(options, mistakes)
    kind = registry.find_kind(options.network_module)
    settings = None
    if kind is None:
        _check_module(options.network_module, mistakes)
    else:
        settings, wrong = read_settings(
            options.network_module,
            dim=options.network_dim,
            alpha=options.network_alpha,
            dropout=options.network_dropout,
            arguments=options.network_args,
            blocks=max((part.blocks for part in family.adapters), default=0) if family else 0,
        )
        for what, remedy in wrong:
            mistakes.add(what, remedy)
        if options.scale_weight_norms and not kind.rescales:
            mistakes.add(f"--scale_weight_norms: {kind.module} cannot be scaled down", "leave it out")
    multipliers = (*options.base_weights_multiplier, *(1.0,) * len(options.base_weights))
    return AdapterPlan(
        module=options.network_module,
        settings=settings,
        arguments=_pairs(options.network_args),
        reaches=_reaches(options, family) if family else frozenset(),
        weights=options.network_weights,
        base=tuple(zip(options.base_weights, multipliers, strict=False)),
    )


def _pairs(arguments: tuple[str, ...]) -> dict[str, str]:
    """key=value texts as kohya's scripts hand them to a network module."""
    return {key.strip(): value.strip() for key, _, value in (member.partition("=") for member in arguments)}


def _reaches(options: AdapterOptions, family: Family) -> frozenset[str]:
    """A rate of 0 leaves a part out, as front-ends mean it that cannot send the switches."""
    reached = {family.backbone, *family.text_encoders}
    rates = options.text_encoder_lr
    for place, name in enumerate(family.text_encoders):
        if options.network_train_unet_only or (rates and not rates[min(place, len(rates) - 1)]):
            reached.discard(name)
    if options.network_train_text_encoder_only or options.unet_lr == 0:
        reached.discard(family.backbone)
    return frozenset(reached)


def _check_files(options: AdapterOptions, mistakes: Mistakes) -> None:
    for flag, paths in (("network_weights", (options.network_weights,)), ("base_weights", options.base_weights)):
        for path in paths:
            if path is not None and not path.is_file():
                mistakes.add(f"--{flag} {path}: there is no such file", "check the path")


def _check_module(name: str, mistakes: Mistakes) -> None:
    """A module of others must be there to be imported; what it is like is seen when it is."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        near = difflib.get_close_matches(name, [kind.module for kind in registry.KINDS], n=1)
        remedy = f"did you mean {near[0]}?" if near else "check the name; docs/adapters.md lists the kinds"
        if name.startswith("lycoris."):
            remedy = "pip install lycoris-lora==4.1.3"
        mistakes.add(f"--network_module {name}: there is no such module", remedy)
