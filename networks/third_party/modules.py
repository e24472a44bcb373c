"""Import, check and call third-party network modules (--network_module lycoris.kohya, a user's own file).

They implement `create_network` of kohya's protocol (sd-scripts, train_network.py). Their exceptions become user errors,
as a wrong --network_args is the usual cause. No torch at module level.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from library.messages import pip_install
from networks.adapter import AdapterError

# Package -> requirement to install when it is missing.
PACKAGES: Mapping[str, str] = {"lycoris": "lycoris-lora==4.1.3"}
_ROOT = Path(__file__).resolve().parents[2]


def import_network_module(name: str) -> ModuleType:
    """Import --network_module from the current folder, the program's folder or the installed packages. AdapterError."""
    for folder in (str(Path.cwd()), str(_ROOT)):
        if folder not in sys.path:
            sys.path.append(folder)  # after installed packages; stays, as the module may import its neighbours later
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing_module(name, error) from error
    except Exception as error:  # third-party code may raise anything
        what = f"--network_module {name} cannot be imported: {type(error).__name__}: {error}"
        raise AdapterError(what, "correct or update the module") from error
    if not callable(getattr(module, "create_network", None)):
        raise AdapterError(
            f"--network_module {name} ({getattr(module, '__file__', None) or 'no file'}) has no create_network",
            "use a module that has it, such as networks.lora or lycoris.kohya",
        )
    return module


def _missing_module(name: str, error: ModuleNotFoundError) -> AdapterError:
    head, missing = name.partition(".")[0], error.name or ""
    if missing == head:
        package = PACKAGES.get(head)
        if package:
            return AdapterError(f"--network_module {name}: {head} is not installed", pip_install(package))
        remedy = f"check the name; put a file of your own, {head}.py, into the current folder or on PYTHONPATH"
        return AdapterError(f"--network_module {name}: there is no module {head}", remedy)
    if (name + ".").startswith(missing + "."):
        package = PACKAGES.get(head)
        remedy = f"check the name, or: {pip_install(package)}" if package else "check the name"
        return AdapterError(f"--network_module {name}: {head} has no module {missing}", remedy)
    return AdapterError(
        f"--network_module {name} needs the package {missing}, which is not installed", pip_install(missing)
    )


def read_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """--network_args as third-party modules receive them: text; a later key wins. AdapterError without `=`."""
    read = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or not key.strip():
            raise AdapterError(f"--network_args {argument!r} is not of the form key=value", "write key=value")
        read[key.strip()] = value.strip()
    return read


@contextmanager
def wrap_errors(what: str, remedy: str = "check --network_args and the documentation of the module") -> Iterator[None]:
    """Turn every exception of a third-party module into an AdapterError that names the call."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{what} failed: {type(error).__name__}: {error}", remedy) from error


def call_if_there(module: Any, name: str, *values: Any) -> bool:
    """Call an optional method of a third-party network; False if it does not have it."""
    method: Callable[..., Any] | None = getattr(module, name, None)
    if method is None:
        return False
    method(*values)
    return True
