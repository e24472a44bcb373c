"""The adapter that a run trains: its settings, and the modules of the model that it is attached to. No torch."""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError
from library.families.family import Family
from library.messages import pip_install
from library.options.groups.adapter import AdapterOptions
from library.options.mistakes import Mistakes
from library.options.train_options import FLAGS
from library.training.adapter.initial_weights import InitialWeights
from library.training.optim.constructors import source_file
from library.training.plan.base_model import BaseModel
from library.training.saving.state import SavedState
from networks import registry
from networks.adapter import AdapterError, Kind
from networks.planned import PlannedLayer, plan_layers
from networks.readers import LYCORIS, note_on_lycoris, note_on_readers
from networks.settings import NetworkSettings, read_settings
from networks.third_party.arguments import check_arguments, read_module_arguments

LEAST_SCALE = 1 / 8  # with alpha = rank / 8; weaker adapters learn slowly


@dataclass(frozen=True)
class AdapterPlan:
    """`module`: the network module. `settings` None: a third-party module, which reads `arguments` itself.
    `trained_modules`: the backbone and text encoders that the adapter is attached to. `weights`: the file with its
    initial weights, and with `from_file` its layers and ranks. `base`: (file, multiplier) of adapters to merge into the
    base model. `layers`: those that get an adapter; None if only the third-party module knows. `out_of_reach`: modules
    that would be trained, but get no adapter."""

    module: str
    settings: NetworkSettings | None
    arguments: dict[str, str]
    trained_modules: frozenset[str]
    weights: Path | None
    base: tuple[tuple[Path, float], ...]
    from_file: bool = False
    layers: tuple[PlannedLayer, ...] | None = None
    out_of_reach: frozenset[str] = frozenset()

    @property
    def trained_parameters(self) -> int | None:
        """Number of trained parameters; None if it is not known before the network is made."""
        if self.layers is None or self.settings is None:
            return None
        return sum(one.trained(self.settings) for one in self.layers)

    @property
    def skips_layers(self) -> bool:
        """Whether a step may leave out layers of the adapter (module dropout)."""
        if self.settings is not None:
            return bool(self.settings.module_dropout)
        text = self.arguments.get("module_dropout", "0")  # of a third-party module, which has yet to read it
        return text.strip("0. ").lower() not in ("", "none", "false")

    @property
    def saved_values(self) -> int | None:
        """Number of values in a saved file; those of init=pissa have twice the rank."""
        if self.layers is None or self.settings is None:
            return None
        twice = 2 if self.settings.own.get("init") == "pissa" and not self.from_file else 1
        return twice * sum(one.saved for one in self.layers)

    @property
    def delta_values(self) -> int:
        """Number of values of ΔW of all layers, and of DoRA's magnitudes; 0 if the layers are not known."""
        magnitudes = [one.tensors.get("dora_scale", (0,)) for one in self.layers or ()]
        return sum(map(math.prod, [*(one.layer.shape for one in self.layers or ()), *magnitudes]))


def decide_adapter(
    options: AdapterOptions, base: BaseModel | None, resume: SavedState | None, mistakes: Mistakes, notes: list[str]
) -> AdapterPlan | None:
    """The adapter of the run; None if all weights are trained."""
    family = None if base is None else base.family
    if options.network_module is None:
        return None
    _check_files(options, mistakes)
    kind = registry.find_kind(options.network_module)
    settings = None
    if kind is None:
        _check_module(options.network_module, _argument_texts(options.network_args), mistakes)
        is_lycoris = options.network_module == LYCORIS
        note = note_on_lycoris(_argument_texts(options.network_args)) if is_lycoris else None
    else:
        settings, problems = read_settings(
            options.network_module,
            dim=options.network_dim,
            alpha=options.network_alpha,
            dropout=options.network_dropout,
            arguments=options.network_args,
            blocks=max((part.blocks for part in family.adapters), default=0) if family else None,
        )
        for what, remedy in problems:
            mistakes.add(what, remedy)
        if options.scale_weight_norms and not kind.rescales:
            mistakes.add(f"--scale_weight_norms: {kind.module} does not support it", "remove --scale_weight_norms")
        settings = _follow_saved_dora(settings, options.network_weights if resume is None else resume.weights, notes)
        scale = None if options.network_weights is not None else note_on_scale(settings)  # a file brings its alphas
        notes.extend([scale] if scale else [])
        notes.extend(_without_effect(kind, options))
        note = note_on_readers(settings)
    notes.extend([note] if note else [])
    multipliers = (*options.base_weights_multiplier, *(1.0,) * len(options.base_weights))
    asked = _trained_modules(options, family) if family else frozenset()
    plan = AdapterPlan(
        module=options.network_module,
        settings=settings,
        arguments=_argument_texts(options.network_args),
        trained_modules=asked,
        weights=options.network_weights,
        base=tuple(zip(options.base_weights, multipliers, strict=False)),
        from_file=options.dim_from_weights and options.network_weights is not None,
    )
    return plan if base is None or settings is None else _with_layers(plan, settings, base, mistakes)


