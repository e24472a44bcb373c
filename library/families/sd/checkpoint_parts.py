"""A Stable Diffusion checkpoint taken apart: its parts by the names of diffusers' and transformers' modules, unread,
and what they are. Loading, converting and the plan begin with this. No torch at module level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints import sd_layout
from library.checkpoints.files import TensorReader
from library.checkpoints.lazy import LazyTensor
from library.checkpoints.prediction_marks import declared_prediction
from library.checkpoints.vae_file import read_vae
from library.families.sd.configs import Configs, read_configs

if TYPE_CHECKING:
    from library.families.family import Family
    from library.families.sd.variant import Variant
    from library.objective.process import Prediction


@dataclass(frozen=True)
class CheckpointParts:
    """`parts`: part -> name in the module -> tensor; `configs`: the arguments of each module; `kept`: what else the
    file holds, by its names there; `prediction` and `zero_terminal_snr` as asked for, else as the checkpoint says."""

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
    """What a checkpoint holds; nothing of it is read. `vae`: the file or folder of another VAE.

    CheckpointError: a missing part, a key without a place, sizes that do not fit.
    """
    source = reader.header
    wanted = tuple(part for part in variant.parts if part != "vae" or vae is None)
    split = sd_layout.to_diffusers(reader, variant.layout, wanted)
    parts: dict[str, Mapping[str, LazyTensor]] = {**split.parts}
    notes = list(split.notes)
    if vae is not None:
        alone = read_vae(vae)
        parts["vae"] = alone.tensors
        notes += [f"VAE from {vae}", *alone.notes]
    for text in variant.texts:
        parts[text.name] = {text.module_name(name): tensor for name, tensor in parts[text.name].items()}
    said = declared_prediction(source)
    meant: Prediction = prediction or said.prediction or "epsilon"
    return CheckpointParts(
        parts=parts,
        configs=read_configs(variant, family, source, parts, meant, foreign_vae=vae is not None),
        kept=split.kept,
        notes=tuple(notes),
        prediction=meant,
        zero_terminal_snr=bool(said.zero_terminal_snr),
    )
