"""The adapter of a run in words: its kind, strength and variants, and the layers that it reaches. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from library.families.family import Family
from library.messages import counted
from library.training.adapter.plan import AdapterPlan
from networks.planned import PlannedLayer
from networks.settings import variants


def lines(adapter: AdapterPlan) -> Iterator[str]:
    """The lines of the plan about the adapter itself."""
    settings = adapter.settings
    arguments = f" ({' '.join(f'{name}={value}' for name, value in adapter.arguments.items())})"
    yield f"adapter: {adapter.module}{_size(adapter)}{arguments if adapter.arguments else ''}"
    if settings is not None and (on := variants(settings, alphas=adapter.weights is None)):
        yield f"with {', '.join(on)}"
    if adapter.weights is not None:
        scaled = settings is not None and settings.kind.is_scaled
        brought = ", with its ranks and alphas" if adapter.from_file else ", with its alphas" if scaled else ""
        yield f"initial weights from {adapter.weights}{brought}"
    for path, multiplier in adapter.base:
        yield f"merged into the base model: {path}, multiplier {multiplier:g}"


def _size(adapter: AdapterPlan) -> str:
    settings = adapter.settings
    if settings is None or adapter.from_file or not settings.kind.has_dim:
        return ""
    if not settings.kind.is_scaled:
        return f", dim {settings.dim}, alpha {settings.alpha or settings.dim:g}"
    if adapter.weights is not None:
        return f", rank {settings.dim}"
    alpha = settings.alpha or settings.dim
    return f", rank {settings.dim}, alpha {alpha:g} (scale {settings.scale:.3g})"


def reached(adapter: AdapterPlan, family: Family, rates: Mapping[str, float]) -> Iterator[str]:
    """A line for each module: its layers and parameters with their learning rate, or why it has none."""
    for name, title in family.module_titles.items():
        layers = [one for one in adapter.layers or () if one.part.module == name]
        if layers and name in rates:
            yield f"{title}: {_counted(layers, adapter)}, learning rate {rates[name]:g}"
        elif name in adapter.out_of_reach and adapter.from_file:
            yield f"{title} not trained: the file has no adapters for it"
        elif name in adapter.out_of_reach:
            yield f"{title} not trained: {adapter.module} does not reach it"
        else:
            yield f"{title} not trained"


def _counted(layers: list[PlannedLayer], adapter: AdapterPlan) -> str:
    settings = adapter.settings
    assert settings is not None  # planned layers have settings
    trained = sum(one.trained(settings) for one in layers)
    return f"{counted(len(layers), 'layer')} with {trained:,} parameters"