def _with_layers(plan: AdapterPlan, settings: NetworkSettings, base: BaseModel, mistakes: Mistakes) -> AdapterPlan:
    """The plan with its layers, which are checked against the file of --network_weights."""
    family, model = base.family, base.sizes.shapes
    for path, _ in plan.base:
        if path.is_file():
            InitialWeights(path, family, model, settings, flag="base_weights").read(mistakes)
    if plan.weights is not None and plan.weights.is_file():
        initial = InitialWeights(plan.weights, family, model, settings)
        found = initial.read(mistakes)
        if plan.from_file:
            layers = () if found is None else initial.planned(found, plan.trained_modules, mistakes)
            return _reaching(plan, layers)
    else:
        found = None
    try:
        layers = plan_layers(family.adapters, model, settings, plan.trained_modules)
    except AdapterError as error:
        mistakes.add(f"--network_module {plan.module}: {error}", error.remedy)
        return _reaching(plan, ())
    if found is not None:
        initial.compare(found, layers, mistakes)
    if plan.trained_modules and not layers:
        trained = ", ".join(family.module_titles[name] for name in sorted(plan.trained_modules))
        mistakes.add(
            f"--network_module {plan.module} finds no layer to adapt in what is trained ({trained})",
            "train another module (--network_train_unet_only), use another kind, or check block_dims and *_lr_weight",
        )
    return _reaching(plan, layers)


def _reaching(plan: AdapterPlan, layers: tuple[PlannedLayer, ...]) -> AdapterPlan:
    """The plan with these layers; modules without a layer are not trained."""
    reached = {one.part.module for one in layers}
    return replace(
        plan,
        layers=layers,
        trained_modules=plan.trained_modules & reached,
        out_of_reach=plan.trained_modules - reached,
    )


def note_on_scale(settings: NetworkSettings) -> str | None:
    """A note where alpha makes the adapter weak, as the default of 1 does at higher ranks."""
    if not settings.kind.is_scaled or settings.scale >= LEAST_SCALE:
        return None
    return (
        f"alpha {settings.alpha:g} with rank {settings.dim} scales the adapter by {settings.scale:.3g}, so it learns "
        f"slowly: usual are --network_alpha {settings.dim / 2:g} or {settings.dim} (0: the rank)"
    )


def _without_effect(kind: Kind, options: AdapterOptions) -> Iterator[str]:
    """Notes on a dim and an alpha of a kind that has none."""
    given = {"network_dim": options.network_dim, "network_alpha": options.network_alpha}
    for name, value in given.items():
        if not kind.has_dim and value is not None and value != FLAGS[name].default:
            yield f"--{name} {value:g} has no effect: {kind.module} has neither rank nor alpha"


def _follow_saved_dora(settings: NetworkSettings, weights: Path | None, notes: list[str]) -> NetworkSettings:
    """The settings with DoRA's magnitudes per output or per input, as in the weights that the run goes on from: earlier
    versions had them per output."""
    if not settings.use_dora or weights is None:
        return settings
    try:
        tensors = read_header(weights).tensors
    except CheckpointError:
        return settings  # a missing file is a mistake of its own, a damaged one of whoever loads it
    by_output = {info.shape[:1] != (1,) for name, info in tensors.items() if name.endswith(".dora_scale")}
    by_output |= {True for name in tensors if ".lora_magnitude_vector" in name}  # PEFT's
    if by_output != {not settings.wd_on_output}:
        return settings
    notes.append(f"DoRA: magnitudes per {'input' if settings.wd_on_output else 'output'}, as in {weights}")
    return replace(settings, wd_on_output=not settings.wd_on_output)


def _argument_texts(arguments: tuple[str, ...]) -> dict[str, str]:
    """key=value texts as kohya's scripts pass them to a network module."""
    return {key.strip(): value.strip() for key, _, value in (text.partition("=") for text in arguments)}


def _trained_modules(options: AdapterOptions, family: Family) -> frozenset[str]:
    """Backbone and text encoders, except those that switches or a learning rate of 0 leave out. Some front-ends can
    only send rates."""
    trained = {family.backbone, *family.text_encoders}
    rates = options.text_encoder_lr
    for place, name in enumerate(family.text_encoders):
        if options.network_train_unet_only or (rates and not rates[min(place, len(rates) - 1)]):
            trained.discard(name)
    if options.network_train_text_encoder_only or options.unet_lr == 0:
        trained.discard(family.backbone)
    return frozenset(trained)


def _check_files(options: AdapterOptions, mistakes: Mistakes) -> None:
    for flag, paths in (("network_weights", (options.network_weights,)), ("base_weights", options.base_weights)):
        for path in paths:
            if path is not None and not path.is_file():
                mistakes.add(f"--{flag} {path}: there is no such file", "check the path")


def _check_module(name: str, arguments: dict[str, str], mistakes: Mistakes) -> None:
    """Check from its source that a third-party module exists and knows its arguments; importing it comes later."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    file = _find_source(name)
    if file is not None:
        for what, remedy in check_arguments(name, read_module_arguments(file), arguments)[0]:
            mistakes.add(what, remedy)
    elif not _may_be_compiled(name):
        near = difflib.get_close_matches(name, [kind.module for kind in registry.KINDS], n=1)
        remedy = f"did you mean {near[0]}?" if near else "check the name; docs/adapters.md lists all modules"
        if name.startswith("lycoris."):
            remedy = pip_install("lycoris-lora==4.1.3")
        mistakes.add(f"--network_module {name}: there is no such module", remedy)


def _find_source(name: str) -> Path | None:
    try:
        return source_file(name)
    except (ImportError, ValueError):
        return None


def _may_be_compiled(name: str) -> bool:
    """Whether a module without a source exists."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
