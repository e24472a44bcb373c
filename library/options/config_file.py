"""Read the --config_file: options in TOML, or SimpleTuner's config.json."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from library.bounded import toml_of
from library.options.dataset_config.source import parse_json
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.simpletuner_config import Target, read_simpletuner
from library.options.sources import RawOption
from library.options.text_files import OPTIONS, SIMPLETUNER, other_kind, read_text


def find_config_file(named: Path) -> Path | None:
    """The file named by --config_file, with or without .toml or .json; None if there is none."""
    candidates = (with_toml(named), named, named.with_name(f"{named.name}.json") if named.name else named)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def with_toml(named: Path) -> Path:
    """The path with the extension .toml. A path without a name (`/`, `.`) stays as it is."""
    return named if named.suffix == ".toml" or not named.name else named.with_name(f"{named.name}.toml")


def read_config_file(path: Path, target: Target, mistakes: Mistakes, notes: list[str]) -> Iterator[RawOption]:
    """Yield the options of a file: JSON if it says so by its name or its first character, else TOML.

    Raises UserError, with one mistake, for a file that cannot be read, is in neither format or is of another kind.
    """
    named = f"--config_file {path}"
    text = read_text(path, named)
    if isinstance(text, Mistake):
        raise UserError([text])
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        yield from _json_options(path, named, text, target, mistakes, notes)
    else:
        yield from _toml_options(path, named, text, mistakes)


def _json_options(
    path: Path, named: str, text: str, target: Target, mistakes: Mistakes, notes: list[str]
) -> Iterator[RawOption]:
    source = parse_json(named, path.name, text)
    other = other_kind(named, text, OPTIONS, SIMPLETUNER)
    if other is not None:
        raise UserError([other])
    if isinstance(source, Mistake):
        raise UserError([source])
    if not isinstance(source.tree, dict):
        what = f"{named} is JSON, but not one object of keys and values"
        raise UserError([Mistake(what, 'write {"learning_rate": 1e-4, ...}, as in SimpleTuner\'s config.json')])
    for address, line in source.places.duplicates:
        mistakes.add(f"{address[-1]} is set twice ({path.name}, line {line})", "keep one of them")
    yield from read_simpletuner(source.tree, path.name, target, mistakes, notes)


def _toml_options(path: Path, named: str, text: str, mistakes: Mistakes) -> Iterator[RawOption]:
    """Tables are flattened one level and their names ignored, as in sd-scripts."""
    try:
        tree = toml_of(text)
    except tomllib.TOMLDecodeError as error:
        invalid = Mistake(
            f"{named} is not valid TOML: {error}",
            "fix that line; texts need quotes, Windows paths single quotes ('C:\\train')",
        )
        raise UserError([other_kind(named, text, OPTIONS) or invalid]) from None
    if (other := other_kind(named, tree, OPTIONS)) is not None:
        raise UserError([other])
    seen: dict[str, object] = {}
    for name, value in _flattened(tree):
        if name in seen and seen[name] != value:
            mistakes.add(f"{name} is set twice in {path.name}, to {seen[name]!r} and to {value!r}", "keep one of them")
            continue
        seen[name] = value
        yield RawOption(name, value, path.name)


def _flattened(tree: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Names and values, with first-level tables flattened; a nested table keeps its dotted name, which no flag has."""
    for name, value in tree.items():
        if not isinstance(value, dict):
            yield name, value
            continue
        for inner, entry in value.items():
            yield (f"{name}.{inner}" if isinstance(entry, dict) else inner), entry
