"""tools/estimate_memory.py: the prediction of a command, and its mistakes as the command itself tells them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import tiny
from tools.estimate_memory import main


def words(root: Path) -> list[str]:
    tiny.write_single_file(root / "sd1.safetensors", "sd1")
    tiny.write_images(root / "train" / "2_sks dog", 2, size=(64, 64))
    return [
        "train_network.py", f"--pretrained_model_name_or_path={root / 'sd1.safetensors'}",
        f"--train_data_dir={root / 'train'}", "--resolution=64", f"--output_dir={root / 'out'}",
        "--network_module=networks.lora",
    ]  # fmt: skip


def test_the_parts_of_the_peak_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is written."""
    assert main(["--", *words(tmp_path), "--cache_latents"]) == 0
    out = capsys.readouterr().out
    assert "a CUDA card" in out
    assert "encoding images" in out
    assert "counted from shapes" in out
    assert "assumed" in out
    block = re.split(r"\n(?=\S)", out.split("\na step:")[1])[0]
    total, *parts = map(float, re.findall(r"([\d.]+) GiB", block))
    assert sum(parts) == pytest.approx(total, abs=0.01 * len(parts))
    assert not (tmp_path / "out").exists()


def test_main_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cpu", *words(tmp_path)]) == 0
    assert "main memory" in capsys.readouterr().out


def test_wrong_flags_are_told_as_by_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--", *words(tmp_path), "--learning_rat=1"]) == 2
    assert "did you mean --learning_rate?" in capsys.readouterr().err
    assert main(["--", "gen_img.py"]) == 2
    assert "train_network.py" in capsys.readouterr().err
