"""All options of training as one record of groups, and all flags by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from library.options.flag import Flag, flags_of
from library.options.groups.adapter import AdapterOptions
from library.options.groups.averaging import AveragingOptions
from library.options.groups.cache import CacheOptions
from library.options.groups.caption import CaptionOptions
from library.options.groups.compilation import CompileOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.deepspeed import DeepSpeedOptions
from library.options.groups.evaluation import EvaluationOptions
from library.options.groups.hub import HubOptions
from library.options.groups.mask import MaskOptions
from library.options.groups.memory import MemoryOptions
from library.options.groups.model import ModelOptions
from library.options.groups.objective import ObjectiveOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.preservation import PreservationOptions
from library.options.groups.preview import PreviewOptions
from library.options.groups.processes import ProcessOptions
from library.options.groups.quantisation import QuantisationOptions
from library.options.groups.rollout import RolloutOptions
from library.options.groups.run import RunOptions
from library.options.groups.saving import SavingOptions
from library.options.groups.validation import ValidationOptions


@dataclass(frozen=True)
class TrainOptions:
    """All options of training. A flag of one kind of training (Flag.script) has its default in the others."""

    model: ModelOptions = field(default_factory=ModelOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    caption: CaptionOptions = field(default_factory=CaptionOptions)
    mask: MaskOptions = field(default_factory=MaskOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    preservation: PreservationOptions = field(default_factory=PreservationOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    averaging: AveragingOptions = field(default_factory=AveragingOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    compilation: CompileOptions = field(default_factory=CompileOptions)
    quantisation: QuantisationOptions = field(default_factory=QuantisationOptions)
    saving: SavingOptions = field(default_factory=SavingOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    preview: PreviewOptions = field(default_factory=PreviewOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    processes: ProcessOptions = field(default_factory=ProcessOptions)
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)
    run: RunOptions = field(default_factory=RunOptions)


# Attribute of TrainOptions -> its dataclass, in the order of help and documentation.
GROUPS: Mapping[str, type[Any]] = MappingProxyType(
    {group.name: cast("type[Any]", group.default_factory) for group in dataclasses.fields(TrainOptions)}
)

FLAGS: Mapping[str, Flag] = MappingProxyType(
    {flag.name: flag for name, options in GROUPS.items() for flag in flags_of(name, options)}
)


def build(values: Mapping[str, object]) -> TrainOptions:
    """Build TrainOptions from flag name -> value; flags that `values` lacks get their default."""
    groups: dict[str, Any] = {}
    for name, options in GROUPS.items():
        own = {field.name: values[field.name] for field in dataclasses.fields(options) if field.name in values}
        groups[name] = options(**own)
    return TrainOptions(**groups)


def values_of(options: TrainOptions) -> dict[str, object]:
    """Flag name -> value in the order of the groups; the inverse of build."""
    return {name: getattr(getattr(options, flag.group), name) for name, flag in FLAGS.items()}
