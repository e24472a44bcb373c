"""Measure on one batch how much quantisation changes the outputs of the base model (--quantise_probe)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.messages import counted
from library.runtime.accelerator import forked_generators
from library.runtime.packed_weight import PackedWeight

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.families.family import Model
    from library.objective.loss import Term
    from library.training.quantised.plan import Quantisation

Losses = Callable[["Batch", int], Sequence["Term"]]
WORST = 10  # layers in the list


def with_probe(losses: Losses, model: Model, quantisation: Quantisation | None, say: Callable[[str], None]) -> Losses:
    """The losses of a run; with a probe, the first batch is also computed with the full weights, which are freed then.
    It changes nothing of the training."""
    if quantisation is None or not quantisation.probe:
        return losses
    layers = {
        f"{module_name}.{name}": layer
        for module_name, module in model.modules().items()
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "weight", None), PackedWeight)
    }
    return _Probe(losses, model.backbone, layers, say)


@dataclass
class _Probe:
    losses: Losses
    backbone: nn.Module
    layers: dict[str, nn.Module]
    say: Callable[[str], None]
    errors: dict[str, float] = field(default_factory=dict)

    def __call__(self, batch: Batch, step: int) -> Sequence[Term]:
        if not self.layers:
            return self.losses(batch, step)
        outputs: list[Tensor] = []
        hook = self.backbone.register_forward_hook(partial(_keep_output, outputs))
        with torch.no_grad(), forked_generators(), self._full_weights():
            self.losses(batch, step)
        expected = outputs[-1]  # a rollout, or the frozen base's prediction, come before
        with self._measuring():
            terms = self.losses(batch, step)
        hook.remove()
        for line in self._report(expected, outputs[-1]):
            self.say(line)
        for layer in self.layers.values():
            _packed(layer).full = None
        self.layers = {}
        return terms

    @contextmanager
    def _full_weights(self) -> Iterator[None]:
        packed = {name: _packed(layer) for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.weight = nn.Parameter(_full(packed[name]), requires_grad=False)
            yield
        finally:
            for name, layer in self.layers.items():
                layer.weight = packed[name]

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        hooks = [layer.register_forward_pre_hook(partial(self._measure, name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _measure(self, name: str, layer: Any, arguments: tuple[Tensor, ...]) -> None:
        """|(Ŵ - W) x| / |W x| of a layer for the input that it gets."""
        x = arguments[0].detach().float()
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            full = _full(layer.weight)
            change = _apply(layer, x, layer.weight.unpacked(torch.float32) - full).norm()
            self.errors[name] = float(change / _apply(layer, x, full).norm().clamp(min=1e-12))

    def _report(self, expected: Tensor, found: Tensor) -> Iterator[str]:
        whole = float((found - expected).norm() / expected.norm())
        errors = sorted(self.errors.items(), key=lambda item: -item[1])
        mean = sum(self.errors.values()) / max(1, len(errors))
        unused = len(self.layers) - len(errors)
        also = f"; {counted(unused, 'layer')} not used for this batch" if unused else ""
        yield f"quantise_probe: relative error of the prediction {whole:.2%}, of a layer's output {mean:.2%} on average"
        yield f"quantise_probe: the worst of {counted(len(errors), 'layer')}{also}:"
        yield from (f"  {error:7.2%}  {name}" for name, error in errors[:WORST])


def _keep_output(outputs: list[Tensor], _module: nn.Module, _arguments: Any, output: Any) -> None:
    first = output if isinstance(output, Tensor) else output[0]
    outputs.append(first.detach().float())


def _packed(layer: Any) -> PackedWeight:
    weight: PackedWeight = layer.weight
    return weight


def _full(weight: PackedWeight) -> Tensor:
    """The weight before it was quantised, in float32 on the device of the run."""
    if weight.full is None:
        raise RuntimeError("the full weights were not kept")
    return weight.full.to(weight.device, torch.float32)


def _apply(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight)
    result: Tensor = layer._conv_forward(x, weight, None)
    return result
