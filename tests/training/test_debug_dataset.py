"""--debug_dataset: what it says where its page cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.running import make_world, run


def test_a_page_that_cannot_be_written_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path)
    (tmp_path / "out" / "dataset.html").mkdir(parents=True)
    outcome = run(world.arguments(tmp_path / "out", debug_dataset=True), capsys)
    assert outcome.code == 2 and "dataset.html" in outcome.err and "Traceback" not in outcome.err
