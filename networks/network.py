"""All adapters of a model as one torch module: names, multiplier, merging and files, for every kind.

network = create({"unet": unet, "text_encoder": text_encoder}, parts, settings, generator=generator)
network.attach()                    # from now on the model's output includes the adapters
network.write(path, None, metadata)
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.adapter_key_names import AdapterPart
from library.messages import counted
from networks import adapter_files, dora
from networks.adapted_layer import AdaptedLayer
from networks.adapter import AdapterError, LayerSettings
from networks.loading import copy_weights, load_layers, main_kind, raise_problems
from networks.parameter_groups import Group, parameter_groups
from networks.registry import load_kind
from networks.settings import NetworkSettings, scaled_alpha, variants
from networks.targets import find_targets

__all__ = ["Group", "Network", "NormReport", "create", "from_tensors"]


@dataclass(frozen=True)
class NormReport:
    """The result of scale_norms: the number of scaled layers, and the mean and largest ‖ΔW‖ afterwards."""

    scaled: int
    mean: float
    largest: float


class Network(nn.Module):
    """The adapters, each a child module under its name in files. The base's modules are not its children."""

    def __init__(self, layers: Iterable[AdaptedLayer], settings: NetworkSettings) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.settings = settings
        self.is_attached = False
        self.problems: tuple[str, ...] = ()
        self.left_out = 0
        for layer in self.layers:
            self.add_module(layer.name, layer.adapter)

    def _load_from_state_dict(self, state: dict[str, Any], *given: Any) -> None:
        prefix = self.settings.kind.other_prefix  # under which earlier versions saved their training states
        for key in [key for key in state if prefix and key.startswith(f"{prefix}_")]:
            state[f"lora{key.removeprefix(prefix)}"] = state.pop(key)
        super()._load_from_state_dict(state, *given)

    @property
    def multiplier(self) -> float:
        """The factor of ΔW while attached."""
        return self.layers[0].multiplier if self.layers else 1.0

    def set_multiplier(self, multiplier: float) -> None:
        """Set the multiplier of all layers; at 0 the output is the base model's, bit for bit."""
        for layer in self.layers:
            layer.multiplier = float(multiplier)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """While this is open, the output of the model is the base model's, bit for bit."""
        before = self.multiplier
        self.set_multiplier(0.0)
        try:
            yield
        finally:
            self.set_multiplier(before)

    @property
    def counts(self) -> dict[str, int]:
        """Number of adapted layers by group of the model ("unet", "text_encoder1")."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.target.part.group] = counts.get(layer.target.part.group, 0) + 1
        return counts

    def attach(self) -> None:
        """Add the adapters to the model's forward pass, and freeze the adapted layers."""
        for layer in self.layers:
            layer.module.requires_grad_(requires_grad=False)
            layer.attach()
        self.is_attached = True

    def detach(self) -> None:
        """Remove the adapters from the model's forward pass. AdapterError if another network was attached later."""
        for layer in reversed(self.layers):
            layer.detach()
        self.is_attached = False

    @torch.no_grad()
    def merge(self, ratio: float = 1.0, by_module: Mapping[str, float] = MappingProxyType({})) -> None:
        """Detach, and add ratio · ΔW to the base's weights permanently; a DoRA replaces them by W'. Computed in float32
        (float64 for float64), rounded once. `by_module`: the ratios of modules that have another ("unet").
        AdapterError if a file changes the bias of a layer without one."""
        self.detach()
        multiplier = self.multiplier
        for layer in self.layers:
            share = by_module.get(layer.target.part.module, ratio)
            if not share:
                continue
            layer.multiplier = float(share)
            weight = layer.module.weight
            work = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(work) + layer.weight_delta(work).to(weight.device))
            bias_delta = layer.bias_delta()
            if bias_delta is not None:
                if layer.module.bias is None:
                    raise AdapterError(f"{layer.name} changes a bias, but the model's layer has none")
                layer.module.bias.add_(bias_delta.to(layer.module.bias.device), alpha=share)
        self.set_multiplier(multiplier)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights of a file (--network_weights). AdapterError that lists missing and unknown tensors and wrong
        shapes; nothing is changed then."""
        model: dict[str, nn.Module] = {}
        for layer in self.layers:
            model.setdefault(layer.target.part.module, layer.target.root)
        parts = list({layer.target.part.module: layer.target.part for layer in self.layers}.values())
        loaded, problems = load_layers(model, parts, tensors, self.settings)
        raise_problems(problems or copy_weights(self.layers, loaded), "the file does not fit the network")

    def groups(self, rates: Mapping[str, float]) -> list[Group]:
        """The optimizer's groups for {"unet": rate, "text_encoder1": rate}; AdapterError if none has a rate above 0.

        Parameters without a group are frozen: their gradients would never be cleared, and would count in clipping.
        """
        groups = parameter_groups(self.layers, rates, self.settings)
        grouped = {id(parameter) for group in groups for parameter in group.parameters}
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in grouped)
        return groups

    @torch.no_grad()
    def scale_norms(self, limit: float) -> NormReport:
        """Scale down every ΔW whose Frobenius norm exceeds `limit` (kohya's scale_weight_norms), for a DoRA too.
        AdapterError for a kind that cannot be scaled."""
        norms = torch.stack([_norm(layer) for layer in self.layers]).tolist()  # one synchronisation with the device
        scaled = 0
        for layer, norm in zip(self.layers, norms, strict=True):
            if norm > limit:
                if not hasattr(layer.adapter, "rescale"):
                    raise AdapterError(
                        f"--scale_weight_norms does not support {layer.kind.title}", "remove --scale_weight_norms"
                    )
                layer.adapter.rescale(limit / norm)
                scaled += 1
        after = [min(norm, limit) for norm in norms]
        return NormReport(scaled, sum(after) / len(after), max(after))

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies of the tensors under their names in files, on the CPU. `dtype` converts all but an alpha that it
        cannot represent exactly (such as rsLoRA's): that stays in float32, as rounding it would change ΔW."""
        content: dict[str, Tensor] = {}
        for layer in self.layers:
            for key, value in _file_tensors(layer).items():
                exact = value.detach().to("cpu", copy=True).contiguous()
                if dtype is not None and exact.is_floating_point():
                    cast = exact.to(dtype)
                    exact = cast if exact.ndim or bool(cast.to(exact.dtype) == exact) else exact
                content[f"{layer.name}.{key}"] = exact
        return content

    def write(self, path: Path | str, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write an adapter file (networks/adapter_files.py). CheckpointError."""
        adapter_files.write(path, self.tensors(dtype), metadata)

    def products(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Down and up of each layer, whose product makes ΔW; empty if a layer makes it otherwise."""
        found = [getattr(layer.adapter, "product", None) for layer in self.layers]
        return [] if None in found else [pair for pair in found if pair is not None]

    def describe(self) -> list[str]:
        """Lines for the log: kinds, layers, parameters."""
        kinds = ", ".join(dict.fromkeys(layer.kind.title for layer in self.layers)) or "no adapters"
        parts = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        on = variants(self.settings)
        if not self.settings.use_dora and any(layer.is_decomposed for layer in self.layers):
            on.append("DoRA")
        lines = [f"{kinds}: {counted(len(self.layers), 'layer')} ({parts}), {trained:,} trainable parameters"]
        lines += [f"with {', '.join(on)}"] if on else []
        return lines + ([f"skipped: {counted(self.left_out, 'layer')} that are not trained"] if self.left_out else [])


def _norm(layer: AdaptedLayer) -> Tensor:
    own = getattr(layer.adapter, "norm", None)
    weight = layer.module.weight
    work = torch.promote_types(weight.dtype, torch.float32)
    norm: Tensor = layer.adapter.delta(weight.to(work)).norm() if own is None else own()
    return norm.float()


def _file_tensors(layer: AdaptedLayer) -> dict[str, Tensor]:
    own = getattr(layer.adapter, "file_tensors", None)
    tensors: dict[str, Tensor] = layer.adapter.state_dict() if own is None else own()
    scale = getattr(layer.adapter, dora.KEY, None)
    return tensors if scale is None else tensors | {dora.KEY: scale}


def create(
    model: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    settings: NetworkSettings,
    *,
    train: Collection[str] | None = None,
    generator: torch.Generator | None = None,
) -> Network:
    """Create adapters for a model ({"unet": …, "text_encoder": …}), in float32 on the CPU, with ΔW = 0.

    `train`: the modules to adapt (None: all). Each layer has a seed of its own, from the generator's first draw and the
    layer's name, so that its initial values do not depend on the other layers. AdapterError if no layer is adapted.
    """
    kind = settings.kind
    seed = int(torch.randint(2**62, (), generator=generator))
    modules = set(model) if train is None else set(train)
    if kind.parts is not None:
        modules &= kind.parts
    layers = []
    create_adapter = load_kind(kind).create
    with torch.random.fork_rng(devices=[]):
        for target in find_targets(model, parts, convolutions=settings.convolutions, only=modules):
            dim, alpha = settings.rank(conv=target.is_kernel, block=target.block)
            if dim == 0:
                continue
            torch.default_generator.manual_seed(_seed(seed, target.layer.name))
            layer_settings = LayerSettings(
                dim, scaled_alpha(settings, dim, alpha), settings.dropout, settings.rank_dropout, settings.own
            )
            adapter = create_adapter(target.layer, layer_settings, target.module.weight)
            if adapter is None:
                continue
            if settings.use_dora:
                scale = dora.magnitude(target.module.weight, by_output=settings.wd_on_output)
                adapter.register_parameter(dora.KEY, nn.Parameter(scale))
            layers.append(AdaptedLayer(target, adapter, kind, settings.module_dropout))
    if not layers:
        raise AdapterError(
            f"{kind.module} finds no layer to adapt in {', '.join(sorted(modules)) or 'the trained modules'}",
            "check block_dims and the *_lr_weight lists, and whether U-Net or text encoder are trained",
        )
    return Network(layers, settings)


def from_tensors(
    model: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    tensors: Mapping[str, Tensor],
    *,
    strict: bool = True,
    settings: NetworkSettings | None = None,
    train: Collection[str] | None = None,
) -> Network:
    """Build the network of a file, in the file's precision. The kind of each layer is detected from its keys.

    `settings`: for training, in float32 (dropouts, LoRA+, learning rates by block; ranks and alphas are the file's).
    `train`: the modules to adapt (None: all); the file's layers of other modules are skipped and counted in `describe`.
    Without `strict`, layers that do not fit are skipped and listed in the network's `problems`.
    AdapterError that lists every problem, or if no layer fits.
    """
    found, problems = load_layers(model, parts, tensors, settings)
    layers = [layer for layer in found if train is None or layer.target.part.module in train]
    if strict or not layers:
        raise_problems(
            problems or ([] if layers else ["it has no layers for the trained modules"]),
            "the adapter does not fit the model",
        )
    network = Network(layers, settings or NetworkSettings(main_kind(layers)))
    network.problems = tuple(problems)
    network.left_out = len(found) - len(layers)
    return network if settings is None else network.float()


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
