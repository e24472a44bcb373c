"""The optimizer's parameter groups of a network, in kohya's order and with kohya's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from library.checkpoints.adapter_key_names import AdapterPart
from networks.adapted_layer import AdaptedLayer
from networks.adapter import AdapterError
from networks.settings import NetworkSettings


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate. `name`: the group of the model ("unet", "text_encoder1"); `description`: the
    name in logs ("textencoder", "textencoder 2", "unet_block4 plus")."""

    name: str
    description: str
    parameters: list[nn.Parameter]
    learning_rate: float


def parameter_groups(
    layers: Iterable[AdaptedLayer], rates: Mapping[str, float], settings: NetworkSettings
) -> list[Group]:
    """Groups by part of the model, by block if blocks have factors, each with its LoRA+ group (arXiv 2402.12354) after
    it. A part or block with a learning rate of 0 or none has no group. AdapterError if there is no group."""
    buckets: dict[tuple[str, str], list[AdaptedLayer]] = {}
    weights = settings.block_weights
    for layer in layers:
        part, block = layer.target.part, layer.target.block if weights is not None else None
        title = _title(part)
        buckets.setdefault((part.group, title if block is None else f"{title}_block{block}"), []).append(layer)
    groups = []
    for (name, title), members in buckets.items():
        target = members[0].target
        block = target.block
        factor = 1.0 if weights is None or block is None else weights[block]
        groups += _with_loraplus(
            name, title, members, (rates.get(name) or 0.0) * factor, settings.ratio(target.part.module)
        )
    groups = [group for group in groups if group.learning_rate and group.parameters]
    if not groups:
        raise AdapterError(
            "no adapter has a learning rate above 0", "set --learning_rate, --unet_lr or --text_encoder_lr"
        )
    return groups


def _title(part: AdapterPart) -> str:
    """The name in logs: kohya's "textencoder", with the number in its prefix if there are several."""
    if not part.group.startswith("text_encoder"):
        return part.group
    number = part.prefix.lstrip("abcdefghijklmnopqrstuvwxyz_")
    return f"textencoder {number}" if number else "textencoder"


def _with_loraplus(
    name: str, title: str, layers: Sequence[AdaptedLayer], rate: float, ratio: float | None
) -> list[Group]:
    usual: list[nn.Parameter] = []
    faster: list[nn.Parameter] = []
    for layer in layers:
        plus = layer.kind.lora_plus if ratio is not None else frozenset()
        for key, parameter in layer.adapter.named_parameters():
            if parameter.requires_grad:
                (faster if any(key == mark or key.startswith(f"{mark}.") for mark in plus) else usual).append(parameter)
    return [Group(name, title, usual, rate), Group(name, f"{title} plus", faster, rate * (ratio or 0.0))]
