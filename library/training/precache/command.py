"""The command of the cache tools: encode latents or captions before training, with one process or several. No torch.

Every process goes through all entries, in an order of its own, and skips those that exist. So no process waits for
another, any of them may end early, and the next call encodes what is missing.
"""

from __future__ import annotations

import io
import multiprocessing
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from library.options.flag import Flag
from library.options.mistakes import Mistake, UserError
from library.options.packages import check_packages
from library.options.parse import Parsed, Program, parse
from library.runtime.children import end_with_parent
from library.runtime.imports import large_imports
from library.runtime.signals import starting_processes
from library.runtime.terminal import columns_of
from library.training.command import explain_out_of_memory, run_program
from library.training.precache.plan import FLAG, CachePlan, Kind, WorkerGroup, decide_caching, describe_caching

if TYPE_CHECKING:
    from library.data.cache.latent_cache import LatentCacheBuild
    from library.data.cache.text_cache import TextCacheBuild

INTERRUPTED = "interrupted: the files written so far are complete; the same command continues from there"
LESS_MEMORY = "use fewer --processes, then a smaller --vae_batch_size, then --mixed_precision bf16 or fp16"

OWN_FLAGS = {
    flag.name: flag
    for flag in (
        Flag("processes", "", "integer", 1, "Number of processes, each with its own model.", at_least=1),
        Flag("skip_existing", "", "switch", False, "For sd-scripts compatibility: valid cache files are always kept."),
        Flag("sdxl", "", "switch", False, "For sd-scripts compatibility: the kind of model is read from its file."),
        Flag("flux", "", "switch", False, "For sd-scripts compatibility: the kind of model is read from its file."),
    )
}
# models are not saved here
UNNEEDED = frozenset({"output_dir"})


@dataclass(frozen=True)
class Tool:
    """A program that fills one kind of cache, with its --help text.

    `defaults` replaces defaults of the training's flags; `names` has flags of the training that the program calls
    otherwise.
    """

    kind: Kind
    title: str
    usage: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def help(self) -> str:
        """The --help text."""
        lines = [self.title, "", f"usage: {self.usage} [training flags]", ""]
        for flag in OWN_FLAGS.values():
            word = f"  --{flag.name}{' N' if flag.kind == 'integer' else ''}"
            lines.append(f"{word:<20}{flag.help}")
        lines += ["", "All other flags are the training's: see python train_db.py --help."]
        lines += [f"Flags that only training needs may be left out; --{FLAG[self.kind]} is implied."]
        return "\n".join(lines)

    def in_own_words(self, text: str) -> str:
        """A text with the flags of this program in place of the training's."""
        return re.sub(r"--(\w+)", lambda flag: f"--{self.names.get(flag[1], flag[1])}", text)


def run_tool(tool: Tool, arguments: Sequence[str]) -> int:
    """Fill the cache. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_program(lambda: plan_and_fill(tool, arguments), INTERRUPTED)


def plan_and_fill(tool: Tool, words: Sequence[str]) -> CachePlan:
    """Print the plan and, unless it is a dry run, fill the cache. Returns the plan. Raises UserError."""
    plan = decide_caching(_parsed(words, tool), tool.kind)
    plan = replace(plan, notes=tuple(map(tool.in_own_words, plan.notes)))
    is_first = plan.worker_group.number == 0
    position = f"process {plan.worker_group.number + 1} of {plan.worker_group.count}"
    print(describe_caching(plan, columns_of(sys.stdout)) if is_first else position, flush=True)
    if plan.facts.options.run.dry_run:
        print("dry run: no weights were loaded and nothing was encoded")
        return plan
    group = replace(plan.worker_group, count=plan.processes) if plan.processes > 1 else plan.worker_group
    with worker_processes(tool, words, plan) as workers:
        filled = _fill(plan, group, progress=is_first)
        if workers:
            print(f"process 1 of {plan.processes}: {filled}")
        for number, worker in enumerate(workers, 2):
            print(f"process {number} of {plan.processes}: {worker.result()}")
    if not workers:
        print(filled)
    return plan


def _parsed(words: Sequence[str], tool: Tool) -> Parsed:
    program = Program(flags=OWN_FLAGS, unneeded=UNNEEDED, help=tool.help, defaults=tool.defaults)
    on_disk = FLAG[tool.kind]
    parsed = parse([*words, f"--{on_disk.removesuffix('_to_disk')}", f"--{on_disk}"], program)
    return replace(parsed, notes=(*check_packages(parsed.mistakes), *parsed.notes))


def _fill(plan: CachePlan, group: WorkerGroup, *, progress: bool) -> LatentCacheBuild | TextCacheBuild:
    with large_imports():
        from library.training.precache.fill import fill_cache
    with explain_out_of_memory(LESS_MEMORY):
        return fill_cache(plan, group, progress=progress)


@dataclass(frozen=True)
class WorkerProcess:
    """A process started by --processes, and the pipe that its report comes from."""

    process: BaseProcess
    report: Connection

    def result(self) -> str:
        """Wait for the process and return its report. If it failed, the others have encoded its share."""
        try:
            text = str(self.report.recv())
        except (EOFError, OSError):
            text = ""
        self.process.join()
        return text or f"ended early (exit code {self.process.exitcode}); the other processes encoded its share"


@contextmanager
def worker_processes(tool: Tool, words: Sequence[str], plan: CachePlan) -> Iterator[list[WorkerProcess]]:
    """Start the other processes of --processes, and end them when this one ends."""
    context = multiprocessing.get_context("spawn")
    # a random seed that this process drew is theirs too
    words = [*words, f"--seed={plan.facts.seed}"]
    started = []
    try:
        with starting_processes():
            for number in range(1, plan.processes):
                receiver, sender = context.Pipe(duplex=False)
                group = WorkerGroup(number, plan.processes, number)
                process = context.Process(target=run_worker, args=(tool, words, group, sender), daemon=True)
                process.start()
                sender.close()
                started.append(WorkerProcess(process, receiver))
        yield started
    finally:
        for helper in started:
            helper.process.kill()
        for helper in started:
            helper.process.join()


def run_worker(tool: Tool, words: Sequence[str], group: WorkerGroup, report: Connection) -> None:
    """Entry point of all processes but the first. Only the first one shows progress and mistakes."""
    end_with_parent()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            plan = decide_caching(_parsed(words, tool), tool.kind)
            report.send(str(_fill(plan, group, progress=False)))
        except UserError as error:
            first: Mistake = error.mistakes[0]
            report.send(f"ended early ({first.what}); the other processes encoded its share")
        except KeyboardInterrupt:
            pass
        finally:
            report.close()
