"""Collectives with two real processes, and no communication with one."""

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


def _as_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    processes = join(rank, 2, folder)
    share = torch.tensor(0.25 + rank)
    assert processes == Processes(rank, 2) and processes.is_writer == (rank == 0)
    assert float(processes.sum(share)) == 1.5 and float(share) == 0.25 + rank  # the share itself stays
    assert processes.sum(torch.tensor(torch.nan if rank == 1 else 1.0)).isnan()
    assert processes.gather(["a"] * rank) == [[], ["a"]]
    torch.distributed.destroy_process_group()


def test_two_processes_agree(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_as_rank, (tmp_path,), nprocs=2)


def test_one_process_is_alone_and_gives_values_back_as_they_are() -> None:
    alone, share, value = Processes.current(), torch.tensor(0.1), object()
    assert alone == Processes() and alone.is_writer
    assert alone.sum(share) is share
    assert alone.gather(value)[0] is value
