"""What makes one run another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.options.parse import parse
from library.training.plan.identity import DATA
from library.training.plan.plan import decide
from tests.data.pictures import save
from tests.training.running import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_picture_with_another_score_is_other_data(world: World, tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    seen = []
    for entry in ({}, {"aesthetic_score": 7}, {"aesthetic_score": 7.5}, {"aesthetic_score": "7.50"}):
        (tmp_path / "meta.json").write_text(json.dumps({"a.png": {"caption": "a", **entry}}), encoding="utf-8")
        flags: dict[str, object] = {"train_data_dir": tmp_path / "x", "in_json": tmp_path / "meta.json"}
        seen.append(decide(parse(world.arguments(tmp_path / "out", **flags))).identity[DATA])
    assert len(set(seen)) == 3 and seen[2] == seen[3]
