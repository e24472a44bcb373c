"""library/options/packages.py, and the versions in pyproject.toml and requirements.txt."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from library.options.mistakes import Mistake, UserError
from library.options.packages import Range, check_packages, read_ranges

ROOT = Path(__file__).resolve().parents[2]
RANGES = (Range("transformers", "4.54", "6"), Range("torch", "2.6", None))


def check(installed: Mapping[str, str]) -> tuple[str, ...]:
    return check_packages(ranges=RANGES, version_of={"torch": "2.13.0+cpu", **installed}.get)


@pytest.mark.parametrize("version", ["4.54", "4.54.0", "4.54.1", "5.23.0", "5.9.9.post1", "5"])
def test_what_is_in_the_range_is_not_mentioned(version: str) -> None:
    assert check({"transformers": version}) == ()


@pytest.mark.parametrize("version", ["4.53.9", "4.6", "3", "4.5.4"])
def test_what_is_too_old_is_a_mistake_with_the_command(version: str) -> None:
    with pytest.raises(UserError, match=rf"transformers {version} \(4\.54 or newer is needed\)") as raised:
        check({"transformers": version})
    assert raised.value.mistakes[0].remedy == f'"{sys.executable}" -m pip install "transformers>=4.54,<6"'


def test_all_packages_are_one_mistake_after_the_others() -> None:
    with pytest.raises(UserError) as raised:
        check_packages((Mistake("a"),), RANGES, {"torch": "2.5.1"}.get)
    first, second = raised.value.mistakes
    assert first.what == "a"
    assert "no transformers, torch 2.5.1" in second.what
    assert second.remedy.endswith('install "transformers>=4.54,<6" "torch>=2.6"')


@pytest.mark.parametrize("version", ["6", "6.0.0rc1", "10.1"])
def test_what_is_newer_is_a_note(version: str) -> None:
    assert check({"transformers": version}) == (
        f"packages newer than this program was tried with: transformers {version} (tried below 6)",
    )


def test_opencv_is_needed_under_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    with pytest.raises(UserError, match="no OpenCV\n.*opencv-python-headless"):
        check({"transformers": "5"})


def test_the_pins_are_in_the_ranges() -> None:
    pins = dict(
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    ranges = read_ranges()
    assert {range_.package for range_ in ranges} >= {"accelerate", "diffusers", "safetensors", "torch", "transformers"}
    assert check_packages(ranges=ranges, version_of=pins.get) == ()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]} <= set(pins)  # type: ignore[index]


def test_the_environment_of_kohya_ss_is_in_the_ranges() -> None:
    """Its pins of July 2026, as far as they are known."""
    pins = {"accelerate": "1.6.0", "diffusers": "0.32.2", "safetensors": "0.4.5", "transformers": "4.54.1"}
    ranges = [range_ for range_ in read_ranges() if range_.package in pins]
    assert check_packages(ranges=ranges, version_of=pins.get) == ()


def test_the_project_can_be_installed(tmp_path: Path) -> None:
    """`pip install -e .` asks for this first; kohya_ss installs its trainer so."""
    program = (
        "import sys; from setuptools import build_meta; build_meta.prepare_metadata_for_build_editable(sys.argv[1])"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    (names,) = tmp_path.glob("*.dist-info/top_level.txt")
    assert names.read_text(encoding="utf-8").split() == ["library", "networks"]
