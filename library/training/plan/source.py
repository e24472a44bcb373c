"""Which model is trained: the checkpoint, its family and what its output means, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header
from library.families.family import Family, PartSizes, Tokenizer
from library.families.registry import detect, find_model, noted_prediction
from library.objective.process import Prediction
from library.options.mistakes import Mistakes
from library.options.model import ModelOptions
from library.options.recipes import FLAGS


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run starts from. `vae` is the file or folder of --vae; `tokenizer` is the family's, or the
    folder's own."""

    header: Header
    family: Family
    prediction: Prediction
    vae: Path | None
    sizes: PartSizes
    tokenizer: Tokenizer


def decide_source(options: ModelOptions, given: Collection[str], mistakes: Mistakes, notes: list[str]) -> Source | None:
    """Read the header and recognise the family. None when there is no usable checkpoint; the mistakes say why."""
    if not options.pretrained_model_name_or_path:
        return None  # the options' own rules say that it is required
    try:
        header = read_header(find_model(options.pretrained_model_name_or_path))
        family = detect(header)
        vae = None if not options.vae else find_model(options.vae)
        sizes = family.sizes(header, vae)
        tokenizer = family.tokenizer(header, options.tokenizer_cache_dir)
    except (CheckpointError, OSError) as error:
        mistakes.add(str(error))
        return None
    check_capabilities(family, given, mistakes)
    check_family_flags(options, family, mistakes, notes)
    prediction: Prediction = "v" if options.v_parameterization else "epsilon"
    noted = noted_prediction(header)
    if noted is not None and noted != prediction:
        notes.append(
            f"the checkpoint says that it predicts {noted}; this run trains {prediction} "
            f"({'leave out' if prediction == 'v' else 'give'} --v_parameterization to follow the checkpoint)"
        )
    return Source(header, family, prediction, vae, sizes, tokenizer)


def check_capabilities(family: Family, given: Collection[str], mistakes: Mistakes) -> None:
    """Refuse the flags that the user set and the family has no use for."""
    for name in sorted(given):
        needs = FLAGS[name].needs
        if needs is not None and needs not in family.capabilities:
            mistakes.add(f"--{name} has no meaning for {family.title}", "leave it out")


def check_family_flags(options: ModelOptions, family: Family, mistakes: Mistakes, notes: list[str]) -> None:
    """--v2 must agree with what the file is; the file itself decides."""
    is_v2 = family.name == "sd2"
    if options.v2 and not is_v2:
        what = f"--v2, but {options.pretrained_model_name_or_path} is {family.title}"
        mistakes.add(what, "leave --v2 out, or give the model you mean")
    if is_v2 and not options.v2:
        notes.append(f"the model is {family.title}: trained as with --v2")
    if options.v_parameterization and not is_v2:
        notes.append("--v_parameterization with Stable Diffusion 1.x: only models that were made for it predict v")
    if is_v2 and options.clip_skip is not None:
        notes.append(
            "--clip_skip with Stable Diffusion 2.x, which takes the penultimate layer already: counted from there"
        )
