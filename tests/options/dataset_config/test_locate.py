"""Lines of values: every integer in the files below is the number of its line."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable, Iterator

import pytest
import tomli_w

from library.options.dataset_config.locate import Address, Places, in_json, in_toml

# "@" becomes the number of its line. What is between the tables is there to mislead a search for words or brackets.
NASTY_TOML = r'''
# [[datasets]] in a comment, "with a quote that stays open
first = @   # a comment with ] and } and """
text = "[[datasets]] # no comment, \"escaped\" and a backslash at the end \\"
literal = 'C:\train\'
long = """
[[datasets]]
batch_size = 7.5
a backslash before the quotes \""" does not end it, nor do two "" of them
""" # but this does
ends_with_quotes = """a"""""
empty = ""
empty_long = """"""
empty_literal = %%%%%%
long_literal = %%%
[general]
it''s = 8.5 \
%%%
after = @
"quoted key" = @
'[literal]' = @
"escaped \"\u0041\"" = @
"" = @
a.b.c = @
a.b."d.e" = @
  a . b . 'f' = @
date = 1979-05-27 07:32:00 # a blank inside
time = 07:32:00
float = 1_000.5e-3
infinite = [inf, -inf, +nan]
flag = [true, false]
list = [ # ]
  @, # [
  @, "]", '"', @ ,
  [[@], [],
   [@]
  ],
  { x = @, y.z = @, "w" = [ @ ] },
]
inline = { }
inline_two = {one = @, two = {three = @}, four = "}"}

[general] # with a comment ]
resolution = @
[general.custom_attributes]
deep = @
[ general . "dotted.name" ]
deep = @

[[datasets]]
batch_size = @
  [[datasets.subsets]]
  num_repeats = @
  [[datasets.subsets]] # the second
  num_repeats = @
    [datasets.subsets.custom_attributes]
    x = @
    [[datasets.subsets.custom_attributes.more]]
    x = @
    [[datasets.subsets.custom_attributes.more]]
    x = @

[[ datasets ]]
batch_size = @
subsets = [
  { num_repeats = @, custom_attributes.a = @ },
  { num_repeats = @ }, # { num_repeats = 1 },
]
[["datasets"]]
[['datasets'.subsets]]
num_repeats = @
[implied.table]
x = @
[implied]
x = @
[["日本"."語 ]]"]]
"ключ" = @
last = @'''.replace("%%%", "'''")

NASTY_JSON = r"""
{
  "first": @, "same line": @,
  "text": "{ \"datasets\": [ \\", "next": @,
  "list": [ @, [@,
     @], "]", {"x": @}, [], {}, true, null, -1.5e+3 ],
  "general": {
    "resolution": [@, @],
    "": @, "a\"b": @, "\u0041": @, "日本語": @
  },
  "datasets":
  [
    { "batch_size": @, "subsets": [
        { "num_repeats": @ },
        {
          "num_repeats": @
        } ] }, { "batch_size": @ }
  ]
}"""


def numbered(text: str) -> str:
    return "\n".join(line.replace("@", str(number)) for number, line in enumerate(text.split("\n"), 1))


def leaves(tree: object, address: Address = ()) -> Iterator[tuple[Address, object]]:
    """Everything below the top level, including tables and lists."""
    if address:
        yield address, tree
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, (*address, name))
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from leaves(value, (*address, place))


@pytest.mark.parametrize(
    ("text", "parse", "locate"), [(NASTY_TOML, tomllib.loads, in_toml), (NASTY_JSON, json.loads, in_json)]
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_every_value_of_a_nasty_file_is_found(
    text: str, parse: Callable[[str], object], locate: Callable[[str], Places], line_end: str
) -> None:
    whole = numbered(text).replace("\n", line_end)
    found = dict(leaves(parse(whole)))
    places = locate(whole)
    assert set(places.lines) == set(found)
    numbers = {address: value for address, value in found.items() if type(value) is int}
    assert len(numbers) >= 17
    assert {address: places.line(address) for address in numbers} == numbers


def test_a_table_is_where_its_header_is_and_a_key_that_is_not_there_is_where_its_table_is() -> None:
    text = "x = 1\n\n[[datasets]]\n\n[[datasets.subsets]]\nimage_dir = 'a'\n\n[[datasets.subsets]]\n[a.b]\n[a]\n"
    places = in_toml(text)
    assert places.line(("datasets",)) == places.line(("datasets", 0)) == 3
    assert places.line(("datasets", 0, "subsets", 0)) == 5
    assert places.line(("datasets", 0, "subsets", 1)) == 8
    assert places.line(("datasets", 0, "subsets", 1, "image_dir")) == 8
    assert places.line(("datasets", 0, "batch_size")) == 3
    assert places.line(("a",)) == 10
    assert places.line(("general",)) == 1
    assert in_json('\n{"datasets":\n[\n{}, {"x":\n5}]}').lines == {
        ("datasets",): 2, ("datasets", 0): 4, ("datasets", 1): 4, ("datasets", 1, "x"): 4
    }  # fmt: skip


def test_repeated_keys_in_json_are_reported() -> None:
    text = '{"a": 1,\n "b": {"a": 2},\n "c": [{"x": 1}, {"x": 2,\n "x": 3}],\n "a": 4}'
    assert in_json(text).duplicates == ((("c", 1, "x"), 4), (("a",), 5))


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "a = 1", "[a]", "[[a]]"])
def test_small_files(text: str) -> None:
    assert set(in_toml(text).lines) == dict(leaves(tomllib.loads(text))).keys()


def random_tree(rng: random.Random, depth: int) -> dict[str, object]:
    names = ["a", "b-c", "d e", 'f"', "g.h", "", "[i]", "日", "#", "'", "\\"]
    values = [1, -2.5, True, "", "x\ny", '"""', "'''", "# no", "]", "}", "a = 1", [], ["]", "#"], {}]
    tree: dict[str, object] = {}
    for name in rng.sample(names, rng.randint(0, 4)):
        kind = rng.random() if depth else 0.0
        if kind < 0.5:
            tree[name] = rng.choice(values)
        elif kind < 0.75:
            tree[name] = random_tree(rng, depth - 1)
        else:
            tree[name] = [random_tree(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    return tree


@pytest.mark.parametrize("seed", range(60))
def test_all_that_another_program_writes_is_found(seed: int) -> None:
    rng = random.Random(seed)
    tree = random_tree(rng, 3)
    toml = tomli_w.dumps(tree, multiline_strings=rng.random() < 0.5)
    for text, places in (
        (toml, in_toml(toml)),
        *((text, in_json(text)) for text in (json.dumps(tree), json.dumps(tree, indent=rng.randint(0, 4)))),
    ):
        assert set(places.lines) == dict(leaves(tree)).keys()
        assert max(places.lines.values(), default=1) <= text.count("\n") + 1
        # What stands in an inner table comes after the name of the table.
        assert all(places.lines[address] >= places.lines[address[:-1]] for address in places.lines if address[1:])
