"""A program that is started with a Python without the packages says which one to use, without a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from library.messages import pip_install

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "library",
    "networks",
    "tools",
    "pyproject.toml",
    "gen_img.py",
    "train_db.py",
    "sdxl_train.py",
    "train_network.py",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs in a folder with a blank in its name, without an environment."""
    root = tmp_path_factory.mktemp("a project")
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    return root


def start(project: Path, *words: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Start a program in its folder with the standard library alone (-S: no site-packages)."""
    command = [python, "-S", "-E", *words]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, encoding="utf-8", check=False)


PROGRAMS = [
    ("train_db.py", "--dry_run", "--pretrained_model_name_or_path=m", "--train_data_dir=t", "--output_dir=o"),
    ("sdxl_train.py", "--dry_run"),
    ("gen_img.py", "--ckpt=m", "--prompt=a"),
    ("tools/merge_lora.py", "--help"),
    ("tools/make_class_images.py", "--ckpt=m", "--prompt=a", "--outdir=o"),
    ("networks/svd_merge_lora.py", "--help"),
]


@pytest.mark.parametrize("words", PROGRAMS, ids=lambda words: words[0])
def test_a_python_without_the_packages_is_told_to_set_up(words: tuple[str, ...], project: Path) -> None:
    ended = start(project, *words)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"this Python, {sys.executable}, has no package " in ended.stderr
    interpreter = os.path.join(".venv", "Scripts", "python.exe") if os.name == "nt" else ".venv/bin/python"
    running = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    assert f"create the environment: {running} set_up.py; then: {interpreter} {words[0]} ..." in ended.stderr


def test_the_environment_beside_the_programs_is_named(project: Path) -> None:
    interpreter = project / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    interpreter.parent.mkdir(parents=True)
    interpreter.touch()
    try:
        ended = start(project, "gen_img.py", "--ckpt=m", "--prompt=a")
        near = os.path.relpath(interpreter, project)
        assert f"start it with the environment's own Python: {near} gen_img.py ..." in ended.stderr
        elsewhere = start(project.parent, str(project / "gen_img.py"), "--ckpt=m", "--prompt=a")
        assert f'"{interpreter}"' not in elsewhere.stderr, "the folder below the current one is named from there"
        assert f'"{interpreter.relative_to(project.parent)}"' in elsewhere.stderr
    finally:
        shutil.rmtree(project / ".venv")


def test_help_needs_no_package(project: Path) -> None:
    ended = start(project, "train_db.py", "--help")
    assert ended.returncode == 0 and "--output_dir" in ended.stdout


def test_an_old_python_is_named_before_anything_fails(project: Path) -> None:
    program = project / "old.py"
    program.write_text("import sys\nsys.version_info = (3, 9, 1)\nimport library.options.parse\n", encoding="utf-8")
    ended = start(project, "old.py")
    assert ended.returncode == 2 and "has version 3.9, but Dreamfolder needs 3.11 or newer" in ended.stderr


@pytest.mark.parametrize(
    ("where", "code", "kept"),
    [
        ("project", "import library.messages\nimport library.gone\n", "No module named 'library.gone'"),
        ("project", "import library.messages\nraise KeyError(3)\n", "KeyError: 3"),
        ("elsewhere", "import library.messages\nimport no_such_package\n", "No module named 'no_such_package'"),
    ],
)
def test_other_errors_and_other_programs_keep_their_tracebacks(
    where: str, code: str, kept: str, project: Path, tmp_path: Path
) -> None:
    program = (project if where == "project" else tmp_path) / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(project)!r})\n{code}", encoding="utf-8")
    ended = start(project, str(program))
    assert ended.returncode == 1 and "Traceback" in ended.stderr and kept in ended.stderr


def test_install_lines_are_those_of_the_running_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/py 3/bin/python")
    assert pip_install("scipy") == '"/opt/py 3/bin/python" -m pip install scipy'
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert pip_install("prodigyopt==1.1.2") == "/usr/bin/python3 -m pip install prodigyopt==1.1.2"
