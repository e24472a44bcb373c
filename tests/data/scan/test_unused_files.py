"""Files of a folder belong to images by their names, and those that are not used are reported."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.data import images
from library.data.image_files import BadImage, readable_extensions
from library.data.scan.image_headers import read_header
from library.data.scan.scan import Scan, scan
from tests.data.image_files import dataset, noise, save, subset

COMPOSED, APART = (unicodedata.normalize(form, "hündchen") for form in ("NFC", "NFD"))


def write(folder: Path, *names: str, text: str | None = None) -> None:
    """Text files that contain `text`, else their own names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name if text is None else text, encoding="utf-8")


def run(folder: Path, **values: Any) -> Scan:
    found = scan([dataset(subset(folder, **values))])
    assert not found.mistakes, found.mistakes
    return found


def pairs(found: Scan) -> dict[str, str | None]:
    return {record.name: record.caption if record.from_file else None for record in found.records}


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        ("robot_1.png", "robot_1.png.txt"),  # gallery downloaders
        ("robot_1.png", "Robot_1.txt"),  # Windows opens it under either name
        ("robot_1.png", "ROBOT_1.PNG.TXT"),
        (f"{APART}.png", f"{COMPOSED}.txt"),  # macOS and an editor elsewhere
        (f"{COMPOSED}.jpg", f"{APART}.jpg.txt"),
        (f"{COMPOSED.upper()}.png", f"{APART}.txt"),
        ("me_1_2_3_4.png", "Me.txt"),  # a face crop
        ("me_1_2_3_4.png", "me.png.txt"),
    ],
)
def test_a_caption_belongs_to_its_image_as_a_user_means_it(tmp_path: Path, image: str, caption: str) -> None:
    save(tmp_path / "x" / image)
    write(tmp_path / "x", caption)
    assert pairs(run(tmp_path / "x")) == {image: caption}


def test_a_name_that_is_equal_comes_first_and_no_other_image_gets_its_caption(tmp_path: Path) -> None:
    for name in ("a.png", "A.PNG", "b.png", "b.jpg", "c.png", "me_1_2_3_4.png"):
        save(tmp_path / "x" / name)
    if len(list((tmp_path / "x").iterdir())) < 6:
        pytest.skip("the file system ignores letter case")
    write(tmp_path / "x", "a.txt", "a.png.txt", "b.txt", "C.txt", "c.png.txt", "me.txt", "ME_1_2_3_4.txt")
    found = run(tmp_path / "x", class_tokens="x")
    assert pairs(found) == {
        "a.png": "a.txt", "A.PNG": "a.png.txt", "b.png": "b.txt", "b.jpg": "b.txt", "c.png": "c.png.txt",
        "me_1_2_3_4.png": "me.txt",
    }  # fmt: skip
    assert any("2 caption files (for example C.txt) not used, because" in note for note in found.notes)


