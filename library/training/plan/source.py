"""Which model is trained: the checkpoint, its family and what its output means, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.vae_file import read_vae
from library.families.family import Family, PartSizes, Tokenizer
from library.families.registry import detect, find_model, noted_prediction
from library.objective.process import Prediction
from library.options.mistakes import Mistakes
from library.options.model import ModelOptions
from library.options.recipes import FLAGS, TrainOptions, values_of


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


def decide_source(all_options: TrainOptions, mistakes: Mistakes, notes: list[str]) -> Source | None:
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
        tokenizer = family.tokenizer(header, options.tokenizer_cache_dir)
    if len(mistakes) > known_before:
        return None
    check_capabilities(family, all_options, mistakes)
    check_family_flags(options, family, notes)
    prediction: Prediction = "v" if options.v_parameterization else "epsilon"
    noted = noted_prediction(header)
    if noted is not None and noted != prediction:
        notes.append(
            f"the checkpoint says that it predicts {noted}; this run trains {prediction} "
            f"({'leave out' if prediction == 'v' else 'give'} --v_parameterization to follow the checkpoint)"
        )
    return Source(header, family, prediction, vae, sizes, tokenizer)


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
    if options.v_parameterization and not is_v2:
        notes.append("--v_parameterization with Stable Diffusion 1.x: only models that were made for it predict v")
    if is_v2 and options.clip_skip is not None:
        notes.append(
            "--clip_skip with Stable Diffusion 2.x, which takes the penultimate layer already: counted from there"
        )
