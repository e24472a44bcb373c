"""finetune/clean_captions_and_tags.py: the file that it writes. The rules are tested in tests/data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import clean_captions_and_tags


@pytest.mark.parametrize("first", [[], ["train_data"]])  # sd-scripts was first called with the folder too
def test_what_has_texts_is_cleaned_and_the_rest_is_kept(
    first: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    entries = {"ä": {"caption": "a lady", "train_resolution": [64, 64]}, "b.png": {"tags": "white_shirt"}, "c": {}}
    Path("in.json").write_text(json.dumps(entries), encoding="utf-8")
    assert clean_captions_and_tags.main([*first, "in.json", "out.json", "--debug"]) == 0
    out = capsys.readouterr().out
    assert "from: a lady\n  to:   a girl" in out and "caption: 1 of 3 images cleaned, 2 have none" in out
    assert Path("out.json").read_text(encoding="utf-8").split() == (
        '{ "\\u00e4": { "caption": "a girl", "train_resolution": [ 64, 64 ] }, '
        '"b.png": { "tags": "white shirt" }, "c": {} }'.split()
    )


def test_all_mistakes_of_a_file_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for content, told in (
        ('{"a": {"caption": 1}, "b": {"tags": ["x"]}}', ("caption of 'a' is not text", "tags of 'b' is not text")),
        ('{"a": "a dog", "b": 2}', ("'a' is not an object", "'b' is not an object")),
        ('{"a": ', ("is not valid JSON",)),
    ):
        Path("in.json").write_text(content, encoding="utf-8")
        assert clean_captions_and_tags.main(["in.json", "out.json"]) == 2
        err = capsys.readouterr().err
        assert all(words in err for words in told), err
    assert clean_captions_and_tags.main(["none.json", "out.json"]) == 2 and "no such file" in capsys.readouterr().err
    assert not Path("out.json").exists()
