"""The compared methods: their settings are valid, and each is trained, merged and evaluated."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import numpy
import pytest
import torch

from examples.shapes import compare
from examples.shapes import judge as judges
from examples.shapes.images import open_model
from examples.shapes.world import draw_scene, render
from library.options.parse import ADAPTERS, DREAMBOOTH, parse


@pytest.mark.parametrize("way", [way for table in compare.TABLES.values() for way in table.values()])
def test_settings_are_without_a_mistake(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compare.ROOT)
    script, *words = compare.command_of(way)
    parsed = parse(words, DREAMBOOTH if script == "train_db.py" else ADAPTERS)
    assert parsed.mistakes == () and parsed.notes == ()
    assert parsed.options.run.max_train_steps
    assert parsed.options.dataset.reg_data_dir in (None, Path("output/shapes/class"))


def test_an_adapter_is_trained_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way = "lora --max_train_steps=1 --lr_warmup_steps=0 --reg_data_dir= --logging_dir= --log_with="
    monkeypatch.setattr(compare, "OUTPUT", tmp_path)
    cost = compare.train(way, seed=3)
    assert cost.seconds > 0 and cost.peak > 100e6 and cost.file.stat().st_size > 1e5
    before, after = (
        open_model(compare.BASE).backbone.state_dict(),
        compare.trained_model(way, cost.file).backbone.state_dict(),
    )
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("attentions" in name for name in changed)


def test_ways_are_chosen_by_name_and_added() -> None:
    ways = compare.chosen_ways("adapters", ["DoRA"], ["rank 4: lora --network_dim 4"])
    assert ways == {"DoRA": compare.TABLES["adapters"]["DoRA"], "rank 4": "lora --network_dim 4"}


def test_an_image_of_noise_is_broken_and_a_scene_is_not() -> None:
    judge = judges.load()
    scenes = [render(draw_scene(random.Random(seed))) for seed in range(20)]
    noise = list(numpy.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=numpy.uint8))
    assert compare.broken_share(judge, scenes) == 0
    assert compare.broken_share(judge, noise) > 0.5


def test_what_has_a_result_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare.Result(0.8, 0.1, 0.0, 100.0, 2, 3)
    monkeypatch.setattr(compare, "OUTPUT", tmp_path)
    monkeypatch.setattr(compare, "train", None)
    (tmp_path / "compare.json").write_text(json.dumps({"lora --seed 1": asdict(result)}), encoding="utf-8")
    (tmp_path / "lora-seed1.safetensors").touch()
    assert [found[:3] for found in compare.compare({"LoRA": "lora"}, [1], again=False)] == [("LoRA", 1, result)]


def test_the_worst_is_the_least_subject_and_the_most_of_all_else() -> None:
    one, other = compare.Result(0.8, 0.1, 0.0, 100.0, 2, 3), compare.Result(0.9, 0.2, 0.1, 90.0, 2, 4)
    assert compare.worst([one, other]) == compare.Result(0.8, 0.2, 0.1, 100.0, 2, 4)


def test_names_of_files_have_no_blanks_and_differ() -> None:
    ways = [way for table in compare.TABLES.values() for way in table.values()]
    names = {compare.name_of(way, seed) for way in ways for seed in (1, 2)}
    assert len(names) == 2 * len(set(ways)) and all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert max(map(len, names)) < 120  # with the endings of all files of a run


@pytest.mark.parametrize("words", [["--only", "Lora"], ["preservation", "--draw", "sheet.png"]])
def test_a_way_that_is_not_there_is_no_traceback(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *words])
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    assert words[-2] in capsys.readouterr().err
