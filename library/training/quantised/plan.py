"""Which weights of the base model are stored quantised, in which format, and what that saves. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.messages import counted, pip_install, readable_bytes
from library.options.groups.quantisation import NO_CHANGE, QuantisationOptions
from library.options.mistakes import Mistakes
from library.options.packages import installed_version
from library.training.quantised.formats import FORMATS, Format

if TYPE_CHECKING:
    from library.families.family import Family, PartSizes
    from library.runtime.device import Machine

Shape = tuple[int, ...]


@dataclass(frozen=True)
class QuantisedModule:
    """One module of the base model: its weights that are quantised, by name, with their shapes, and the number of
    others in it."""

    title: str
    format: Format
    weights: Mapping[str, Shape]
    left: int

    @property
    def values(self) -> int:
        """Number of quantised values."""
        return sum(math.prod(shape) for shape in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised weights."""
        return sum(self.format.nbytes(shape) for shape in self.weights.values())


@dataclass(frozen=True)
class Quantisation:
    """The modules of the base model that are stored quantised, by name.

    `probe`: list the layers that change most, before the first step (--quantise_probe).
    """

    modules: Mapping[str, QuantisedModule]
    probe: bool = False

    def format_of(self, module: str, name: str) -> Format | None:
        """The format of a weight; None if it is stored as usual."""
        chosen = self.modules.get(module)
        return chosen.format if chosen is not None and name in chosen.weights else None

    def bytes_saved(self, bytes_per_value: int) -> int:
        """Memory saved, where a value would otherwise take this many bytes."""
        return sum(module.values * bytes_per_value - module.nbytes for module in self.modules.values())

    def lines(self, bytes_per_value: int) -> Iterator[str]:
        """What the plan says: formats, memory before and after, and what is left as it is."""
        for module in self.modules.values():
            before = readable_bytes(module.values * bytes_per_value)
            yield (
                f"{module.title} quantised to {module.format.title}: {counted(len(module.weights), 'weight')} in "
                f"{readable_bytes(module.nbytes)} instead of {before}; {module.left} left as they are"
            )


def decide_quantisation(
    options: QuantisationOptions, family: Family, sizes: PartSizes, machine: Machine, mistakes: Mistakes
) -> Quantisation | None:
    """The quantisation of a run; None without. Mistakes: a package that is not installed, a device that lacks the
    format, a text encoder that the model does not have."""
    names = _names(options, family, mistakes)
    modules = {module: quantised_module(family, sizes, module, FORMATS[name]) for module, name in names.items()}
    for name, format_ in dict.fromkeys((name, FORMATS[name]) for name in names.values()):
        check_format(name, format_, machine, mistakes)
    return Quantisation(modules, options.quantise_probe) if modules else None


def _names(options: QuantisationOptions, family: Family, mistakes: Mistakes) -> dict[str, str]:
    """The name of the format of each quantised module."""
    by_fp8 = "fp8" if options.fp8_base or options.fp8_base_unet else NO_CHANGE
    texts_by_fp8 = "fp8" if options.fp8_base and not options.fp8_base_unet else NO_CHANGE
    given = (options.text_encoder_1_precision, options.text_encoder_2_precision, options.text_encoder_3_precision)
    own = options.base_model_precision
    names = {family.backbone: by_fp8 if own == NO_CHANGE else own}
    for number, name in enumerate(given):
        if number < len(family.text_encoders):
            names[family.text_encoders[number]] = name or texts_by_fp8
        elif name not in (None, NO_CHANGE):
            count = counted(len(family.text_encoders), "text encoder")
            mistakes.add(
                f"--text_encoder_{number + 1}_precision {name}: {family.title} has {count}",
                f"remove --text_encoder_{number + 1}_precision",
            )
    return {module: name for module, name in names.items() if name != NO_CHANGE}


def quantised_module(family: Family, sizes: PartSizes, module: str, chosen: Format) -> QuantisedModule:
    """A module of the model whose weights are stored in a format, where they can be."""
    left_alone = [re.compile(pattern) for pattern in family.not_quantised[module]]
    shapes = sizes.shapes[module]
    weights = {
        name: shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and chosen.fits(shape) and not any(pattern.match(name) for pattern in left_alone)
    }
    others = sum(name.endswith(".weight") for name in shapes) - len(weights)
    return QuantisedModule(family.module_titles[module], chosen, weights, others)


def check_format(name: str, chosen: Format, machine: Machine, mistakes: Mistakes) -> None:
    """Add a mistake if the package of a format is not installed, or the machine lacks the format."""
    if installed_version(chosen.backend.title) is None:
        mistakes.add(
            f"the format {name} needs the package {chosen.backend.title}, which is not installed",
            pip_install(chosen.backend.requirement),
        )
    if machine.kind not in chosen.devices:
        mistakes.add(
            f"the format {name} cannot be used on this machine ({machine.name})", "use int8, which every machine has"
        )
