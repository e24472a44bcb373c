"""Which of the processes of a launcher this one is."""

from __future__ import annotations

import pytest

from library.options.mistakes import Mistakes
from library.runtime.launch import ALONE, Launch, read_launch


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, ALONE),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ALONE),
        # torchrun, on the second of two machines
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launch(3, 4, 1, 2)),
        # Open MPI; torchrun's variables come first
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Launch(1, 2, 1, 2),
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", "PMI_SIZE": "9", "PMI_RANK": "7"}, Launch(1, 2, 1, 2)),
    ],
)
def test_the_environment_says_which_process_this_is(environment: dict[str, str], launch: Launch) -> None:
    mistakes = Mistakes()
    assert read_launch(environment, mistakes) == launch and not mistakes


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"RANK": "-1"}]
)
def test_an_impossible_environment_is_a_mistake(environment: dict[str, str]) -> None:
    mistakes = Mistakes()
    assert read_launch(environment, mistakes) == ALONE
    (mistake,) = mistakes
    assert "(environment)" in mistake.what and mistake.remedy


def test_processes_that_accelerate_does_not_start_are_told() -> None:
    """`accelerate launch --cpu --num_processes 2` sets an address for two, and starts one."""
    mistakes = Mistakes()
    assert read_launch({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, mistakes) == ALONE
    (mistake,) = mistakes
    assert "torchrun --nproc_per_node" in mistake.remedy
    assert read_launch({"ACCELERATE_USE_CPU": "True"}, mistakes) == ALONE and len(mistakes) == 1


def test_the_first_process_writes() -> None:
    assert ALONE.is_writer and Launch(0, 2).is_writer and not Launch(1, 2).is_writer
