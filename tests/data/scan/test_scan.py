"""Records of folders with repeats, and the mistakes that are reported."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
import unicodedata
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.data.scan import listing
from library.data.scan.folders import folder_datasets
from library.data.scan.scan import Scan, scan
from library.options.datasets import CaptionSettings
from tests.data.image_files import dataset, noise, save, subset, template

ROOT = Path(__file__).resolve().parents[3]


def run(base: Path, reg: Path | None = None, index: Path | None = None, **values: Any) -> Scan:
    """Scan folders with repeats, with `values` of the command line, and keep all mistakes and notes."""
    described = folder_datasets(base, reg, template(**values))
    found = scan(described.datasets, index)
    return replace(found, notes=described.notes + found.notes, mistakes=described.mistakes + found.mistakes)


def told(found: Scan) -> str:
    return "\n".join(str(mistake) for mistake in found.mistakes)


def captions(found: Scan) -> dict[str, str]:
    return {record.path.name: record.caption for record in found.records}


def test_folders_and_images_are_sorted_and_repeats_and_classes_read(tmp_path: Path) -> None:
    save(tmp_path / "3_sks_two dog" / "b.png", caption="a")
    save(tmp_path / "3_sks_two dog" / "A.JPG", caption="a")
    save(tmp_path / "10_sks dog" / "c.WebP", caption="a")
    save(tmp_path / "7" / "d.Bmp", caption="a")
    found = run(tmp_path)
    assert [(s.image_dir.name, s.repeats, s.class_tokens) for s in found.subsets if s.image_dir] == [
        ("10_sks dog", 10, "sks dog"), ("3_sks_two dog", 3, "sks_two dog"), ("7", 7, ""),
    ]  # fmt: skip
    assert [r.path.name for r in found.records] == ["c.WebP", "A.JPG", "b.png", "d.Bmp"]
    assert [(r.repeats, r.subset) for r in found.records] == [(10, 0), (3, 1), (3, 1), (7, 2)]
    assert found.train_samples == 23 and not found.mistakes
    assert found.records[1].key == "train/3_sks_two dog/A.JPG"


def test_an_empty_folder_is_a_mistake(tmp_path: Path) -> None:
    save(tmp_path / "1_a" / "a.png", caption="a")
    (tmp_path / "2_b").mkdir()
    (tmp_path / "2_b" / "notes.md").write_text("x", encoding="utf-8")
    assert "2_b contains no image" in told(run(tmp_path))


def test_a_regularisation_folder_without_a_image_is_a_mistake(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1_a" / "a.png", caption="a")
    (tmp_path / "reg" / "1_dog").mkdir(parents=True)
    assert "regularisation folder" in told(run(tmp_path / "train", tmp_path / "reg"))


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
    assert "2 images with an empty caption file" in notes and "c.png" in notes
    assert "2 caption files with several lines" in notes


def test_the_ending_of_captions_may_lack_its_dot_and_differ_in_case(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    save(folder / "a.png")
    (folder / "a.TXT").write_text("upper", encoding="utf-8")
    assert captions(run(tmp_path, caption_extensions=("txt",))) == {"a.png": "upper"}
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
    assert f"--caption_extension={there}" in told(run(tmp_path, caption_extensions=(asked,)))
    assert not run(tmp_path, caption_extensions=(there,)).mistakes


@pytest.mark.parametrize("asked", [".none-use-foldername", ".txt2", ".txt-no file", ".none"])
def test_an_ending_that_no_image_has_switches_captions_off(tmp_path: Path, asked: str) -> None:
    """Values of kohya_ss's presets, whose users have no other way to train on the folder's name."""
    for name in "abc":
        save(tmp_path / "1_sks dog" / f"{name}.png", caption="words")
    found = run(tmp_path, caption_extensions=(asked,))
    assert not found.mistakes and set(captions(found).values()) == {"sks dog"}
    (note,) = found.notes
    assert f'no image has a {asked} file: no caption file is read, and "sks dog" is the caption of all' in note
    assert "3 .txt files not used" in note and "--caption_extension=.txt" in note
    save(tmp_path / "1_cat" / "d.png")  # an image that has such a file: it is the ending of captions
    (tmp_path / "1_cat" / f"d{asked}").write_text("words", encoding="utf-8")
    assert "--caption_extension=.txt" in told(run(tmp_path, caption_extensions=(asked,)))


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
def test_a_cut_off_image_is_named_and_left_out(tmp_path: Path, name: str, keep: float) -> None:
    if name.endswith(".avif") and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow reads no AVIF")
    for index in range(10):
        save(tmp_path / "1_x" / f"{index}.png", (8, 8), caption="a")
    save(tmp_path / "1_x" / name, (64, 64), caption="a")
    assert len(run(tmp_path).records) == 11
    cut(tmp_path / "1_x" / name, keep)
    found = run(tmp_path)
    assert [path.name for path, _ in found.bad_images] == [name] and found.bad_images[0][1]
    assert len(found.records) == 10 and not found.mistakes


def test_a_jpeg_that_ends_in_its_thumbnail_is_cut_off(tmp_path: Path) -> None:
    thumbnail = tmp_path / "small.jpg"
    noise((16, 16)).save(thumbnail)
    path = save(tmp_path / "1_x" / "a.jpg", (64, 64), caption="a")
    data = path.read_bytes()
    extra = thumbnail.read_bytes()  # in a comment segment before the scan, with its own end mark
    whole = data[:2] + b"\xff\xfe" + (len(extra) + 2).to_bytes(2, "big") + extra + data[2:]
    path.write_bytes(whole)
    assert not run(tmp_path).bad_images
    path.write_bytes(whole[:-200])
    assert len(run(tmp_path).bad_images) == 1


def test_a_film_behind_a_jpeg_does_no_harm(tmp_path: Path) -> None:
    path = save(tmp_path / "1_x" / "a.jpg", (64, 64), caption="a")
    path.write_bytes(path.read_bytes() + bytes(100_000))
    assert not run(tmp_path).bad_images


def test_more_than_a_tenth_damaged_stops(tmp_path: Path) -> None:
    for index in range(8):
        save(tmp_path / "1_x" / f"{index}.png", (8, 8), caption="a")
    (tmp_path / "1_x" / "bad.png").write_bytes(b"no image at all")
    found = run(tmp_path)
    assert "1 of 9 images cannot be used" in told(found) and "bad.png" in told(found)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_sizes_are_upright(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "1_x" / name, (40, 24), caption="a", exif=exif)
    if name == "a.png":  # the standard allows it behind the pixels too: move it there
        data = path.read_bytes()
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert run(tmp_path).records[0].size == ((24, 40) if orientation >= 5 else (40, 24))


def test_one_stem_twice_and_transparency_are_two_images_and_a_note(tmp_path: Path) -> None:
    save(tmp_path / "1_x" / "a.jpg", caption="words")
    noise((8, 8), mode="RGBA").save(tmp_path / "1_x" / "a.png")
    noise((8, 8)).quantize(4).save(tmp_path / "1_x" / "p.png", transparency=0)
    found = run(tmp_path)
    assert captions(found) == {"a.jpg": "words", "a.png": "words", "p.png": "x"}
    assert [record.transparent for record in found.records] == [False, True, True]
    assert any("2 images with transparency" in note for note in found.notes)


def test_files_of_the_system_are_no_images(tmp_path: Path) -> None:
    save(tmp_path / "1_x" / "a.png", caption="a")
    (tmp_path / "1_x" / "._a.png").write_bytes(b"a resource fork")
    save(tmp_path / "1_x" / "sub" / "b.png")
    found = run(tmp_path)
    assert len(found.records) == 1 and not found.bad_images
    assert any("1 sub-folder not read" in note for note in found.notes)


def test_balance_in_the_scan_is_told(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "train" / "2_sks dog" / f"{name}.png", caption="a")
    for index in range(6):
        save(tmp_path / "reg" / "1_dog" / f"{index}.png")
    found = run(tmp_path / "train", tmp_path / "reg")
    assert (found.train_samples, found.reg_samples, found.left_out_reg, found.found_reg_samples) == (4, 4, 2, 6)
    assert any("2 of 6 images left out; ratio 1.00 : 1" in note for note in found.notes)
    assert [r.is_reg for r in found.records] == [False] * 2 + [True] * 4
    assert {r.caption for r in found.records if r.is_reg} == {"dog"}


def test_a_scan_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    save(tmp_path / "1_x" / "a.png", caption="a")
    program = f"""
