"""One of two processes that go through many runs together: `python -m tests.training.pair_worker CASES RESULTS`.

Starting an interpreter costs more than a miniature run, so one pair does all of them. Each run meets at a port of its
own, as if its processes had just been started.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as run_recipe does before torch is imported
import torch

from library.runtime.meeting import end_process


def main(cases: Path, results: Path) -> None:
    """Carry out all cases, and write what became of them."""
    from library.training.command import run_recipe
    from tests.training.running import recorded_losses

    outcomes: list[dict[str, Any]] = []
    groups: list[Any] = []
    for case in json.loads(cases.read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(case["port"])
        began = time.monotonic()
        out, err = io.StringIO(), io.StringIO()
        losses: dict[int, float] = {}
        with redirect_stdout(out), redirect_stderr(err):
            try:
                module = importlib.import_module(case["module"])
                if case["function"] and not case["words"]:
                    code = getattr(module, case["function"])()
                else:
                    with recorded_losses() as losses:
                        run = getattr(module, case["function"]) if case["function"] else run_recipe
                        code = run(module.RECIPE, case["words"])
            except BaseException:  # noqa: BLE001 - the test reads it
                code = traceback.format_exc()
        if torch.distributed.is_initialized():  # a run leaves that to the end of its process
            groups.append(torch.distributed.group.WORLD)  # destroying it may wait forever (meeting.end_process)
            torch.distributed.destroy_process_group()
        print(case["module"], case["function"], f"{time.monotonic() - began:.1f} s", flush=True)
        outcomes.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "losses": losses})
        results.write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    end_process(0)
