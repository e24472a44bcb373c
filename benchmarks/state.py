"""How long training waits for a state, against a plain copy of what changes, and against writing it while it waits.

    python benchmarks/state.py

A model of the size of Stable Diffusion 1.5's U-Net (860 million weights in float32, random) with AdamW and its state:
10.3 GB; `--scale 0.25` takes a quarter of each tensor. The steps that train on meanwhile are not timed: a state that is
written takes bandwidth of the disk and a little of one core. In each round the three are timed one after the other, so
that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.machine import describe  # noqa: E402
from benchmarks.pairs import spread  # noqa: E402
from library.messages import readable_bytes  # noqa: E402
from library.training.optim.optimizers import ExactState, allocate_state  # noqa: E402
from library.training.saving.state import (  # noqa: E402
    Description,
    Progress,
    RunState,
    bytes_of,
    save_state,
)
from library.training.saving.state_writer import StateWriter  # noqa: E402

WEIGHTS = 860_000_000
TENSORS = 686  # of the U-Net


def make_state(scale: float) -> RunState:
    """A module with as many weights and tensors as the U-Net, and AdamW after a step."""
    per_tensor = int(WEIGHTS * scale) // TENSORS
    module = nn.ParameterDict(
        {f"weight{number:03d}": nn.Parameter(torch.randn(per_tensor)) for number in range(TENSORS)}
    )
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    allocate_state(optimizer)
    return {"unet": module, "optimizer": ExactState(optimizer)}


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors of nested dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for inner in value.values() for tensor in tensors_of(inner)] if isinstance(value, dict) else []


def timed(call: Any) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scale", type=float, default=0.25, help="share of the full size; 1 needs 22 GB of memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where states are written; not set: a temporary folder")
    chosen = parser.parse_args()
    state = make_state(chosen.scale)
    changing = [tensor for entry in state.values() if entry is not None for tensor in tensors_of(entry.state_dict())]
    states = StateWriter(state, Description({}), print, lambda: 2**60)
    to_copy, to_write = [], []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder, states.writing():
        target = Path(folder) / "a-state"
        for _ in range(chosen.rounds):
            copy = timed(lambda: [tensor.detach().clone() for tensor in changing])
            pause = timed(lambda: states.begin(target, Progress(), lambda: None))
            states.collect(wait=True)
            waiting = timed(lambda: save_state(target, Progress(), state, Description({})))
            to_copy.append(pause / copy)
            to_write.append(pause / waiting)
    print(describe())
    print(f"state of {readable_bytes(bytes_of(state))}, {chosen.rounds} rounds")
    print(f"pause of a save / a plain copy of what changes: {spread(to_copy)}")
    print(f"pause of a save / writing it while training waits: {spread(to_write)}")


if __name__ == "__main__":
    main()
