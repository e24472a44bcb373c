"""Network modules of others (--network_module lycoris.kohya, a file of the user's own): found, checked and called.

They offer `create_network` in kohya's protocol (sd-scripts, train_network.py). What goes wrong in them is told as a
mistake, for a wrong --network_args is the usual cause. No torch at module level.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from networks.adapter import AdapterError

# What to install for a module that is not there.
PACKAGES: Mapping[str, str] = {"lycoris": "lycoris-lora==4.1.3"}
_ROOT = Path(__file__).resolve().parents[2]


def import_network_module(name: str) -> ModuleType:
    """The module of --network_module, found in the current folder, beside the program, or installed. AdapterError."""
    for place in (str(Path.cwd()), str(_ROOT)):
        if place not in sys.path:
            sys.path.append(place)  # behind what is installed; stays, as the module may import beside itself later
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing(name, error) from error
    except Exception as error:  # whatever a module does when it is imported
        what = f"--network_module {name} cannot be imported: {type(error).__name__}: {error}"
        raise AdapterError(what, "Correct or update it.") from error
    if not callable(getattr(module, "create_network", None)):
        raise AdapterError(
            f"--network_module {name} ({getattr(module, '__file__', None) or 'no file'}) has no create_network",
            "Name a module that offers it, such as networks.lora or lycoris.kohya.",
        )
    return module


def _missing(name: str, error: ModuleNotFoundError) -> AdapterError:
    head, missing = name.partition(".")[0], error.name or ""
    if missing == head:
        package = PACKAGES.get(head)
        if package:
            return AdapterError(f"--network_module {name}: {head} is not installed", f"pip install {package}")
        remedy = f"Check the name; a file of your own lies in the current folder or on PYTHONPATH: {head}.py"
        return AdapterError(f"--network_module {name}: there is no module {head}", remedy)
    if (name + ".").startswith(missing + "."):
        package = PACKAGES.get(head)
        remedy = f"Check the name, or: pip install {package}" if package else "Check the name."
        return AdapterError(f"--network_module {name}: {head} has no module {missing}", remedy)
    return AdapterError(
        f"--network_module {name} needs the package {missing}, which is not installed", f"pip install {missing}"
    )


def read_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """--network_args as foreign modules get them: text, the last of a repeated one. AdapterError without a `=`."""
    read = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or not key.strip():
            raise AdapterError(f"--network_args {argument!r} is not of the form key=value", "Write key=value.")
        read[key.strip()] = value.strip()
    return read


def check_arguments(module: ModuleType, arguments: Mapping[str, str]) -> tuple[str, ...]:
    """Arguments that nothing in the module's source names, told as notes. AdapterError for a near miss of one."""
    known = _named(module)
    notes = []
    for key in arguments:
        if known is None or key in known:
            continue
        near = difflib.get_close_matches(key, _read_by(module), n=1, cutoff=0.85)
        if near:
            what = f"--network_args {key}={arguments[key]}: {module.__name__} reads no {key}"
            raise AdapterError(what, f"Did you mean {near[0]}?")
        notes.append(f"--network_args {key}={arguments[key]} changes nothing: {module.__name__} does not read it")
    return tuple(notes)


def _tree(module: ModuleType) -> ast.Module | None:
    try:
        return ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return None


def _named(module: ModuleType) -> set[str] | None:
    """Every text and parameter in the source; None where arguments are handed on, so that no one can tell."""
    tree = _tree(module)
    if tree is None:
        return None
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.add(node.value)
        elif isinstance(node, ast.arg):
            named.add(node.arg)
        elif isinstance(node, ast.FunctionDef) and node.name == "create_network" and _hands_on(node):
            return None
    return named


def _hands_on(function: ast.FunctionDef) -> bool:
    """Whether a function passes its own **kwargs to another, by ** or as a value."""
    rest = function.args.kwarg
    if rest is None:
        return False
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    values = [value for call in calls for value in (*call.args, *(keyword.value for keyword in call.keywords))]
    return any(isinstance(value, ast.Name) and value.id == rest.arg for value in values)


def _read_by(module: ModuleType) -> list[str]:
    """What `create_network` itself takes out of its arguments: what a near miss is measured against."""
    tree = _tree(module)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)] if tree else []
    names = []
    for function in (node for node in functions if node.name == "create_network"):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                names.append(str(node.args[0].value))
    return names


@contextmanager
def told(what: str, remedy: str = "Check --network_args and the page of that module.") -> Iterator[None]:
    """Turn whatever a foreign module raises into an AdapterError that says what was asked of it."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{what} failed: {type(error).__name__}: {error}", remedy) from error


def call_if_there(module: Any, name: str, *values: Any) -> bool:
    """Call a method that a foreign network may have; False if it has none."""
    method: Callable[..., Any] | None = getattr(module, name, None)
    if method is None:
        return False
    method(*values)
    return True
