"""Texts of others are parsed or refused: no RecursionError, no error of another kind, no quadratic time."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path

import pytest

from library.bounded import json_of, read_bytes, read_json, toml_of
from library.limits import CAPTION_FILE, KEY_PARTS, OPTIONS_FILE


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", "", '{"a": ' + "-" + "1" * 9999 + "}"]
)
def test_json(text: str) -> None:
    with pytest.raises(ValueError):
        json_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "{a = " * 50_000,
        "a = " + "9" * 5000,
        ".".join("a" * (KEY_PARTS + 1)) + " = 1",
        "[" + ".".join(["'a'"] * 100_000) + "]",
        "a . " * 100_000 + "a = 1",
        ".".join(['"!"'] * (KEY_PARTS + 1)) + " = 1",
        "a = {b = 1, " + " . ".join(["' '", r'"\"."'] * KEY_PARTS) + " = 1}",
        "a =",
    ],
)
def test_toml(text: str) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        toml_of(text)


def test_long_texts_with_dots_are_no_long_keys() -> None:
    prompt = "a.b, 1.5, www.example.org. " * 1000 + "a" * 100_000 + "." * 1000
    assert toml_of(f'prompt = "{prompt}"\n# {prompt}\n[a.b.c]\nd.e = 1')["prompt"] == prompt


@pytest.mark.parametrize(
    "text", ['"' + r"\"" * 300_000, "' \" " * 200_000, '"!".' * 90 + '"', "a." * 99 + "a"], ids=lambda text: text[:6]
)
def test_long_keys_are_looked_for_in_linear_time(text: str) -> None:
    began = time.perf_counter()
    assert toml_of(f"a = '''\n{text}\n'''")["a"] == f"{text}\n"
    assert time.perf_counter() - began < 5


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}', encoding="utf-8")
    assert read_json(path) == {"a": 1} and read_bytes(path, 8) == b'{"a": 1}'
    with pytest.raises(ValueError, match="more than"):
        read_bytes(path, 7)


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as stream:
        stream.truncate(size)
    return path


def test_a_file_that_is_too_large_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from library.data.scan.caption_files import read_caption
    from library.options.mistakes import Mistake, UserError
    from library.options.text_files import read_text

    told = read_text(sparse(tmp_path / "x.toml", OPTIONS_FILE + 1), "--dataset_config x.toml")
    assert isinstance(told, Mistake) and "is not read: it has more than 16.0 MB" in told.what
    with pytest.raises(UserError, match=r"x\.txt is not read: it has more than 1\.0 MB"):
        read_caption(sparse(tmp_path / "x.txt", CAPTION_FILE + 1))


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000, "{a = " * 5000], ids=["number", "lists", "tables"])
@pytest.mark.parametrize("flag", ["config_file", "dataset_config", "log_tracker_config", "sample_prompts"])
def test_every_flag_that_names_a_toml_file(tmp_path: Path, flag: str, value: str) -> None:
    """Found by reading: a number of 5000 digits ended in a traceback."""
    from library.data.scan.dataset_specs import describe
    from library.options.mistakes import Mistakes, UserError
    from library.options.parse import DREAMBOOTH, parse
    from library.sampling.prompts import read_prompts
    from library.training.trackers import _read_settings

    path = tmp_path / "x.toml"
    path.write_text(f"a = {value}", encoding="utf-8")
    mistakes = Mistakes()
    if flag == "sample_prompts":
        with pytest.raises(UserError, match="is invalid"):
            read_prompts(path)
        return
    if flag == "log_tracker_config":
        _read_settings(path, mistakes)
    else:
        parsed = parse([f"--{flag}={path}"], DREAMBOOTH)
        mistakes.extend(parsed.mistakes if flag == "config_file" else describe(parsed.options).mistakes)
    assert any("is not valid TOML" in mistake.what for mistake in mistakes)


def test_json_is_what_it_was() -> None:
    tree = {"a": [1, 2.5, None, True, "ü"], "b": {"c": []}}
    assert json_of(json.dumps(tree)) == tree
