"""The text of a plan, printed at the start of every run: each decision and where it comes from."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from library.messages import counted, shortened
from library.objective.describe import describe as describe_objective
from library.options.datasets import CaptionSettings
from library.options.train_options import TrainOptions
from library.runtime.precision import BYTES
from library.training.adapter import describe as describe_adapter
from library.training.optim.learning_rates import LearningRates
from library.training.plan.base_model import BaseModel
from library.training.plan.duration import PASSES_OF_A_SAMPLE
from library.training.plan.facts import RunFacts
from library.training.plan.given import dataset_settings, given_options, subset_settings
from library.training.plan.images import Images, SubsetCount
from library.training.plan.memory.describe import memory_lines
from library.training.plan.plan import Plan
from library.training.plan.processes import describe_processes
from library.training.preview.plan import PreviewPlan
from library.training.validation.plan import TIMESTEPS
from library.training.validation.table import table_path

WIDTH = 12  # of the left column

Section = Iterable[str]
"""The lines of one section."""


def describe(plan: Plan, columns: int | None = None) -> str:
    """The whole plan, a few lines per section."""
    return as_text("Dreamfolder: the plan of this run", sections(plan).items(), columns)


def as_text(heading: str, titled_sections: Iterable[tuple[str, Section]], columns: int | None = None) -> str:
    """A heading, then the sections with their titles in a column on the left.

    Lines are broken between words to fit into `columns`, the width of the terminal; None: whole lines.
    """
    lines = [heading]
    for title, section in titled_sections:
        for index, line in enumerate(section):
            start = f"  {title if index == 0 else '':<{WIDTH}}"
            lines += [start + line] if columns is None else _broken(start, line, columns)
    return "\n".join(lines)


def _broken(start: str, line: str, columns: int) -> list[str]:
    return textwrap.wrap(
        line,
        columns,
        initial_indent=start,
        subsequent_indent=" " * (len(start) + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def sections(plan: Plan) -> dict[str, Section]:
    """The sections of a plan by title, in the order in which they are printed."""
    return facts_sections(plan.facts) | {
        "training": _training(plan),
        "length": _length(plan),
        "images": _preview(plan.preview),
        "validation": _validation(plan.facts, len(plan.averages.shown)),
        "evaluation": _evaluation(plan),
        "machine": _machine(plan.facts, plan.workers),
        "base model": _quantisation(plan.facts),
        "memory": _memory(plan),
        "files": _files(plan),
        "options": _options(plan),
        "notes": plan.notes,
    }


def facts_sections(facts: RunFacts) -> dict[str, Section]:
    """The sections that training and precaching share."""
    return {
        "model": _model(facts.base_model),
        "data": _data(facts.images, facts.options),
        "captions": _captions(facts.images),
        "buckets": _buckets(facts.images, facts.options, facts.duration.batches_per_epoch),
    }


def _model(base_model: BaseModel) -> Iterator[str]:
    yield f"{base_model.header.path} ({base_model.family.title}, {base_model.header.kind})"
    yield f"predicts {base_model.prediction}: {base_model.prediction_reason}"
    if base_model.vae is not None:
        yield f"VAE from {base_model.vae}"


def _data(images: Images, options: TrainOptions) -> Iterator[str]:
    # a subset that is trained at several resolutions is listed once
    subsets = Counter((_subset(count), subset_settings(count.subset, options)) for count in images.subsets)
    for (line, settings), times in subsets.items():
        yield line + (f", at each of {times} resolutions" if times > 1 else "") + settings
    scan = images.scan
    yield from images.notes
    yield from scan.notes
    for path, why in scan.bad_images:
        yield f"left out: {path} ({why})"


def _subset(subset_count: SubsetCount) -> str:
    subset = subset_count.subset
    kind = "training" if subset_count.samples else "validation"
    if subset.is_reg:
        kind = "validation of the class" if subset.validation else "regularisation"
    return f"{subset.source}: {_samples(subset_count)}, {kind}{_caption_source(subset_count)}"


def _samples(subset_count: SubsetCount) -> str:
    total, held_out = subset_count.images, subset_count.held_out
    images, repeats = counted(total, "image"), subset_count.subset.repeats
    samples = counted(subset_count.samples, "sample")
    if held_out and held_out == total:
        return f"{images}, all held out"
    if held_out:
        return f"{images}, {held_out} held out for validation, {total - held_out} x {repeats} = {samples}"
    if subset_count.samples != total * repeats:  # balanced: some images are repeated more often than others
        return f"{images}, {samples} after balancing"
    return f"{images} x {repeats} = {samples}"


def _caption_source(subset_count: SubsetCount) -> str:
    subset = subset_count.subset
    without = subset_count.images - subset_count.own_captions
    if subset.caption_source == "file_name":
        return ", captions from file names"
    tokens = '" or "'.join((subset.class_tokens or "").split("\n"))
    fallback = f'captioned "{tokens}"' if subset.class_tokens else "with an empty caption"
    if subset.caption_source == "class_tokens" or not subset_count.own_captions:
        return f", all {fallback}"
    source = {"files": "files", "metadata": "the metadata file"}[subset.caption_source]
    source = source if subset.shards is None else "the table of the shards"
    if not without:
        return f", captions from {source}"
    return f", {counted(subset_count.own_captions, 'caption')} from {source}, {without} {fallback}"


def _captions(images: Images) -> Iterator[str]:
    lengths = images.captions
    yield f'longest: {lengths.longest} of {lengths.limit} tokens, "{shortened(lengths.longest_text)}"'
    if lengths.cut:
        yield (
            f"{counted(len(lengths.cut), 'caption')} truncated to {lengths.limit} tokens, first {lengths.cut[0]} "
            "(use --max_token_length 150 or 225 for longer captions)"
        )
    for settings in dict.fromkeys(count.subset.captions for count in images.subsets):
        yield from _caption_settings(settings)


def _caption_settings(settings: CaptionSettings) -> Iterator[str]:
    """How captions are changed before they are encoded."""
    if settings.prefix or settings.suffix:
        yield f'prefix and suffix: "{" ".join(part for part in (settings.prefix, "...", settings.suffix) if part)}"'
    if settings.wildcard:
        yield "wildcards: a random line of each caption file, a random choice from {a|b}"
    if settings.shuffle:
        yield f"tags shuffled{_kept_tags(settings)}"
    if settings.tag_dropout_rate:
        kept = "" if settings.shuffle else _kept_tags(settings)
        yield f"tag dropout: each tag is dropped with a probability of {settings.tag_dropout_rate:.0%}{kept}"
    if settings.warmup_step:
        steps = settings.warmup_step
        length = counted(steps, "step") if steps >= 1 else f"{steps:.0%} of the run"
        yield f"token warm-up: {counted(settings.warmup_min, 'tag')} at first, all tags after {length}"
    if settings.dropout_rate:
        yield f"caption dropout: {settings.dropout_rate:.0%} of the samples have an empty caption"
    if settings.dropout_every_n_epochs == 1:
        yield "caption dropout: empty captions in every epoch"
    elif settings.dropout_every_n_epochs:
        yield f"caption dropout: empty captions in every epoch divisible by {settings.dropout_every_n_epochs}"


def _kept_tags(settings: CaptionSettings) -> str:
    if settings.keep_tokens_separator:
        return f', except those before "{settings.keep_tokens_separator}"'
    if settings.keep_tokens:
        return ", except the first" + (f" {settings.keep_tokens}" if settings.keep_tokens > 1 else "")
    return ""


def _buckets(images: Images, options: TrainOptions, batches: int) -> Iterator[str]:
    datasets, samples = images.scan.datasets, images.table.samples
    for index, dataset in enumerate(datasets):
        name = f"{dataset.origin}: " if len(datasets) > 1 else ""
        counts = sorted((bucket, count) for (number, bucket), count in samples.items() if number == index)
        sizes = ", ".join(f"{width}x{height}: {count}" for (width, height), count in counts)
        what = f"{sizes}, {_batches_of(dataset.batch_size)}" if sizes else "only held-out images"
        yield f"{name}{what}{dataset_settings(dataset, options)}"
    partial = any(dataset.batch_size > 1 for dataset in datasets)
    weighted = "; partial batches are weighted by their size" if partial else ""
    yield f"{counted(batches, 'batch', 'batches')} per epoch{weighted}"


def _batches_of(size: int) -> str:
    return f"in batches of up to {size}" if size > 1 else "in batches of 1"


def _training(plan: Plan) -> Iterator[str]:
    facts, optimization = plan.facts, plan.optimization
    adapter, rates = plan.adapter, optimization.learning_rates
    if adapter is not None:
        yield from describe_adapter.lines(adapter)
    if adapter is not None and adapter.layers is not None:
        yield from describe_adapter.reached(adapter, facts.base_model.family, rates.modules)
    else:
        yield from _learning_rates(facts.base_model, rates, is_adapter=adapter is not None)
    optimizer, schedule = optimization.optimizer, optimization.schedule
    warmup = f", warm-up of {counted(schedule.warmup_steps, 'step')}" if schedule.warmup_steps else ""
    yield f"optimizer {optimizer.name}{_arguments(optimizer.arguments)}, schedule {schedule.name}{warmup}"
    yield from optimization.update.describe()
    yield from plan.averages.describe(facts.duration.steps)
    yield _loss(facts)
    if plan.rollout is not None:
        steps = facts.duration.steps
        passes = plan.rollout.passes_per_sample(steps)
        count = f"{passes:.2g}" if passes < 100 else f"{passes:.0f}"
        yield plan.rollout.describe(steps)
        yield (
            f"adds about {count} forward passes per sample ({plan.rollout.longest} for the longest rollout), "
            f"{passes / PASSES_OF_A_SAMPLE:.0%} of the training time"
        )
    yield from facts.preservation.describe(plan.base)


def _arguments(arguments: Mapping[str, object]) -> str:
    """` (betas=(0.9, 0.99) eps=1e-06)`, or nothing."""
    return f" ({' '.join(f'{name}={value}' for name, value in arguments.items())})" if arguments else ""


def _learning_rates(base_model: BaseModel, rates: LearningRates, *, is_adapter: bool) -> Iterator[str]:
    family, sizes = base_model.family, base_model.sizes.parameters
    label = "learning rate of the adapter" if is_adapter else "learning rate"
    for name, title in family.module_titles.items():
        size = f"{sizes[name] / 1e6:.1f} M parameters"
        if name == family.backbone and rates.blocks:
            yield f"{title} ({size}), {label} {_block_rates(rates.blocks)}"
        elif name not in rates.modules:
            yield f"{title} not trained"
        else:
            stop = None if name == family.backbone else rates.text_encoder_stop
            until = "" if stop is None else f", until step {stop}"
            yield f"{title} ({size}), {label} {rates.modules[name]:g}{until}"


def _block_rates(rates: tuple[float, ...]) -> str:
    """Learning rates of blocks, equal neighbours together: "0 for 3 blocks, 1e-05 for 20 blocks"."""
    runs = [(rate, len(list(same))) for rate, same in groupby(rates)]
    return ", ".join(f"{rate:g} for {counted(count, 'block')}" for rate, count in runs)


def _loss(facts: RunFacts) -> str:
    objective = facts.base_model.objective
    parts = [f"{facts.base_model.prediction} prediction"]
    masks = facts.options.mask
    if any(count.subset.mask_dir or count.subset.alpha_mask for count in facts.images.subsets):
        floor = f", floor {masks.mask_floor:g}" if masks.mask_floor else ""
        parts.append(f"masked ({'inverted, ' if masks.mask_invert else ''}normalised: {masks.mask_normalise}{floor})")
    if facts.images.scan.reg_samples:
        parts.append(f"prior loss weight {objective.prior_loss_weight:g}")
    parts.extend(describe_objective(objective, facts.base_model.prediction))
    return "loss: " + ", ".join(parts)


def _length(plan: Plan) -> Iterator[str]:
    duration, batches = plan.facts.duration, plan.facts.window
    window = f" of {batches} batches" if batches > 1 else ""
    epochs = f"{counted(duration.epochs, 'epoch')} of {duration.steps_per_epoch}"
    partial = "" if duration.steps == duration.epochs * duration.steps_per_epoch else ", the last one incomplete"
    yield f"{counted(duration.steps, 'optimizer step')}{window} in {epochs}{partial} ({duration.reason})"
    if plan.resume is not None:
        progress = plan.resume.progress
        where = f"step {progress.step} (epoch {progress.epoch}, step {progress.window} of it)"
        yield f"resumes after {where} from {plan.resume.folder}"
    yield from describe_processes(plan.facts, plan.resume)
    yield from plan.best.describe()
    drawn = plan.facts.options.run.seed is None and plan.resume is None
    repeat = f" (random; use --seed {plan.facts.seed} to repeat this run)" if drawn else ""
    yield f"seed {plan.facts.seed}{repeat}"


def _preview(preview: PreviewPlan | None) -> Iterator[str]:
    if preview is not None:
        yield str(preview)
        if preview.refiner is not None:
            yield str(preview.refiner)
        if preview.so_far is not None:
            yield str(preview.so_far)


def _validation(facts: RunFacts, versions: int) -> Iterator[str]:
    """`versions`: how many versions of the weights are validated."""
    validation = facts.validation
    if validation is None:
        return
    intervals = ((validation.every_n_steps, "step"), (validation.every_n_epochs, "epoch"))
    moments = [f"every {unit}" if every == 1 else f"every {every} {unit}s" for every, unit in intervals if every]
    kinds = {"held_out": "held-out", "training": "training", "class": "class"}
    counts = [f"{len(set(each.numbers))} {kinds[each.name]}" for each in validation.sets]
    last = counted(len(set(validation.sets[-1].numbers)), f"{kinds[validation.sets[-1].name]} image")
    yield f"{' and '.join([*counts[:-1], last])}, each at {TIMESTEPS} timesteps, after {' and '.join(moments)}"
    share = validation.share_of_training(facts.duration, facts.order.samples_per_epoch, versions)
    yield f"adds about {share:.0%} to the training time (use --max_validation_steps to lower it)"


def _evaluation(plan: Plan) -> Iterator[str]:
    if plan.evaluation is not None:
        samples, versions = plan.facts.order.samples_per_epoch, len(plan.averages.shown)
        yield from plan.evaluation.describe(plan.evaluation.share_of_training(plan.facts.duration, samples, versions))


def _machine(facts: RunFacts, workers: int) -> Iterator[str]:
    precision = facts.precision
    yield (
        f"{facts.machine.name}; mixed precision {precision.mixed_precision}, trained weights {precision.trained}, "
        f"attention {precision.attention}, {counted(workers, 'data worker')}"
    )


def _quantisation(facts: RunFacts) -> Iterator[str]:
    if facts.quantisation is not None:
        yield from facts.quantisation.lines(BYTES[facts.precision.base])


def _memory(plan: Plan) -> Iterator[str]:
    yield from plan.blocks.lines()
    is_unknown = plan.adapter is not None and plan.adapter.layers is None
    yield from memory_lines(plan.costs, plan.memory, plan.facts, is_unknown=is_unknown)


def _files(plan: Plan) -> Iterator[str]:
    outputs, duration = plan.outputs, plan.facts.duration
    yield from map(str, outputs.models(outputs.final_stem()))
    events = list(outputs.events(duration.steps, duration.epochs, duration.steps_per_epoch))
    if events:
        names = [path.name for event in events for path in outputs.models(outputs.stem(event))]
        yield f"{len(names)} during training: {_first_and_last(names)}"
    if plan.best.keep is not None:
        names = [path.name for path in outputs.models(outputs.best_stem())]
        yield f"the best by {plan.best.keep.name} ({plan.best.keep.direction}): {', '.join(names)}"
    most = plan.costs.files.models - outputs.best_models
    if most <= len(events) * len(outputs.suffixes):  # older ones are removed on the way
        yield f"at most {counted(most, 'model')} at once, with the final one"
    if outputs.states or outputs.final_state:
        yield f"training state: {outputs.final_state_folder()}" + (" and one with each file" if outputs.states else "")
    snapshots = outputs.snapshot_folder
    if snapshots is not None:
        replaced = ", in place of those of an earlier run" if os.path.isdir(snapshots) and plan.resume is None else ""
        yield f"{counted(plan.costs.files.snapshots, 'snapshot')}: {snapshots}{replaced}"
    yield f"loss curve: {plan.curve}" if plan.curve else "no loss curve: the folder holds training images"
    if plan.facts.validation is not None:
        yield f"table of validations: {table_path(outputs)}"
    yield f"record of the run, for tools/watch.py: {outputs.record}"
    if plan.trackers.names:
        folder = "" if plan.trackers.folder is None else f": {plan.trackers.folder}"
        yield f"logs for {' and '.join(plan.trackers.names)}{folder}"
    if plan.uploads is not None:
        yield str(plan.uploads)


def _first_and_last(names: Sequence[str], most: int = 4) -> str:
    """All of up to `most` names, else the first two and the last."""
    return ", ".join(names) if len(names) <= most else f"{names[0]}, {names[1]} ... {names[-1]}"


def _options(plan: Plan) -> Iterator[str]:
    """The options that were given and stand nowhere else."""
    said = {"network_dim", "network_alpha"} if plan.adapter is not None and plan.adapter.settings is not None else set()
    if plan.facts.images.scan.reg_samples:
        said.add("prior_loss_weight")
    if not plan.facts.preservation.is_usual:
        said |= {"preservation", "preservation_identifier", "preservation_class", "preservation_base"}
    return given_options(plan.facts.options, plan.facts.given, said)
