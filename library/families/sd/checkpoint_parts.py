"""Split a Stable Diffusion checkpoint into its modules, with lazy tensors under diffusers' and transformers' names.
Loading, converting and the plan start here. No torch at module level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints import sd_layout
from library.checkpoints.files import TensorReader
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.prediction_marks import DeclaredPrediction, declared_prediction, other_schedule
from library.checkpoints.vae_file import read_vae
from library.families.sd.configs import Configs, read_configs
from library.messages import listed, quoted

if TYPE_CHECKING:
    from library.families.family import Family
    from library.families.sd.variant import Variant
    from library.objective.process import Prediction


@dataclass(frozen=True)
class CheckpointParts:
    """`parts`: part -> name in the module -> tensor. `configs`: the arguments of each module. `kept`: other tensors of
    the file, under their names there. `prediction`: as chosen by the user, otherwise as the checkpoint declares."""

    parts: Mapping[str, Mapping[str, LazyTensor]]
    configs: Configs
    kept: Mapping[str, LazyTensor]
    notes: tuple[str, ...]
    prediction: Prediction
    zero_terminal_snr: bool


def split_checkpoint(
    family: Family,
    variant: Variant,
    reader: TensorReader,
    vae: Path | str | None = None,
    prediction: Prediction | None = None,
) -> CheckpointParts:
    """Split a checkpoint without reading tensors. `vae`: the file or folder of another VAE.

    Raises CheckpointError for another noise process, a missing part, an unknown key or sizes that do not fit.
    """
    source = reader.header
    declared = declared_prediction(source)
    _check_noise_process(family, source, declared)
    own_parts = tuple(part for part in variant.parts if part != "vae" or vae is None)
    split = sd_layout.to_diffusers(reader, variant.layout, own_parts)
    parts: dict[str, Mapping[str, LazyTensor]] = {**split.parts}
    notes = list(split.notes)
    vae_file = None if vae is None else read_vae(vae)
    if vae_file is not None:
        parts["vae"] = vae_file.tensors
        notes += [f"VAE from {vae}", *vae_file.notes]
    for text in variant.texts:
        parts[text.name] = {text.module_name(name): tensor for name, tensor in parts[text.name].items()}
    chosen: Prediction = prediction or declared.prediction or "epsilon"
    return CheckpointParts(
        parts=parts,
        configs=read_configs(variant, family, source, parts, chosen, foreign_vae=vae_file),
        kept=split.kept,
        notes=tuple(notes),
        prediction=chosen,
        zero_terminal_snr=bool(declared.zero_terminal_snr),
    )


def _check_noise_process(family: Family, source: Header, declared: DeclaredPrediction) -> None:
    """Raise CheckpointError if a checkpoint declares another noise process than the family's: training, drawing and
    saving as epsilon would ruin the model, or what its file says."""
    said = other_noise(family, source)
    if said:
        where = declared.where or "its scheduler_config.json"
        raise CheckpointError(
            f"{source.path}: says {listed(said)} ({where}). Supported are epsilon and v with the noise schedule that "
            f"{family.title} was made with. Give such a model; if the file says it wrongly, correct it: python "
            f"tools/convert_checkpoint.py {quoted(source.path)} TARGET --prediction_type epsilon (or v)"
        )


def other_noise(family: Family, source: Header) -> list[str]:
    """Return quotes of what a checkpoint declares of its noise process that is not the family's."""
    schedule = other_schedule(source, family.process.scheduler_arguments())
    return [*declared_prediction(source).unknown, *schedule]
