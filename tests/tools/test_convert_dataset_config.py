"""tools/convert_dataset_config.py as users call it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import convert_dataset_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "convert_dataset_config.py"

DATASET = """
[[datasets]]
resolution = 512
batch_size = 2
[[datasets.subsets]]
image_dir = "собака"
num_repeats = 10
caption_extension = ".txt"
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "данные.toml"
    path.write_text(DATASET, encoding="utf-8")
    return path


def run(*words: str | Path) -> int:
    return convert_dataset_config.main([str(word) for word in words])


def test_to_the_other_kind_and_back(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "multidatabackend.json", tmp_path / "back.toml"
    assert run(dataset, "--output", there) == 0
    entry = json.loads(there.read_text(encoding="utf-8"))[0]
    assert (entry["instance_data_dir"], entry["repeats"], entry["resolution"]) == ("собака", 9, 512)
    told = capsys.readouterr()
    assert told.out == "" and "without a counterpart: собака: batch_size = 2" in told.err

    assert run(there, "--output", back) == 0
    table = tomllib.loads(back.read_text(encoding="utf-8"))["datasets"][0]
    assert table == {
        "resolution": 512, "batch_size": 1,
        "subsets": [{"image_dir": "собака", "num_repeats": 10, "caption_extension": ".txt"}],
    }  # fmt: skip
    assert "about: multidatabackend.json" in capsys.readouterr().err


def test_without_an_output_it_is_printed(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dataset, "--to", "kohya") == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed) == tomllib.loads(DATASET)


def test_nothing_is_overwritten(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dataset, "--output", dataset) == 2
    assert "already exists" in capsys.readouterr().err and dataset.read_text(encoding="utf-8") == DATASET
    assert run(dataset, "--output", tmp_path / "gone" / "new.json") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("gone.toml", None, ["gone.toml", "no such file"]),
        ("a.toml", "[[datasets]]\nresolutoin = 5\n", ["resolutoin", "did you mean resolution", "no subsets"]),
        ("a.json", '[{"id": "a", "reapets": 1}]', ["did you mean repeats", "instance_data_dir"]),
        ("a.txt", "", ["neither a .toml nor a .json file"]),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, said: list[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert run(tmp_path / name) == 2
    told = capsys.readouterr()
    assert all(word in told.err for word in said) and "Traceback" not in told.err and told.out == ""


def test_wrong_words(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2 and run(dataset, "--to", "onetrainer") == 2 and run(dataset, "--foo") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run("--help") == 0 and "--output" in capsys.readouterr().out


@pytest.mark.parametrize("by_path", [True, False])
def test_it_starts_by_path_from_anywhere_and_as_a_module(dataset: Path, tmp_path: Path, by_path: bool) -> None:
    start, folder = ([str(SCRIPT)], tmp_path) if by_path else (["-m", "tools.convert_dataset_config"], ROOT)
    done = subprocess.run(
        [sys.executable, *start, str(dataset)], cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0 and json.loads(done.stdout)[0]["instance_data_dir"] == "собака", done.stderr
