"""Open and load models for the LoRA tools. No torch at module level."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.checkpoints.header import CheckpointError, Header
from library.families.family import Family, Model
from library.families.registry import FAMILIES, declared_prediction, open_model
from library.messages import counted, listed
from library.options.flag import Capability
from library.options.mistakes import Mistake, Mistakes, UserError
from library.runtime.imports import quiet_libraries
from tools.lora_files import explain_write_errors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.objective.process import Prediction


@dataclass(frozen=True)
class Opened:
    """A model of which only the header was read. `prediction` None: neither the file nor the user declares it."""

    header: Header
    family: Family
    prediction: Prediction | None


def open_models(
    named: Mapping[str, str], *, v2: bool = False, sdxl: bool = False, v_parameterization: bool = False
) -> list[Opened]:
    """Open the models given as {flag: name}. Raises UserError with every mistake: not a model, not of the kind that
    --v2 or --sdxl claims, models of different kinds or prediction types."""
    mistakes = Mistakes()
    opened: list[Opened] = []
    for flag, name in named.items():
        try:
            header, family = open_model(name)
            family.sizes(header)
        except CheckpointError as error:
            mistakes.add(f"--{flag}: {error}")
            continue
        opened.append(Opened(header, family, "v" if v_parameterization else declared_prediction(header).prediction))
        claims: tuple[tuple[str, bool, Capability], ...] = (("v2", v2, "v2"), ("sdxl", sdxl, "size_conditioning"))
        for claim, is_set, capability in claims:
            if is_set and capability not in family.capabilities:
                mistakes.add(f"--{claim}, but {name} is {family.title}", f"remove --{claim}, or give another model")
    if any(each.family is not opened[0].family for each in opened):
        what = ", ".join(f"{each.header.path} is {each.family.title}" for each in opened)
        mistakes.add(f"the models differ in kind: {what}", "give two models of the same kind")
    declared = {str(each.header.path): declared_prediction(each.header).prediction for each in opened}
    if len({*declared.values()} - {None}) > 1:
        what = ", ".join(f"{path}: {prediction or 'not declared'}" for path, prediction in declared.items())
        mistakes.add(
            f"the models have different prediction types, so their difference is no LoRA for either ({what})",
            "give models with the same prediction type; correct a wrong declaration with tools/convert_checkpoint.py "
            "--prediction_type",
        )
    mistakes.raise_if_any()
    return opened


def load(opened: Opened, dtype: torch.dtype | None = None, only: Collection[str] | None = None) -> Model:
    """Load the model, or only some of its modules, on the CPU; `dtype` None: float32. Raises UserError, also for NaN or
    infinite weights."""
    quiet_libraries()
    with explain_write_errors():
        model = opened.family.load(opened.header, dtype=dtype, only=only, prediction=opened.prediction)
    if model.broken:
        what = f"{opened.header.path}: NaN or infinite values in {counted(len(model.broken), 'tensor')}"
        raise UserError([Mistake(f"{what}: {listed(model.broken)}", "get the model again")])
    return model


def adapted_modules(model: Model) -> dict[str, nn.Module]:
    """Return the modules of a model that adapters apply to, by name."""
    names = {part.module for part in model.family.adapters}
    return {name: module for name, module in model.modules().items() if name in names}


def lora_facts(base_version: str, prediction: Prediction | None = None) -> dict[str, str]:
    """Return the modelspec values of a LoRA, by the ss_base_model_version of its model; {} for an unknown version.

    `prediction`: the model's prediction type, if known; not every version implies it (SDXL's does not).
    """
    from library.checkpoints.metadata import IMPLEMENTATIONS

    family = next((each for each in FAMILIES if base_version in each.versions.values()), None)
    if family is None:
        return {}
    implied = [each for each, version in family.versions.items() if version == base_version]
    known = prediction or (implied[0] if len(implied) == 1 else None)
    width, height = family.preview[known or "epsilon"]
    facts = {
        "architecture": f"{family.architectures[known or 'epsilon']}/lora",
        "implementation": IMPLEMENTATIONS[family.adapter_names],
        "resolution": f"{width}x{height}",
    }
    return facts | ({"prediction_type": known} if known else {})


def lowest_precision(*models: Opened) -> torch.dtype:
    """Return the lowest-precision dtype in the models' files; weights equal in it differ only by rounding."""
    from library.runtime.precision import torch_dtype

    found = {info.dtype for each in models for info in each.header.tensors.values()}
    return torch_dtype("bf16" if "BF16" in found else "fp16" if "F16" in found else "float")


def merged_metadata(opened: Opened, title: str, merged: Sequence[str]) -> dict[str, str]:
    """Return the metadata of a merged model: the source's own, with a new title, date and modelspec.merged_from.

    If the source does not declare its prediction type, neither does the result: a wrong value would be trusted later.
    """
    from library.checkpoints.metadata import build_modelspec
    from library.training.saving.model_file import time_of_saving
    from networks.arithmetic.result_metadata import title_of, without_hashes

    family, source = opened.family, opened.header
    prediction: Prediction = opened.prediction or "epsilon"
    before = without_hashes(source.metadata) if source.kind == "safetensors" else {}
    name = source.path.stem if source.path.is_file() else source.path.name
    spec = build_modelspec(
        architecture=family.architectures[prediction],
        title=title,
        made_at=time_of_saving(),
        resolution=family.preview[prediction],
        prediction=prediction,
        user_fields={"merged_from": ", ".join([title_of(before, name), *merged])},
    )
    if opened.prediction is None:
        for key in ("prediction_type", "architecture", "resolution"):
            del spec[f"modelspec.{key}"]
        if len(names := set(family.architectures.values())) == 1:
            spec["modelspec.architecture"] = names.pop()
    replaced = {"modelspec.title", "modelspec.date", "modelspec.merged_from"}
    if opened.prediction is not None:  # --v_parameterization overrides what the source declares
        replaced |= {"modelspec.prediction_type", "modelspec.architecture"}
    return spec | before | {key: spec[key] for key in replaced}
