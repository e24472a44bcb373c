"""The base model of a run: checkpoint, family, prediction type and range of timesteps, decided from tensor names and
shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.vae_file import read_vae
from library.families.family import Family, PartSizes, Tokenizer
from library.families.registry import DeclaredPrediction, declared_prediction, detect, find_model
from library.messages import counted
from library.objective.process import Prediction
from library.options.groups.model import ModelOptions
from library.options.groups.objective import ObjectiveOptions
from library.options.mistakes import Mistakes
from library.options.train_options import FLAGS, TrainOptions, values_of


@dataclass(frozen=True)
class BaseModel:
    """The checkpoint that a run starts from.

    `prediction_reason`: where the prediction type comes from. `objective`: the options of the loss, limited to the
    family's range of timesteps, with the noise schedule that the checkpoint was made for. `vae`: the file or folder of
    --vae. `tokenizer`: the family's, or the folder's own, with the token settings of the run.
    """

    header: Header
    family: Family
    prediction: Prediction
    prediction_reason: str
    objective: ObjectiveOptions
    vae: Path | None
    sizes: PartSizes
    tokenizer: Tokenizer


def decide_base_model(all_options: TrainOptions, mistakes: Mistakes, notes: list[str]) -> BaseModel | None:
    """Read the header and detect the family. None, with mistakes added, if there is no usable checkpoint."""
    options, mistakes_before = all_options.model, len(mistakes)
    header = family = vae = None
    with collect_errors("pretrained_model_name_or_path", mistakes):
        if options.pretrained_model_name_or_path:  # if it is missing, the rules of the options report it
            header = read_header(find_model(options.pretrained_model_name_or_path))
            family = detect(header)
    with collect_errors("vae", mistakes):
        vae = find_model(options.vae) if options.vae else None
        if vae is not None and family is None:  # otherwise family.sizes reads it below
            read_vae(vae)
    if header is None or family is None or len(mistakes) > mistakes_before:
        return None
    with collect_errors("pretrained_model_name_or_path", mistakes, unless=("vae", vae)):
        sizes = family.sizes(header, vae)
    with collect_errors("tokenizer_cache_dir", mistakes):
        tokenizer = family.tokenizer(header, options.tokenizer_cache_dir).configured(
            max_tokens=options.max_token_length,
            padded=not options.no_token_padding,
            weighted=all_options.caption.weighted_captions,
        )
    if len(mistakes) > mistakes_before:
        return None
    check_capabilities(family, all_options, mistakes)
    check_family_flags(options, family, notes)
    check_clip_skip(options, family, sizes, mistakes)
    marks = declared_prediction(header)
    prediction, reason = decide_prediction(options, marks)
    drawn = all_options.preview.preview_refiner is not None
    objective = decide_objective(
        all_options.objective, family, marks, prediction, mistakes, notes, drawn_with_refiner=drawn
    )
    return BaseModel(header, family, prediction, reason, objective, vae, sizes, tokenizer)


def decide_prediction(options: ModelOptions, marks: DeclaredPrediction) -> tuple[Prediction, str]:
    """The prediction type of the network and the reason for it.

    A v-prediction mark in the checkpoint always wins: training for epsilon would ruin the model, and front-ends write
    v_parameterization = false whatever the model is.
    """
    if marks.prediction == "v":
        return "v", f"according to the checkpoint ({marks.where})"
    if options.v_parameterization:
        mark = f", although the checkpoint says epsilon ({marks.where})" if marks.prediction else ""
        return "v", f"set by --v_parameterization{mark}"
    if marks.prediction == "epsilon":
        return "epsilon", f"according to the checkpoint ({marks.where}); use --v_parameterization to train for v"
    return "epsilon", "assumed, the checkpoint does not say; use --v_parameterization if the model predicts v"


def decide_objective(
    options: ObjectiveOptions,
    family: Family,
    marks: DeclaredPrediction,
    prediction: Prediction,
    mistakes: Mistakes,
    notes: list[str],
    *,
    drawn_with_refiner: bool = False,
) -> ObjectiveOptions:
    """The options of the loss, with the timesteps and the noise schedule of this checkpoint.

    A refiner is trained at the last, least noisy timesteps; a base model that hands over to a refiner is trained at
    all others (arXiv 2307.01952, section 2.5).
    """
    strength, timesteps = options.refiner_training_strength, family.process.timesteps
    edge = int(round(timesteps * strength, 6))
    low, high = 0, timesteps
    if family.refines:
        high = edge
    elif options.refiner_training_invert_schedule:
        low = edge
    elif (
        strength != FLAGS["refiner_training_strength"].default
        and "hand_over" in family.capabilities
        and not drawn_with_refiner
    ):
        notes.append(
            f"--refiner_training_strength = {strength:g} has no effect: {family.title} is trained at all timesteps "
            "(use --refiner_training_invert_schedule to leave out those of a refiner)"
        )
    if family.refines and options.refiner_training_invert_schedule:
        mistakes.add(
            f"--refiner_training_invert_schedule: {family.title} is itself a refiner",
            "remove it; it is for a base model that hands over to a refiner",
        )
    low = max(low, options.min_timestep or 0)
    high = min(high, options.max_timestep or timesteps) if high < timesteps else options.max_timestep or timesteps
    if low >= high and (low, high) != (options.min_timestep or 0, options.max_timestep or timesteps):
        first, last = (0, edge - 1) if family.refines else (edge, timesteps - 1)
        mistakes.add(
            f"--min_timestep and --max_timestep exclude all timesteps from {first} to {last}, at which {family.title} "
            f"is trained with --refiner_training_strength = {strength:g}",
            "remove both, or use values within that range",
        )
        return options
    zero_terminal_snr = options.zero_terminal_snr
    if marks.zero_terminal_snr and not zero_terminal_snr and prediction == "v":
        zero_terminal_snr = True
        notes.append(
            f"the checkpoint was made for zero terminal SNR ({marks.where}): --zero_terminal_snr is switched on"
        )
    return replace(
        options,
        min_timestep=low or options.min_timestep,
        max_timestep=high if high != timesteps else options.max_timestep,
        zero_terminal_snr=zero_terminal_snr,
    )


@contextmanager
def collect_errors(flag: str, mistakes: Mistakes, unless: tuple[str, Path | None] = ("", None)) -> Iterator[None]:
    """Add errors about the file of `flag` to the mistakes. `unless`: (another flag, its file); an error message that
    begins with that file is reported for the other flag."""
    try:
        yield
    except CheckpointError as error:
        other, file = unless
        mistakes.add(f"--{other if file is not None and str(error).startswith(str(file)) else flag}: {error}")
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user of an unknown user
        mistakes.add(f"--{flag}: {error}", "check the path")


def check_capabilities(family: Family, options: TrainOptions, mistakes: Mistakes) -> None:
    """Refuse flags that are on and that the family does not support; front-ends also write flags that are off."""
    for name, value in values_of(options).items():
        flag = FLAGS[name]
        is_on = value != flag.default and value not in flag.neutral
        if flag.needs is not None and flag.needs not in family.capabilities and is_on:
            mistakes.add(f"--{name} has no meaning for {family.title}", "remove it, or use a model that supports it")


def check_clip_skip(options: ModelOptions, family: Family, sizes: PartSizes, mistakes: Mistakes) -> None:
    """Refuse a --clip_skip beyond the layers of the text encoder."""
    if "clip_skip" not in family.capabilities or options.clip_skip is None:
        return
    layers = min(sizes.layers(name) for name in family.text_encoders)
    if options.clip_skip > layers:
        what = f"--clip_skip {options.clip_skip}, but the text encoder has {counted(layers, 'layer')}"
        mistakes.add(what, f"use {layers} or less")


def check_family_flags(options: ModelOptions, family: Family, notes: list[str]) -> None:
    """The file decides the family, not --v2; add a note where they differ."""
    is_v2 = "v2" in family.capabilities
    if is_v2 and not options.v2:
        notes.append(f"the model is {family.title}: --v2 is switched on")
    if is_v2 and options.clip_skip is not None:
        notes.append("--clip_skip counts from the penultimate layer, which Stable Diffusion 2.x uses by default")
