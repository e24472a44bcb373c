"""All adapters of a model as one torch module: names, multiplier, merging, files; once for all kinds.

network = create({"unet": unet, "text_encoder": text_encoder}, parts, settings, generator=generator)
network.attach()                    # from now on the model computes with the adapters
network.write(path, None, metadata)
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from library.checkpoints.adapter_names import AdapterPart
from networks import adapter_files, dora
from networks.adapted_layer import AdaptedLayer
from networks.adapter import AdapterError, LayerSettings
from networks.loading import fill, load_layers, main_kind, refuse
from networks.parameter_groups import Group, parameter_groups
from networks.registry import load_kind
from networks.settings import NetworkSettings, scaled_alpha
from networks.targets import file_name, find_targets

__all__ = ["Group", "Network", "NormReport", "create", "from_tensors"]


@dataclass(frozen=True)
class NormReport:
    """What scale_norms did: how many layers it scaled, and the mean and largest ‖ΔW‖ after that."""

    scaled: int
    mean: float
    largest: float


class Network(nn.Module):
    """The adapters, each a child under its name in adapter_files. The base's modules are none of its children."""

    def __init__(self, layers: Iterable[AdaptedLayer], settings: NetworkSettings) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.settings = settings
        self.is_attached = False
        self.problems: tuple[str, ...] = ()
        self.left_out = 0
        for layer in self.layers:
            self.add_module(layer.name, layer.adapter)

    @property
    def multiplier(self) -> float:
        """How much of ΔW is added while attached."""
        return self.layers[0].multiplier if self.layers else 1.0

    def set_multiplier(self, multiplier: float) -> None:
        """Set it for all layers; 0: the model computes as if nothing were attached, bit for bit."""
        for layer in self.layers:
            layer.multiplier = float(multiplier)

    @property
    def counts(self) -> dict[str, int]:
        """How many layers are adapted, by group of the model ("unet", "text_encoder1")."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.target.part.group] = counts.get(layer.target.part.group, 0) + 1
        return counts

    def attach(self) -> None:
        """Let the model compute with the adapters, and freeze the layers that they sit on."""
        for layer in self.layers:
            layer.module.requires_grad_(requires_grad=False)
            layer.attach()
        self.is_attached = True

    def detach(self) -> None:
        """Let the model compute as before `attach`. AdapterError if another network was attached later."""
        for layer in reversed(self.layers):
            layer.detach()
        self.is_attached = False

    @torch.no_grad()
    def merge(self, ratio: float = 1.0) -> None:
        """Detach, and add ratio · ΔW to the base's weights for good; of a DoRA write W'. In float32 (float64 for such),
        rounded once. AdapterError if a file changes the bias of a layer without one."""
        self.detach()
        kept = self.multiplier
        self.set_multiplier(ratio)
        for layer in self.layers if ratio else ():
            weight = layer.module.weight
            work = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(work) + layer.weight_delta(work).to(weight.device))
            more = layer.bias_delta()
            if more is not None:
                if layer.module.bias is None:
                    raise AdapterError(f"{layer.name} changes a bias, and the model has none there")
                layer.module.bias.add_(more.to(layer.module.bias.device), alpha=ratio)
        self.set_multiplier(kept)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the numbers of a file (--network_weights). AdapterError that lists what is missing in it, unknown, or of
        another shape; then nothing has changed."""
        model: dict[str, nn.Module] = {}
        for layer in self.layers:
            model.setdefault(layer.target.part.module, layer.target.root)
        parts = list({layer.target.part.module: layer.target.part for layer in self.layers}.values())
        loaded, problems = load_layers(model, parts, tensors, self.settings)
        refuse(problems or fill(self.layers, loaded), "the file does not fit the network")

    def groups(self, rates: Mapping[str, float]) -> list[Group]:
        """The optimizer's groups for {"unet": rate, "text_encoder1": rate}; AdapterError if none has a rate above 0.

        What gets no group is frozen: nobody would clear its gradients, and they would count when gradients are clipped.
        """
        found = parameter_groups(self.layers, rates, self.settings)
        grouped = {id(parameter) for group in found for parameter in group.parameters}
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in grouped)
        return found

    @torch.no_grad()
    def scale_norms(self, limit: float) -> NormReport:
        """Scale down every ΔW whose Frobenius norm exceeds `limit` (kohya's scale_weight_norms). Of a DoRA the norm of
        ΔW alone counts. AdapterError for a kind that cannot be scaled."""
        norms = torch.stack([_norm(layer) for layer in self.layers]).tolist()  # one wait for the device
        scaled = 0
        for layer, norm in zip(self.layers, norms, strict=True):
            if norm > limit:
                if not hasattr(layer.adapter, "rescale"):
                    raise AdapterError(
                        f"scale_weight_norms cannot go with {layer.kind.title}", "Leave out --scale_weight_norms."
                    )
                layer.adapter.rescale(limit / norm)
                scaled += 1
        after = [min(norm, limit) for norm in norms]
        return NormReport(scaled, sum(after) / len(after), max(after))

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What a file holds, on the CPU and independent of the network. A dtype is for all but an alpha that it cannot
        hold exactly (an alpha of rsLoRA is no round number): that stays in float32, for ΔW would change with it."""
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

    def describe(self) -> list[str]:
        """Lines for the user: kinds, layers, ranks, size."""
        kinds = ", ".join(dict.fromkeys(layer.kind.title for layer in self.layers)) or "no adapters"
        parts = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        how = [name for name in ("use_dora", "use_rslora") if getattr(self.settings, name)]
        lines = [f"{kinds}: {len(self.layers)} layers ({parts}), {trained:,} parameters to train"]
        lines += [f"with {', '.join(how)}"] if how else []
        return lines + ([f"left out: {self.left_out} layers of what is not trained"] if self.left_out else [])


def _norm(layer: AdaptedLayer) -> Tensor:
    own = getattr(layer.adapter, "norm", None)
    weight = layer.module.weight
    work = torch.promote_types(weight.dtype, torch.float32)
    norm: Tensor = layer.adapter.delta(weight.to(work)).norm() if own is None else own()
    return norm.float()


def _file_tensors(layer: AdaptedLayer) -> dict[str, Tensor]:
    own = getattr(layer.adapter, "file_tensors", None)
    found: dict[str, Tensor] = layer.adapter.state_dict() if own is None else own()
    scale = getattr(layer.adapter, dora.KEY, None)
    return found if scale is None else found | {dora.KEY: scale}


def create(
    model: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    settings: NetworkSettings,
    *,
    train: Collection[str] | None = None,
    generator: torch.Generator | None = None,
) -> Network:
    """New adapters for a model ({"unet": …, "text_encoder": …}), in float32 on the CPU, whose ΔW is 0.

    `train`: the modules to adapt (None: all). Each layer draws from numbers of its own, by the generator's first draw
    and the layer's name, so that it does not depend on what else is adapted. AdapterError if no layer is reached.
    """
    kind = settings.kind
    seed = int(torch.randint(2**62, (), generator=generator))
    modules = set(model) if train is None else set(train)
    if kind.parts is not None:
        modules &= kind.parts
    layers = []
    make = load_kind(kind).create
    with torch.random.fork_rng(devices=[]):
        for target in find_targets(model, parts, convolutions=settings.convolutions, only=modules):
            dim, alpha = settings.rank(conv=target.is_kernel, block=target.block)
            if dim == 0:
                continue
            name = file_name(target, kind)
            torch.default_generator.manual_seed(_seed(seed, name))
            asked = LayerSettings(
                dim, scaled_alpha(settings, dim, alpha), settings.dropout, settings.rank_dropout, settings.own
            )
            adapter = make(target.layer, asked, target.module.weight)
            if adapter is None:
                continue
            if settings.use_dora:
                adapter.register_parameter(dora.KEY, nn.Parameter(dora.magnitude(target.module.weight)))
            layers.append(AdaptedLayer(target, name, adapter, kind, settings.module_dropout))
    if not layers:
        raise AdapterError(
            f"{kind.module} finds no layer to sit on in {', '.join(sorted(modules)) or 'what is to be trained'}",
            "Check block_dims and the *_lr_weight lists, and which of the U-Net and the text encoder is to be trained.",
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
    """The network that a file holds, in the file's precision; the kind is told for each layer by its tensors.

    `settings`: how it is to be trained, and then it is in float32 (dropouts, LoRA+, rates by block; ranks and alphas
    are the file's). `train`: the modules to adapt (None: all); what the file has for others is left out, and told by
    `describe`. Not `strict`: layers that do not fit are left out, and told in the network's `problems`.
    AdapterError that lists all that does not fit, and if nothing does.
    """
    found, problems = load_layers(model, parts, tensors, settings)
    layers = [layer for layer in found if train is None or layer.target.part.module in train]
    if strict or not layers:
        refuse(
            problems or ([] if layers else ["it has nothing for what is adapted"]), "the adapter does not fit the model"
        )
    network = Network(layers, settings or NetworkSettings(main_kind(layers)))
    network.problems = tuple(problems)
    network.left_out = len(found) - len(layers)
    return network if settings is None else network.float()


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
