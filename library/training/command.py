"""The command of every recipe: parse flags, print the plan, train, and return an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.packages import check_packages
from library.options.parse import Parsed, parse
from library.options.render import write_config
from library.options.report import report_mistakes
from library.options.tool_command import quiet_broken_pipe
from library.runtime.imports import large_imports, quiet_libraries
from library.runtime.launch import read_launch
from library.runtime.out_of_memory import is_out_of_memory
from library.runtime.signals import report_interrupt, signals_as_interrupts
from library.runtime.terminal import columns_of

if TYPE_CHECKING:
    from library.training.plan.facts import RunFacts
    from library.training.preview.plan import PreviewPlan
    from library.training.recipe import Recipe
    from library.training.saving.outputs import Outputs

INTERRUPTED = "interrupted before training began: no model was saved"
LESS_MEMORY = (
    "save memory, most effective first: --gradient_checkpointing, a smaller --train_batch_size with "
    "--gradient_accumulation_steps, --optimizer_type AdamW8bit, --mixed_precision bf16 or fp16, --cache_latents, "
    "a smaller --resolution"
)


def run_recipe(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Parse, plan, print the plan, train. Returns the exit code: 0 done, 2 user error, 130 Ctrl-C, 143 SIGTERM, 129
    SIGHUP."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    mistakes = Mistakes()
    launch = read_launch(os.environ, mistakes)
    if launch.world > 1:
        # DistributedDataParallel warns of looking for unused parameters in vain
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with large_imports():
            from library.runtime.meeting import end_process
            from library.training.joint_run import run_jointly

        code = run_jointly(recipe, words, launch)
        return code if arguments is not None else end_process(code)
    return run_program(partial(_run, recipe, words, mistakes), INTERRUPTED)


def run_program(work: Callable[[], object], interrupted: str) -> int:
    """Run `work` and return the exit code of the program. `interrupted` is printed after a signal that ends it and says
    nothing itself."""
    make_output_safe()
    quiet_libraries()
    try:
        with signals_as_interrupts(), quiet_broken_pipe():
            work()
    except UserError as error:
        return report_mistakes(error)
    except KeyboardInterrupt as interrupt:
        return report_interrupt(str(interrupt) or interrupted, interrupt)
    return 0


def _run(recipe: Recipe, arguments: Sequence[str], mistakes: Mistakes) -> None:
    mistakes.raise_if_any()
    parsed = parse(arguments, recipe.program)
    if parsed.options.run.output_config:
        write_options(parsed)
        return
    from library.training.plan.plan import decide  # slow to import, and not needed for --help and --output_config
    from library.training.plan.text import describe, sections

    clear_before(parsed)
    plan = decide(with_packages(parsed))
    print(describe(plan, columns_of(sys.stdout)), flush=True)
    if not shows_only(plan.facts, plan.outputs, sections(plan)):
        with large_imports():
            from library.training.session import train
        with explain_out_of_memory(), claiming(plan.outputs, plan.preview):
            train(plan, recipe)


def clear_before(parsed: Parsed) -> None:
    """Remove what killed processes left in the output folder of a run that trains."""
    from library.training.saving.claim import clear_leftovers

    if not (parsed.options.run.dry_run or parsed.options.dataset.debug_dataset):
        clear_leftovers([parsed.options.saving.output_dir], print)  # a state to resume from may be among them


def claiming(outputs: Outputs, preview: PreviewPlan | None) -> AbstractContextManager[None]:
    """Hold the output names of a run, so that no other run writes them."""
    from library.training.saving.claim import claimed

    return claimed(outputs, (None if preview is None else preview.folder, outputs.snapshot_folder), print)


def write_options(parsed: Parsed) -> None:
    """Carry out --output_config. Raises UserError for mistakes in the options."""
    if parsed.mistakes:
        raise UserError(parsed.mistakes)
    print(f"options written to {write_config(parsed.options)}")


def with_packages(parsed: Parsed) -> Parsed:
    """The options with notes about installed packages; their mistakes are added."""
    return replace(parsed, notes=(*check_packages(parsed.mistakes), *parsed.notes))


def shows_only(facts: RunFacts, outputs: Outputs, sections: Mapping[str, Iterable[str]]) -> bool:
    """Whether the run is only shown: with --dry_run, and with --debug_dataset, which shows its images now."""
    if facts.options.dataset.debug_dataset:
        from library.training.debug_dataset import show_dataset

        show_dataset(facts, outputs.directory, sections)
        return True
    if facts.options.run.dry_run:
        print("dry run: no weights were loaded and no files were written")
    return facts.options.run.dry_run


def make_output_safe() -> None:
    """Replace characters that the console or pipe cannot encode, so that no file name or caption ends a run."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


@contextmanager
def explain_out_of_memory(remedy: str = LESS_MEMORY) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError with `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "main memory"
        raise UserError((Mistake(f"out of memory ({reason})", remedy),)) from error
