"""Predict the memory of a training run without the run and without a card.

    python tools/estimate_memory.py -- train_network.py --pretrained_model_name_or_path model.safetensors ...

Behind `--` stands the command as it would be run. The prediction is counted from the shapes in the model's header.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.options.flag import flag
from library.options.mistakes import Mistake, UserError
from library.options.parse import PROGRAMS, parse
from library.options.tool_command import Tool, run_tool

USAGE = "python tools/estimate_memory.py [--cpu] -- train_network.py --pretrained_model_name_or_path ..."


@dataclass(frozen=True)
class EstimateOptions:
    """Where the run would compute."""

    cpu: bool = flag(False, "Predict for the CPU. Not set = for this machine's card, or a CUDA card if it has none.")


def estimate(command: list[str], options: EstimateOptions) -> None:
    """Print the moments of the run that need the most memory, part by part. Raises UserError."""
    from library.training.plan.memory.describe import table
    from library.training.plan.memory.machine import planned_machine
    from library.training.plan.plan import decide

    launcher, name, words = split_command(command)
    machine = planned_machine(cpu=options.cpu)
    plan = decide(parse(words, PROGRAMS[name]), machine=machine)
    print(f"{machine.name}; {plan.facts.base_model.family.title}")
    if plan.memory is None:
        print("this cannot be told before the run: it is sharded, or the layers of its network module are not known")
        return
    notes = [note for note in plan.notes if note.startswith("--vram") or "has no effect" in note]
    if launcher:
        notes.append(f"for one process: {' '.join(launcher)} is not read")
    for line in (*table(plan.memory, machine), *notes):
        print(line)


def split_command(command: list[str]) -> tuple[list[str], str, list[str]]:
    """A launcher with its flags, the training program, and the program's flags. Raises UserError without a program."""
    place = next((index for index, word in enumerate(command) if Path(word).name in PROGRAMS), None)
    if place is not None:
        before = command[:place]
        is_python = len(before) == 1 and Path(before[0]).stem.lower().startswith("python")
        return [] if is_python else before, Path(command[place]).name, command[place + 1 :]
    known = ", ".join(PROGRAMS)
    what, remedy = "no command", f"write -- and the command that you would run: one of {known}, and its flags"
    if command and " " in command[0] and any(name in command[0] for name in PROGRAMS):
        what, remedy = f'"{command[0]}" is one word', "write the command without quotes around the whole of it"
    elif command:
        what = f"{Path(command[0]).name} is not a training program"
    raise UserError([Mistake(what, remedy)])


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    starts = (index for index, word in enumerate(words) if word == "--" or not word.startswith("-"))
    place = next(starts, len(words))
    command = [word for word in words[place:] if word != "--"]
    tool = Tool("Predict the memory of a training run.", USAGE, EstimateOptions, partial(estimate, command))
    return run_tool(tool, words[:place])


if __name__ == "__main__":
    raise SystemExit(main())
