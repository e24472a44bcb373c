"""The plan as data, for the first event of a run."""

from __future__ import annotations

import re

from library.options.train_options import FLAGS, values_of
from library.training.plan.plan import Plan
from library.training.plan.text import sections
from library.training.saving.state import run_of


def summary(plan: Plan) -> dict[str, object]:
    """Stage (started, resumed), whose run it is, name, folder, length, lines of the plan, notes, and the options that
    were given. Secrets are left out. See docs/events.md."""
    duration, outputs = plan.facts.duration, plan.outputs
    values = values_of(plan.facts.options)
    return {
        "stage": "started" if plan.resume is None else "resumed",
        "run": run_of(plan.identity),
        "name": outputs.final_stem(),
        "output_dir": str(outputs.directory),
        "total_steps": duration.steps,
        "steps_per_epoch": duration.steps_per_epoch,
        "epochs": duration.epochs,
        "plan": [[title, line] for title, section in sections(plan).items() for line in section],
        "options": {
            name: without_password(value)
            for name, value in values.items()
            if name in plan.facts.given and not FLAGS[name].secret
        },
    }


def without_password(value: object) -> object:
    """A value without the name and password of an address, such as of a proxy or a bucket."""
    if isinstance(value, tuple):
        return [without_password(each) for each in value]
    return re.sub(r"//[^/@\s]*@", "//", value) if isinstance(value, str) else value
