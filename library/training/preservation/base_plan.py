"""Plan where the base model of a run is kept: what anchors compare with. No torch.

Under an adapter it is the model itself, switched off. A run that trains the model needs a second set of the weights
that it trains:

    accelerator   in float32, beside the model
    half          in half precision, beside the model; with mixed precision that is what the model computes with too
    cpu           in float32 in main memory; each layer's weights are copied to the accelerator when it computes
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from library.checkpoints.files import legacy_hash
from library.messages import listed, readable_bytes
from library.runtime.precision import BYTES, FloatName

if TYPE_CHECKING:
    from library.checkpoints.header import Header
    from library.options.groups.preservation import PreservationBase
    from library.runtime.device import Machine
    from library.training.plan.costs import Costs
    from library.training.plan.facts import RunFacts

Place = Literal["accelerator", "half", "cpu"]
_ROOM = 0.7  # share of the memory that weights may take, the rest is for activations


@dataclass(frozen=True)
class BasePlan:
    """The second set of weights of a run: the `modules` it has, where they are kept, their format and their bytes.
    `file`: a fingerprint of the base model, which a resumed run must have too. `reason`: why this place."""

    place: Place
    format: FloatName
    modules: tuple[str, ...]
    size: int
    file: str
    reason: str

    @property
    def on_accelerator(self) -> int:
        """Bytes in the memory of the device that computes."""
        return 0 if self.place == "cpu" else self.size

    def __str__(self) -> str:
        where = "in main memory, copied layer by layer for each pass" if self.place == "cpu" else "beside the model"
        size = f"{readable_bytes(self.size)} in {self.format} {where}"
        return f"a second set of weights of the {listed(self.modules)}, {size} ({self.reason})"


def decide_base(facts: RunFacts, trained: frozenset[str], costs: Costs) -> BasePlan | None:
    """The second set of weights of a run that trains these modules; None without anchors that need it.

    `costs`: those of the run without it.
    """
    if not facts.preservation.of_base:
        return None
    family, machine, mixed = facts.base_model.family, facts.machine, facts.precision.mixed_precision
    half: FloatName = "fp16" if mixed == "no" else mixed
    parameters = facts.base_model.sizes.total(trained)
    sizes = {place: parameters * BYTES[half if place == "half" else "fp32"] for place in get_args(Place)}
    place, reason = _choose(facts.options.preservation.preservation_base, sizes, costs.training, machine, mixed)
    return BasePlan(
        place=place,
        format=half if place == "half" else "fp32",
        modules=tuple(title for name, title in family.module_titles.items() if name in trained),
        size=sizes[place],
        file=fingerprint_of(facts.base_model.header),
        reason=reason,
    )


def _choose(
    asked: PreservationBase, sizes: dict[Place, int], others: int, machine: Machine, mixed: str
) -> tuple[Place, str]:
    """The place, and why. `others`: bytes of everything else on the device."""
    memory = machine.system_memory_bytes if machine.is_cpu else machine.memory_bytes
    texts = [f"{place} takes {readable_bytes(size)}" for place, size in sizes.items() if place != "cpu"]
    costs = f"{', '.join(texts)}, cpu none on an accelerator and more time"
    if asked == "cpu" and machine.is_cpu:
        return "accelerator", f"--preservation_base cpu: the run computes in main memory anyway; {costs}"
    if asked != "auto":
        return asked, f"--preservation_base; {costs}"
    if mixed != "no":
        return "half", f"auto: the model computes in {mixed} too; {costs}"
    for place in ("accelerator", "half"):
        if memory is None or others + sizes[place] <= _ROOM * memory:
            return place, f"auto: there is room; {costs}"
    return "half" if machine.is_cpu else "cpu", f"auto: there is little room beside {readable_bytes(others)}; {costs}"


def fingerprint_of(header: Header) -> str:
    """Tells models of one kind apart by a part of each file."""
    files = sorted({place.file for place in header.places.values()} or {header.path})
    parts = [f"{Path(file).name} {Path(file).stat().st_size} {legacy_hash(file)}" for file in files]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
