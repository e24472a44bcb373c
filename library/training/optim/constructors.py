"""Find classes by their dotted path and check their arguments without importing them.

Optimizers and schedules come from large packages. The plan must report a missing package, a wrong name or a misspelt
argument at once, so their sources are parsed; only `load` imports them.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options.mistakes import Mistake

_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class LookUp:
    """What the source of a dotted path says. `arguments`: names that the constructor accepts, without the first; None
    if unknown (**kwargs, inherited). `problem`: empty if the class exists, or if only importing it could tell."""

    arguments: frozenset[str] | None = None
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
    file = _source_file(module)
    if file is None:
        is_compiled = spec.origin and not spec.origin.endswith(".py")
        return LookUp() if is_compiled else LookUp(problem=f"there is no module {module}")
    return _look_up_in_file(file, module, name, depth=0)


def load(path: str) -> Any:
    """Import the object at a dotted path. Raises ImportError or AttributeError."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def read_arguments(flag: str, pairs: Iterable[str]) -> tuple[dict[str, Any], list[Mistake]]:
    """Parse `key=value` texts as keyword arguments; return them with the mistakes.

    Values are Python literals ("betas=0.9,0.99" is a tuple, "weight_decay=0.1" a float); true, false and none may be
    written in any case; anything else is a string.
    """
    arguments: dict[str, Any] = {}
    mistakes = []
    for pair in pairs:
        key, sign, text = (part.strip() for part in pair.partition("="))
        if not sign or not key.isidentifier():
            mistakes.append(Mistake(f"--{flag} {pair!r} is not key=value", "use for example weight_decay=0.01"))
        elif key in arguments:
            mistakes.append(Mistake(f"--{flag} sets {key} twice", "set it once"))
        else:
            arguments[key] = _literal(text)
    return arguments, mistakes


def check_argument_names(
    flag: str, owner: str, arguments: Mapping[str, Any], accepted: frozenset[str] | None
) -> list[Mistake]:
    """A mistake for each argument that `owner` does not accept, with the closest accepted name.

    `accepted` None: unknown, nothing is checked.
    """
    if accepted is None:
        return []
    mistakes = []
    for key in arguments:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, 1, 0.6)
            remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(accepted))}"
            mistakes.append(Mistake(f"--{flag} {key}: {owner} has no such argument", remedy))
    return mistakes


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _source_file(module: str) -> Path | None:
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


def _look_up_in_file(file: Path, module: str, name: str, depth: int) -> LookUp:
    """Find a name in the source of a module, following up to 5 imports of it from other modules."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return LookUp()
    dynamic = False
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return LookUp(_constructor_arguments(node))
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return LookUp(_argument_names(node.args, skip=1))
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
    source = _source_file(target) if target else None
    if source is None or depth > 4:
        return LookUp()
    return _look_up_in_file(source, target, name, depth + 1)


def _constructor_arguments(node: ast.ClassDef) -> frozenset[str] | None:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _argument_names(member.args, skip=2)
    return None


def _argument_names(arguments: ast.arguments, skip: int) -> frozenset[str] | None:
    """Names that can be passed by keyword, after the first `skip` (self, and the argument that we pass ourselves)."""
    if arguments.kwarg is not None:
        return None
    positional = [*arguments.posonlyargs, *arguments.args]
    return frozenset(argument.arg for argument in [*positional[skip:], *arguments.kwonlyargs])
