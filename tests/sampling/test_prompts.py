"""Prompt lines and prompt files mean what kohya's trainer makes of them, save where that goes wrong."""

from __future__ import annotations

import json

import pytest

from library.options.mistakes import UserError
from library.sampling.prompts import ImageRequest, group_requests, parse_line, read_prompts


def test_a_bare_line_has_the_published_defaults():
    expected = ImageRequest("a dog", width=512, height=512, seed=None, steps=30, scale=7.5, sampler="ddim")
    assert parse_line("a dog") == expected


def test_every_option_is_read_in_any_case():
    line = "a dog, (big:1.2) --n blurry, bad --W 640 --h 448 --d 42 --S 20 --l 5.5 --ss k_euler_a"
    assert parse_line(line) == ImageRequest("a dog, (big:1.2)", "blurry, bad", 640, 448, 42, 20, 5.5, "k_euler_a")


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("x --w 517", "width", 512),
        ("x --h 10", "height", 64),
        ("x --s 0", "steps", 1),
        ("x --s 5000", "steps", 1000),
        ("x --d -3", "seed", None),
        ("x --l 1", "scale", 1.0),
        ("x --l .5", "scale", 0.5),
        ("w 300", "width", 512),
        ("h 20", "height", 512),
        ("a well--known dog", "prompt", "a well--known dog"),
        ("a dog -- at home", "prompt", "a dog -- at home"),
        ("a dog --n", "negative_prompt", ""),
    ],
)
def test_single_values(line, field, value):
    assert getattr(parse_line(line), field) == value


@pytest.mark.parametrize("option", ["--cn c.png", "--g 3", "--zz 3", "--w wide", "--d -3"])
def test_what_has_no_effect_is_told(option):
    request = parse_line(f"a dog {option} --s 7")
    assert request == parse_line("a dog --s 7")
    assert len(request.notes) == 1 and option in request.notes[0]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a dog --7", "--7"),
        ("a dog -w 640", "-w 640"),
        ("a dog \u2014w 640", "\u2014w 640"),
        ("a dog \u2013H 640", "\u2013H 640"),
        ("a dog -n blurry --s 7", "-n blurry"),
        ("a dog --w640", "--w640"),
        ("a dog --w=640", "--w=640"),
        ("a dog -- w 640", "-- w 640"),
        ("a dog--w 640", "--w 640"),
        ("a dog -l 7.5", "-l 7.5"),
        ("a dog --n blurry -l .5", "-l .5"),
    ],
)
def test_text_that_looks_like_an_option_is_noted_and_stays(line, found):
    request = parse_line(line)
    (note,) = request.notes
    assert note.startswith(f'"{found}" in a prompt: kept as text')
    assert found in request.prompt + request.negative_prompt


@pytest.mark.parametrize(
    "line",
    ["a well--known dog", "a dog -- at home", "a dog - at home", "2-d, :-d 3", "-1, a-s 30", "dog \u2014running"],
)
def test_dashes_in_prose_are_no_options(line):
    assert parse_line(line).notes == () and parse_line(line).prompt == line


