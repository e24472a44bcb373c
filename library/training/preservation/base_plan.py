"""Plan where the base model of a run is kept: what anchors compare with. No torch.

Under an adapter it is the model itself, switched off. A run that trains the model needs a second set of the weights
that it trains:

    accelerator   in float32, beside the model
    half          in half precision, beside the model; with mixed precision that is what the model computes with too
    int8, nf4, …  quantised, beside the model (library/training/quantised): the least memory, and the largest error
    cpu           in float32 in main memory; each layer's weights are copied to the accelerator when it computes

or none, with `cached`: then it predicts before the first step, for a few fixed draws of each regularisation image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.checkpoints.files import legacy_hash
from library.messages import counted, listed, readable_bytes
from library.runtime.precision import BYTES, FloatName
from library.training.quantised.formats import FORMATS
from library.training.quantised.plan import Quantisation, check_format, quantised_module

if TYPE_CHECKING:
    from library.checkpoints.header import Header
    from library.options.groups.preservation import PreservationBase
    from library.options.mistakes import Mistakes
    from library.runtime.device import Machine
    from library.training.plan.costs import Costs
    from library.training.plan.facts import RunFacts

Place = Literal["accelerator", "half", "int8", "int4", "nf4", "fp8", "cpu", "cached"]
_ROOM = 0.7  # share of the memory that weights may take, the rest is for activations


@dataclass(frozen=True)
class BasePlan:
    """The second set of weights of a run: the `modules` it has, where they are kept, in which format, and their bytes.

    With a `quantisation`, `format` is that of the weights which it leaves alone; with the place cached, it is that of
    predictions in their stead. `file`: a fingerprint of the base model, which a resumed run must have too. `reason`:
    why this place.
    """

    place: Place
    format: FloatName
    quantisation: Quantisation | None
    modules: tuple[str, ...]
    size: int
    file: str
    reason: str

    @property
    def on_accelerator(self) -> int:
        """Bytes in the memory of the device that computes."""
        return 0 if self.place in ("cpu", "cached") else self.size

    def __str__(self) -> str:
        if self.place == "cached":
            return f"predictions made before the first step, {readable_bytes(self.size)} in main memory ({self.reason})"
        kinds = {module.format.title for module in self.quantisation.modules.values()} if self.quantisation else ()
        where = "in main memory, copied layer by layer for each pass" if self.place == "cpu" else "beside the model"
        size = f"{readable_bytes(self.size)} in {listed(kinds) or self.format} {where}"
        return f"a second set of weights of the {listed(self.modules)}, {size} ({self.reason})"


def decide_base(facts: RunFacts, trained: frozenset[str], costs: Costs, mistakes: Mistakes) -> BasePlan | None:
    """The second set of weights of a run that trains these modules; None without anchors that need it.

    `costs`: those of the run without it.
    """
    if not facts.preservation.of_base:
        return None
    family, mixed = facts.base_model.family, facts.precision.mixed_precision
    half: FloatName = "fp16" if mixed == "no" else mixed
    formats: dict[Place, FloatName] = {"accelerator": "fp32", "half": half, "cpu": "fp32"}
    parameters = facts.base_model.sizes.total(trained)
    sizes = {place: parameters * BYTES[each] for place, each in formats.items()}
    place, why = _choose(facts.options.preservation.preservation_base, sizes, costs.training, facts.machine, mixed)
    quantisation = _quantisation(place, facts, trained, mistakes) if place in FORMATS else None
    if quantisation is not None:
        sizes[place] = sizes["accelerator"] - quantisation.bytes_saved(BYTES["fp32"])
    if place == "cached":
        count, sizes[place] = _count_predictions(facts)
        uses = facts.preservation.reg_samples * facts.duration.epochs / max(1, count)
        why = f"--preservation_base: {counted(count, 'prediction')}, each used about {counted(round(uses, 1), 'time')}"
    others = ", ".join(f"{each} takes {readable_bytes(sizes[each])}" for each in ("accelerator", "half"))
    return BasePlan(
        place=place,
        format="fp16" if place == "cached" else formats.get(place, "fp32"),
        quantisation=quantisation,
        modules=tuple(title for name, title in family.module_titles.items() if name in trained),
        size=sizes[place],
        file=fingerprint_of(facts.base_model.header),
        reason=f"{why}; {others}, cpu none on an accelerator and more time",
    )


def _quantisation(name: str, facts: RunFacts, trained: frozenset[str], mistakes: Mistakes) -> Quantisation:
    """The trained modules in one of the quantised formats."""
    check_format(name, FORMATS[name], facts.machine, mistakes)
    family, sizes = facts.base_model.family, facts.base_model.sizes
    return Quantisation({module: quantised_module(family, sizes, module, FORMATS[name]) for module in sorted(trained)})


def _count_predictions(facts: RunFacts) -> tuple[int, int]:
    """Number and bytes of the predictions for the fixed draws of all regularisation images."""
    latent, count, size = facts.base_model.family.latent, 0, 0
    for record, placement in zip(facts.images.records, facts.images.table.placements, strict=True):
        width, height = placement.bucket
        if record.is_reg:
            draws = min(facts.preservation.fixed_draws, record.repeats * facts.duration.epochs)
            count += draws
            size += draws * latent.channels * (width // latent.stride) * (height // latent.stride) * BYTES["fp16"]
    return count, size


def _choose(
    asked: PreservationBase, sizes: dict[Place, int], others: int, machine: Machine, mixed: str
) -> tuple[Place, str]:
    """The place, and why. `others`: bytes of everything else on the device."""
    memory = machine.system_memory_bytes if machine.is_cpu else machine.memory_bytes
    if asked == "cpu" and machine.is_cpu:
        return "accelerator", "--preservation_base cpu: the run computes in main memory anyway"
    if asked != "auto":
        return asked, "--preservation_base"
    if mixed != "no":
        return "half", f"auto: the model computes in {mixed} too"
    places: tuple[Place, ...] = ("accelerator", "half")
    for place in places:
        if memory is None or others + sizes[place] <= _ROOM * memory:
            return place, "auto: there is room"
    return "half" if machine.is_cpu else "cpu", f"auto: there is little room beside {readable_bytes(others)}"


def fingerprint_of(header: Header) -> str:
    """Tells models of one kind apart by a part of each file."""
    files = sorted({place.file for place in header.places.values()} or {header.path})
    parts = [f"{Path(file).name} {Path(file).stat().st_size} {legacy_hash(file)}" for file in files]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
