"""Build the pretend device with the compiler of this machine, once, and keep it outside of the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
OLDEST_TORCH = (2, 13)  # its interface of devices changes from release to release


class CannotBuildError(Exception):
    """Why there is no pretend device on this machine."""


def library_file() -> Path:
    """The shared library: built now if no run of the tests has built these sources for this torch before. Processes
    that need it at once wait for the one that builds. Raises CannotBuildError."""
    import torch

    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        raise CannotBuildError(f"the pretend device needs torch {'.'.join(map(str, OLDEST_TORCH))}")
    key = hashlib.sha256(f"{torch.__version__} {sys.version} {sys.platform}".encode())
    for source in ("device.h", "device.cpp"):
        key.update((HERE / source).read_bytes())
    folder = _kept() / f"pretend device {key.hexdigest()[:16]}"
    whole = folder / "whole"
    if not whole.exists():
        from filelock import FileLock

        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "building"):  # free again if its process is killed
            if not whole.exists():
                _build(folder)
                whole.touch()
    return folder / f"pretend_device{'.pyd' if os.name == 'nt' else '.so'}"


def _kept() -> Path:
    """The folder of what is built: DREAMFOLDER_TEST_CACHE, or one in the user's cache. XDG_CACHE_HOME is not asked: in
    tests it is a folder that goes with them."""
    chosen = os.environ.get("DREAMFOLDER_TEST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ["LOCALAPPDATA"] if os.name == "nt" else Path.home() / ".cache") / "dreamfolder tests"


def _build(folder: Path) -> None:
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise CannotBuildError(f"the pretend device needs a C++ compiler, and there is no {compiler}")
    if not cpp_extension.is_ninja_available():
        raise CannotBuildError("the pretend device needs ninja to be built")
    (folder / "lock").unlink(missing_ok=True)  # torch's own, of a build that was killed
    cpp_extension.load(
        "pretend_device",
        [str(HERE / "device.cpp")],
        extra_cflags=["/Od"] if os.name == "nt" else ["-O0", "-w"],  # the time is spent in torch's kernels
        build_directory=str(folder),
        is_python_module=False,
    )
