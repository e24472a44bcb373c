"""What a folder of the convention is read as, and which of its faults are told."""

from __future__ import annotations

import codecs
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.data.scan import ImageRecord, Scan, balance, scan
from library.options.dataset import DatasetOptions
from tests.data.pictures import noise, save

ROOT = Path(__file__).resolve().parents[2]


def run(base: Path, **options: Any) -> Scan:
    return scan(DatasetOptions(train_data_dir=base, **{"caption_extension": ".txt", **options}))


def told(found: Scan) -> str:
    return "\n".join(str(mistake) for mistake in found.mistakes)


def captions(found: Scan) -> dict[str, str]:
    return {record.path.name: record.caption for record in found.records}


def test_folders_and_pictures_are_sorted_and_repeats_and_classes_read(tmp_path: Path) -> None:
    save(tmp_path / "3_sks_two dog" / "b.png", caption="")
    save(tmp_path / "3_sks_two dog" / "A.JPG", caption="")
    save(tmp_path / "10_sks dog" / "c.WebP", caption="")
    save(tmp_path / "7" / "d.Bmp", caption="")
    found = run(tmp_path)
    assert [(s.folder.name, s.repeats, s.class_tokens) for s in found.subsets] == [
        ("10_sks dog", 10, "sks dog"), ("3_sks_two dog", 3, "sks_two dog"), ("7", 7, ""),
    ]  # fmt: skip
    assert [r.path.name for r in found.records] == ["c.WebP", "A.JPG", "b.png", "d.Bmp"]
    assert [(r.repeats, r.subset) for r in found.records] == [(10, 0), (3, 1), (3, 1), (7, 2)]
    assert found.train_samples == 23 and not found.mistakes
    assert found.records[1].key == "train/3_sks_two dog/A.JPG"


@pytest.mark.parametrize("name", ["x_10", "10 foo", "1.5_x", "+3_x", "-3_x", "0_x", "٣_x", ".git"])
def test_every_skipped_folder_is_told(tmp_path: Path, name: str) -> None:
    save(tmp_path / "1_a" / "a.png", caption="")
    save(tmp_path / name / "b.png")
    found = run(tmp_path)
    assert [path.name for path, _ in found.skipped_folders] == [name]
    assert len(found.records) == 1 and not found.mistakes


def test_no_folder_is_a_mistake_with_the_way_out(tmp_path: Path) -> None:
    assert "--train_data_dir is not set" in told(scan(DatasetOptions()))
    assert "no folder" in told(run(tmp_path / "missing"))
    save(tmp_path / "10_sks dog" / "a.png", caption="")
    inside = run(tmp_path / "10_sks dog")
    assert f"--train_data_dir={tmp_path}" in told(inside)
    save(tmp_path / "a.png")
    beside = run(tmp_path)
    assert not beside.mistakes and "1 pictures directly in" in beside.notes[0]
    shutil.rmtree(tmp_path / "10_sks dog")
    assert "but 1 pictures" in told(run(tmp_path))


def test_an_empty_folder_is_a_mistake(tmp_path: Path) -> None:
    save(tmp_path / "1_a" / "a.png", caption="")
    (tmp_path / "2_b").mkdir()
    (tmp_path / "2_b" / "notes.md").write_text("x", encoding="utf-8")
    assert "2_b holds no picture" in told(run(tmp_path))


