"""The identity of a run: everything that its result depends on. A resumed run must have that of the saved run.

A state also says what else was chosen, and which images there were, so that a resumed run can tell what has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from library.data.scan.image_record import ImageRecord
from library.options.groups.dataset import DatasetOptions
from library.options.train_options import FLAGS, values_of
from library.training.plan.facts import RunFacts
from library.training.plan.images import Images
from library.training.preservation.base_plan import BasePlan
from library.training.saving.state import Description, Identity, fingerprint

PRESERVATION = "what --preservation chooses"
DATA = "the data"
SETTINGS = "the dataset file"
"""Facts whose values are fingerprints, which messages do not show."""
ACCUMULATION = "--gradient_accumulation_steps"
"""In an identity: times the number of processes, the batches of an optimizer step."""
PIECES = "what shares out the weights"
PROCESSES = "the number of processes"
"""Among the options of a description, though no flag sets it."""


def identity_of(run: RunFacts, base: BasePlan | None) -> Identity:
    """Every option that affects the result, the kind of model, the precision used on this machine, the seed, the data,
    and the model that a second set of weights is loaded from."""
    facts = {
        f"--{name}": value.name if isinstance(value, Path) else str(value)
        for name, value in values_of(run.options).items()
        if not FLAGS[name].may_change_on_resume and name != "preservation"
    }
    if run.launch.world > 1:  # the same batches of a step may come from another number of processes
        facts[ACCUMULATION] = str(run.window)
    if run.preservation.chosen:  # by what it means: spellings and the order of anchors change nothing
        facts[PRESERVATION] = run.preservation.chosen
    facts["the kind of model"] = run.base_model.family.title
    facts["what the U-Net predicts"] = run.base_model.prediction
    facts["zero terminal SNR"] = str(run.base_model.objective.zero_terminal_snr)
    facts["seed"] = str(run.seed)
    if run.zero is not None:  # its states hold pieces that no other run has
        facts[PIECES] = run.zero.title
    facts["mixed precision"] = run.precision.mixed_precision
    facts["precision of the weights"] = run.precision.trained
    if base is not None:
        facts["the base model, to compare with,"] = f"{base.file} in {base.format}"
    facts[DATA] = fingerprint([_line(record) for record in run.images.records])
    if dataset_file(run.options.dataset):  # settings given by flags are facts of their own
        facts[SETTINGS] = fingerprint(list(_settings(run.images)))
    return facts


MOST_IMAGES = 50_000  # of which a state has a list: about 1.5 MB


def description_of(run: RunFacts, identity: Identity, output_name: str | None) -> Description:
    """What the states of a run say of it."""
    options = {
        name: str(value)
        for name, value in values_of(run.options).items()
        if FLAGS[name].may_change_on_resume and not FLAGS[name].secret and name not in ABOUT_ONE_CALL
    }
    options[PROCESSES] = str(run.launch.world)
    return Description(identity, options, _hashes(run.images.records), output_name or "")


ABOUT_ONE_CALL = frozenset({"resume", "dry_run", "output_config", "config_file", "debug_dataset"})


def _hashes(records: Sequence[ImageRecord]) -> dict[str, str]:
    """Of each image by its key, a short hash of what the result depends on, and the length of its file: `1f3870be 5120`
    (0: not known). Where an image is in several subsets, the hash is of all."""
    if len(records) > MOST_IMAGES:
        return {}
    lines: dict[str, str] = {}
    lengths: dict[str, int] = {}
    for record in records:
        lines[record.key] = lines.get(record.key, "") + _line(record) + "\n"
        lengths[record.key] = record.length
    return {key: f"{fingerprint([line])[:8]} {lengths[key]}" for key, line in lines.items()}


def dataset_file(options: DatasetOptions) -> str:
    """The flag and path of the file that describes the datasets, "" without one."""
    if options.dataset_config is not None:
        return f"--dataset_config {options.dataset_config}"
    return "" if options.data_backend_config is None else f"--data_backend_config {options.data_backend_config}"


def _settings(images: Images) -> Iterator[str]:
    """The settings of a dataset file, without the origin of each."""
    for dataset in images.scan.datasets:
        yield f"{dataset.buckets}|{dataset.batch_size}"
    for subset in images.scan.subsets:
        yield f"{subset.captions}|{subset.images}|{subset.alpha_mask}"


def _line(record: ImageRecord) -> str:
    line = f"{record.dataset}|{record.key}|{record.size}|{record.repeats}|{record.caption}|{record.mask}"
    return (
        line if record.score is None else f"{line}|{record.score}"
    )  # so that data without scores keeps its fingerprint
