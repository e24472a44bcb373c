"""A folder and its shards are the same data: records, pixels, bytes."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data import images
from library.data.scan.image_record import ImageRecord
from library.data.scan.mask_values import mask_source, read_masks
from library.data.scan.shard_images import RecordsOnDisk, joined, to_disk
from tests.data.image_files import save
from tests.data.shards.packing import opened, pack, scanned, tool

IN_SHARDS = {"member", "mask_member", "row", "folder"}  # what tells a record of a shard from that of a file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several kinds, captions of several kinds, masks."""
    folder = tmp_path_factory.mktemp("data") / "10_sks dog"
    for number in range(9):
        save(folder / f"im{number}.png", (64, 48 + 16 * (number % 3)), f"dog {number}\n\nsecond line" if number else "")
    save(folder / "bild ä.jpg", (80, 64), "é")
    (folder / "bild ä.txt").write_bytes("été".encode("utf-8-sig"))
    save(folder / "nocaption.webp", (64, 64))
    save(folder / "sub" / "deep.png", (64, 64), "deep")
    Image.new("RGBA", (64, 64), (10, 20, 30, 77)).save(folder / "clear.png")
    (folder / "broken.png").write_bytes(b"nothing")
    for name in ("im1.png", "im4.png", "sub/deep.png"):
        with Image.open(folder / name) as image:
            path = folder.parent / "masks" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.linear_gradient("L").resize(image.size).save(path)
    pack(folder, folder.parent / "packed", mask_dir=folder.parent / "masks", recursive=True)
    return folder


@pytest.mark.parametrize("values", [{}, {"alpha_mask": True}, {"repeats": 3, "is_reg": True, "score": 6.5}])
@pytest.mark.parametrize("masked", [False, True])
def test_a_scan_of_the_shards_finds_the_records_of_the_folder(
    folder: Path, values: dict[str, object], masked: bool
) -> None:
    masks = folder.parent / "masks" if masked else None
    expected = scanned(folder, mask_dir=masks, recursive=True, **values)
    found = scanned(folder.parent / "packed", mask_dir=masks, **values)
    assert not expected.mistakes and not found.mistakes
    names = [field.name for field in fields(ImageRecord) if field.name not in IN_SHARDS]
    for one, other in zip(expected.records, found.records, strict=True):
        assert {name: getattr(one, name) for name in names} == {name: getattr(other, name) for name in names}
        assert one.key == other.key
        with one.path.open("rb") as first, other.path.open("rb") as second:
            assert first.read() == second.read()
        assert (images.load(one.path, one.size) == images.load(other.path, other.size)).all()
    sources = [
        [mask_source(record, scan.subsets[record.subset]) for record in scan.records] for scan in (expected, found)
    ]
    values_of = [read_masks(filter(None, some), None) for some in sources]
    for one_mask, other_mask in zip(*sources, strict=True):
        assert (one_mask is None) == (other_mask is None)
        if one_mask is not None and other_mask is not None:
            assert values_of[0][one_mask] == values_of[1][other_mask]


def test_records_on_disk_are_the_records(folder: Path, tmp_path: Path) -> None:
    shards, other = scanned(folder.parent / "packed", repeats=2), scanned(folder / "sub")
    kept = tuple(replace(record, repeats=1 + place % 2) for place, record in enumerate(shards.records))
    held_out = tuple(replace(record, held_out=True) for record in kept[3:5])
    for records, sources in ((kept + held_out, shards.shards), (tuple(other.records), other.shards)):
        assert tuple(to_disk(records, sources)) == records
    on_disk = to_disk(kept, shards.shards)
    assert isinstance(on_disk, RecordsOnDisk) and len(on_disk) == len(kept)
    both = joined(on_disk, to_disk(held_out, shards.shards))
    again = pickle.loads(pickle.dumps(both))  # as data workers get them
    for records in (both, again):
        assert list(records) == [*kept, *held_out]
        assert [records[place] for place in range(len(records))] == [*kept, *held_out]
        assert records[-1] == held_out[-1] and records[1:3] == kept[1:3]
    with pytest.raises(IndexError):
        both[len(both)]
    # the rows are on the disk: an image more costs a few bytes
    size = len(pickle.dumps(to_disk(kept * 100, shards.shards))) - len(pickle.dumps(on_disk))
    assert size / (99 * len(kept)) < 20


def test_there_and_back_gives_the_same_bytes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = folder.parent / "packed"
    code, out = tool(
        capsys, "--unpack", packed, "--output_dir", tmp_path / "out", "--conditioning_data_dir", tmp_path / "masks"
    )
    assert code == 0, out
    for before, after in ((folder, tmp_path / "out"), (folder.parent / "masks", tmp_path / "masks")):
        names = {path.relative_to(before) for path in before.rglob("*") if path.is_file() and path.stem != "broken"}
        assert {path.relative_to(after) for path in after.rglob("*") if path.is_file()} == names
        assert all((before / name).read_bytes() == (after / name).read_bytes() for name in names)


def test_the_same_folder_gives_the_same_shards(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "again", mask_dir=folder.parent / "masks", recursive=True)
    packed = folder.parent / "packed"
    names = sorted(path.name for path in packed.glob("*.tar"))
    assert len(names) > 2 and names == sorted(path.name for path in (tmp_path / "again").glob("*.tar"))
    assert all((packed / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_a_metadata_file_gives_captions_and_scores(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a.png")
    save(tmp_path / "data" / "b.png", caption="not this one")
    meta = tmp_path / "meta.json"
    text = '{"a": {"caption": "a dog", "tags": "grass", "aesthetic_score": 5.5}, "b": {"tags": "sky"}}'
    meta.write_text(text, encoding="utf-8")
    pack(tmp_path / "data", tmp_path / "packed", metadata_file=meta, caption_source="metadata")
    records = scanned(tmp_path / "packed").records
    assert [(record.caption, record.score) for record in records] == [("a dog,grass", 5.5), ("sky", None)]


def test_pixels_of_masks_are_those_of_the_folder(folder: Path) -> None:
    from library.data import masks

    images_in_shards = opened(folder.parent / "packed", mask_dir=folder)
    for number, row in images_in_shards.rows():
        record = images_in_shards.record(number, row)
        if record.mask_member is not None and record.mask is not None:
            expected = masks.load(folder.parent / "masks" / record.mask, record.size)
            assert np.array_equal(masks.load(record.mask_member, record.size), expected)
