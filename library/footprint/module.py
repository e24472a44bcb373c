"""The layers of a module on a tape: what Linear, Conv2d, norms, attention and activations leave in memory, with the
adapters on them. One method per layer, by the operations that torch runs for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from library.footprint.tape import FULL, Operand, Shape, Tape, Tensor, Weight


@dataclass(frozen=True)
class LowRank:
    """An adapter that is computed beside its layer, through `down` (r, in, …) and `up` (out, r, …)."""

    down: Shape
    up: Shape


@dataclass(frozen=True)
class FullDelta:
    """An adapter whose ΔW, as large as the layer's weight, is formed in each forward pass. `factors`: its tensors."""

    factors: tuple[Shape, ...]


AdapterShapes = LowRank | FullDelta


@dataclass
class Module:
    """A module of the model. `tensors`: their shapes by name; `width`: bytes of a number of its weights; `trains`:
    whether its weights are trained; `stored`: names of weights that are cast or unpacked for each use, into a buffer
    that all share; `adapters`: by path of the layer, with `trained` bytes of a number of their weights; `checkpoints`:
    blocks are computed again in the backward pass, but those of the paths `not_again`.
    """

    tape: Tape
    tensors: Mapping[str, Shape]
    width: int = FULL
    trains: bool = False
    stored: Collection[str] = ()
    adapters: Mapping[str, AdapterShapes] = field(default_factory=dict)
    checkpoints: bool = False
    trained: int = FULL
    not_again: Collection[str] = ()
    _weights: dict[str, Weight] = field(default_factory=dict)

    def repeated(self, path: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """A block, which gradient checkpointing computes again in the backward pass."""
        if self.checkpoints and path not in self.not_again:
            return self.tape.checkpoint(function, *inputs)
        return function(*inputs)

    def has(self, name: str) -> bool:
        """Whether it has a tensor of this name."""
        return name in self.tensors

    def weight(self, name: str) -> Weight:
        """A weight by its name."""
        if name not in self._weights:
            self._weights[name] = Weight(self.tensors[name], self.width, needs=self.trains)
        return self._weights[name]

    def weights(self) -> list[Weight]:
        """All weights that were used, those of adapters too."""
        return list(self._weights.values())

    def linear(self, path: str, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        out = self.tensors[f"{path}.weight"][0]
        shape = (*x.shape[:-1], out)
        adapter = self.adapters.get(path)
        if isinstance(adapter, LowRank):
            return self._low_rank_linear(path, adapter, x, shape)
        x = self._input(x)
        if isinstance(adapter, FullDelta):
            return self._with_delta(path, adapter, x, shape)
        if f"{path}.weight" in self.stored:
            return self.tape.op([x], shape, x.width)
        weight = self.tape.cast(self.weight(f"{path}.weight"), x.width)
        keeps = [each for each, other in ((x, weight), (weight, x)) if other.needs]
        return self.tape.op([x, weight, *self._bias(path, x.width)], shape, x.width, keeps=keeps)

    def conv(self, path: str, x: Tensor, stride: int = 1) -> Tensor:
        """x (n, in, h, w) -> (n, out, h / stride, w / stride)."""
        weight_shape = self.tensors[f"{path}.weight"]
        size = tuple(-(-side // stride) for side in x.shape[2:])
        shape = (x.shape[0], weight_shape[0], *size)
        adapter = self.adapters.get(path)
        x = self._input(x)
        if isinstance(adapter, FullDelta):
            return self._with_delta(path, adapter, x, shape)
        if f"{path}.weight" in self.stored:
            out = self.tape.op([x], shape, x.width)
        else:
            weight = self.tape.cast(self.weight(f"{path}.weight"), x.width)
            out = self.tape.op([x, weight, *self._bias(path, x.width)], shape, x.width, keeps=[x, weight])
        if isinstance(adapter, LowRank):
            x = self._adapter_input(x)
            down, up = self._factors(path, adapter.down, adapter.up, width=x.width)
            ranks = self.tape.op([x, down], (shape[0], adapter.down[0], *size), x.width, keeps=[x, down])
            ranks = self.tape.op([ranks], ranks.shape, ranks.width)
            delta = self.tape.op([ranks, up], shape, x.width, keeps=[ranks, up])
            if delta.width == out.width:
                return self.tape.op([out, delta], shape, out.width, shares=True, view=True)
            out = self.narrowed(self.tape.op([out, delta], shape, FULL, shares=True), out.width)
        return out

    def norm(self, path: str, x: Tensor, groups: int = 1) -> Tensor:
        """GroupNorm or LayerNorm: autocast computes both in fp32 on CUDA."""
        wide = self.tape.compute is not None and self.tape.wide_norms
        x = self.narrowed(x, FULL) if wide else x
        rows = x.shape[0] * groups if len(x.shape) == 4 else math.prod(x.shape[:-1])
        parts = [self.weight(f"{path}.{name}") for name in ("weight", "bias")]
        return self.tape.op([x, *parts], x.shape, x.width, keeps=[x], keeps_more=2 * FULL * rows)

    def activation(self, x: Tensor) -> Tensor:
        """SiLU or GELU, which save their input."""
        return self.tape.op([x], x.shape, x.width, keeps=[x])

    def quick_gelu(self, x: Tensor) -> Tensor:
        """x sigmoid(1.702 x), as transformers writes it."""
        tape = self.tape
        scaled = tape.op([x], x.shape, x.width)
        gate = tape.op([scaled], x.shape, x.width, keeps_output=True)
        del scaled
        return tape.op([x, gate], x.shape, x.width, keeps=[x, gate])

    def gated_gelu(self, path: str, x: Tensor) -> Tensor:
        """GEGLU: half of a Linear's output times the GELU of the other half."""
        value, gate = self.tape.split(self.linear(path, x), 2)
        gate = self.tape.op([gate], gate.shape, gate.width, keeps=[gate])
        return self.tape.op([value, gate], value.shape, value.width, keeps=[value, gate])

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Scaled dot-product attention of (n, L, width) by a kernel that does not store the scores: the output and the
        sums of the softmax (n, heads, L) in fp32 are saved."""
        tape = self.tape
        sums = FULL * query.shape[0] * query.shape[1] * heads
        extra = tape.attention_extra * math.prod(query.shape)
        inputs: Sequence[Operand] = [query, key, value]
        return tape.op(
            inputs, query.shape, query.width, keeps=inputs, keeps_output=True, keeps_more=sums, backward_extra=extra
        )

    def copied(self, x: Tensor, shape: Shape) -> Tensor:
        """A copy in another order of the axes; the gradient is a view."""
        return self.tape.op([x], shape, x.width, shares=True)

    def scaled(self, x: Tensor) -> Tensor:
        """Times a number."""
        return self.tape.op([x], x.shape, x.width)

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """The sum, which may be broadcast over `other`."""
        return self.tape.op([x, other], x.shape, max(x.width, other.width), shares=True)

    def upsampled(self, x: Tensor) -> Tensor:
        """Twice as high and wide, the nearest value each."""
        shape = (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        return self.tape.op([x], shape, x.width)

    def embedded(self, path: str, ids: Tensor) -> Tensor:
        """Rows of an embedding."""
        weight = self.weight(f"{path}.weight")
        width = FULL if f"{path}.weight" in self.stored else weight.width
        return self.tape.op([weight], (*ids.shape, weight.shape[1]), width, keeps=[ids])

    def narrowed(self, x: Tensor, width: int) -> Tensor:
        """x in another format."""
        cast = self.tape.cast(x, width)
        assert isinstance(cast, Tensor)
        return cast

    def _input(self, x: Tensor) -> Tensor:
        """The input of a product, in autocast's format."""
        return x if self.tape.compute is None else self.narrowed(x, self.tape.compute)

    def _bias(self, path: str, width: int) -> list[Operand]:
        name = f"{path}.bias"
        return [self.tape.cast(self.weight(name), width)] if name in self.tensors else []

    def _adapter_input(self, x: Tensor) -> Tensor:
        return x if self.tape.compute is not None else self.narrowed(x, self.trained)

    def _factors(self, path: str, *shapes: Shape, width: int) -> list[Operand]:
        found = []
        for number, shape in enumerate(shapes):
            name = f"{path} adapter {number}"
            if name not in self._weights:
                self._weights[name] = Weight(shape, self.trained, needs=True)
            found.append(self.tape.cast(self._weights[name], width))
        return found

    def _low_rank_linear(self, path: str, adapter: LowRank, x: Tensor, shape: Shape) -> Tensor:
        """One operation with the base (networks/fused.py): it saves the input once, and the ranks."""
        x = self._input(x)
        down, up = self._factors(path, adapter.down, adapter.up, width=self.tape.compute or self.trained)
        ranks = math.prod(x.shape[:-1]) * adapter.down[0] * down.width
        return self.tape.op([x, down, up], shape, x.width, keeps=[x, down, up], keeps_more=ranks)

    def _with_delta(self, path: str, adapter: FullDelta, x: Tensor, shape: Shape) -> Tensor:
        """The layer with W + ΔW: the merged weight is saved, and ΔW's factors."""
        weight = self.tensors[f"{path}.weight"]
        factors = self._factors(path, *adapter.factors, width=self.trained)
        delta = self.tape.op(factors, weight, self.trained, keeps=factors)
        if self.width == self.trained and self.tape.compute is None and f"{path}.weight" not in self.stored:
            merged: Operand = self.tape.op([delta, self.weight(f"{path}.weight")], weight, self.trained, shares=True)
            return self.tape.op([x, merged], shape, x.width, keeps=[x, merged])
        merged = self.tape.cast(delta, x.width)
        base = self.tape.op([x], shape, x.width)
        beside = self.tape.op([x, merged], shape, x.width, keeps=[x, merged])
        return self.tape.op([base, beside], shape, x.width, shares=True)
