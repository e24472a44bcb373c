"""The plan of caches that are filled ahead of a training: what the training's own plan says of its images and
captions, and nothing that only the training needs (an output folder, an optimiser, room for models)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from library.data import captions
from library.data.scan.dataset_specs import cache_folder
from library.options.mistakes import Mistakes
from library.options.parse import Parsed
from library.options.train_options import TrainOptions
from library.training.plan.facts import RunFacts, decide_facts, decide_seed
from library.training.plan.images import Images
from library.training.plan.resume import decide_resume
from library.training.plan.text import as_text, facts_sections
from library.training.plan.writable_paths import check_logs

Kind = Literal["latents", "captions"]

# what a training reads such a cache with
FLAG: Mapping[Kind, str] = {"latents": "cache_latents_to_disk", "captions": "cache_text_encoder_outputs_to_disk"}


@dataclass(frozen=True)
class WorkerGroup:
    """The processes that fill the same caches: this one's `number` from 0, how many there are, and its number on this
    machine, which chooses its graphics card."""

    number: int = 0
    count: int = 1
    local: int = 0

    @property
    def share(self) -> tuple[int, int]:
        """Number and count, as caches take them."""
        return self.number, self.count


@dataclass(frozen=True)
class CachePlan:
    """What is encoded and by whom; the facts are those that the training itself will find."""

    kind: Kind
    facts: RunFacts
    worker_group: WorkerGroup
    processes: int  # to be started by this one, itself included
    notes: tuple[str, ...]


def decide_caching(parsed: Parsed, kind: Kind) -> CachePlan:
    """Make the plan from the options of a training. Raises UserError with all mistakes at once."""
    options, mistakes, notes = parsed.options, Mistakes(), [*parsed.notes, *_flag_notes(parsed)]
    mistakes.extend(parsed.mistakes)
    if options.run.output_config:
        mistakes.add("--output_config is no flag of this program", "write the file with train_db.py")
    processes = cast(int, parsed.own["processes"])
    group = decide_worker_group(os.environ, processes, mistakes)
    seed = decide_seed(options, decide_resume(options.saving.resume, Mistakes()))
    facts = decide_facts(parsed, seed, mistakes, notes)
    check_logs(replace(options.run, logging_dir=None), mistakes)
    if facts is not None:
        _check_seed(options, kind, facts.images, mistakes)
    mistakes.raise_if_any()
    if facts is None:
        raise AssertionError("the base model or the images are missing and no mistake says why")
    return CachePlan(kind, facts, group, processes, tuple(notes))


def decide_worker_group(environment: Mapping[str, str], processes: int, mistakes: Mistakes) -> WorkerGroup:
    """This process among those that accelerate, torchrun or the user have started (WORLD_SIZE, RANK, LOCAL_RANK)."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    texts = {name: environment[name].strip() for name in names if environment.get(name, "").strip()}
    wrong = {name: text for name, text in texts.items() if not text.isdecimal()}
    for name, text in wrong.items():
        mistakes.add(f"{name} = {text} (environment) is no number", "count processes from 1, their RANK from 0")
    count = 1 if wrong else max(1, int(texts.get("WORLD_SIZE", 1)))
    if wrong or count == 1:
        return WorkerGroup()
    if processes > 1:
        mistakes.add(
            f"--processes {processes} in one of {count} processes (WORLD_SIZE)",
            "start it as one process, or leave --processes out",
        )
    number = int(texts.get("RANK", count))
    if number >= count:
        what = f"RANK = {texts['RANK']}" if "RANK" in texts else "no RANK"
        mistakes.add(f"{what} with WORLD_SIZE = {count} (environment)", f"number the processes from 0 to {count - 1}")
    return WorkerGroup(number, count, int(texts.get("LOCAL_RANK", number)))


def _flag_notes(parsed: Parsed) -> Iterator[str]:
    """What the user should know about flags that mean something else here, or nothing."""
    if parsed.own.get("skip_existing"):
        yield (
            "--skip_existing: what is in the cache and fits its image is never made again, with or without it "
            "(--skip_cache_check does not compare either)"
        )
    for name in ("sdxl", "flux"):
        if parsed.own.get(name):
            yield f"--{name}: the model's own file says what it is"
    if parsed.options.dataset.debug_dataset:
        yield "--debug_dataset: train_db.py shows the page; here nothing is shown"


def _check_seed(options: TrainOptions, kind: Kind, images: Images, mistakes: Mistakes) -> None:
    """Where the seed decides what is cached, there must be one: --seed, or that of the state that a training without
    it goes on from."""
    varied = any(captions.vary_with_seed(count.subset.captions) for count in images.subsets)
    if kind == "latents" or not varied or options.run.seed is not None:
        return
    if options.saving.resume is not None:
        decide_resume(options.saving.resume, mistakes)
        return
    mistakes.add(
        "no --seed: captions vary by chance, and another seed trains with other ones",
        "give --seed here and to the training",
    )


def describe_caching(plan: CachePlan) -> str:
    """The plan as text: the sections of the training's plan that matter here, and the cache."""
    sections = facts_sections(plan.facts)
    data = ["data", "buckets"] if plan.kind == "latents" else ["data", "captions"]
    chosen = [(title, sections[title]) for title in ("model", *data)]
    return as_text(
        f"Dreamfolder: the {plan.kind} of this training, encoded ahead",
        (*chosen, ("cache", _cache(plan)), ("notes", plan.notes)),
    )


def _cache(plan: CachePlan) -> Iterator[str]:
    facts = plan.facts
    cache, machine = facts.options.cache, facts.machine.name
    if plan.kind == "latents":
        yield f"a .{cache.cache_format} file beside each image"
        yield f"{machine}; VAE in {facts.precision.vae}, {cache.vae_batch_size} at a time"
    else:
        yield f"{cache_folder(facts.options.dataset) / 'captions'}"
        yield f"{machine}; text encoder in {facts.precision.frozen}"
        epochs = facts.duration.epochs
        yield f"the captions of {epochs} {'epoch' if epochs == 1 else 'epochs'} ({facts.duration.because})"
    yield f"a training with --{FLAG[plan.kind]} reads it"
    if plan.worker_group.count > 1:
        yield f"process {plan.worker_group.number + 1} of {plan.worker_group.count}"
    elif plan.processes > 1:
        yield f"{plan.processes} processes"
