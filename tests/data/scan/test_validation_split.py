"""Held-out images: those of sd-scripts for a seed, and none on both sides."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest

from library.data.scan.image_record import ImageRecord
from library.data.scan.scan import Scan, scan
from library.data.scan.validation_split import choose_held_out
from tests.data.image_files import dataset, save, subset

NAMES = [f"{letter}.png" for letter in "abcdefghijkl"]


def make(folder: Path, names: list[str]) -> Path:
    for name in names:
        save(folder / name, caption=name)
    return folder


def names(records: tuple[ImageRecord, ...]) -> list[str]:
    return [record.name for record in records]


def told(found: Scan) -> str:
    return "\n".join(map(str, found.mistakes))


@pytest.mark.parametrize("seed", [0, 7, 2**31])
def test_a_seed_chooses_the_images_that_it_chooses_in_sd_scripts(seed: int) -> None:
    """There: random.seed(validation_seed), the sorted paths shuffled, the first ceil(N (1 - split)) trained."""
    paths = [f"/data/10_dog/{name}" for name in NAMES]
    random.seed(seed)
    random.shuffle(paths)
    theirs = {path.rpartition("/")[2] for path in paths[math.ceil(len(paths) * (1 - 0.25)) :]}
    backwards = NAMES[::-1]
    assert {NAMES[place] for place in choose_held_out(NAMES, 0.25, seed)} == theirs
    assert {backwards[place] for place in choose_held_out(backwards, 0.25, seed)} == theirs


def test_the_share_is_that_which_was_written() -> None:
    """ceil(N (1 - s)) are trained; 0.41 and its like have no exact floating-point number."""
    counts = {(n, s): len(choose_held_out([str(i) for i in range(n)], s, 1)) for n, s in COUNTS}
    assert counts == COUNTS


COUNTS = {(100, 0.41): 41, (10, 0.3): 3, (5, 0.3): 1, (3, 0.1): 0, (3, 1.0): 3, (7, 0.0): 0, (0, 0.5): 0}


def test_what_is_set_aside_is_not_trained_and_all_the_rest_is(tmp_path: Path) -> None:
    spec = dataset(subset(make(tmp_path / "3_dog", NAMES), repeats=3), validation_split=0.25)
    found = scan([spec], seed=5)
    assert not found.mistakes
    assert sorted(names(found.records) + names(found.held_out)) == NAMES and len(found.held_out) == 3
    assert {record.repeats for record in found.held_out} == {1} and found.train_samples == 27
    assert all(record.held_out for record in found.held_out) and not any(record.held_out for record in found.records)


def test_the_choice_depends_on_seed_and_names_alone(tmp_path: Path) -> None:
    first = scan([dataset(subset(make(tmp_path / "here", NAMES)), validation_split=0.25)], seed=5)
    moved = scan([dataset(subset(make(tmp_path / "there", NAMES[::-1])), validation_split=0.25)], seed=5)
    own_seed = scan([dataset(subset(tmp_path / "here"), validation_split=0.25, validation_seed=5)], seed=99)
    others = [scan([dataset(subset(tmp_path / "here"), validation_split=0.25)], seed=seed) for seed in range(20)]
    assert names(first.held_out) == names(moved.held_out) == names(own_seed.held_out)
    assert len({tuple(names(other.held_out)) for other in others}) > 10


def test_chance_elsewhere_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path, NAMES)
    random.seed(1)
    state = random.getstate()
    scan([dataset(subset(tmp_path), validation_split=0.25)], seed=5)
    assert random.getstate() == state


def test_regularisation_images_are_never_set_aside_and_balance_what_is_trained(tmp_path: Path) -> None:
    parts = subset(make(tmp_path / "x", NAMES)), subset(make(tmp_path / "r", ["1.png", "2.png", "3.png"]), is_reg=True)
    found = scan([dataset(*parts, validation_split=0.5)], seed=1)
    assert (found.train_samples, found.reg_samples, len(found.held_out)) == (6, 6, 6)
    assert not any(record.is_reg for record in found.held_out)


def test_each_folder_gives_its_share(tmp_path: Path) -> None:
    parts = (
        subset(make(tmp_path / "x", NAMES)),
        subset(make(tmp_path / "y", [f"y{name}" for name in NAMES[:4]])),
        subset(make(tmp_path / "z", ["z.png"])),
    )
    found = scan([dataset(*parts, validation_split=0.25)])
    assert [sum(record.subset == number for record in found.held_out) for number in range(3)] == [3, 1, 0]
    assert any("does not hold out the only image of " in note and str(tmp_path / "z") in note for note in found.notes)


def test_a_metadata_file_is_split_too(tmp_path: Path) -> None:
    make(tmp_path / "x", NAMES)
    listed = tmp_path / "meta.json"
    listed.write_text(json.dumps({name: {"caption": "a"} for name in NAMES}), encoding="utf-8")
    spec = subset(tmp_path / "x", metadata_file=listed, caption_source="metadata")
    by_metadata = scan([dataset(spec, validation_split=0.25)], seed=5)
    by_folder = scan([dataset(subset(tmp_path / "x"), validation_split=0.25)], seed=5)
    assert len(by_metadata.held_out) == 3 and names(by_metadata.held_out) == names(by_folder.held_out)


def test_a_file_of_two_datasets_is_on_one_side(tmp_path: Path) -> None:
    """An image at another resolution is the same image."""
    make(tmp_path / "x", NAMES)
    sizes = [(64, 64), (128, 128)]
    alike = scan([dataset(subset(tmp_path / "x"), resolution=size, validation_split=0.25) for size in sizes])
    assert names(alike.held_out[:3]) == names(alike.held_out[3:]) and len(alike.held_out) == 6
    otherwise = [
        dataset(subset(tmp_path / "x"), resolution=size, validation_split=0.25, validation_seed=seed)
        for size, seed in zip(sizes, (1, 2), strict=True)
    ]
    found = scan(otherwise)
    both = {record.path for record in found.records} & {record.path for record in found.held_out}
    assert not both and len(found.records) == 18
    assert any("also trained on" in note for note in found.notes)


def test_a_copy_of_a_trained_image_is_not_validated_on(tmp_path: Path) -> None:
    make(tmp_path / "x", NAMES)
    chosen = scan([dataset(subset(tmp_path / "x"), validation_split=0.25)], seed=5)
    copied = chosen.held_out[1]
    for other in (tmp_path / "y" / "other name.png", tmp_path / "z" / "o.png"):
        other.parent.mkdir()
        shutil.copy(copied.path, other)
        found = scan(
            [
                dataset(
                    subset(tmp_path / "x"), subset(other.parent, is_reg=other.name == "o.png"), validation_split=0.25
                )
            ],
            seed=5,
        )
        assert names(found.held_out) == [n for n in names(chosen.held_out) if n != copied.name]
        assert copied.path not in {record.path for record in found.records}
        assert any(str(copied.path) in note for note in found.notes)


def test_images_of_one_length_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES[:4]):
        save(tmp_path / name, size=(200, 200))
        with (tmp_path / name.replace("png", "bmp")).open("wb") as file:
            file.write(bmp(number))
    bitmaps = [name.replace("png", "bmp") for name in NAMES[:4]]
    found = scan([dataset(subset(tmp_path), validation_split=0.5)])
    assert len({(tmp_path / name).stat().st_size for name in bitmaps}) == 1
    assert len(found.held_out) == 4


def bmp(number: int) -> bytes:
    """A bitmap of 200 x 200, which differs from others only in its last pixels."""
    head = b"BM" + (54 + 120000).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    info = (40).to_bytes(4, "little") + (200).to_bytes(4, "little") * 2 + b"\x01\x00\x18\x00" + bytes(24)
    return head + info + bytes(119990) + bytes([number]) * 10


def test_all_set_aside_needs_another_dataset_to_train_on(tmp_path: Path) -> None:
    make(tmp_path / "x", NAMES[:3])
    make(tmp_path / "y", NAMES[3:])
    alone = dataset(subset(tmp_path / "x"), validation_split=1.0)
    assert "validation_split = 1 (data.toml) leaves no image to train on" in told(scan([alone]))
    beside = scan([alone, dataset(subset(tmp_path / "y"))])
    assert not beside.mistakes and names(beside.held_out) == NAMES[:3] and names(beside.records) == NAMES[3:]
    the_same = scan([alone, dataset(subset(tmp_path / "x"))])
    assert "every held-out image is also trained on" in told(the_same)


def test_regularisation_is_not_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "x", NAMES[:3])
    make(tmp_path / "y", NAMES[3:])
    make(tmp_path / "r", ["1.png"])
    lonely = dataset(subset(tmp_path / "x"), subset(tmp_path / "r", is_reg=True), validation_split=1.0)
    assert "without training images" in told(scan([lonely, dataset(subset(tmp_path / "y"))]))


def test_a_share_that_sets_nothing_aside_is_a_mistake_with_one_that_does(tmp_path: Path) -> None:
    make(tmp_path / "x", NAMES[:3])
    found = scan([dataset(subset(tmp_path / "x"), validation_split=0.1)])
    assert "holds out no image" in told(found) and "0.34, to hold out 1 of" in told(found)
    assert not scan([dataset(subset(tmp_path / "x"), validation_split=0.34)]).mistakes


def test_a_validation_subset_is_held_out_whole_and_a_share_of_the_others_besides(tmp_path: Path) -> None:
    """Also images of the class. The copy of a trained image is not unseen."""
    make(tmp_path / "x", NAMES)
    make(tmp_path / "unseen", ["u1.png", "u2.png"])
    shutil.copy(tmp_path / "x" / "a.png", tmp_path / "unseen" / "copy.png")
    parts = (
        subset(make(tmp_path / "class", ["class.png"]), validation=True, is_reg=True),
        subset(tmp_path / "x"),
        subset(tmp_path / "unseen", validation=True, repeats=5),
        subset(make(tmp_path / "reg", ["r.png"]), is_reg=True),
    )
    found = scan([dataset(*parts)])
    assert not found.mistakes and any("copy.png" in note for note in found.notes)
    assert names(found.held_out) == ["class.png", "u1.png", "u2.png"] and {each.repeats for each in found.held_out} == {
        1
    }
    assert [record.is_reg for record in found.held_out] == [True, False, False]
    assert names(found.records) == [*NAMES, "r.png"] and found.reg_samples == 12
    both = scan([dataset(*parts, validation_split=0.25)])
    assert len(both.held_out) in (6, 7)  # the copy is validated on where its other self is held out too
    assert {"class.png", "u1.png", "u2.png"} <= set(names(both.held_out))


def test_a_run_needs_images_to_train_on(tmp_path: Path) -> None:
    make(tmp_path / "x", NAMES)
    alone = scan([dataset(subset(tmp_path / "x", validation=True))])
    assert "validation subset (data.toml, line 1) leaves no image to train on" in told(alone)
    again = scan([dataset(subset(tmp_path / "x")), dataset(subset(tmp_path / "x", validation=True))])
    assert "every held-out image is also trained on" in told(again)
    twice = scan([dataset(subset(tmp_path / "x"), subset(tmp_path / "x", validation=True))])
    assert "for one of training, regularisation and validation" in told(twice)
