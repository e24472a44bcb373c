"""The caption file of an image, its encoding, and mistakes."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from library.data.scan.caption_files import CaptionFiles, check_encoding, normal_extensions, read_caption
from library.options.mistakes import UserError

JAPANESE, CYRILLIC, WESTERN = "赤い 犬、草の上", "рыжая собака", "café, Straße"


def write(folder: Path, data: bytes) -> Path:
    path = folder / "a.txt"
    path.write_bytes(data)
    return path


def refused(path: Path, encoding: str = "utf-8") -> str:
    with pytest.raises(UserError) as error:
        read_caption(path, encoding)
    return "\n".join(str(mistake) for mistake in error.value.mistakes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("txt", (".txt",)),
        (".txt, caption", (".txt", ".caption")),
        ("a,,.a, ", (".a",)),
        ("", ()),
    ],
)
def test_a_list_of_endings(given: str, expected: tuple[str, ...]) -> None:
    assert normal_extensions(given) == expected


@pytest.mark.parametrize("given", [".caption,.txt", ("caption", ".txt")])
def test_the_first_ending_that_is_there_counts(given: str | tuple[str, ...]) -> None:
    names = ["a.txt", "b.caption", "b.txt", "c.TXT", "c.caption.bak", "d.json"]
    files = CaptionFiles(names, given)
    assert [files.find(stem) for stem in "abcd"] == ["a.txt", "b.caption", "c.TXT", None]
    assert CaptionFiles(names, ".txt,.caption").find("b") == "b.txt"
    assert CaptionFiles(names, ()).find("a") is None


def test_an_exact_ending_wins_and_a_stem_may_hold_dots() -> None:
    assert CaptionFiles(["a.TXT", "a.txt", "b.x.txt"], ".txt").find("a") == "a.txt"
    assert CaptionFiles(["b.x.txt"], ".txt").find("b.x") == "b.x.txt"


def test_a_face_crop_has_its_own_caption_or_that_of_its_source() -> None:
    files = CaptionFiles(["p.caption", "p_1_2_3_4.txt", "q.txt"], ".caption,.txt")
    assert files.find("p_1_2_3_4") == "p_1_2_3_4.txt"  # its own, under whichever ending
    assert files.find("p_9_9_9_9") == "p.caption"
    assert files.find("q_5_6_7_8") == "q.txt"
    assert files.find("q_5_6_7") is None


@pytest.mark.parametrize("text", ["", JAPANESE, CYRILLIC, WESTERN])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_byte_order_mark_wins_over_the_encoding(tmp_path: Path, text: str, mark: bytes, encoding: str) -> None:
    path = write(tmp_path, mark + text.encode(encoding))
    assert read_caption(path) == (text, False)
    if mark:
        assert read_caption(path, "shift_jis") == read_caption(path, "latin-1") == (text, False)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(JAPANESE, "shift_jis"), (JAPANESE, "cp932"), (CYRILLIC, "cp1251"), (WESTERN, "latin-1"), (WESTERN, "utf-16-le")],
)
def test_another_encoding_is_read_when_it_is_named_and_else_refused(tmp_path: Path, text: str, encoding: str) -> None:
    path = write(tmp_path, f"{text}\r\nx".encode(encoding))
    assert read_caption(path, encoding) == (text, True)
    said = refused(path)
    assert str(path) in said and "UTF-8" in said and "--caption_encoding" in said


def test_the_encoding_that_was_named_is_the_one_complained_about(tmp_path: Path) -> None:
    path = write(tmp_path, b"a\xff")
    assert "SHIFT_JIS (byte 1)" in refused(path, "shift_jis")


@pytest.mark.parametrize("name", ["nonsense", "", "base64", "rot13", "utf-8\0", "ünknown"])
def test_an_encoding_that_python_does_not_know_is_a_mistake(tmp_path: Path, name: str) -> None:
    said = refused(write(tmp_path, b"a"), name)
    assert said == str(check_encoding(name)) and said.startswith("--caption_encoding") and "utf-8" in said


@pytest.mark.parametrize("name", ["utf-8", "UTF8", "shift_jis", "Latin-1", "utf-16", "cp437", "euc_kr"])
def test_encodings_that_python_knows(name: str) -> None:
    assert check_encoding(name) is None


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_the_first_line_or_all_lines_with_text(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, ending.join([" one, two ", "", "  three", "\t", ""]).encode())
    assert read_caption(path) == ("one, two", True)
    assert read_caption(path, all_lines=True) == ("one, two\nthree", False)
    late = write(tmp_path, ending.join(["", "late"]).encode())
    assert read_caption(late) == ("", True)
    assert read_caption(late, all_lines=True) == ("late", False)
    only = write(tmp_path, ending.join(["only", " "]).encode())
    assert read_caption(only) == read_caption(only, all_lines=True) == ("only", False)
    assert read_caption(write(tmp_path, b""), all_lines=True) == ("", False)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "gone.txt") in refused(tmp_path / "gone.txt")
