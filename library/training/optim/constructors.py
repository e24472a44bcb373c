"""Classes named by their dotted path: found, and their arguments checked, without importing them.

Optimisers and schedules come from large packages. The plan must tell a missing package, a wrong name or a misspelt
argument before anything is loaded and in no time, so sources are read as text; only `load` imports.
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
class Found:
    """What the sources say of a dotted path. `arguments` are the constructor's, without the first; None when that is
    open (**kwargs, inherited). `problem` is empty when the class is there or cannot be judged without importing it."""

    arguments: frozenset[str] | None = None
    problem: str = ""
    missing_package: str = ""


def look_up(path: str) -> Found:
    """Find a class or function by its dotted path, `package.module.Name`, reading sources only."""
    module, _, name = path.rpartition(".")
    if not module:
        return Found(problem=f"{path} is not of the form package.module.Name")
    package = module.split(".")[0]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return Found(problem=f"the package {package} is not installed", missing_package=package)
    file = _source_file(module)
    if file is None:
        return Found() if spec.origin and not spec.origin.endswith(".py") else Found(problem=f"no module {module}")
    return _look_in(file, module, name, depth=0)


def load(path: str) -> Any:
    """Import the object of a dotted path. Raises ImportError or AttributeError."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def read_arguments(flag: str, pairs: Iterable[str]) -> tuple[dict[str, Any], list[Mistake]]:
    """`key=value` texts as keyword arguments, and what is wrong with them.

    Values are Python literals ("betas=0.9,0.99" is a tuple, "weight_decay=0.1" a float); true, false and none count in
    any case; whatever else is a string.
    """
    arguments: dict[str, Any] = {}
    mistakes = []
    for pair in pairs:
        key, sign, text = (part.strip() for part in pair.partition("="))
        if not sign or not key.isidentifier():
            mistakes.append(Mistake(f"--{flag} {pair!r} is not key=value", "write for example weight_decay=0.01"))
        elif key in arguments:
            mistakes.append(Mistake(f"--{flag} gives {key} twice", "give it once"))
        else:
            arguments[key] = _literal(text)
    return arguments, mistakes


def refuse_unknown(
    flag: str, owner: str, arguments: Mapping[str, Any], accepted: frozenset[str] | None
) -> list[Mistake]:
    """A mistake for each argument that `owner` does not take, with the nearest that it does."""
    if accepted is None:
        return []
    mistakes = []
    for key in arguments:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, 1, 0.6)
            remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(accepted))}"
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
    """The source of a module, found on disk next to its top-level package (find_spec would import the parents)."""
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


def _look_in(file: Path, module: str, name: str, depth: int) -> Found:
    """Find a name in a module's source, following `from x import name` a few steps."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return Found()
    dynamic = False
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Found(_constructor_arguments(node))
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return Found(_argument_names(node.args, skip=1))
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                dynamic = dynamic or alias.name == "*"
                if (alias.asname or alias.name) == name:
                    return _follow(file, module, node, alias.name, depth)
        elif not isinstance(node, ast.Import | ast.ClassDef):
            # what else names it, or makes the module answer for names that stand nowhere, only running would tell
            shown = ast.dump(node)
            dynamic = dynamic or any(word in shown for word in (f"'{name}'", "'__getattr__'", "attr='modules'"))
    return Found() if dynamic else Found(problem=f"{module} has no {name}")


def _follow(file: Path, module: str, node: ast.ImportFrom, name: str, depth: int) -> Found:
    if node.level:
        base = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        base = base[: len(base) - (node.level - 1)]
        target = ".".join([*base, node.module] if node.module else base)
    else:
        target = node.module or ""
    source = _source_file(target) if target else None
    if source is None or depth > 4:
        return Found()
    return _look_in(source, target, name, depth + 1)


def _constructor_arguments(node: ast.ClassDef) -> frozenset[str] | None:
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return _argument_names(each.args, skip=2)
    return None


def _argument_names(arguments: ast.arguments, skip: int) -> frozenset[str] | None:
    """All names that may be given by keyword, after the first `skip` (self, and what we pass ourselves)."""
    if arguments.kwarg is not None:
        return None
    positional = [*arguments.posonlyargs, *arguments.args]
    return frozenset(each.arg for each in [*positional[skip:], *arguments.kwonlyargs])
