"""Miniature checkpoints, written once for all tests of this folder (never written to)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "sd1", "sd2": single files; "sd1 folder", "sd2 folder": diffusers folders of the same weights."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}
    for family in tiny.FAMILIES:
        made[family] = tiny.write_single_file(root / f"{family}.safetensors", family)
        made[f"{family} folder"] = tiny.write_diffusers(root / family, family)
    return made