def test_options_in_the_text_of_an_object_are_noted(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": "a dog --w 640", "negative_prompt": "bad -h 64"}]), encoding="utf-8")
    (request,) = read_prompts(path)
    assert request == ImageRequest("a dog --w 640", "bad -h 64")
    (note,) = request.notes
    assert note.startswith('"--w", "-h 64" in a prompt') and "keys of their own" in note


def test_defaults_are_the_callers():
    defaults = ImageRequest("", width=768, steps=10)
    assert parse_line("x --h 64", defaults) == ImageRequest("x", width=768, height=64, steps=10)


def test_a_text_file_is_a_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffein Hündchen --s 3\r\n\r\n# a note\n# another\na cat --d 1\n".encode())
    assert read_prompts(path) == [ImageRequest("ein Hündchen", steps=3), ImageRequest("a cat", seed=1)]


def test_a_toml_files_subsets_beat_what_they_share(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(
        '[prompt]\nwidth = 640\nscale = 5\nnegative_prompt = "bad"\n'
        '[[prompt.subset]]\nprompt = "a"\nsample_steps = 9\nwidth = 320\n'
        '[[prompt.subset]]\nprompt = "b"\nseed = 4\nsample_sampler = "euler"\n',
        encoding="utf-8",
    )
    first = ImageRequest("a", "bad", width=320, scale=5.0, steps=9)
    assert read_prompts(path) == [first, ImageRequest("b", "bad", width=640, scale=5.0, seed=4, sampler="euler")]


def test_a_json_file_holds_lines_or_objects(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(["a --s 4", {"prompt": "b", "height": 72, "guidance_scale": 3}]), encoding="utf-8")
    first, second = read_prompts(path)
    assert (first, second) == (ImageRequest("a", steps=4), ImageRequest("b", height=72))
    assert "guidance_scale" in second.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.yaml", b"a", "unknown extension"),
        ("p.txt", b"\n# nothing\n", "no prompt"),
        ("p.txt", "Hündchen".encode("latin-1"), "UTF-8"),
        ("p.json", b"{", "is invalid"),
        ("p.json", b'{"prompt": "a"}', "list"),
        ("p.json", b'[{"width": 3}]', "prompt"),
        ("p.json", b'[{"prompt": "a", "width": "wide"}]', "width"),
        ("p.toml", b'prompt = "a"', "table"),
        ("p.toml", b"[prompt", "is invalid"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "gone.txt")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", -1, None),
        ("seed", "42", 42),
        ("width", 512.0, 512),
        ("scale", "7", 7.0),
        ("sample_sampler", "Euler_A", "euler_a"),
    ],
)
def test_values_of_objects(tmp_path, key, value, expected):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": "a", key: value}]), encoding="utf-8")
    field = {"sample_sampler": "sampler"}.get(key, key)
    assert getattr(read_prompts(path)[0], field) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", "1e30"), *((key, value) for key in ("width", "seed", "scale") for value in ("Infinity", "NaN"))],
)
def test_numbers_that_do_not_fit_are_named(tmp_path, key, value):
    path = tmp_path / "p.json"
    path.write_text(f'[{{"prompt": "a", "{key}": {value}}}]', encoding="utf-8")
    with pytest.raises(UserError, match=key):
        read_prompts(path)


def test_what_can_be_drawn_together():
    a, b, c = ImageRequest("a"), ImageRequest("b", width=64), ImageRequest("c", seed=3)
    assert group_requests([a, b, c, a]) == [[0, 2, 3], [1]]
    assert group_requests([a, b, c, a], 2) == [[0, 2], [3], [1]]
    assert group_requests([]) == []


@pytest.mark.parametrize(
    "line", ["a --w 99999", "a --h 8200", f"a --w {'9' * 5000}", f"a --s {'9' * 5000}", f"a --l {'9' * 400}"]
)
def test_sizes_that_no_machine_draws_are_noted(line):
    """A number of 5000 digits ended in a traceback, one of five filled the memory."""
    request = parse_line(line)
    assert request == ImageRequest("a") and len(request.notes) == 1 and "is ignored" in request.notes[0]
    assert len(request.notes[0]) < 200
    assert parse_line("a --w 8192 --h 64").width == 8192


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", '[{"prompt": "a", "width": 99999}]', "not a valid number up to 8192"),
        ("p.json", json.dumps(["a" * 20_001]), "has 20001 characters, more than 20000"),
        ("p.json", json.dumps([{"prompt": "a", "negative_prompt": " " * 20_001}]), "more than 20000"),
        ("p.txt", "a" * 20_001, "has 20001 characters"),
        ("p.json", "[" * 100_000, "is invalid"),
    ],
)
def test_prompts_that_no_encoder_reads_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words) as raised:
        read_prompts(tmp_path / name)
    assert len(str(raised.value)) < 1000


def test_spaces_before_a_tag_take_no_time():
    """The search for tags took quadratic time for spaces: minutes for a megabyte."""
    from library.sampling.lora_tags import split_tags

    assert split_tags("a" + " " * 200_000) == ("a" + " " * 200_000, ())
    text, (tag,) = split_tags("a" + " " * 2000 + "<lora:b:0.5>")
    assert text == "a" and tag.name == "b"


def test_dashes_without_end_take_no_time(tmp_path):
    """Found by tests/fuzzing.py, seed 7: a line of 20,000 dashes took quadratic time, more than 20 seconds."""
    (tmp_path / "p.txt").write_text("\n".join(["-" * 20_000, "a" + "-" * 19_999, "dog--w 640"] * 20), encoding="utf-8")
    requests = read_prompts(tmp_path / "p.txt")
    assert len(requests) == 60 and requests[0].notes == () and "--w 640" in requests[2].notes[0]
