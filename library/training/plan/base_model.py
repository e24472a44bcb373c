"""Which model is trained: the checkpoint, its family, what its output means and at which timesteps it is trained, from
names and shapes alone."""

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
from library.objective.process import Prediction
from library.options.groups.model import ModelOptions
from library.options.groups.objective import ObjectiveOptions
from library.options.mistakes import Mistakes
from library.options.train_options import FLAGS, TrainOptions, values_of


@dataclass(frozen=True)
class BaseModel:
    """The checkpoint that a run starts from. `vae` is the file or folder of --vae; `tokenizer` is the family's, or the
    folder's own, and reads captions as the run asks. `because` says how it is known what the network predicts.
    `objective`: the options of the loss, within the family's own range of timesteps and with the noise schedule that
    the checkpoint was made for."""

    header: Header
    family: Family
    prediction: Prediction
    because: str
    objective: ObjectiveOptions
    vae: Path | None
    sizes: PartSizes
    tokenizer: Tokenizer


def decide_base_model(all_options: TrainOptions, mistakes: Mistakes, notes: list[str]) -> BaseModel | None:
    """Read the header and recognise the family. None when there is no usable checkpoint; the mistakes say why."""
    options, known_before = all_options.model, len(mistakes)
    header = family = vae = None
    with _blamed_on("pretrained_model_name_or_path", mistakes):
        if options.pretrained_model_name_or_path:  # the options' own rules say that it is required
            header = read_header(find_model(options.pretrained_model_name_or_path))
            family = detect(header)
    with _blamed_on("vae", mistakes):
        vae = find_model(options.vae) if options.vae else None
        if vae is not None and family is None:  # else the sizes below are read from it
            read_vae(vae)
    if header is None or family is None or len(mistakes) > known_before:
        return None
    with _blamed_on("pretrained_model_name_or_path", mistakes, unless=("vae", vae)):
        sizes = family.sizes(header, vae)
    with _blamed_on("tokenizer_cache_dir", mistakes):
        tokenizer = family.tokenizer(header, options.tokenizer_cache_dir).configured(
            max_tokens=options.max_token_length,
            padded=not options.no_token_padding,
            weighted=all_options.caption.weighted_captions,
        )
    if len(mistakes) > known_before:
        return None
    check_capabilities(family, all_options, mistakes)
    check_family_flags(options, family, notes)
    said = declared_prediction(header)
    prediction, because = decide_prediction(options, family, said)
    objective = decide_objective(all_options.objective, family, said, prediction, mistakes, notes)
    return BaseModel(header, family, prediction, because, objective, vae, sizes, tokenizer)


def decide_prediction(options: ModelOptions, family: Family, said: DeclaredPrediction) -> tuple[Prediction, str]:
    """What the network predicts, and how that is known. A checkpoint that says v is believed: trained for another
    prediction it would be spoilt, and front-ends always write v_parameterization = false."""
    if said.prediction == "v":
        return "v", f"as the checkpoint says ({said.where})"
    if options.v_parameterization:
        what = f", though the checkpoint says epsilon ({said.where})" if said.prediction else ""
        return "v", f"--v_parameterization{what}"
    if said.prediction == "epsilon":
        return "epsilon", f"as the checkpoint says ({said.where}); --v_parameterization changes it"
    return "epsilon", "assumed, as the checkpoint does not say; --v_parameterization changes it"


def decide_objective(
    options: ObjectiveOptions,
    family: Family,
    said: DeclaredPrediction,
    prediction: Prediction,
    mistakes: Mistakes,
    notes: list[str],
) -> ObjectiveOptions:
    """The options of the loss as they hold for this checkpoint. A refiner is trained at the last, least noisy
    timesteps; a base that is to hand over to one at all others (arXiv 2307.01952, section 2.5)."""
    strength, timesteps = options.refiner_training_strength, family.process.timesteps
    edge = int(round(timesteps * strength, 6))
    low, high = 0, timesteps
    if family.refines:
        high = edge
    elif options.refiner_training_invert_schedule:
        low = edge
    elif strength != FLAGS["refiner_training_strength"].default and "hand_over" in family.capabilities:
        notes.append(
            f"--refiner_training_strength = {strength:g}: no effect, {family.title} is trained at all timesteps "
            "(--refiner_training_invert_schedule leaves those of a refiner out)"
        )
    if family.refines and options.refiner_training_invert_schedule:
        mistakes.add(
            f"--refiner_training_invert_schedule: the model is {family.title}",
            "leave it out; it is for a base model that hands over to a refiner",
        )
    low = max(low, options.min_timestep or 0)
    high = min(high, options.max_timestep or timesteps) if high < timesteps else options.max_timestep or timesteps
    if low >= high and (low, high) != (options.min_timestep or 0, options.max_timestep or timesteps):
        first, last = (0, edge - 1) if family.refines else (edge, timesteps - 1)
        mistakes.add(
            f"--min_timestep and --max_timestep leave nothing of the timesteps {first} to {last}, which "
            f"--refiner_training_strength = {strength:g} gives {family.title}",
            "leave the two out, or give a part of that range",
        )
        return options
    zero = options.zero_terminal_snr
    if said.zero_terminal_snr and not zero and prediction == "v":
        zero = True
        notes.append(
            f"the checkpoint was made for zero terminal SNR ({said.where}): trained as with --zero_terminal_snr"
        )
    return replace(
        options,
        min_timestep=low or options.min_timestep,
        max_timestep=high if high != timesteps else options.max_timestep,
        zero_terminal_snr=zero,
    )


@contextmanager
def _blamed_on(flag: str, mistakes: Mistakes, unless: tuple[str, Path | None] = ("", None)) -> Iterator[None]:
    """Collect what is wrong with the file that a flag names. `unless`: another flag, to blame where the message is
    about its file."""
    try:
        yield
    except CheckpointError as error:
        other, file = unless
        mistakes.add(f"--{other if file is not None and str(error).startswith(str(file)) else flag}: {error}")
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of a user that is not known
        mistakes.add(f"--{flag}: {error}", "check the path")


def check_capabilities(family: Family, options: TrainOptions, mistakes: Mistakes) -> None:
    """Refuse the flags that are on and that the family has no use for; front-ends also write those that are off."""
    for name, value in values_of(options).items():
        flag = FLAGS[name]
        asks = value != flag.default and value not in flag.neutral
        if flag.needs is not None and flag.needs not in family.capabilities and asks:
            mistakes.add(f"--{name} has no meaning for {family.title}", "leave it out, or give the model you mean")


def check_family_flags(options: ModelOptions, family: Family, notes: list[str]) -> None:
    """What the file is decides, not --v2; say where the two differ."""
    is_v2 = "v2" in family.capabilities
    if is_v2 and not options.v2:
        notes.append(f"the model is {family.title}: trained as with --v2")
    if is_v2 and options.clip_skip is not None:
        notes.append(
            "--clip_skip with Stable Diffusion 2.x, which takes the penultimate layer already: counted from there"
        )
