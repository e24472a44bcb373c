"""How this program was started: alone, or as one of several processes by torchrun, accelerate or mpirun. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.mistakes import Mistakes

_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
"""Environment variables of torchrun and accelerate, then of Intel MPI, Open MPI and MVAPICH."""


@dataclass(frozen=True)
class Launch:
    """This process among those of the run: its `rank` of `world`, and its `local_rank` of the `local_world` processes
    on this machine, which selects its GPU. `seed`: what the first process drew for a run without --seed."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    seed: int | None = None

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files, logs and messages."""
        return self.rank == 0


ALONE = Launch()


def read_launch(environment: Mapping[str, str], mistakes: Mistakes) -> Launch:
    """Read the variables that a launcher sets; a single process without them, or with a mistake added."""
    found = {
        names[0]: (name, environment[name].strip())
        for names in (_WORLD, _RANK, _LOCAL_RANK, _LOCAL_WORLD)
        for name in reversed(names)
        if environment.get(name, "").strip()
    }
    if "WORLD_SIZE" not in found and environment.get("ACCELERATE_USE_CPU", "").lower() == "true":
        if environment.get("MASTER_ADDR"):  # set by accelerate's launcher for more than one process
            mistakes.add(
                "accelerate launch --cpu was asked for several processes, and starts one",
                "use torchrun --nproc_per_node N, or accelerate launch --cpu --num_processes 1",
            )
        return ALONE
    invalid = {name: text for name, text in found.values() if not text.isdecimal()}
    for name, text in invalid.items():
        mistakes.add(
            f"{name} = {text} (environment) is not a number", "set WORLD_SIZE to the number of processes, RANK from 0"
        )
    world = 1 if invalid else max(1, int(found.get("WORLD_SIZE", ("", "1"))[1]))
    if invalid or world == 1:
        return ALONE
    name, text = found.get("RANK", ("RANK", str(world)))
    rank = int(text)
    if rank >= world:
        what = f"{name} = {text}" if "RANK" in found else "no RANK"
        mistakes.add(f"{what} with WORLD_SIZE = {world} (environment)", f"number the processes from 0 to {world - 1}")
        return ALONE
    local_rank = int(found.get("LOCAL_RANK", ("", str(rank)))[1])
    local_world = int(found.get("LOCAL_WORLD_SIZE", ("", str(max(local_rank + 1, world))))[1])
    return Launch(rank, world, local_rank, max(1, local_world))
