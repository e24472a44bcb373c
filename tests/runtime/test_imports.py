"""Large imports: no garbage collection, excluded packages, and everything restored afterwards."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from library.runtime.imports import import_in_thread, large_imports

ROOT = Path(__file__).parents[2]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`big_package` imports `extra_package` if it is installed."""
    (tmp_path / "extra_package.py").write_text("", encoding="utf-8")
    (tmp_path / "big_package.py").write_text(
        "import importlib.util\n"
        "has_extra = importlib.util.find_spec('extra_package') is not None\n"
        "if has_extra:\n    import extra_package\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("big_package", "extra_package"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("packages")
def test_hidden_packages_count_as_not_installed_inside_only() -> None:
    with large_imports(without=("extra_package",)):
        big = importlib.import_module("big_package")
        with pytest.raises(ImportError):
            importlib.import_module("extra_package")
    assert not big.has_extra
    assert importlib.util.find_spec("extra_package") is not None
    assert importlib.import_module("extra_package") is sys.modules["extra_package"]


@pytest.mark.usefixtures("packages")
def test_what_is_imported_already_is_not_hidden() -> None:
    extra = importlib.import_module("extra_package")
    with large_imports(without=("extra_package",)):
        assert importlib.import_module("big_package").has_extra
    assert sys.modules["extra_package"] is extra


def test_the_collector_is_off_inside_and_as_it_was_afterwards() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), large_imports():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with large_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_only_what_was_imported_is_kept_from_the_collector() -> None:
    frozen = gc.get_freeze_count()
    with large_imports():
        pass
    assert gc.get_freeze_count() <= frozen


def test_packages_that_keep_an_error_keep_nothing_of_who_imported_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "try:\n    import no_such_package\nexcept ImportError as error:\n    kept = error\n"
    (tmp_path / "careful_package.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    class Large:
        pass

    def load(run: Callable[[Callable[[], object]], None]) -> weakref.ref[Large]:
        run(lambda: importlib.import_module("careful_package"))
        held = Large()
        return weakref.ref(held)

    large = load(import_in_thread)
    gc.collect()
    assert large() is None
    sys.modules.pop("careful_package")
    kept = load(lambda imports: imports() and None)
    gc.collect()
    assert kept() is not None  # so it would be
    with pytest.raises(ZeroDivisionError):
        import_in_thread(lambda: 1 / 0)


def test_a_schedule_of_transformers_imports_no_package_that_is_not_needed() -> None:
    """`peft` alone imports torch's compiler, bitsandbytes and torchao: a fifth of the time until the first step."""
    code = (
        "import sys\n"
        "from library.runtime.imports import NOT_NEEDED\n"
        "from library.training.optim.constructors import load\n"
        "load('transformers.optimization.get_constant_schedule')\n"
        "print([name for name in NOT_NEEDED if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
