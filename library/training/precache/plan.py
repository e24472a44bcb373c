"""Plan a cache that is filled before training: the run facts of the training, without what only training needs (output
folder, optimizer, disk space for models)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from library.data import captions
from library.data.scan.dataset_specs import cache_folder
from library.messages import counted
from library.options.mistakes import Mistakes
from library.options.parse import Parsed
from library.options.train_options import TrainOptions
from library.runtime.launch import read_launch
from library.training.plan.facts import RunFacts, decide_facts, decide_seed
from library.training.plan.given import given_options
from library.training.plan.images import Images
from library.training.plan.resume import decide_resume
from library.training.plan.text import as_text, facts_sections
from library.training.plan.writable_paths import check_logs

Kind = Literal["latents", "captions"]

# the training flag that reads such a cache
FLAG: Mapping[Kind, str] = {"latents": "cache_latents_to_disk", "captions": "cache_text_encoder_outputs_to_disk"}


@dataclass(frozen=True)
class WorkerGroup:
    """The processes that fill the same cache: the `number` of this one, from 0, their `count`, and `local`, its number
    on this machine, which selects its GPU."""

    number: int = 0
    count: int = 1
    local: int = 0

    @property
    def share(self) -> tuple[int, int]:
        """(number, count), the `share` of the cache builders."""
        return self.number, self.count


@dataclass(frozen=True)
class CachePlan:
    """What is encoded, by which processes. `facts` are those of the training with the same flags."""

    kind: Kind
    facts: RunFacts
    worker_group: WorkerGroup
    processes: int  # on this machine, this one included
    notes: tuple[str, ...]


def decide_caching(parsed: Parsed, kind: Kind) -> CachePlan:
    """Make the plan from training options. Raises UserError with all mistakes at once."""
    parsed.check_complete()
    options, mistakes, notes = parsed.options, Mistakes(), [*parsed.notes, *_flag_notes(parsed)]
    mistakes.extend(parsed.mistakes)
    if options.run.output_config:
        mistakes.add("--output_config is no flag of this program", "write the file with train_db.py")
    processes = cast(int, parsed.program_values["processes"])
    group = decide_worker_group(os.environ, processes, mistakes)
    seed = decide_seed(options, decide_resume(options.saving.resume, options.saving, Mistakes(), []))
    facts = decide_facts(parsed, seed, mistakes, notes)
    check_logs(replace(options.run, logging_dir=None), mistakes)
    if facts is not None:
        _check_seed(options, kind, facts.images, mistakes)
    mistakes.raise_if_any()
    if facts is None:
        raise AssertionError("the base model or the images are missing and no mistake says why")
    return CachePlan(kind, facts, group, processes, tuple(notes))


def decide_worker_group(environment: Mapping[str, str], processes: int, mistakes: Mistakes) -> WorkerGroup:
    """Which of the processes of a launcher this one is."""
    launch = read_launch(environment, mistakes)
    if launch.world > 1 and processes > 1:
        mistakes.add(
            f"--processes {processes} cannot be combined with a launcher that starts {launch.world} processes "
            "(WORLD_SIZE)",
            "start one process, or remove --processes",
        )
    return WorkerGroup(launch.rank, launch.world, launch.local_rank)


def _flag_notes(parsed: Parsed) -> Iterator[str]:
    """Notes about flags that have no effect here, or another one than in sd-scripts."""
    if parsed.program_values.get("skip_existing"):
        yield (
            "--skip_existing has no effect: valid cache files are always kept (--skip_cache_check skips the check of "
            "existing files)"
        )
    for name in ("sdxl", "flux"):
        if parsed.program_values.get(name):
            yield f"--{name} has no effect: the kind of model is read from its file"
    if parsed.options.dataset.debug_dataset:
        yield "--debug_dataset has no effect here: use it with train_db.py"


def _check_seed(options: TrainOptions, kind: Kind, images: Images, mistakes: Mistakes) -> None:
    """Require a seed where captions depend on it: --seed, or the one in the state of --resume."""
    varied = any(captions.vary_with_seed(count.subset.captions) for count in images.subsets)
    if kind == "latents" or not varied or options.run.seed is not None:
        return
    if options.saving.resume is not None:
        decide_resume(options.saving.resume, options.saving, mistakes, [])
        return
    mistakes.add(
        "no --seed: captions are drawn at random, so the training would use other captions with another seed",
        "use the same --seed here and for the training",
    )


# what the lines about the cache say, besides the flag that the tool sets itself
SAID = ("cache_latents", "cache_text_encoder_outputs", "cache_format", "vae_batch_size")


def describe_caching(plan: CachePlan, columns: int | None = None) -> str:
    """The plan as text: the relevant sections of the training's plan, and the cache."""
    sections = facts_sections(plan.facts)
    data = ["data", "buckets"] if plan.kind == "latents" else ["data", "captions"]
    chosen = [(title, sections[title]) for title in ("model", *data)]
    return as_text(
        f"Dreamfolder: caching the {plan.kind} of this training",
        (*chosen, ("cache", _cache(plan)), ("options", _options(plan)), ("notes", plan.notes)),
        columns,
    )


def _options(plan: CachePlan) -> Iterator[str]:
    return given_options(plan.facts.options, plan.facts.given, (*SAID, FLAG[plan.kind]))


def _cache(plan: CachePlan) -> Iterator[str]:
    facts = plan.facts
    cache, machine = facts.options.cache, facts.machine.name
    if plan.kind == "latents":
        yield f"a .{cache.cache_format} file next to each image"
        yield f"{machine}; VAE in {facts.precision.vae}, {cache.vae_batch_size} at a time"
    else:
        yield f"{cache_folder(facts.options.dataset) / 'captions'}"
        yield f"{machine}; text encoder in {facts.precision.frozen}"
        yield f"the captions of {counted(facts.duration.epochs, 'epoch')} ({facts.duration.reason})"
    yield f"read by a training with --{FLAG[plan.kind]}"
    if plan.worker_group.count > 1:
        yield f"process {plan.worker_group.number + 1} of {plan.worker_group.count}"
    elif plan.processes > 1:
        yield f"{plan.processes} processes"
