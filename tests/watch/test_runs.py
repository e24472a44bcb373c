"""Which runs are followed, and which files are theirs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from library.options.mistakes import UserError
from library.watch.runs import WatchedRun, find_runs, image_file
from tests.watch.records import begin, drawn, status, write, write_image


def answer(run: WatchedRun, known: str = "") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(run.answer(known))
    return content


def test_all_records_of_the_folders_are_found(tmp_path: Path) -> None:
    names = ["dog", "dog 'quoted' \"twice\" & <b>", "Hündchen", "狗"] if os.name != "nt" else ["dog", "Hündchen", "狗"]
    for name in names:
        write(tmp_path / "a", begin(), name=name)
    other = write(tmp_path / "b", begin())
    runs = find_runs([tmp_path / "a", other])
    assert sorted(run.name for run in runs.look()) == sorted([*names, "dog"])
    assert runs.look()[runs.first_shown()[1]].record.path == other


def test_the_newest_record_of_a_folder_is_shown_first(tmp_path: Path) -> None:
    for age, name in enumerate(("b", "a", "c")):
        os.utime(write(tmp_path, begin(), name=name), (1000 - age, 1000 - age))
    runs = find_runs([tmp_path])
    assert [runs.look()[number].name for number in runs.first_shown()] == ["b"]


def test_a_run_that_begins_later_is_found_and_numbers_stay(tmp_path: Path) -> None:
    write(tmp_path, begin(), name="m")
    runs = find_runs([tmp_path])
    assert [run.name for run in runs.look()] == ["m"]
    write(tmp_path, begin(), name="a")
    assert [run.name for run in runs.look()] == ["m", "a"]


def test_places_without_a_record_are_mistakes_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write(tmp_path / "output" / "dog", begin())
    (tmp_path / "dog.safetensors").write_bytes(b"")
    places = [tmp_path / name for name in ("gone", "old", "output", "dog.safetensors")]
    with pytest.raises(UserError) as raised:
        find_runs([*places, tmp_path / "output" / "dog"])
    gone, old, output, file = raised.value.mistakes
    assert "no such folder" in gone.what and "holds no record of a run" in old.what
    assert "--logging_dir" in old.remedy and "--logging_dir" in file.remedy
    assert str(tmp_path / "output" / "dog") in output.remedy


def test_only_what_is_new_is_sent(tmp_path: Path) -> None:
    path = write(tmp_path, begin(), status(1, loss=1.0))
    (run,) = find_runs([tmp_path]).look()
    first = answer(run)
    assert first["step"] == 1 and first["name"] == "dog"
    assert set(answer(run, first["version"])) == {"version", "now"}
    with path.open("ab") as file:
        file.write(status(2, loss=1.0)[:30])
    assert set(answer(run, first["version"])) == {"version", "now"}
    with path.open("ab") as file:
        file.write(status(2, loss=1.0)[30:])
    second = answer(run, first["version"])
    assert second["step"] == 2 and second["version"] != first["version"]
    assert answer(run, "of another server")["step"] == 2


def test_a_record_that_is_begun_anew_or_deleted(tmp_path: Path) -> None:
    path = write(tmp_path, begin(run="a"), status(1, loss=1.0), status(2, loss=1.0), b"damaged\n")
    (run,) = find_runs([tmp_path]).look()
    first = answer(run)
    assert first["damaged"] == 1
    write(tmp_path, begin(run="b"), status(1, loss=2.0))
    second = answer(run, first["version"])
    assert second["step"] == 1 and second["damaged"] == 0
    path.unlink()
    third = answer(run, second["version"])
    assert "cannot be read" in third["problem"] and third["step"] == 1
    assert set(answer(run, third["version"])) == {"version", "now"}
    write(tmp_path, begin(run="c"))
    assert answer(run, third["version"])["problem"] == ""


@pytest.mark.parametrize(
    ("output_dir", "recorded"),
    [
        ("output", "output/sample/dog.png"),
        ("output", "output\\sample\\dog.png"),
        ("/data/output", "/data/output/sample/dog.png"),
        ("C:\\data\\output", "C:\\data\\output\\sample\\dog.png"),
        ("C:\\data\\output", "c:\\Data\\output\\sample\\dog.png"),
        (".", "sample/dog.png"),
        ("", "sample/dog.png"),
    ],
)
def test_images_are_found_wherever_the_folder_is_now(output_dir: str, recorded: str, tmp_path: Path) -> None:
    """Also if the run was trained on Windows, or the folder was moved."""
    image = write_image(tmp_path / "now" / "sample" / "dog.png")
    assert image_file(tmp_path / "now", output_dir, recorded) == image.resolve()


@pytest.mark.parametrize(
    "recorded",
    [
        "output/../secret.png",
        "output/sample/../../secret.png",
        "output\\..\\secret.png",
        "../secret.png",
        "{root}/secret.png",
        "output/{root}/secret.png",
        "secret.png",
        "output/sample/notes.txt",
        "output/dog.safetensors",
        "output/sample",
        "output/gone.png",
        "output",
        "",
        "output/dog.png:stream.png",
        "output/dog.png\0.png",
        "//server/share/dog.png",
        "\\\\server\\share\\dog.png",
        "output/" + "a" * 5000 + ".png",
        "output/folder.png",
    ],
)
def test_nothing_else_is_a_file_of_the_run(recorded: str, tmp_path: Path) -> None:
    """A record that comes from somebody else is not trusted."""
    write_image(tmp_path / "secret.png")
    folder = tmp_path / "output"
    write_image(folder / "sample" / "dog.png")
    (folder / "folder.png").mkdir()
    (folder / "sample" / "notes.txt").write_text("private", encoding="utf-8")
    (folder / "dog.safetensors").write_bytes(b"")
    for output_dir in ("output", "", "/", str(tmp_path / "output"), "..", "output/.."):
        found = image_file(folder, output_dir, recorded.format(root=tmp_path))
        assert found is None, output_dir


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    secret = write_image(tmp_path / "secret.png")
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "dog.png").symlink_to(secret)
    (folder / "sample").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    for name in ("dog.png", "sample/secret.png", "loop.png", "pipe.png"):
        assert image_file(folder, "output", f"output/{name}") is None


def test_an_image_is_served_by_its_key_alone(tmp_path: Path) -> None:
    image = write_image(tmp_path / "sample" / "dog.png")
    write_image(tmp_path / "sample" / "not recorded.png")
    write(tmp_path, begin(), drawn("output/sample/dog.png", 0))
    (run,) = find_runs([tmp_path]).look()
    key = answer(run)["prompts"][0]["images"][0][1]
    assert run.image(key) == image.resolve()
    assert run.image("0" * 20) is None
    image.unlink()
    assert run.image(key) is None
