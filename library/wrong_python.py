"""Say which Python to use if a program is started with one that cannot run it.

Every program imports `library` before any package, and `library` calls `explain_wrong_python`. Both files are written
so that an older Python can read them.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

OLDEST = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def explain_wrong_python() -> None:
    """In a program of this project, say what to do in place of a traceback about a missing package, and stop at once if
    Python is too old. Other programs that import `library` are left alone."""
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    if program is None or not os.path.abspath(program).startswith(ROOT + os.sep):
        return
    if sys.version_info < OLDEST:
        version = ".".join(map(str, sys.version_info[:2]))
        _stop(_describe(f"has version {version}, but Dreamfolder needs {'.'.join(map(str, OLDEST))} or newer"))
    sys.excepthook = _explain_missing_package


def _explain_missing_package(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    package = (getattr(error, "name", None) or "").partition(".")[0]
    is_ours = any(os.path.exists(os.path.join(ROOT, package + ending)) for ending in ("", ".py"))
    if isinstance(error, ModuleNotFoundError) and not is_ours:
        _stop(missing_package(package))
    sys.__excepthook__(kind, error, traceback)


def missing_package(package: str) -> tuple[str, str]:
    """What is wrong if the running Python lacks a package, and what to do."""
    return _describe(f"has no package {package}")


def _describe(what: str) -> tuple[str, str]:
    return f"this Python, {sys.executable}, {what}", _remedy()


def _stop(mistake: tuple[str, str]) -> None:
    sys.stderr.write(f"\n- {mistake[0]}\n    -> {mistake[1]}\n")
    raise SystemExit(2)


def _remedy() -> str:
    """What to do: use the environment that set_up.py made, make it, or complete it if it is running."""
    venv = os.path.join(ROOT, ".venv")
    interpreter = os.path.join(venv, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
    start = _command(_near(interpreter), _near(sys.argv[0]), "...")
    if os.path.abspath(sys.prefix) == venv:
        requirements = _near(os.path.join(ROOT, "requirements.txt"))
        install = _command(_near(interpreter), "-m", "pip", "install", "-r", requirements)
        return f"complete this environment: {install}"
    if os.path.exists(interpreter):
        return f"start it with the environment's own Python: {start}"
    # an old Python gets the same answer from set_up.py
    return f"create the environment: {_command(sys.executable, _near(os.path.join(ROOT, 'set_up.py')))}; then: {start}"


def _near(path: str) -> str:
    """A path as a user in the current folder would write it."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive of Windows
        return path
    return path if relative.startswith("..") else relative


def _command(*words: str) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in words)
