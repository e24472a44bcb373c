"""What a saved model says about itself beside what the user said: tests/test_command.py has that."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.parse import parse
from library.training.plan.plan import Plan, decide
from library.training.saving.dataset_metadata import largest_resolution
from library.training.saving.model_file import file_metadata
from tests.training.running import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def plan_of(world: World, out: Path, **flags: object) -> Plan:
    return decide(parse(world.arguments(out, **flags)))


def metadata_of(world: World, out: Path, **flags: object) -> dict[str, str]:
    plan = plan_of(world, out, **flags)
    return file_metadata(plan.facts.options, plan.facts.base_model, largest_resolution(plan.facts.images))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, None),
        ({"min_timestep": 100}, "100,1000"),
        ({"max_timestep": 600}, "0,600"),
        ({"min_timestep": 0, "max_timestep": 900}, "0,900"),
    ],
)
def test_a_range_of_timesteps_is_in_the_metadata(
    flags: dict[str, object], expected: str | None, world: World, tmp_path: Path
) -> None:
    assert metadata_of(world, tmp_path, **flags).get("modelspec.timestep_range") == expected


def test_the_resolution_is_the_largest_that_is_trained(world: World, tmp_path: Path) -> None:
    """Not that of --resolution where a dataset file says another one."""
    cat = (world.root / "train" / "1_zwx cat").as_posix()
    one = "[[datasets]]\nresolution = {}\n[[datasets.subsets]]\nimage_dir = '{}'\nclass_tokens = 'cat'\n"
    file = tmp_path / "data.toml"
    file.write_text(one.format("[128, 64]", cat) + one.format(64, cat), encoding="utf-8")
    flags = {"train_data_dir": None, "dataset_config": file}
    assert metadata_of(world, tmp_path, **flags, resolution=64)["modelspec.resolution"] == "128x64"
    assert metadata_of(world, tmp_path, resolution=64)["modelspec.resolution"] == "64x64"