import sys
from pathlib import Path
from library.data.scan import folders, scan
from library.options.datasets import BucketSettings, DatasetSpec, SubsetSpec
template = DatasetSpec("", BucketSettings((64, 64)), (SubsetSpec(None, "", caption_extensions=(".txt",)),))
described = folders.folder_datasets(Path({str(tmp_path)!r}), None, template)
assert len(scan.scan(described.datasets, Path({str(tmp_path / "index")!r}), progress=True).records) == 1
sys.exit(", ".join({{"torch", "numpy", "cv2"}} & set(sys.modules)) or 0)
"""
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert answer.returncode == 0, answer.stderr


def test_the_order_of_several_datasets_and_balancing_in_each(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "reg/1.png", "reg/2.png", "reg/3.png", "other/1.png"):
        save(tmp_path / name, caption=name)
    one = dataset(
        subset(tmp_path / "reg", is_reg=True), subset(tmp_path / "b", repeats=2), subset(tmp_path / "a"), origin="one"
    )
    two = dataset(subset(tmp_path / "a"), resolution=(128, 128), origin="two")
    three = dataset(subset(tmp_path / "other", is_reg=True, repeats=5), origin="three")
    found = scan([one, two, three])
    assert not found.mistakes
    assert [(r.dataset, r.subset, r.folder.name, r.name, r.repeats) for r in found.records] == [
        (0, 1, "b", "1.png", 2), (0, 2, "a", "1.png", 1), (0, 2, "a", "2.png", 1),
        (1, 3, "a", "1.png", 1), (1, 3, "a", "2.png", 1),
        (0, 0, "reg", "1.png", 2), (0, 0, "reg", "2.png", 1), (0, 0, "reg", "3.png", 1),
        (2, 4, "other", "1.png", 5),
    ]  # fmt: skip
    assert found.subsets[3] is two.subsets[0] and found.datasets == (one, two, three)
    assert "regularisation of one: 3 samples for 4 training samples; repeated to 4" in "\n".join(found.notes)
    assert "three: only regularisation images" in "\n".join(found.notes)


def test_one_image_at_several_resolutions_has_one_key_and_is_told_once(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", caption="")
    (tmp_path / "x" / "b.png").write_bytes(b"")
    found = scan([dataset(subset(tmp_path / "x"), resolution=(side, side)) for side in (64, 128, 256)])
    assert [record.key for record in found.records] == ["train/x/a.png"] * 3
    assert len(found.bad_images) == 1 and "1 of 2 images cannot be used" in told(found)
    assert sum("1 image with an empty caption file" in note for note in found.notes) == 1


def test_a_folder_given_twice_in_one_dataset_counts_once(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", caption="a")
    found = scan([dataset(subset(tmp_path / "x"), subset(tmp_path / "y" / ".." / "x", origin="data.toml, line 9"))])
    (tmp_path / "y").mkdir()
    found = scan([dataset(subset(tmp_path / "x"), subset(tmp_path / "y" / ".." / "x", origin="data.toml, line 9"))])
    assert len(found.records) == 1 and not found.mistakes
    assert "occurs twice in one dataset (data.toml, line 1 and data.toml, line 9)" in found.notes[0]
    both = scan([dataset(subset(tmp_path / "x"), subset(tmp_path / "x", is_reg=True))])
    assert "for one of training, regularisation and validation" in told(both)


def test_a_missing_folder_names_the_place_that_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    found = scan([dataset(subset(tmp_path / "none"), subset(tmp_path / "file", origin="data.toml, line 7"))])
    assert f"there is no folder {tmp_path / 'none'} (data.toml, line 1)" in told(found)
    assert f"{tmp_path / 'file'} is a file (data.toml, line 7)" in told(found)


def test_sub_folders_are_read_where_asked(tmp_path: Path) -> None:
    for name in ("a.png", "sub/a.png", "sub/deep/b_1_2_3_4.png", ".hidden/c.png"):
        save(tmp_path / "x" / name, caption=name)
    (tmp_path / "x" / "sub" / "deep" / "b.txt").write_text("source", encoding="utf-8")
    (tmp_path / "x" / "sub" / "deep" / "b_1_2_3_4.txt").unlink()
    if hasattr(os, "symlink") and os.name == "posix":
        (tmp_path / "x" / "sub" / "round").symlink_to(tmp_path / "x", target_is_directory=True)
    found = scan([dataset(subset(tmp_path / "x", recursive=True))])
    assert {record.name: record.caption for record in found.records} == {
        "a.png": "a.png", "sub/a.png": "sub/a.png", "sub/deep/b_1_2_3_4.png": "source",
    }  # fmt: skip
    assert found.records[1].key == "train/x/sub/a.png" and found.records[1].path == tmp_path / "x" / "sub" / "a.png"
    assert len({id(record.folder) for record in found.records}) == 1
    assert [record.name for record in scan([dataset(subset(tmp_path / "x"))]).records] == ["a.png"]


@pytest.mark.parametrize(
    ("source", "tokens", "caption"),
    [
        ("files", "sks", "from file"),
        ("class_tokens", "sks dog", "sks dog"),
        ("class_tokens", None, ""),
        ("file_name", "sks", "a red dog, 2"),
    ],
)
def test_where_captions_come_from(tmp_path: Path, source: Any, tokens: str | None, caption: str) -> None:
    save(tmp_path / "x" / "a_red__dog, 2.png", caption="from file")
    (record,) = scan([dataset(subset(tmp_path / "x", caption_source=source, class_tokens=tokens))]).records
    assert (record.caption, record.from_file) == (caption, source == "files")


def test_the_first_of_several_endings_counts(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "x" / f"{name}.png", caption="txt")
    (tmp_path / "x" / "a.caption").write_text("caption", encoding="utf-8")
    found = scan([dataset(subset(tmp_path / "x", caption_extensions=(".caption", ".txt")))])
    assert captions(found) == {"a.png": "caption", "b.png": "txt"} and not found.mistakes


def test_all_lines_are_kept_for_wildcards(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", caption=" one \n\n two\n")
    specs = [subset(tmp_path / "x", captions=CaptionSettings(wildcard=wildcard)) for wildcard in (True, False)]
    found = scan([dataset(spec) for spec in specs], tmp_path / "index")
    assert [record.caption for record in found.records] == ["one\ntwo", "one"]


def test_captions_in_another_encoding(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "a.txt").write_bytes("犬".encode("shift_jis"))
    (record,) = scan([dataset(subset(tmp_path / "x", caption_encoding="shift_jis"))]).records
    assert record.caption == "犬"


@pytest.mark.parametrize(("least", "names"), [({"least_edge": 33}, "bc"), ({"least_area": 64 * 64}, "c")])
def test_small_images_are_left_out_counted_and_told(tmp_path: Path, least: dict[str, int], names: str) -> None:
    for name, size in {"a": (100, 32), "b": (33, 33), "c": (64, 64)}.items():
        save(tmp_path / "x" / f"{name}.png", size, caption="a")
    found = scan([dataset(subset(tmp_path / "x", **least))])
    assert [record.name for record in found.records] == [f"{name}.png" for name in names]
    assert found.left_out_small == 3 - len(names) and not found.mistakes
    assert f"{3 - len(names)} image" in found.notes[0] and found.notes[0].endswith(" left out")
    assert "all 3 images" in told(scan([dataset(subset(tmp_path / "x", least_edge=1000))]))


def test_one_image_is_not_called_images(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", caption="a")
    assert "x: the only image has a side below 1000 pixels" in told(
        scan([dataset(subset(tmp_path / "x", least_edge=1000))])
    )
    (tmp_path / "x" / "a.png").write_bytes(b"")
    assert "1 of 1 image cannot be used" in told(scan([dataset(subset(tmp_path / "x"))]))


def test_masks_are_paired_and_the_rest_is_told(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.png"):
        save(tmp_path / "x" / name, caption="a")
    for name in ("a.png", "b.webp", "d.png"):
        save(tmp_path / "masks" / name)
    found = scan([dataset(subset(tmp_path / "x", mask_dir=tmp_path / "masks"))])
    assert [record.mask for record in found.records] == ["a.png", "b.webp", None]
    assert found.without_mask == 1 and not found.mistakes
    notes = "\n".join(found.notes)
    assert "1 of 3 images without a mask" in notes and "1 mask without an image: d.png" in notes
    (tmp_path / "none").mkdir()
    assert "contains no mask for any image" in told(scan([dataset(subset(tmp_path / "x", mask_dir=tmp_path / "none"))]))
    assert "no mask folder" in told(scan([dataset(subset(tmp_path / "x", mask_dir=tmp_path / "nowhere"))]))


def test_a_folder_s_images_have_its_score(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save(tmp_path / name / "a.png", caption="a")
    found = scan([dataset(subset(tmp_path / "x", score=6.0), subset(tmp_path / "y"))])
    assert [record.score for record in found.records] == [6.0, None] and not found.mistakes


def test_one_folder_of_masks_for_all_folders_of_the_command_line(tmp_path: Path) -> None:
    """Some of them may have no masks, such as regularisation images; a file that names the folder means it."""
    for name in ("x/a.png", "y/b.png", "reg/c.png", "masks/a.png", "masks/b.png", "masks/d.png"):
        save(tmp_path / name, caption="a" if "masks" not in name else None)
    masks = tmp_path / "masks"
    parts = [
        subset(tmp_path / name, mask_dir=masks, is_reg=name == "reg", origin="--train_data_dir")
        for name in ("x", "y", "reg")
    ]
    found = scan([dataset(*parts)])
    assert not found.mistakes and [record.mask for record in found.records] == ["a.png", "b.png", None]
    notes = "\n".join(found.notes)
    assert "reg: 1 of 1 image without a mask" in notes and "1 mask without an image: d.png" in notes
    (mistake,) = scan([dataset(parts[0], replace(parts[2], origin="data.toml, line 9"))]).mistakes
    assert "contains no mask for any image" in mistake.what and "data.toml, line 9" in mistake.what
    (tmp_path / "none").mkdir()
    (mistake,) = scan([dataset(*(replace(part, mask_dir=tmp_path / "none") for part in parts))]).mistakes
    assert "contains no mask for any image" in mistake.what


def test_masks_that_cannot_be_used_are_named_before_the_training(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / "x" / name, caption="a")  # 64 x 48
    save(tmp_path / "masks" / "a.png", size=(48, 64))
    save(tmp_path / "masks" / "b.png", size=(32, 24))
    (tmp_path / "masks" / "c.png").write_bytes(b"")
    (mistake,) = scan([dataset(subset(tmp_path / "x", mask_dir=tmp_path / "masks"))]).mistakes
    assert "2 masks in" in mistake.what and "a.png: its size is 48x64, its image's 64x48" in mistake.what
    assert "c.png: the file is empty" in mistake.what and "b.png" not in mistake.what


def test_what_transparency_is_taken_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    noise((8, 8), mode="RGBA").save(tmp_path / "x" / "a.png")
    found = scan([dataset(subset(tmp_path / "x", alpha_mask=True, class_tokens="x"))])
    assert "1 image with transparency, used as mask" in found.notes
    save(tmp_path / "masks" / "b.png", size=(8, 8))
    noise((8, 8), mode="RGBA").save(tmp_path / "x" / "b.png")
    found = scan([dataset(subset(tmp_path / "x", alpha_mask=True, mask_dir=tmp_path / "masks", class_tokens="x"))])
    assert "1 image with transparency, used as mask" in found.notes
    assert "1 image with transparency, filled with white" in found.notes
    assert any(note.endswith("trained with transparency as mask, or unmasked") for note in found.notes)


ODD_NAMES = [
    "日本語の犬", "собака на льду", "🐕‍🦺 dog", "it's a dog", " two  blanks", "100%, [a] {b} #1 & co", "a.b.c",
    "grün" + "ü" * 50, unicodedata.normalize("NFD", "grün"), "x" * 246, "犬" * 82,
]  # fmt: skip


@pytest.mark.parametrize("stem", ODD_NAMES + (['"quoted" <name>?*|\\'] if os.name == "posix" else []))
def test_names_in_any_script(tmp_path: Path, stem: str) -> None:
    folder = tmp_path / "1_собака 犬 🐕"
    save(folder / f"{stem}.png", caption=stem)
    for _ in range(2):
        found = run(tmp_path, index=tmp_path / "索引")
        assert not found.mistakes and not found.bad_images
        assert [(record.name, record.caption) for record in found.records] == [(f"{stem}.png", stem.strip())]
        assert found.records[0].path.is_file()
        found.records[0].key.encode("utf-8")


def ten(folder: Path) -> None:
    for index in range(10):
        save(folder / f"{index}.png", (8, 8), caption="a")


def left_out(found: Scan) -> dict[str, str]:
    assert len(found.records) == 10 and not found.mistakes, told(found)
    return {path.name: why for path, why in found.bad_images}


def test_a_folder_that_is_named_like_a_image(tmp_path: Path) -> None:
    ten(tmp_path / "1_x")
    (tmp_path / "1_x" / "x.png").mkdir()
    found = run(tmp_path)
    assert not left_out(found) and any("x.png is a folder, not an image" in note for note in found.notes)


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    ten(tmp_path / "1_x")
    (tmp_path / "1_x" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert left_out(run(tmp_path)) == {"broken.png": "it is a broken link"}
    (tmp_path / "1_x" / "broken.png").unlink()
    (tmp_path / "1_x" / "round.png").symlink_to(tmp_path / "1_x" / "round.png")
    assert "cannot be read" in left_out(run(tmp_path))["round.png"]
    (tmp_path / "1_x" / "round.png").unlink()
    os.mkfifo(tmp_path / "1_x" / "pipe.png")  # opening it would wait for ever
    assert left_out(run(tmp_path)) == {"pipe.png": "not a file"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names as text")
def test_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    ten(tmp_path / "1_x")
    with open(os.fsencode(tmp_path / "1_x") + b"/gr\xfcn.png", "wb") as file:
        file.write((tmp_path / "1_x" / "0.png").read_bytes())
    (why,) = left_out(run(tmp_path, index=tmp_path / "index")).values()
    assert "not valid" in why


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    ten(tmp_path / "1_x")
    save(tmp_path / "1_x" / "mine.png", caption="a").chmod(0)
    assert "ermission" in left_out(run(tmp_path))["mine.png"]


def bomb(path: Path, size: tuple[int, int]) -> None:
    """A PNG of a few bytes that claims to have `size`."""
    whole = save(path, (1, 1)).read_bytes()
    start = whole.index(b"IHDR")
    head = b"IHDR" + size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big") + whole[start + 12 : start + 17]
    path.write_bytes(whole[:start] + head + zlib.crc32(head).to_bytes(4, "big") + whole[start + 21 :])


def test_an_image_bomb_is_not_decoded(tmp_path: Path) -> None:
    """30000 x 30000 pixels of 4 bytes are 3.35 x 2^30 bytes."""
    ten(tmp_path / "1_x")
    bomb(tmp_path / "1_x" / "bomb.png", (30_000, 30_000))
    why = left_out(run(tmp_path))["bomb.png"]
    assert "30000x30000" in why and "3.35 GiB" in why and "--max_image_memory 2" in why


def test_the_limit_of_memory_can_be_raised_and_lowered(tmp_path: Path) -> None:
    """What an earlier scan remembers does not escape it. 512 x 512 pixels of 4 bytes are 1/1024 of 2^30 bytes."""
    ten(tmp_path / "x")
    save(tmp_path / "x" / "large.png", (512, 513), caption="a")
    bomb(tmp_path / "x" / "bomb.png", (30_000, 30_000))
    spec = dataset(subset(tmp_path / "x"))
    assert not scan([spec], tmp_path / "index", most_memory=3.5).bad_images
    for index in (None, tmp_path / "index"):
        found = {path.name: why for path, why in scan([spec], index, most_memory=1 / 1024).bad_images}
        assert found.keys() == {"bomb.png", "large.png"} and "512x513" in found["large.png"]
    assert [path.name for path, _ in scan([spec], tmp_path / "index").bad_images] == ["bomb.png"]


def test_files_that_vanish_while_a_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ten(tmp_path / "1_x")
    save(tmp_path / "1_x" / "gone.png", caption="a")
    listed = listing.list_directory

    def then_remove(*words: Any) -> listing.Directory:
        found = listed(*words)
        (tmp_path / "1_x" / "gone.png").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(listing, "list_directory", then_remove)
    assert left_out(run(tmp_path)) == {"gone.png": "it was deleted while the folder was being read"}


def test_a_caption_that_vanishes_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ten(tmp_path / "1_x")
    listed = listing.list_directory

    def then_remove(*words: Any) -> listing.Directory:
        found = listed(*words)
        (tmp_path / "1_x" / "3.txt").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(listing, "list_directory", then_remove)
    assert "3.txt cannot be read" in told(run(tmp_path))
