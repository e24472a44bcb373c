"""Find classes by their dotted path and check their arguments without importing them.

Optimizers and schedules come from large packages. The plan must report a missing package, a wrong name or a misspelt
argument at once, so their sources are parsed; only `load` imports them.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from library.options.mistakes import Mistake
from library.runtime.imports import NOT_NEEDED, large_imports
from library.training.optim.argument_types import Accepts, accepts

_WORDS = {"true": True, "false": False, "none": None, "inf": math.inf}


@dataclass(frozen=True)
class LookUp:
    """What the source of a dotted path says. `arguments`: what the constructor accepts, by name, without the first;
    None if unknown (**kwargs, inherited). `problem`: empty if the class exists, or if only importing it could tell."""

    arguments: Mapping[str, Accepts] | None = None
    problem: str = ""
    missing_package: str = ""


def look_up(path: str) -> LookUp:
    """Find a class or function by its dotted path, `package.module.Name`, in source files only."""
    module, _, name = path.rpartition(".")
    if not module:
        return LookUp(problem=f"{path} is not of the form package.module.Name")
    package = module.split(".")[0]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return LookUp(problem=f"the package {package} is not installed", missing_package=package)
    file = source_file(module)
    if file is None:
        is_compiled = spec.origin and not spec.origin.endswith(".py")
        return LookUp() if is_compiled else LookUp(problem=f"there is no module {module}")
    return _look_up_in_file(file, module, name, depth=0)


def load(path: str) -> Any:
    """Import the object at a dotted path. Raises ImportError or AttributeError."""
    module, _, name = path.rpartition(".")
    with large_imports(without=NOT_NEEDED if module.startswith("transformers.") else ()):
        return getattr(importlib.import_module(module), name)


def read_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` texts (options.key_value_pairs) as keyword arguments.

    Values are Python literals ("betas=0.9,0.99" is a tuple, "weight_decay=0.1" a float); true, false and none may be
    written in any case; anything else is a string.
    """
    return {key.strip(): _literal(text.strip()) for key, _, text in (pair.partition("=") for pair in pairs)}


def check_arguments(
    flag: str,
    owner: str,
    arguments: Mapping[str, Any],
    accepted: Mapping[str, Accepts] | None,
    ours: Collection[str] = (),
) -> list[Mistake]:
    """A mistake for each argument that `owner` does not accept, by its name or its value.

    `accepted` None: unknown, nothing is checked. `ours`: arguments that this program sets itself.
    """
    if accepted is None:
        return []
    free = {name: accepts for name, accepts in accepted.items() if name not in ours}
    mistakes = []
    for key, value in arguments.items():
        if key not in free:
            near = difflib.get_close_matches(key, free, 1, 0.6)
            listed = f"use one of {', '.join(sorted(free))}" if free else "remove it"
            remedy = f"did you mean {near[0]}?" if near else listed
            mistakes.append(Mistake(f"--{flag} {key}: {owner} has no such argument", remedy))
        elif fault := free[key].fault(value):
            remedy = f"use for example {key}={free[key].example}" if free[key].example else f"set {key} to such a value"
            mistakes.append(Mistake(f"--{flag} {key}={value} {fault}", remedy))
    return mistakes


def check_required(
    flag: str, owner: str, arguments: Mapping[str, Any], accepted: Mapping[str, Accepts] | None
) -> list[Mistake]:
    """A mistake if an argument without a default is missing. `accepted` None: unknown, nothing is checked."""
    accepted = accepted or {}
    missing = [name for name, accepts in accepted.items() if accepts.required and name not in arguments]
    if not missing or any(name not in accepted for name in arguments):  # a misspelt one may be the missing one
        return []
    remedy = f"add --{flag} {' '.join(f'{name}=...' for name in missing)}"
    return [Mistake(f"{owner} needs {', '.join(missing)}, which --{flag} does not set", remedy)]


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def source_file(module: str) -> Path | None:
    """The source file of a module, searched from its top-level package (find_spec would import the parents)."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder, *rest)
        for file in (base / "__init__.py", base.with_name(base.name + ".py")):
            if file.is_file():
                return file
    return None


@lru_cache(maxsize=8)  # those of torch take 20 ms, once for optimizer and schedule of all runs of a process
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _look_up_in_file(file: Path, module: str, name: str, depth: int) -> LookUp:
    """Find a name in the source of a module, following up to 5 imports of it from other modules."""
    try:
        tree = _parsed(file)
    except (OSError, SyntaxError, ValueError):
        return LookUp()
    dynamic = False
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return LookUp(_constructor_arguments(node))
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return LookUp(_arguments(node.args, skip=1))
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                dynamic = dynamic or alias.name == "*"
                if (alias.asname or alias.name) == name:
                    return _look_up_import(file, module, node, alias.name, depth)
        elif not isinstance(node, ast.Import | ast.ClassDef):
            # other statements may define the name, or make the module answer to any name: only importing would tell
            dump = ast.dump(node)
            dynamic = dynamic or any(word in dump for word in (f"'{name}'", "'__getattr__'", "attr='modules'"))
    return LookUp() if dynamic else LookUp(problem=f"{module} has no {name}")


def _look_up_import(file: Path, module: str, node: ast.ImportFrom, name: str, depth: int) -> LookUp:
    if node.level:
        base = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        base = base[: len(base) - (node.level - 1)]
        target = ".".join([*base, node.module] if node.module else base)
    else:
        target = node.module or ""
    source = source_file(target) if target else None
    if source is None or depth > 4:
        return LookUp()
    return _look_up_in_file(source, target, name, depth + 1)


def _constructor_arguments(node: ast.ClassDef) -> Mapping[str, Accepts] | None:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _arguments(member.args, skip=2)
    return None


def _arguments(arguments: ast.arguments, skip: int) -> Mapping[str, Accepts] | None:
    """What can be passed by keyword, after the first `skip` (self, and the argument that we pass ourselves)."""
    if arguments.kwarg is not None:
        return None
    positional = [*arguments.posonlyargs, *arguments.args]
    no_default: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    by_place = list(zip(positional, [*no_default, *arguments.defaults], strict=True))[skip:]
    by_keyword = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {argument.arg: accepts(argument.annotation, default) for argument, default in [*by_place, *by_keyword]}
