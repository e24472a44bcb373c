"""Options of a run with several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import flag


@dataclass(frozen=True)
class ProcessOptions:
    """How the processes of a run share their gradients; without effect in a single one."""

    may_change_on_resume: ClassVar[bool] = True

    ddp_timeout: int | None = flag(
        None,
        "Minutes that a process waits for the others before the run ends; not set = 30. It must be longer than "
        "saving, drawing and validating take.",
        at_least=1,
        zero_is_off=True,
    )
    ddp_gradient_as_bucket_view: bool = flag(
        False, "Several processes: keep gradients only where they are exchanged, which saves the memory of one copy."
    )
    ddp_static_graph: bool = flag(
        False,
        "Several processes: take it that every batch gives gradients to the same parameters, which saves looking for "
        "those without. Refused with module_dropout.",
    )
