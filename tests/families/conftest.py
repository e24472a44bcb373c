"""Miniature checkpoints, written once for all tests of this folder (never written to)."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.checkpoints.files import read_header
from library.families.family import Model
from library.families.registry import load_model
from tests import tiny


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "sd1", "sdxl", ...: single files; "sd1 folder", ...: diffusers folders of the same weights."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}
    for family in tiny.ALL:
        made[family] = tiny.write_single_file(root / f"{family}.safetensors", family)
        made[f"{family} folder"] = tiny.write_diffusers(root / family, family)
    return made


@pytest.fixture(scope="session")
def sdxl(files: dict[str, Path]) -> Model:
    """The miniature of SDXL, loaded; for tests that change nothing in it."""
    return load_model(read_header(files["sdxl"]))


@pytest.fixture(scope="session")
def refiner(files: dict[str, Path]) -> Model:
    """The miniature of the refiner, loaded; for tests that change nothing in it."""
    return load_model(read_header(files["refiner"]))