def test_a_regularisation_folder_without_a_picture_is_a_mistake(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1_a" / "a.png", caption="")
    (tmp_path / "reg").mkdir()
    assert "--reg_data_dir" in told(run(tmp_path / "train", reg_data_dir=tmp_path / "reg"))
    (tmp_path / "reg" / "1_dog").mkdir()
    assert "regularisation folder" in told(run(tmp_path / "train", reg_data_dir=tmp_path / "reg"))
    assert "same folder" in told(run(tmp_path / "train", reg_data_dir=tmp_path / "train" / "." / ""))


def test_a_caption_file_wins_over_the_folder_name(tmp_path: Path) -> None:
    folder = tmp_path / "1_sks dog"
    save(folder / "a.png", caption="  a photo, of x \nsecond line\n")
    save(folder / "b.png")
    save(folder / "c.png", caption="")
    save(folder / "d.png", caption="\r\nlate")
    found = run(tmp_path)
    assert captions(found) == {"a.png": "a photo, of x", "b.png": "sks dog", "c.png": "", "d.png": ""}
    assert [record.from_file for record in found.records] == [True, False, True, True]
    notes = "\n".join(found.notes)
    assert "2 pictures have an empty caption file" in notes and "c.png" in notes
    assert "2 caption files have more lines" in notes


def test_the_ending_of_captions_may_lack_its_dot_and_differ_in_case(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    save(folder / "a.png")
    (folder / "a.TXT").write_text("upper", encoding="utf-8")
    assert captions(run(tmp_path, caption_extension="txt")) == {"a.png": "upper"}
    if not (folder / "a.txt").exists():  # a file system that knows case
        (folder / "a.txt").write_text("exact", encoding="utf-8")
        assert captions(run(tmp_path)) == {"a.png": "exact"}


def test_face_crops_share_the_caption_of_their_source(tmp_path: Path) -> None:
    folder = tmp_path / "1_x_y_z_1_2_3_4"
    save(folder / "me_0100_0080_0256_0256.png")
    save(folder / "my_photo_of_a_dog.png")
    (folder / "me.txt").write_text("a face", encoding="utf-8")
    (folder / "my.txt").write_text("somebody else's", encoding="utf-8")
    assert captions(run(tmp_path)) == {"me_0100_0080_0256_0256.png": "a face", "my_photo_of_a_dog.png": "x_y_z_1_2_3_4"}


@pytest.mark.parametrize(
    "data",
    [
        "grün, 犬".encode(),
        codecs.BOM_UTF8 + "grün, 犬".encode(),
        "grün, 犬\r\nx".encode("utf-16"),
        codecs.BOM_UTF16_BE + "grün, 犬".encode("utf-16-be"),
        codecs.BOM_UTF32_LE + "grün, 犬".encode("utf-32-le"),
    ],
)
def test_byte_order_marks_are_honoured(tmp_path: Path, data: bytes) -> None:
    save(tmp_path / "1_x" / "a.png")
    (tmp_path / "1_x" / "a.txt").write_bytes(data)
    assert captions(run(tmp_path)) == {"a.png": "grün, 犬"}


@pytest.mark.parametrize("data", ["grün".encode("latin-1"), "dog".encode("utf-16-le"), codecs.BOM_UTF16_LE + b"abc"])
def test_another_encoding_is_a_mistake_that_names_the_file(tmp_path: Path, data: bytes) -> None:
    save(tmp_path / "1_x" / "a.png")
    (tmp_path / "1_x" / "a.txt").write_bytes(data)
    assert str(tmp_path / "1_x" / "a.txt") in told(run(tmp_path))


@pytest.mark.parametrize(("asked", "there"), [(".caption", ".txt"), (".txt", ".caption")])
def test_captions_under_another_ending_are_a_mistake(tmp_path: Path, asked: str, there: str) -> None:
    for name in "abc":
        save(tmp_path / "1_x" / f"{name}.png")
        (tmp_path / "1_x" / f"{name}{there}").write_text("words", encoding="utf-8")
    assert f"--caption_extension={there}" in told(run(tmp_path, caption_extension=asked))
    assert not run(tmp_path, caption_extension=there).mistakes


def test_few_missing_captions_are_no_mistake(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "1_x" / f"{name}.png", caption="words")
    save(tmp_path / "1_x" / "d.png")
    (tmp_path / "1_x" / "d.caption").write_text("words", encoding="utf-8")
    assert not run(tmp_path).mistakes


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("name", ["bad.png", "bad.jpg", "bad.webp", "bad.bmp", "bad.avif"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_cut_off_picture_is_named_and_left_out(tmp_path: Path, name: str, keep: float) -> None:
    if name.endswith(".avif") and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow reads no AVIF")
    for index in range(10):
        save(tmp_path / "1_x" / f"{index}.png", (8, 8), caption="")
    save(tmp_path / "1_x" / name, (64, 64), caption="")
    assert len(run(tmp_path).records) == 11
    cut(tmp_path / "1_x" / name, keep)
    found = run(tmp_path)
    assert [path.name for path, _ in found.bad_images] == [name] and found.bad_images[0][1]
    assert len(found.records) == 10 and not found.mistakes


def test_a_jpeg_that_ends_in_its_thumbnail_is_cut_off(tmp_path: Path) -> None:
    thumbnail = tmp_path / "small.jpg"
    noise((16, 16)).save(thumbnail)
    path = save(tmp_path / "1_x" / "a.jpg", (64, 64), caption="")
    data = path.read_bytes()
    extra = thumbnail.read_bytes()  # in a comment segment before the scan, with its own end mark
    whole = data[:2] + b"\xff\xfe" + (len(extra) + 2).to_bytes(2, "big") + extra + data[2:]
    path.write_bytes(whole)
    assert not run(tmp_path).bad_images
    path.write_bytes(whole[:-200])
    assert len(run(tmp_path).bad_images) == 1


def test_a_film_behind_a_jpeg_does_no_harm(tmp_path: Path) -> None:
    path = save(tmp_path / "1_x" / "a.jpg", (64, 64), caption="")
    path.write_bytes(path.read_bytes() + bytes(100_000))
    assert not run(tmp_path).bad_images


def test_more_than_a_tenth_damaged_stops(tmp_path: Path) -> None:
    for index in range(8):
        save(tmp_path / "1_x" / f"{index}.png", (8, 8), caption="")
    (tmp_path / "1_x" / "bad.png").write_bytes(b"no picture at all")
    found = run(tmp_path)
    assert "1 of 9 pictures are damaged" in told(found) and "bad.png" in told(found)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_sizes_are_upright(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "1_x" / name, (40, 24), caption="", exif=exif)
    if name == "a.png":  # the standard allows it behind the pixels too: move it there
        data = path.read_bytes()
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert run(tmp_path).records[0].size == ((24, 40) if orientation >= 5 else (40, 24))


def test_one_stem_twice_and_transparency_are_two_pictures_and_a_note(tmp_path: Path) -> None:
    save(tmp_path / "1_x" / "a.jpg", caption="words")
    noise((8, 8), mode="RGBA").save(tmp_path / "1_x" / "a.png")
    noise((8, 8)).quantize(4).save(tmp_path / "1_x" / "p.png", transparency=0)
    found = run(tmp_path)
    assert captions(found) == {"a.jpg": "words", "a.png": "words", "p.png": "x"}
    assert [record.transparent for record in found.records] == [False, True, True]
    assert any("2 pictures have transparency" in note for note in found.notes)


def test_files_of_the_system_are_no_pictures(tmp_path: Path) -> None:
    save(tmp_path / "1_x" / "a.png", caption="")
    (tmp_path / "1_x" / "._a.png").write_bytes(b"a resource fork")
    save(tmp_path / "1_x" / "sub" / "b.png")
    found = run(tmp_path)
    assert len(found.records) == 1 and not found.bad_images
    assert any("sub-folders are not read" in note for note in found.notes)


def walk(repeats: list[int], target: int) -> list[int]:
    """The walk of sd-scripts to the letter: repeats given to each picture, 0 = left out."""
    given = [0] * len(repeats)
    total = 0
    first = True
    while total < target:
        for index, own in enumerate(repeats):
            given[index] += own if first else 1
            total += own if first else 1
            if total >= target:
                break
        first = False
    return given


def reg_records(counts: list[tuple[int, int]]) -> list[ImageRecord]:
    """Per folder (pictures, repeats)."""
    return [
        ImageRecord(Path(f"{subset}/{place}"), f"{subset}/{place}", (8, 8), subset, "", False, repeats, True)
        for subset, (pictures, repeats) in enumerate(counts)
        for place in range(pictures)
    ]


@pytest.mark.parametrize("pictures", [1, 2, 7])
@pytest.mark.parametrize("repeats", [1, 3])
def test_balancing_is_the_walk_of_the_format(pictures: int, repeats: int) -> None:
    records = reg_records([(pictures, repeats)])
    for target in range(40):
        given = walk([repeats] * pictures, target)
        balanced = balance(records, target)
        assert [(r.path, r.repeats) for r in balanced] == [
            (r.path, count) for r, count in zip(records, given, strict=True) if count
        ]


def test_trimming_leaves_no_regularisation_folder_out() -> None:
    balanced = balance(reg_records([(100, 1), (100, 1), (50, 1)]), 50)
    assert [sum(r.subset == folder for r in balanced) for folder in range(3)] == [20, 20, 10]


def test_balance_in_the_scan_is_told(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "train" / "2_sks dog" / f"{name}.png", caption="")
    for index in range(6):
        save(tmp_path / "reg" / "1_dog" / f"{index}.png")
    found = run(tmp_path / "train", reg_data_dir=tmp_path / "reg")
    assert (found.train_samples, found.reg_samples, found.left_out_reg, found.found_reg_samples) == (4, 4, 2, 6)
    assert any("2 of 6 pictures are left out; ratio 1.00 : 1" in note for note in found.notes)
    assert [r.is_reg for r in found.records] == [False] * 2 + [True] * 4
    assert {r.caption for r in found.records if r.is_reg} == {"dog"}


def test_a_scan_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    save(tmp_path / "1_x" / "a.png", caption="")
    program = f"""
import sys
from pathlib import Path
from library.data import buckets, captions, order, scan
from library.options.dataset import DatasetOptions
options = DatasetOptions(train_data_dir=Path({str(tmp_path)!r}), resolution=(64, 64), caption_extension=".txt")
found = scan.scan(options)
table = buckets.make_table(found.records, buckets.settings(options))
list(order.EpochOrder([p.bucket for p in table.placements], [1], batch_size=1, seed=0).requests(1))
sys.exit(", ".join({{"torch", "numpy", "cv2"}} & set(sys.modules)) or 0)
"""
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert answer.returncode == 0, answer.stderr
