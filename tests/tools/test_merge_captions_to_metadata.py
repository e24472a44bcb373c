"""finetune/merge_captions_to_metadata.py and merge_dd_tags_to_metadata.py: the files that they write, byte for byte.

The expected texts follow the format of sd-scripts' programs: JSON with an indent of two, in ASCII.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from library.data.scan.scan import scan
from tests.data.image_files import dataset, save, subset
from tools import merge_captions_to_metadata as captions
from tools import merge_dd_tags_to_metadata as tags

ROOT = Path(__file__).resolve().parents[2]


def image(path: Path, **texts: str) -> Path:
    """An image, and a file beside it for each text, by its extension."""
    for ending, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(f".{ending}").write_text(text, encoding="utf-8")
    return save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image(tmp_path / "träin dir" / "b.jpg", caption="a cat\n", txt="cat, grass")
    image(tmp_path / "träin dir" / "a.png", caption=" a dög ", txt="dog, sky\n")
    return tmp_path / "träin dir"


def test_captions_then_tags_in_one_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "meta.json"
    assert captions.main([str(folder), str(file), "--caption_extention=.caption"]) == 0
    expected = '{\n  "a": {\n    "caption": "a d\\u00f6g"\n  },\n  "b": {\n    "caption": "a cat"\n  }\n}'
    assert file.read_text(encoding="utf-8") == expected
    assert tags.main(["--debug", str(folder), str(tmp_path / "both.json"), "--in_json", str(file)]) == 0
    expected = (
        '{\n  "a": {\n    "caption": "a d\\u00f6g",\n    "tags": "dog, sky"\n  },\n'
        '  "b": {\n    "caption": "a cat",\n    "tags": "cat, grass"\n  }\n}'
    )
    assert (tmp_path / "both.json").read_text(encoding="utf-8") == expected
    assert "tags" not in file.read_text(encoding="utf-8")


def test_an_existing_file_is_continued(folder: Path, tmp_path: Path) -> None:
    """An image keeps its key, however it is spelled; other images and other facts stay."""
    file = tmp_path / "meta.json"
    file.write_text(
        f'{{"gone": {{"caption": "x"}}, "a.png": {{"caption": "old", "aesthetic_score": 6}}, '
        f'"{(folder / "b.jpg").as_posix()}": {{}}}}',
        encoding="utf-8",
    )
    assert captions.main([str(folder), str(file)]) == 0
    assert file.read_text(encoding="utf-8").split() == (
        '{ "gone": { "caption": "x" }, "a.png": { "caption": "a d\\u00f6g", "aesthetic_score": 6 }, '
        f'"{folder.as_posix()}/b.jpg": {{ "caption": "a cat" }} }}'.replace("ä", "\\u00e4").split()
    )


def test_full_paths_of_sub_folders_are_read_by_the_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a relative folder too: absolute paths are what every version of sd-scripts reads."""
    image(folder / "sub" / "a.png", caption="two lines\nof one")
    monkeypatch.chdir(tmp_path)
    words = [folder.name, "meta.json", "--recursive"]
    assert captions.main(words) == 2 and "add --full_path" in capsys.readouterr().err
    assert captions.main([*words, "--full_path"]) == 0
    file = Path("meta.json")
    found = scan([dataset(subset(Path(folder.name), metadata_file=file, caption_source="metadata"))])
    expected = [("a.png", "a dög"), ("b.jpg", "a cat"), ("sub/a.png", "two lines of one")]
    assert [(record.name, record.caption) for record in found.records] == expected
    assert str(folder).replace("ä", "\\u00e4") in file.read_text(encoding="utf-8")


def test_images_with_one_stem_have_their_whole_names(folder: Path, tmp_path: Path) -> None:
    image(folder / "a.jpg", caption="shared")
    file = tmp_path / "meta.json"
    assert captions.main([str(folder), str(file)]) == 0
    found = scan([dataset(subset(folder, metadata_file=file, caption_source="metadata"))])
    assert [record.name for record in found.records] == ["a.jpg", "a.png", "b.jpg"] and not found.bad_images


def test_images_without_a_caption_are_named_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(folder / "lost.png")
    (folder / "b.caption").write_bytes("é".encode("latin-1"))
    file = tmp_path / "meta.json"
    assert captions.main([str(folder), str(file)]) == 2
    told = capsys.readouterr().err
    assert "1 of 3 images without a .caption file: lost.png" in told and "b.caption is not valid UTF-8" in told
    assert "set --caption_extension" not in told
    assert captions.main([str(folder), str(file), "--caption_extension", ".capt"]) == 2
    assert "set --caption_extension .txt" in capsys.readouterr().err
    assert captions.main([str(folder / "none"), str(file)]) == 2 and "none cannot be read" in capsys.readouterr().err
    assert not file.exists()
    assert captions.main([str(folder), str(file), "--in_json", str(folder / "b.jpg")]) == 2
    assert captions.main(["--full_path"]) == 2 and "give the folder of the images first" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["merge_captions_to_metadata", "merge_dd_tags_to_metadata"])
def test_started_by_its_path_as_kohya_ss_does(program: str, folder: Path, tmp_path: Path) -> None:
    extension = ".caption" if program == "merge_captions_to_metadata" else ".txt"
    words = ["--caption_extension", extension, str(folder), str(tmp_path / "meta.json"), "--full_path"]
    command = [sys.executable, str(ROOT / "finetune" / f"{program}.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and (tmp_path / "meta.json").is_file(), done.stderr
