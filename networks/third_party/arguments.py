"""What third-party network modules do with --network_args, read from their source without importing them.

Importing such a module imports torch. Its `create_network` (sd-scripts, train_network.py) receives every argument as
text in **kwargs, and names those that it knows: `kwargs.get("conv_dim")`.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Mistake = tuple[str, str]
"""(what is wrong, remedy)"""

_OFF = ("", "0", "0.0", "false", "none")
# what DoRA is called elsewhere -> in LyCORIS
_OF_DORA = {
    "use_dora": "dora_wd",
    "weight_decompose": "dora_wd",
    "decompose": "dora_wd (DoRA) or decompose_both (LoKr)",
}


@dataclass(frozen=True)
class ModuleArguments:
    """`names`: every argument that the module knows (None: it passes its arguments on to other code). `own`: those of
    them that are not outdated. `types`: the function that converts the text of one ("int", "float" or "bool").
    `choices`: the values that one can have."""

    names: frozenset[str] | None = None
    own: tuple[str, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_module_arguments(file: Path | None) -> ModuleArguments:
    """What `create_network` in a source file takes; everything if there is no source."""
    tree = None if file is None else _parse(file)
    if tree is None or file is None:
        return ModuleArguments()
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "create_network"]
    if not functions:
        return ModuleArguments()
    own, types, is_complete = _read_function(functions[-1])
    if file.parent.name == "lycoris" and file.name == "kohya.py":
        older, choices = _lycoris(file.parent)
        return ModuleArguments(frozenset({*own, *older}), own, types, choices)
    return ModuleArguments(frozenset(own) if is_complete else None, own, types)


def check_arguments(
    module: str, taken: ModuleArguments, arguments: Mapping[str, str]
) -> tuple[list[Mistake], tuple[str, ...]]:
    """Mistakes in the arguments, and notes about unknown ones that are off anyway."""
    mistakes, notes = list[Mistake](), list[str]()
    for key, text in arguments.items():
        what = f"--network_args {key}={text}"
        if taken.names is not None and key not in taken.names:
            if text.lower() in _OFF:
                notes.append(f"{what} has no effect: {module} does not use it")
            else:
                mistakes.append((f"{what}: {module} does not use {key}", _suggest(key, module, taken.own)))
        elif key in taken.choices and text and not _is_choice(text, taken.choices[key]):
            path = ", or give the path of a preset file" if key == "preset" else ""
            mistakes.append((f"{what}: {module} has no such {key}", f"use {', '.join(taken.choices[key])}{path}"))
        elif text and not _can_be_read(text, taken.types.get(key)):
            kind = {"int": "a whole number", "float": "a number"}.get(taken.types[key], "True or False")
            mistakes.append((f"{what} is not {kind}", f"{module} takes {kind} for {key}"))
    return mistakes, tuple(notes)


def _suggest(key: str, module: str, own: Sequence[str]) -> str:
    near = _OF_DORA.get(key) if "dora_wd" in own else None
    near = near or next(iter(difflib.get_close_matches(key, own, n=1, cutoff=0.75)), None)
    return f"did you mean {near}?" if near else f"remove it; {module} reads {', '.join(sorted(own))}"


def _is_choice(text: str, choices: Sequence[str]) -> bool:
    """Whether a text is one of the choices, or a file: LyCORIS reads presets from files too."""
    return text in choices or text.lower() in choices or Path(text).is_file()


def _can_be_read(text: str, kind: str | None) -> bool:
    readers: Mapping[str, Callable[[str], object]] = {"int": int, "float": float}
    if kind is None:
        return True
    if kind not in readers:
        return text.lower() in ("true", "false", "1", "yes", "on")  # LyCORIS reads 0, no and off as true
    try:
        readers[kind](text)
    except ValueError:
        return False
    return True


def _parse(file: Path) -> ast.Module | None:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def _read_function(function: ast.FunctionDef) -> tuple[tuple[str, ...], dict[str, str], bool]:
    """(the arguments that a function reads from its **kwargs, their types, whether these are all)."""
    rest = "" if function.args.kwarg is None else function.args.kwarg.arg
    keys, variables = list[str](), dict[str, str]()
    for node in ast.walk(function):
        found = _key_read(node, rest)
        if found is not None:
            keys.append(found)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned = _key_read(node.value, rest)
            variables |= {} if assigned is None else {node.targets[0].id: assigned}
    types = dict[str, str]()
    for node in ast.walk(function):  # from the outside in, so that the innermost call remains
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            kind = "bool" if "bool" in node.func.id else node.func.id
            if kind in ("int", "float", "bool"):
                types |= dict.fromkeys(_keys_in(node, rest, variables), kind)
    uses = sum(isinstance(node, ast.Name) and node.id == rest for node in ast.walk(function))
    named = [argument.arg for argument in function.args.args[6:]] + [a.arg for a in function.args.kwonlyargs]
    return tuple(dict.fromkeys([*keys, *named])), types, uses == len(keys)


def _key_read(node: ast.AST, rest: str) -> str | None:
    """The key of `kwargs.get("key")`, `kwargs.pop("key")`, `kwargs["key"]` or `"key" in kwargs`."""
    key: ast.expr | None = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
        key = node.args[0] if _is_name(node.func.value, rest) and node.args else None
    elif isinstance(node, ast.Subscript) and _is_name(node.value, rest):
        key = node.slice
    elif isinstance(node, ast.Compare) and any(_is_name(side, rest) for side in node.comparators):
        key = node.left
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _keys_in(call: ast.Call, rest: str, variables: Mapping[str, str]) -> Iterator[str]:
    """The keys that the arguments of a call read, directly or by a variable that is the whole argument."""
    for argument in call.args:
        if isinstance(argument, ast.Name) and argument.id in variables:
            yield variables[argument.id]
        for node in ast.walk(argument):
            key = _key_read(node, rest)
            if key is not None:
                yield key


def _lycoris(package: Path) -> tuple[set[str], dict[str, tuple[str, ...]]]:
    """LyCORIS's older names of arguments, and its values of `algo` and `preset`, from the tables of its wrapper."""
    tables = {"algo": ("wrapper.py", "network_module_dict"), "preset": ("config.py", "BUILTIN_PRESET_CONFIGS")}
    choices = {key: tuple(_keys_of_table(package / file, table)) for key, (file, table) in tables.items()}
    older = set(_keys_of_table(package / "wrapper.py", "deprecated_arg_dict"))
    return older, {key: values for key, values in choices.items() if values}


def _keys_of_table(file: Path, name: str) -> Iterator[str]:
    tree = _parse(file)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and _is_name(node.targets[0], name) and isinstance(node.value, ast.Dict):
            yield from (str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
