"""tools/estimate_memory.py: the prediction of a command, and its mistakes as the command itself tells them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.options.parse import PROGRAMS, parse
from library.training.plan.memory.machine import planned_machine
from library.training.plan.plan import decide
from library.training.plan.text import sections
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


def test_the_plan_tells_the_same_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = words(tmp_path)
    assert main(["--cpu", *command]) == 0
    block = next(part for part in capsys.readouterr().out.split("\n") if "(the peak)" in part)
    plan = decide(parse(command[1:], PROGRAMS[command[0]]), machine=planned_machine(cpu=True))
    (line,) = (line for line in sections(plan)["memory"] if "peak" in line)
    told = re.findall(r"([\d.]+) ([GM])B", line)
    peak, *parts, _ = (float(number) * {"G": 1e9, "M": 1e6}[unit] for number, unit in told)
    assert peak == pytest.approx(float(re.findall(r"([\d.]+) GiB", block)[0]) * 2**30, rel=0.01)
    assert sum(parts) == pytest.approx(peak, rel=0.01)
    assert not any("without activations" in line for line in sections(plan)["memory"]), "another count beside it"


def test_wrong_flags_are_told_as_by_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--", *words(tmp_path), "--learning_rat=1"]) == 2
    assert "did you mean --learning_rate?" in capsys.readouterr().err
    assert main(["--", " ".join(words(tmp_path))]) == 2
    assert "without quotes" in capsys.readouterr().err
    assert main(["--", "gen_img.py"]) == 2
    assert "train_network.py" in capsys.readouterr().err


def test_a_command_is_read_as_it_would_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its launcher, which may have flags; what has no effect is said, as the program says it."""
    command = [*words(tmp_path), "--fused_backward_pass", "--gradient_accumulation_steps=2"]
    assert main(["--", "accelerate", "launch", "--num_processes", "2", *command]) == 0
    launched = capsys.readouterr().out
    assert "for one process: accelerate launch --num_processes 2 is not read" in launched
    assert "--fused_backward_pass has no effect" in launched
    assert main([".venv/bin/python3.11", *command]) == 0
    assert capsys.readouterr().out == launched[: launched.index("for one process")]
