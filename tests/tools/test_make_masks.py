"""tools/make_masks.py as users call it: what it writes, what training makes of it, called again and misused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library import whole_files
from library.data.scan.folders import folder_datasets
from library.data.scan.scan import scan
from tests.data.image_files import noise, template
from tests.mask_making import models
from tests.mask_making.pictures import overlap, photograph, robot
from tools import make_masks


def make(folder: Path, out: Path, *more: object) -> int:
    return make_masks.main([str(word) for word in ("--input_dir", folder, "--output_dir", out, *more)])


def mask_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        return np.asarray(image)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images of different kinds with a subject that is known, on green."""
    folder = tmp_path / "images 'ø' 图"
    folder.mkdir()
    pixels = np.full((40, 60, 3), (0, 255, 0), np.uint8)
    pixels[10:30, 20:50] = (200, 30, 90)
    image = Image.fromarray(pixels)
    image.save(folder / "a.png")
    image.save(folder / "b.jpg", quality=95, subsampling=0)
    turned = image.transpose(Image.Transpose.ROTATE_90)  # which viewers turn back
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "c.webp", lossless=True, exif=exif)
    image.quantize(8).save(folder / 'd"ö.gif')
    return folder


SUBJECT = np.zeros((40, 60), bool)
SUBJECT[10:30, 20:50] = True


def test_masks_are_upright_png_whatever_the_image(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(images, tmp_path / "masks", "--background_color", "#00ff00") == 0
    names = ["a.png", "b.png", "c.png", 'd"ö.png']
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.png")) == sorted(names)
    for name in names:
        assert overlap(mask_of(tmp_path / "masks" / name) > 0, SUBJECT) > 0.9, name
    assert np.array_equal(mask_of(tmp_path / "masks" / "a.png"), np.where(SUBJECT, 255, 0))
    assert "4 masks made" in capsys.readouterr().out


def test_training_takes_them_without_a_word(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train" / "1_dog"
    folder.parent.mkdir()
    images.rename(folder)
    noise((60, 40)).save(folder / "a.bmp")  # named like another image
    assert make(folder, tmp_path / "masks", "--background_color", "#00ff00") == 0
    datasets = folder_datasets(
        tmp_path / "train", None, template(mask_dir=tmp_path / "masks", caption_extensions=(".txt",))
    ).datasets
    found = scan(datasets)
    assert not found.mistakes and {record.path.name: record.mask for record in found.records} == {
        "a.bmp": "a.bmp.png", "a.png": "a.png.png", "b.jpg": "b.png", "c.webp": "c.png", 'd"ö.gif': 'd"ö.png',
    }  # fmt: skip
    assert not [note for note in found.notes if "mask" in note and "mean" not in note]


def test_masks_beside_the_images_are_named_as_onetrainer_names_them(images: Path) -> None:
    assert make(images, images, "--background_color", "#00ff00") == 0
    before = sorted(path.name for path in images.iterdir())
    assert {"a-masklabel.png", "b-masklabel.png", "a.png", "masks.html"} <= set(before)
    assert make(images, images, "--background_color", "#00ff00", "--overwrite") == 0
    assert sorted(path.name for path in images.iterdir()) == before, "masks are no images"


def test_sources_are_united_then_padded_feathered_and_inverted(tmp_path: Path) -> None:
    folder, boxes = tmp_path / "images", tmp_path / "boxes.json"
    folder.mkdir()
    image = Image.new("RGBA", (60, 40), (0, 0, 255, 255))
    image.paste((0, 0, 255, 0), (0, 0, 60, 30))  # opaque below
    image.putpixel((40, 5), (0, 0, 255, 255))  # a speck
    image.save(folder / "a.png")
    boxes.write_text(json.dumps({"a.png": [[0, 10, 20, 20]]}), encoding="utf-8")
    assert make(folder, tmp_path / "m", "--alpha", "--boxes", boxes, "--mask_padding", 2, "--invert_mask") == 0
    expected = np.full((40, 60), 255, np.uint8)
    expected[28:] = expected[8:22, :22] = 0
    assert np.array_equal(mask_of(tmp_path / "m" / "a.png"), expected)
    assert make(folder, tmp_path / "m", "--alpha", "--mask_blur", 3, "--min_area", 0) == 0
    blurred = mask_of(tmp_path / "m" / "a.png")
    assert (blurred[33:] == 255).all() and (blurred[10:27] == 0).all() and 0 < blurred[29, 0] < 255
    assert 0 < blurred[5, 40] < 255, "without --min_area the speck stays"


def test_palette_images_with_transparency(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 4, 8))
    image.save(folder / "p.png", transparency=0)
    assert make(folder, tmp_path / "m", "--alpha") == 0
    assert np.array_equal(mask_of(tmp_path / "m" / "p.png"), np.tile(np.repeat([0, 255], 4), (8, 1)))


def test_grabcut_and_boxes_for_what_it_takes_wrong(tmp_path: Path) -> None:
    folder, boxes = tmp_path / "images", tmp_path / "boxes.json"
    folder.mkdir()
    (drawn, truth), (shot, seen) = robot(1), photograph(4)
    Image.fromarray(drawn).save(folder / "robot.png")
    Image.fromarray(shot).save(folder / "photo.png")
    rows, columns = (places[[0, -1]] for places in (np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))))
    box = [int(columns[0]) - 5, int(rows[0]) - 5, int(columns[1]) + 6, int(rows[1]) + 6]
    boxes.write_text(json.dumps({"photo.png": [box]}), encoding="utf-8")
    assert make(folder, tmp_path / "m", "--grabcut", "--boxes", boxes) == 0
    assert overlap(mask_of(tmp_path / "m" / "photo.png") > 0, seen) > 0.95
    assert overlap(mask_of(tmp_path / "m" / "robot.png") > 0, truth) > 0.9, "an image without a box is cut out too"


