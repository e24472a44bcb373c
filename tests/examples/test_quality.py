"""The page of quality is rendered from the kept results of all comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.shapes import quality
from examples.shapes.compare import TABLES

KEPT = {
    "lora --seed 1": {"subject": 0.8, "moved": 0.1, "broken": 0.05, "seconds": 9.0, "size": 1, "peak": 2},
    "lora --seed 3": {"subject": 0.9, "moved": 0.2, "broken": 0.15, "seconds": 9.0, "size": 1, "peak": 2},
    "dreambooth --seed 1": {"subject": 1.0, "moved": 0.125, "broken": 0.0, "seconds": 9.0, "size": 1, "peak": 2},
}


def test_the_table_has_every_measured_way_with_its_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, page = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "quality.md"
    first.write_text(json.dumps({key: KEPT[key] for key in list(KEPT)[:2]}), encoding="utf-8")
    second.write_text(json.dumps({key: KEPT[key] for key in list(KEPT)[2:]}), encoding="utf-8")
    text = quality.PAGE.read_text(encoding="utf-8")
    head, _, foot = text.partition(quality.BEGIN)
    earlier = (
        "| adapters | LoRA | 1 | 70.0% | 0.500 | 1.0% |",
        "| adapters | DreamBooth | 1, 2 | 90.0% (88.3% to 91.7%) | 0.100 (0.090 to 0.110) | 5.0% (4.6% to 5.4%) |",
    )
    page.write_text("\n".join([head + quality.BEGIN, *earlier, quality.END + foot.partition(quality.END)[2]]), "utf-8")
    words = ["--results", str(first), str(second), "--page", str(page)]
    quality.main(words)
    assert capsys.readouterr().out.startswith("| Comparison | Way |")
    once = page.read_text(encoding="utf-8")
    quality.main(words)
    assert page.read_text(encoding="utf-8") == once
    for row in (
        "| adapters | LoRA | 1, 3 | 85.0% (80.0% to 90.0%) | 0.150 (0.100 to 0.200) | 10.0% (5.0% to 15.0%) |",
        "| preservation | reg_images | 1, 3 | 85.0%",
        "| preservation of all weights | reg_images | 1 | 100.0% | 0.125 | 0.0% |",
        earlier[1],  # it has more seeds
    ):
        assert row in once
    assert earlier[0] not in once
    assert "Not measured yet: adapters: DoRA; adapters: LoKr" in once


def test_every_way_has_a_row_once_it_is_measured() -> None:
    values = KEPT["lora --seed 1"]
    table = quality.render({way: {1: values} for ways in TABLES.values() for way in ways.values()})
    assert table.count("\n") == 2 + sum(map(len, TABLES.values())) and "Not measured" not in table


def test_a_page_without_marks_and_missing_results_are_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="has no lines"):
        quality.fill_in("# Quality\n", "")
    with pytest.raises(SystemExit, match="2"):
        quality.main(["--results", "gone.json"])
    assert "gone.json is not there" in capsys.readouterr().err
