"""The weights of a run on its device: their formats, bytes, and what of them is trained. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.footprint.module import AdapterShapes, FullDelta, LowRank, Module
from library.footprint.tape import FULL, Tape
from library.runtime.precision import BYTES

if TYPE_CHECKING:
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.learning_rates import Optimization
    from library.training.plan.facts import RunFacts

_NOT_TRAINED = ("alpha", "on_input")


@dataclass(frozen=True)
class WeightsOnDevice:
    """The weights of a run, module by module."""

    facts: RunFacts
    optimization: Optimization
    plan: AdapterPlan | None

    @cached_property
    def active(self) -> frozenset[str]:
        """The modules that gradients pass through."""
        own = self.optimization.learning_rates.modules if self.plan is None else self.plan.trained_modules
        backbone = self.facts.base_model.family.backbone
        return frozenset(own) if self.plan is None else frozenset(own) | ({backbone} if own else set())

    def bytes_of(self, module: str) -> int:
        """Bytes of a module on the device."""
        sizes, precision = self.facts.base_model.sizes, self.facts.precision
        count = sizes.parameters[module]
        if module == "vae":
            twice = self.facts.machine.is_cpu and precision.vae != "fp32"  # the exact ones, and those that compute
            return count * (BYTES[precision.vae] + (FULL if twice else 0))
        if self.plan is None:
            if module in self.active:
                return count * BYTES[precision.trained]
            twice = self.facts.machine.is_cpu and precision.frozen != "fp32"
            return count * (BYTES[precision.frozen] + (FULL if twice else 0))
        if self._is_whole(module):
            return self._base_bytes(module)
        return count * BYTES[precision.frozen]

    def _is_whole(self, module: str) -> bool:
        """Whether a frozen module stays as it was loaded: gradients pass through it, or it is quantised."""
        quantisation = self.facts.quantisation
        quantised = quantisation is not None and module in quantisation.modules
        backbone = self.facts.base_model.family.backbone
        return module in self.active or module == backbone or quantised or self.facts.precision.frozen == "fp32"

    def _base_bytes(self, module: str) -> int:
        """Bytes of a frozen module under an adapter, as it was loaded: matrices in the base format or quantised, the
        others in fp32, and the buffer that matrices are cast into."""
        width = BYTES[self.facts.precision.base]
        shapes = self.facts.base_model.sizes.shapes[module]
        matrices = sum(math.prod(shape) for shape in shapes.values() if len(shape) > 1)
        total = matrices * width + (sum(map(math.prod, shapes.values())) - matrices) * FULL
        quantisation = self.facts.quantisation
        packed = None if quantisation is None else quantisation.modules.get(module)
        if packed is not None:
            total -= packed.values * width - packed.nbytes
        stored = self._stored(module)
        largest = max((math.prod(shapes[name]) for name in stored), default=0)
        return total + largest * (FULL if self.facts.precision.mixed_precision == "no" else 2)

    def _stored(self, module: str) -> frozenset[str]:
        """Names of the matrices that are cast or unpacked for each use."""
        if self.plan is None or module == "vae":
            return frozenset()
        shapes = self.facts.base_model.sizes.shapes[module]
        quantisation = self.facts.quantisation
        packed = None if quantisation is None else quantisation.modules.get(module)
        found = set() if packed is None else set(packed.weights)
        if self.facts.precision.mixed_precision == "no" and self.facts.precision.base != "fp32":
            found |= {name for name, shape in shapes.items() if len(shape) > 1 and "position" not in name}
        return frozenset(found)

    def on_tape(self, module: str, tape: Tape) -> Module:
        """A module whose passes are to be recorded."""
        precision = self.facts.precision
        shapes = self.facts.base_model.sizes.shapes[module]
        trains = self.plan is None and module in self.active
        if module == "vae":
            width = BYTES[precision.vae]
        elif trains:
            width = BYTES[precision.trained]
        else:
            width = BYTES[precision.base if self.plan is not None else precision.frozen]
        return Module(
            tape,
            shapes,
            width=width,
            trains=trains,
            stored=self._stored(module),
            adapters=self._adapters.get(module, {}),
            checkpoints=self.facts.options.memory.gradient_checkpointing and module in self.active,
            trained=BYTES[precision.trained],
        )

    @cached_property
    def _adapters(self) -> Mapping[str, Mapping[str, AdapterShapes]]:
        """The adapters by module and path of the layer."""
        found: dict[str, dict[str, AdapterShapes]] = {}
        layers = (self.plan.layers if self.plan is not None else None) or ()
        by_name = {(one.part.module, one.layer.name): one.tensors for one in layers}
        for part in self.facts.base_model.family.adapters:
            for tensor in self.facts.base_model.sizes.shapes[part.module]:
                path = tensor.removesuffix(".weight")
                own = path.removeprefix(part.level)
                tensors = by_name.get((part.module, _name(part, own)))
                if path == tensor or tensors is None:
                    continue
                down, up = tensors.get("lora_down.weight"), tensors.get("lora_up.weight")
                factors = tuple(shape for name, shape in tensors.items() if name not in _NOT_TRAINED)
                shapes: AdapterShapes = FullDelta(factors) if down is None or up is None else LowRank(down, up)
                found.setdefault(part.module, {})[path] = shapes
        return found

    @cached_property
    def adapter(self) -> int:
        """Bytes of the adapter's weights."""
        saved = 0 if self.plan is None else self.plan.saved_values or 0
        return saved * BYTES[self.facts.precision.trained]

    @cached_property
    def trained_values(self) -> int:
        """Number of trained values."""
        if self.plan is not None:
            return self.plan.trained_parameters or 0
        base = self.facts.base_model
        return self.optimization.learning_rates.trained_values(base.sizes, base.family)

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained weights."""
        return self.trained_values * BYTES[self.facts.precision.trained]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of their gradients, which have their format."""
        return self.trained_bytes

    @cached_property
    def trained_shapes(self) -> Sequence[Sequence[int]]:
        """Shapes of the trained weights."""
        if self.plan is not None:
            return [shape for one in self.plan.layers or () for shape in one.tensors.values()]
        tensors = self.facts.base_model.sizes.shapes
        return [shape for name in self.active for shape in tensors[name].values()]

    @cached_property
    def largest_trained(self) -> int:
        """Number of values of the largest trained weight."""
        return max(map(math.prod, self.trained_shapes), default=0)


def _name(part: object, path: str) -> str:
    """A layer's name in files; empty for a path that has none."""
    try:
        name: str = part.name(path)  # type: ignore[attr-defined]
    except (ValueError, KeyError, IndexError):
        return ""
    return name