def test_words_by_simpletuners_command_and_no_guess_without_a_find(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.segformer(tmp_path / "model")
    assert make(images, tmp_path / "m", "--text_input", "person, dog", "--model", model, "--device", "cpu") == 0
    assert (mask_of(tmp_path / "m" / "a.png") == 255).all(), "each pixel is one of the two classes"
    assert "nothing found" not in capsys.readouterr().out
    detector = models.yolos(tmp_path / "detector")
    words = (
        "--text_input",
        "dog",
        "--model",
        detector,
        "--device",
        "cpu",
        "--threshold",
        1,
        "--grabcut",
        "--invert_mask",
    )
    assert make(images, tmp_path / "m", *words) == 0
    out = capsys.readouterr().out
    assert "nothing found in 4 images, whose mask is white, so that all of it counts: a.png, b.jpg" in out
    assert (mask_of(tmp_path / "m" / "a.png") == 255).all(), "also with --invert_mask"
    page = (tmp_path / "m" / "masks.html").read_text(encoding="utf-8")
    assert page.count("nothing found") == 4


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def test_only_what_is_missing_or_outdated_is_made_again(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, boxes = tmp_path / "m", tmp_path / "boxes.json"
    words: tuple[Any, ...] = ("--background_color", "#00ff00", "--boxes", boxes)
    boxes.write_text('{"b.jpg": [[0, 0, 9, 9]]}', encoding="utf-8")
    assert make(images, out, *words) == 0
    first = written(out)
    assert make(images, out, *words) == 0 and written(out) == first
    assert "4 masks there already" in capsys.readouterr().out

    def changed() -> set[str]:
        return {name for name, time in written(out).items() if first.get(name) != time}

    (out / "a.png").unlink()
    with Image.open(images / "c.webp") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(images / "c.webp", lossless=True)
    boxes.write_text('{"b.jpg": [[0, 0, 9, 10]]}', encoding="utf-8")
    assert make(images, out, *words) == 0 and changed() == {"a.png", "b.png", "c.png"}
    first = written(out)
    assert make(images, out, *words, "--mask_padding", 1) == 0 and changed() == set(first)


def test_masks_made_or_changed_by_hand_are_kept_until_asked(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    out.mkdir()
    Image.new("L", (60, 40), 7).save(out / "a.png")
    assert make(images, out, "--background_color", "#00ff00") == 0
    Image.new("L", (60, 40), 9).save(out / "b.png")
    assert make(images, out, "--background_color", "#00ff00", "--mask_blur", 1) == 0
    assert mask_of(out / "a.png")[0, 0] == 7 and mask_of(out / "b.png")[0, 0] == 9
    assert "2 masks made or changed by hand, kept (--overwrite replaces them): a.png, b.png" in capsys.readouterr().out
    assert (out / "masks.html").read_text(encoding="utf-8").count("by hand") == 2
    assert make(images, out, "--background_color", "#00ff00", "--overwrite") == 0
    assert mask_of(out / "a.png")[0, 0] == 0


def test_sub_folders_are_mirrored(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        noise((8, 8)).save(tmp_path / "in" / name)
    assert make(tmp_path / "in", tmp_path / "m", "--recursive", "--alpha") == 0
    assert (mask_of(tmp_path / "m" / "a" / "x.png") == 255).all() and (tmp_path / "m" / "b" / "x.png").exists()


def test_a_full_disk_leaves_whole_masks_only(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole_files.os, "fsync", full)
    monkeypatch.setattr(whole_files, "flush_folder", lambda folder: None)
    assert make(images, tmp_path / "m", "--background_color", "#00ff00") == 2
    assert "No space left" in capsys.readouterr().err
    assert len(list((tmp_path / "m").iterdir())) == 2
    for path in (tmp_path / "m").iterdir():
        mask_of(path)
    monkeypatch.undo()
    assert make(images, tmp_path / "m", "--background_color", "#00ff00") == 0
    assert len(written(tmp_path / "m")) == 4


def errors(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert make_masks.main([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_all_mistakes_of_a_command_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    err = errors(
        capsys, "--model", "x", "--color_tolerance", 300, "--mask_blur", "-1", "--background_color", "red", "--grab"
    )
    for told in (
        "--grab (command line) is not a flag", "--color_tolerance = ", "--mask_blur = ", "no --input_dir",
        "no --output_dir", "--model has no effect without --text_input", '--background_color "red" is not a colour',
    ):  # fmt: skip
        assert told in err, told
    err = errors(capsys, "--input_dir", "x", "--output_dir", "y")
    assert "nothing says what the masks are made from" in err and "--text_input" in err and "--grabcut" in err
    assert '--text_input "," names nothing' in errors(
        capsys, "--input_dir", "x", "--output_dir", "y", "--text_input", ","
    )


def test_all_mistakes_of_folders_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, boxes = tmp_path / "in", tmp_path / "boxes.json"
    folder.mkdir()
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image", encoding="utf-8")
    noise((8, 8)).save(folder / "good.png")
    boxes.write_text('{"other.png": [[0, 0, 1, 1]], "good.png": [[8, 0, 9, 1]]}', encoding="utf-8")
    (tmp_path / "m").touch()
    err = errors(
        capsys,
        "--input_dir",
        folder,
        "--output_dir",
        tmp_path / "m",
        "--boxes",
        boxes,
        "--text_input",
        "x",
        "--model",
        "y",
    )
    for told in (
        "y: no such file or folder", "2 images cannot be used:", "empty.png: the file is empty",
        "text.jpg: unknown image",
        "images that are not in the folder: other.png", "is outside of good.png, 8x8", "m is a file",
    ):  # fmt: skip
        assert told in err, told


def test_folders_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m"
    for name, told in (("none", "there is no such folder"), ("file", "is a file"), ("empty", "contains no image")):
        if name == "file":
            (tmp_path / name).touch()
        elif name == "empty":
            (tmp_path / name).mkdir()
        assert told in errors(capsys, "--input_dir", tmp_path / name, "--output_dir", out, "--alpha")
    (tmp_path / "train" / "10_dog").mkdir(parents=True)
    below = tmp_path / "file" / "a" / "b"
    err = errors(capsys, "--input_dir", tmp_path / "train", "--output_dir", below, "--alpha")
    assert f"--output_dir {below} cannot be made: {tmp_path / 'file'} is a file" in err
    noise((8, 8)).save(tmp_path / "train" / "10_dog" / "a.png")
    err = errors(capsys, "--input_dir", tmp_path / "train", "--output_dir", out, "--alpha")
    assert "give its sub-folder '10_dog', which contains 1 image, or add --recursive" in err
    err = errors(
        capsys, "--input_dir", tmp_path / "train", "--output_dir", tmp_path / "train" / "m", "--alpha", "--recursive"
    )
    assert "is in --input_dir" in err
    (tmp_path / "train" / "train").mkdir()
    (tmp_path / "train" / "10_dog" / "a.png").rename(tmp_path / "train" / "a.png")
    noise((8, 8)).save(tmp_path / "train" / "train" / "a.png")
    err = errors(capsys, "--input_dir", tmp_path / "train", "--output_dir", tmp_path, "--alpha", "--recursive")
    assert "masks would replace images" in err
    assert not out.exists()


def test_an_image_that_turns_out_damaged_does_not_stop_the_others(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((images / "a.png").read_bytes())
    place = content.index(b"IDAT") + 10
    content[place] ^= 255  # a whole file with a wrong checksum
    (images / "a.png").write_bytes(content)
    assert make(images, tmp_path / "m", "--background_color", "#00ff00") == 2
    told = capsys.readouterr()
    assert "3 masks made" in told.out and "a.png: its data do not match their checksum" in told.err
    assert len(written(tmp_path / "m")) == 3
    assert "Cannot be opened" in (tmp_path / "m" / "masks.html").read_text(encoding="utf-8")


def test_an_image_of_one_pixel(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "in" / "a.png")
    words = ("--grabcut", "--alpha", "--background_color", "#ffffff", "--mask_padding", 3, "--mask_blur", 3)
    assert make(tmp_path / "in", tmp_path / "m", *words) == 0
    assert mask_of(tmp_path / "m" / "a.png").tolist() == [[255]]
