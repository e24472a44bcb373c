"""Parse a TOML or JSON file, with the line of every value."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from library.bounded import json_of, toml_of
from library.options.dataset_config.locate import Address, Places, in_json, in_toml
from library.options.mistakes import Mistake
from library.options.text_files import FileKind, other_kind, read_text

_BACKSLASHES = "in JSON a Windows path needs two backslashes or one slash (C:/train)"


@dataclass(frozen=True)
class ConfigFile:
    """A parsed file. `name` is its name in messages."""

    name: str
    tree: object
    places: Places

    def origin(self, address: Address) -> str:
        """Location of a value: "data.toml, line 12"."""
        return f"{self.name}, line {self.places.line(address)}"


def read_source(path: Path, flag: str, wanted: FileKind | None = None) -> ConfigFile | Mistake:
    """Read the file that `flag` names: TOML or JSON by its extension, UTF-8 with or without a byte order mark.

    Returns a mistake if the file cannot be read, for example because of a syntax error, or is not of the `wanted` kind.
    """
    named = f"--{flag} {path}"
    text = read_text(path, named)
    if isinstance(text, Mistake):
        return text
    source = _parse(path, named, text)
    return source if wanted is None else other_kind(named, text, wanted) or source


def _parse(path: Path, named: str, text: str) -> ConfigFile | Mistake:
    ending = path.suffix.lower()
    if ending == ".json":
        return parse_json(named, path.name, text)
    if ending != ".toml":
        return Mistake(f"{named} is neither a .toml nor a .json file", "rename it to match its format")
    try:
        return ConfigFile(path.name, toml_of(text), in_toml(text))
    except tomllib.TOMLDecodeError as error:
        return Mistake(
            f"{named} is not valid TOML: {error}",
            "fix that line; texts need quotes, Windows paths single quotes ('C:\\train')",
        )


def parse_json(named: str, name: str, text: str) -> ConfigFile | Mistake:
    """Parse a JSON text. `named`: flag and path, for the mistake about a text that is not JSON; `name`: of the file."""
    try:
        tree = json_of(text)
    except json.JSONDecodeError as error:
        return Mistake(
            f"{named} is not valid JSON: {error.msg} (at line {error.lineno}, column {error.colno})",
            _json_remedy(text, error),
        )
    except ValueError as error:
        return Mistake(f"{named} is not valid JSON: {error}", "five levels are enough for every file")
    path = re.search(r'"[A-Za-z]:\\(?![\\/"])[^"]*', text)
    if path:  # \t and the like are valid, but no path has them
        return Mistake(f"{named} has a Windows path with single backslashes: {path.group()[1:]}", _BACKSLASHES)
    half = re.search("[\ud800-\udfff]", json.dumps(tree, ensure_ascii=False))
    if half:
        return Mistake(
            f"{named} contains half a character (a lone surrogate), \\u{ord(half.group()):04x}",
            "write the character itself",
        )
    return ConfigFile(name, tree, in_json(text))


def _json_remedy(text: str, error: json.JSONDecodeError) -> str:
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if after.startswith(("#", "//", "/*")):
        return "remove the comments, which JSON does not have"
    if re.match(r",\s*[}\]]", after) or (after.startswith(("}", "]")) and before.endswith(",")):  # Python 3.13 or older
        return "remove the comma before the closing bracket"
    if after.startswith(("True", "False", "None")):
        return "write true, false or null in small letters"
    return f"fix that line; {_BACKSLASHES}"
