"""From the command line to the exit code: what every recipe does around its own choice of what is trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from library.options.mistakes import Mistake, UserError
from library.options.parse import parse
from library.options.render import write_config
from library.runtime.imports import large_imports, quiet_libraries
from library.training.signals import termination_as_interrupt

if TYPE_CHECKING:
    from library.training.recipe import Recipe

INTERRUPTED = "interrupted: what was saved before stands; --resume goes on from the last state of --save_state"
LESS_MEMORY = (
    "what saves most comes first: --gradient_checkpointing, a smaller --train_batch_size with accumulation, "
    "--optimizer_type AdamW8bit, --mixed_precision bf16 or fp16, --cache_latents, a smaller --resolution"
)
OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")  # in messages of torch's RuntimeErrors


def run_recipe(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Parse, decide, show the plan, train. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    return finish(partial(_run, recipe, words), INTERRUPTED)


def finish(work: Callable[[], None], interrupted: str) -> int:
    """Do the work of a program, and turn how it ended into its exit code. `interrupted` is what to say after Ctrl-C."""
    make_output_safe()
    quiet_libraries()
    try:
        with termination_as_interrupt():
            work()
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(
            os.devnull, "w", encoding="utf-8"
        )  # whoever read the output has gone: nothing more can be said
        return 1
    return 0


def _run(recipe: Recipe, arguments: Sequence[str]) -> None:
    parsed = parse(arguments, recipe.program)
    if parsed.options.run.output_config:
        if parsed.mistakes:
            raise UserError(parsed.mistakes)
        print(f"options written to {write_config(parsed.options)}")
        return
    from library.training.plan.plan import decide  # --help and --output_config need none of it
    from library.training.plan.text import describe, sections

    plan = decide(parsed)
    print(describe(plan), flush=True)
    if plan.facts.options.dataset.debug_dataset:
        from library.training.debug_dataset import show_dataset

        show_dataset(plan.facts, plan.outputs.directory, sections(plan))
    elif plan.facts.options.run.dry_run:
        print("dry run: no weight was loaded and nothing was written")
    else:
        with large_imports():
            from library.training.session import train
        with explain_out_of_memory():
            train(plan, recipe)


def make_output_safe() -> None:
    """File names and captions of any script must not end a run on a console or pipe with a small alphabet."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


@contextmanager
def explain_out_of_memory(remedy: str = LESS_MEMORY) -> Iterator[None]:
    """Turn an exhausted memory into a message that names what saves memory."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not exhausted and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "main memory"
        raise UserError((Mistake(f"the memory is exhausted ({reason})", remedy),)) from error
