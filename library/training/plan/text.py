"""The plan as the text that heads every run: what was decided, and where each decision comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

from library.objective.describe import describe as describe_objective
from library.options.datasets import CaptionSettings
from library.training.adapter.plan import AdapterPlan
from library.training.plan.base_model import BaseModel
from library.training.plan.costs import Costs, readable_bytes
from library.training.plan.facts import RunFacts
from library.training.plan.images import Images, SubsetCount
from library.training.plan.plan import Plan
from library.training.preview.plan import PreviewPlan
from library.training.validation.plan import TIMESTEPS

WIDTH = 12  # of the left column


Section = Iterable[str]
"""The lines of one section."""


def describe(plan: Plan) -> str:
    """The whole plan, a few lines for each section."""
    return as_text("Dreamfolder: the plan of this run", sections(plan).items())


def as_text(heading: str, parts: Iterable[tuple[str, Section]]) -> str:
    """Sections under a heading, their titles in a column on the left."""
    lines = [heading]
    for title, section in parts:
        lines += [f"  {title if index == 0 else '':<{WIDTH}}{line}" for index, line in enumerate(section)]
    return "\n".join(lines)


def sections(plan: Plan) -> dict[str, Section]:
    """The sections of a plan by title, in their order."""
    return facts_sections(plan.facts) | {
        "training": _training(plan),
        "length": _length(plan),
        "images": _preview(plan.preview),
        "validation": _validation(plan.facts),
        "machine": _machine(plan.facts, plan.workers),
        "memory": _costs(plan.costs, is_adapter=plan.adapter is not None),
        "files": _files(plan),
        "notes": plan.notes,
    }


def facts_sections(facts: RunFacts) -> dict[str, Section]:
    """The sections that a precaching run shows too."""
    return {
        "model": _model(facts.base_model),
        "data": _data(facts.images),
        "captions": _captions(facts.images),
        "buckets": _buckets(facts.images, facts.duration.batches_per_epoch),
    }


def _model(base_model: BaseModel) -> Iterator[str]:
    yield f"{base_model.header.path} ({base_model.family.title}, {base_model.header.kind})"
    yield f"predicts {base_model.prediction}: {base_model.because}"
    if base_model.vae is not None:
        yield f"VAE from {base_model.vae}"


def _data(images: Images) -> Iterator[str]:
    # a subset of several resolutions is as many: told once
    for line, times in Counter(map(_subset, images.subsets)).items():
        yield line if times == 1 else f"{line}, at each of {times} resolutions"
    scan = images.scan
    yield from images.notes
    yield from scan.notes
    for path, why in scan.bad_images:
        yield f"left out: {path} ({why})"


def _subset(counted: SubsetCount) -> str:
    subset = counted.subset
    kind = "regularisation" if subset.is_reg else "training" if counted.samples else "validation"
    return f"{subset.image_dir or subset.metadata_file}: {_count(counted)}, {kind}{_source(counted)}"


def _count(counted: SubsetCount) -> str:
    images, repeats = _number(counted.images, "image"), counted.subset.repeats
    if counted.held_out and counted.held_out == counted.images:
        return f"{images}, all of them set aside"
    if counted.held_out:
        trained = counted.images - counted.held_out
        images += f", {counted.held_out} of them set aside for validation, {trained}"
        return f"{images} x {repeats} = {_number(counted.samples, 'sample')}"
    if counted.samples != counted.images * repeats:  # balanced: not all have the repeats of their folder
        return f"{images}, {counted.samples} samples after balancing"
    return f"{images} x {repeats} = {_number(counted.samples, 'sample')}"


def _source(counted: SubsetCount) -> str:
    subset = counted.subset
    rest = counted.images - counted.own_captions
    tokens = f'"{subset.class_tokens}"' if subset.class_tokens else "empty captions"
    if subset.caption_source == "class_tokens" or not counted.own_captions:
        return f", all as {tokens}"
    where = {"files": "files", "metadata": "the metadata file", "file_name": "file names"}[subset.caption_source]
    if not rest:
        return f", captions from {where}"
    return f", {_number(counted.own_captions, 'caption')} from {where}, {rest} as {tokens}"


def _captions(images: Images) -> Iterator[str]:
    counted = images.captions
    yield f'longest: {counted.longest} of {counted.limit} tokens, "{_short(counted.longest_text)}"'
    if counted.cut:
        yield (
            f"{_number(len(counted.cut), 'caption')} cut at {counted.limit} tokens, the first of {counted.cut[0]} "
            "(--max_token_length 150 or 225 keeps more)"
        )
    for subset in dict.fromkeys(count.subset.captions for count in images.subsets):
        yield from _changes(subset)


def _changes(chosen: CaptionSettings) -> Iterator[str]:
    """What happens to the captions of one way of treating them."""
    if chosen.prefix or chosen.suffix:
        yield f'each as "{" ".join(part for part in (chosen.prefix, "...", chosen.suffix) if part)}"'
    if chosen.wildcard:
        yield "one line of a file, and one of {a|b}, chosen by chance"
    if chosen.shuffle:
        kept = (
            f'those before "{chosen.keep_tokens_separator}"'
            if chosen.keep_tokens_separator
            else f"the first {chosen.keep_tokens}"
        )
        yield f"tags shuffled, {kept} kept in place"
    if chosen.tag_dropout_rate:
        yield f"each tag left out with a chance of {chosen.tag_dropout_rate:.0%}"
    if chosen.warmup_step:
        length = f"{chosen.warmup_step:g} steps" if chosen.warmup_step >= 1 else f"{chosen.warmup_step:.0%} of the run"
        yield f"{_number(chosen.warmup_min, 'tag')} at first, all of them after {length}"
    if chosen.dropout_rate:
        yield f"empty for {chosen.dropout_rate:.0%} of the samples, by chance"
    if chosen.dropout_every_n_epochs:
        yield f"empty in every epoch that {chosen.dropout_every_n_epochs} divides"


def _buckets(images: Images, batches: int) -> Iterator[str]:
    datasets, samples = images.scan.datasets, images.table.samples
    for index, dataset in enumerate(datasets):
        of = f"{dataset.origin}: " if len(datasets) > 1 else ""
        counts = sorted((bucket, count) for (which, bucket), count in samples.items() if which == index)
        sizes = ", ".join(f"{width}x{height}: {count}" for (width, height), count in counts)
        yield f"{of}{sizes}, in batches of up to {dataset.batch_size}"
    yield f"{batches} {'batch' if batches == 1 else 'batches'} an epoch; short ones count exactly"


def _training(plan: Plan) -> Iterator[str]:
    facts = plan.facts
    family, sizes = facts.base_model.family, facts.base_model.sizes.parameters
    rates, optimizer, schedule = (
        plan.optimization.learning_rates,
        plan.optimization.optimizer,
        plan.optimization.schedule,
    )
    backbone = f"{family.backbone_title} ({sizes[family.backbone] / 1e6:.1f} M parameters)"
    if plan.adapter is not None:
        yield from _adapter(plan.adapter)
    frozen = ", through the adapter" if plan.adapter is not None else ""
    if rates.blocks:
        yield f"{backbone} at {_blocks(rates.blocks)}"
    elif family.backbone not in rates.modules:
        yield f"{family.backbone_title} not trained"
    else:
        yield f"{backbone} at {rates.modules[family.backbone]:g}{frozen}"
    until = "" if rates.text_encoder_stop is None else f", until step {rates.text_encoder_stop}"
    for place, name in enumerate(family.text_encoders, 1):
        title = "text encoder" if len(family.text_encoders) == 1 else f"text encoder {place}"
        if name not in rates.modules:
            yield f"{title} not trained"
        else:
            yield f"{title} ({sizes[name] / 1e6:.1f} M parameters) at {rates.modules[name]:g}{frozen}{until}"
    listed = " ".join(f"{name}={value}" for name, value in optimizer.arguments.items())
    warmup = f", warm-up of {schedule.warmup_steps} steps" if schedule.warmup_steps else ""
    yield f"{optimizer.name}{f' ({listed})' if listed else ''}, schedule {schedule.name}{warmup}"
    yield _loss(facts)


def _blocks(rates: tuple[float, ...]) -> str:
    """LearningRates of blocks, equal neighbours together: "0 for 3 blocks, 1e-05 for 20"."""
    runs = [(rate, len(list(same))) for rate, same in groupby(rates)]
    return ", ".join(f"{rate:g} for {count} {'block' if count == 1 else 'blocks'}" for rate, count in runs)


def _adapter(adapter: AdapterPlan) -> Iterator[str]:
    listed = " ".join(f"{key}={value}" for key, value in adapter.arguments.items())
    settings = adapter.settings
    size = f", rank {settings.dim}, alpha {settings.alpha or settings.dim:g}" if settings is not None else ""
    yield f"adapter: {adapter.module}{size}{f' ({listed})' if listed else ''}"
    if adapter.weights is not None:
        yield f"begins with {adapter.weights}"
    for path, multiplier in adapter.base:
        yield f"merged into the model beforehand: {path}, times {multiplier:g}"


def _loss(facts: RunFacts) -> str:
    objective = facts.base_model.objective
    parts = [f"{facts.base_model.prediction} prediction"]
    masks = facts.options.mask
    if any(count.subset.mask_dir or count.subset.alpha_mask for count in facts.images.subsets):
        floor = f", floor {masks.mask_floor:g}" if masks.mask_floor else ""
        parts.append(f"masked ({'inverted, ' if masks.mask_invert else ''}normalised: {masks.mask_normalise}{floor})")
    if facts.images.scan.reg_samples:
        parts.append(f"regularisation weighted {objective.prior_loss_weight:g}")
    parts.extend(describe_objective(objective, facts.base_model.prediction))
    return "loss: " + ", ".join(parts)


def _length(plan: Plan) -> Iterator[str]:
    length, accumulation = plan.facts.duration, plan.facts.options.memory.gradient_accumulation_steps
    of = f" of {accumulation} batches" if accumulation > 1 else ""
    epochs = f"{_number(length.epochs, 'epoch')} of {length.steps_per_epoch}"
    cut = "" if length.steps == length.epochs * length.steps_per_epoch else ", the last one in part"
    yield f"{_number(length.steps, 'optimiser step')}{of} in {epochs}{cut} ({length.because})"
    if plan.resume is not None:
        progress = plan.resume.progress
        where = f"step {progress.step} (epoch {progress.epoch}, step {progress.window} of it)"
        yield f"goes on after {where} from {plan.resume.folder}"
    given = "" if plan.facts.options.run.seed is not None or plan.resume else ", drawn for this run; --seed repeats it"
    yield f"seed {plan.facts.seed}{given}"


def _preview(preview: PreviewPlan | None) -> Iterator[str]:
    if preview is not None:
        yield str(preview)


def _validation(facts: RunFacts) -> Iterator[str]:
    validation = facts.validation
    if validation is None:
        return
    count = len(validation.pairs)
    when = [
        f"every {what}" if number == 1 else f"every {number} {what}s"
        for number, what in ((validation.every_n_steps, "step"), (validation.every_n_epochs, "epoch"))
        if number
    ]
    yield (
        f"{_number(count, 'image')} set aside and as many that are trained on, each at {TIMESTEPS} timesteps, after "
        f"{' and '.join(when)}"
    )
    share = validation.share_of_training(facts.duration, facts.order.samples_per_epoch)
    yield f"about {share:.0%} of the time that the training takes, in addition (--max_validation_steps lowers it)"


def _machine(facts: RunFacts, workers: int) -> Iterator[str]:
    precision = facts.precision
    yield (
        f"{facts.machine.name}; mixed precision {precision.mixed_precision}, trained weights {precision.trained}, "
        f"attention {precision.attention}, {_number(workers, 'data worker')}"
    )


def _costs(costs: Costs, *, is_adapter: bool) -> Iterator[str]:
    yield (
        f"{readable_bytes(costs.training)} before the first image: weights {readable_bytes(costs.weights)}, "
        f"gradients {readable_bytes(costs.gradients)}, optimiser {readable_bytes(costs.optimizer)}"
    )
    if is_adapter:
        yield "what the adapter takes is told when it is made"
        return
    free = "" if costs.free is None else f" of {readable_bytes(costs.free)} free"
    yield f"disk: up to {readable_bytes(costs.disk)}{free} (a model {readable_bytes(costs.model_file)})"


def _files(plan: Plan) -> Iterator[str]:
    outputs, length = plan.outputs, plan.facts.duration
    yield f"{outputs.final_model()}"
    events = list(outputs.events(length.steps, length.epochs, length.steps_per_epoch))
    if events:
        names = [outputs.stem(event) + outputs.extension for event in events]
        yield f"{len(events)} on the way: {_some(names)}"
    if outputs.states or outputs.final_state:
        yield f"states: {outputs.final_state_folder()}" + (" and one with each file" if outputs.states else "")
    if plan.trackers.names:
        where = "" if plan.trackers.folder is None else f": {plan.trackers.folder}"
        yield f"logs by {' and '.join(plan.trackers.names)}{where}"


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names) if len(names) <= most else f"{names[0]}, {names[1]} ... {names[-1]}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
