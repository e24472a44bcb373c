"""A run with several processes: they meet, make one plan, train, and end together."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from library.options.parse import parse
from library.runtime.imports import large_imports
from library.runtime.launch import Launch
from library.runtime.meeting import Meeting, meet
from library.runtime.processes import Processes
from library.runtime.terminal import columns_of
from library.training.command import (
    INTERRUPTED,
    claiming,
    clear_before,
    explain_out_of_memory,
    run_program,
    shows_only,
    with_packages,
    write_options,
)
from library.training.plan.facts import draw_seed
from library.training.plan.plan import decide
from library.training.plan.processes import decide_together
from library.training.plan.text import describe, sections

if TYPE_CHECKING:
    from library.training.recipe import Recipe


def run_jointly(recipe: Recipe, arguments: Sequence[str], launch: Launch) -> int:
    """As command.run_recipe, for one of several processes. The exit code is the same on all of them; only the writer
    prints."""
    codes: list[int] = []

    def work() -> None:
        with meet(launch) as meeting:
            codes.append(run_program(partial(_run, recipe, arguments, meeting), INTERRUPTED))
            meeting.end(codes[0])

    failed = run_program(work, INTERRUPTED)  # the others were not found
    return codes[0] if codes else failed


def _run(recipe: Recipe, arguments: Sequence[str], meeting: Meeting) -> None:
    with meeting.agreeing():
        parsed = parse(arguments, recipe.program)
        if parsed.options.run.output_config:
            if meeting.launch.is_writer:
                write_options(parsed)
            return
        launch = replace(meeting.launch, seed=meeting.shared_seed(draw_seed))
        meeting.open_group(cpu=_computes_on_cpu(), minutes=parsed.options.processes.ddp_timeout)
        processes = Processes.current()
        if launch.is_writer:
            clear_before(parsed)
        plan = decide_together(partial(decide, with_packages(parsed), launch), processes)
        only_shown = False
        if launch.is_writer:
            print(describe(plan, columns_of(sys.stdout)), flush=True)
            only_shown = shows_only(plan.facts, plan.outputs, sections(plan))
        if not processes.agree(only_shown):
            with large_imports():
                from library.training.session import train
            with explain_out_of_memory(), claiming(plan.outputs, plan.preview) if launch.is_writer else nullcontext():
                train(plan, recipe, meeting.agreeing, meeting.all_alike)


def _computes_on_cpu() -> bool:
    from library.runtime.device import cpu_is_forced

    with large_imports():
        import torch
    return cpu_is_forced(os.environ) or not torch.cuda.is_available()
