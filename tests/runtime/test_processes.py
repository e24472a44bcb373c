"""No communication with one process. What two tell each other: tests/training/test_several_processes.py."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from library.runtime.processes import Processes


def join(rank: int, world: int, folder: Path) -> Processes:
    """Open a local process group over a file; returns this process."""
    if "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=(folder / "meeting").absolute().as_uri(), rank=rank, world_size=world
    )
    return Processes.current()


def test_one_process_is_alone_and_gives_values_back_as_they_are() -> None:
    alone, share, value = Processes.current(), torch.tensor(0.1), object()
    assert alone == Processes() and alone.is_writer
    assert alone.sum(share) is share
    assert alone.gather(value)[0] is value
    assert alone.agree(value) is value and [*alone.in_turn()] == [None]
    alone.barrier()
    with alone.failing_together():
        pass
