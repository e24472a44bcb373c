"""Models for the tools that need one: opened by their header, loaded by their family. No torch at module level."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.checkpoints.header import CheckpointError, Header
from library.families.family import Family, Model
from library.families.registry import FAMILIES, declared_prediction, open_model
from library.options.flag import Capability
from library.options.mistakes import Mistakes
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
    """The models that flags name, by flag. Raises UserError with every mistake: no model, other kinds than --v2 and
    --sdxl say, kinds that differ."""
    mistakes = Mistakes()
    opened: list[Opened] = []
    for flag, name in named.items():
        try:
            header, family = open_model(name)
        except CheckpointError as error:
            mistakes.add(f"--{flag}: {error}")
            continue
        opened.append(Opened(header, family, "v" if v_parameterization else declared_prediction(header).prediction))
        claims: tuple[tuple[str, bool, Capability], ...] = (("v2", v2, "v2"), ("sdxl", sdxl, "size_conditioning"))
        for word, given, capability in claims:
            if given and capability not in family.capabilities:
                remedy = f"leave --{word} out, or give the model you mean"
                mistakes.add(f"--{word}, but {name} is {family.title}", remedy)
    if any(each.family is not opened[0].family for each in opened):
        what = ", ".join(f"{each.header.path} is {each.family.title}" for each in opened)
        mistakes.add(f"the models differ in kind: {what}", "give two models of one kind")
    mistakes.raise_if_any()
    return opened


def load(opened: Opened, dtype: torch.dtype | None = None, only: Collection[str] | None = None) -> Model:
    """The model, or some of its modules, on the CPU; float32 unless told otherwise. Raises UserError."""
    quiet_libraries()
    with explain_write_errors():
        return opened.family.load(opened.header, dtype=dtype, only=only, prediction=opened.prediction)


def adapted_modules(model: Model) -> dict[str, nn.Module]:
    """The modules of a model that adapters sit in, by name."""
    names = {part.module for part in model.family.adapters}
    return {name: module for name, module in model.modules().items() if name in names}


def lora_facts(base_version: str, prediction: Prediction | None = None) -> dict[str, str]:
    """What modelspec says of a LoRA for a kind of model, by ss_base_model_version; nothing for an unknown one.

    `prediction`: what the model is known to predict, where the version does not tell (SDXL's is the same for both).
    """
    from library.checkpoints.metadata import IMPLEMENTATIONS

    family = next((each for each in FAMILIES if base_version in each.versions.values()), None)
    if family is None:
        return {}
    told = [each for each, version in family.versions.items() if version == base_version]
    known = prediction or (told[0] if len(told) == 1 else None)
    width, height = family.preview[known or "epsilon"]
    facts = {
        "architecture": f"{family.architectures[known or 'epsilon']}/lora",
        "implementation": IMPLEMENTATIONS[family.adapter_names],
        "resolution": f"{width}x{height}",
    }
    return facts | ({"prediction_type": known} if known else {})


def coarsest(*models: Opened) -> torch.dtype:
    """The coarsest format among the numbers of models' files; weights that are equal in it differ by rounding alone."""
    from library.runtime.precision import torch_dtype

    found = {info.dtype for each in models for info in each.header.tensors.values()}
    return torch_dtype("bf16" if "BF16" in found else "fp16" if "F16" in found else "float")


def merged_metadata(opened: Opened, title: str, merged: Sequence[str]) -> dict[str, str]:
    """The metadata of a model that something was merged into: its own, with a title, a date and what it is made of.

    Where the model does not tell what it predicts, they do not either: a wrong word would be believed later.
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
    made = {"modelspec.title", "modelspec.date", "modelspec.merged_from"}
    if opened.prediction is not None:  # --v_parameterization beats what the source says
        made |= {"modelspec.prediction_type", "modelspec.architecture"}
    return spec | before | {key: spec[key] for key in made}