def test_a_caption_under_another_ending_with_a_double_ending_is_a_mistake(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    write(tmp_path / "x", "a.png.txt")
    (mistake,) = scan([dataset(subset(tmp_path / "x", caption_extensions=(".caption",), class_tokens="x"))]).mistakes
    assert "0 of 1 image has a .caption file, 1 has a .txt file" in mistake.what


def test_captions_without_an_image_are_counted_with_an_example(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", caption="a")
    write(tmp_path / "x", "robot.txt", "zebra.txt", "old.caption", "a.caption", "a.json", "a.png.json", "a.npz")
    write(tmp_path / "x", "list.json", "README.md")
    notes = [note.removeprefix(f"{tmp_path / 'x'}: ") for note in run(tmp_path / "x").notes]
    assert notes == [
        "2 caption files (for example robot.txt) without an image",
        "2 .caption files (for example a.caption) not used; captions are from .txt files",
        "2 other files (for example a.json) named like images not used",
    ]
    notes = run(tmp_path / "x", caption_source="class_tokens", class_tokens="x").notes
    assert f"{tmp_path / 'x'}: 1 .txt file (a.txt) not used; captions are from one text for all" in notes


def test_a_folder_without_unused_files_has_no_note(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", caption="a")
    save(tmp_path / "x" / "me_1_2_3_4.png")
    write(tmp_path / "x", "me.txt", "Thumbs.db", "a_0064x0064_sd.npz")
    assert run(tmp_path / "x").notes == ()


def test_formats_that_are_not_read_are_named_with_what_to_do(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", caption="a")
    write(tmp_path / "x", "b.psd", "c.PSD", "d.mp4", "e.CR2", "sub.txt.bak")
    notes = "\n".join(run(tmp_path / "x").notes)
    assert "2 .psd files (for example" in notes and ") not used; save each as PNG" in notes
    assert "1 .mp4 file (d.mp4) not used; save the frames" in notes and "1 .cr2 file (e.CR2)" in notes
    if ".heic" not in readable_extensions():
        write(tmp_path / "x", "f.heic")
        assert "1 .heic image (f.heic) not used; install pillow-heif" in "\n".join(run(tmp_path / "x").notes)


@pytest.mark.parametrize("ending", [".tif", ".tiff", ".gif", ".jfif", ".jpe", ".jp2", ".tga", ".ppm", ".qoi", ".apng"])
def test_every_format_that_pillow_reads_is_an_image(tmp_path: Path, ending: str) -> None:
    image = noise((64, 48))
    save(tmp_path / "x" / "b.png", caption="b")
    lossy = {".jp2": {"irreversible": False}}.get(ending, {})
    try:
        image.save(tmp_path / "x" / f"a{ending}", **lossy)
    except (OSError, ValueError) as error:
        pytest.skip(f"Pillow cannot write {ending}: {error}")
    write(tmp_path / "x", "a.txt")
    found = run(tmp_path / "x")
    assert pairs(found) == {f"a{ending}": "a.txt", "b.png": "b"} and found.records[0].size == (64, 48)
    pixels = images.load(found.records[0].path, found.records[0].size)
    if ending not in (".gif", ".jfif", ".jpe"):  # exact
        assert Image.fromarray(pixels).tobytes() == image.tobytes()


def test_a_rotated_tiff_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((64, 48)).save(tmp_path / "a.tif", exif=exif)
    assert read_header(tmp_path / "a.tif").size == (48, 64)
    assert images.load(tmp_path / "a.tif", (48, 64)).shape == (64, 48, 3)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.new("F", (8, 8), 0.5).save(tmp_path / "a.tif")  # Pillow would make it black
    with pytest.raises(BadImage, match="8 or 16 bits"):
        read_header(tmp_path / "a.tif")


def test_a_mask_beside_its_image_is_not_trained_on(tmp_path: Path) -> None:
    for name in ("img0.png", "img1.png"):
        save(tmp_path / "x" / name, caption="a")
    for name in ("img0-masklabel.png", "img2-masklabel.png"):
        save(tmp_path / "x" / name)
    found = run(tmp_path / "x")
    assert list(pairs(found)) == ["img0.png", "img1.png"]
    assert any(
        "2 masks (for example img0-masklabel.png) beside the images not used" in note and "--masked_loss" in note
        for note in found.notes
    )
    found = run(tmp_path / "x", mask_dir=tmp_path / "x")
    assert [record.mask for record in found.records] == ["img0-masklabel.png", None]
    notes = "\n".join(found.notes)
    assert "1 mask without an image: img2-masklabel.png" in notes and "beside the images" not in notes
    save(tmp_path / "masks" / "IMG1-masklabel.png")
    found = run(tmp_path / "x", mask_dir=tmp_path / "masks")
    assert [record.mask for record in found.records] == [None, "IMG1-masklabel.png"]


def test_a_metadata_file_finds_images_by_the_same_rule_and_lists_no_masks(tmp_path: Path) -> None:
    for name in (f"{APART}.png", "B.png", "B-masklabel.png"):
        save(tmp_path / "x" / name)
    write(tmp_path / "x", "b.txt")
    entries = ", ".join(f'"{name}": {{"caption": "{name}"}}' for name in (f"{COMPOSED}.png", "b", "B-masklabel.png"))
    write(tmp_path, "m.json", text=f"{{{entries}}}")
    found = run(tmp_path / "x", metadata_file=tmp_path / "m.json", caption_source="metadata")
    assert pairs(found) == {"B.png": "b", f"{APART}.png": f"{COMPOSED}.png"}
    notes = "\n".join(found.notes)
    assert "m.json: 1 mask (B-masklabel.png) beside the images not used" in notes
    assert "1 .txt file (b.txt) not used; captions are from the metadata file" in notes
