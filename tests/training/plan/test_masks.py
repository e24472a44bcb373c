"""The plan says how much masks count, refuses a run in which nothing does, and notes odd masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data import decoding
from library.data.scan.scan import scan
from library.options.datasets import SubsetSpec
from library.options.groups.mask import MaskOptions
from library.options.mistakes import Mistakes
from library.training.plan.masks import check_masks
from tests.data.image_files import dataset, noise, save, subset

SIZE = (64, 48)


def folder_of(root: Path, masks: Sequence[Image.Image | None], **values: object) -> SubsetSpec:
    """Images with these masks."""
    for number, mask in enumerate(masks):
        save(root / "x" / f"{number}.png", SIZE, caption="a")
        (root / "masks").mkdir(exist_ok=True)
        if mask is not None:
            mask.save(root / "masks" / f"{number}.png")
    return subset(root / "x", mask_dir=root / "masks", **values)


def grey(level: int, mode: str = "L") -> Image.Image:
    return Image.new("L", SIZE, level).convert(mode)


def half() -> Image.Image:
    """White on the left half."""
    mask = grey(0)
    mask.paste(255, (0, 0, SIZE[0] // 2, SIZE[1]))
    return mask


def check(*subsets: SubsetSpec, index: Path | None = None, **options: object) -> tuple[list[str], list[str]]:
    """Mistakes and notes about the masks."""
    mistakes = Mistakes()
    found = scan([dataset(*subsets)], index)
    assert not found.mistakes
    notes = check_masks(MaskOptions(**{"masked_loss": True, **options}), found, index, mistakes)  # type: ignore[arg-type]
    return [str(mistake) for mistake in mistakes], list(notes)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "RGBA"])
def test_black_masks_train_nothing(tmp_path: Path, mode: str) -> None:
    part = folder_of(tmp_path, [grey(0, mode)] * 6)
    ((mistake,), notes) = check(part)
    assert "nothing would be trained: the masks of all 6 images are black" in mistake and not notes
    assert "--mask_invert" in mistake


def test_masks_of_zeros_and_ones_train_nothing(tmp_path: Path) -> None:
    """1 of 255 is 0.4%. Programs that segment write such masks, and 16-bit files of 0 and 255 come to the same."""
    ones = half().point(lambda value: value // 255)
    wide = Image.fromarray(np.asarray(half()).astype(np.uint16))
    ((mistake,), _) = check(folder_of(tmp_path, [ones, wide]))
    assert "the masks of all 2 images are black (no value is above 1 of 255)" in mistake


def test_a_palette_counts_by_its_colours(tmp_path: Path) -> None:
    """Palette masks of segmentation: the first class is dark red, the last is white."""
    palette = Image.new("P", SIZE)
    palette.putpalette([0, 0, 0, 0, 255, 0, 255, 255, 255])
    palette.paste(1, (0, 0, SIZE[0] // 2, SIZE[1]))
    mistakes, notes = check(folder_of(tmp_path, [palette]))
    assert not mistakes
    # half of it is green: 150 of 255 by ITU-R BT.601
    assert notes[0] == "1 image with a mask: 29% of the area counts"
    assert notes[1] == f"1 mask in colour, used by luminance: {tmp_path / 'masks' / '0.png'}"


def test_how_much_counts_is_told(tmp_path: Path) -> None:
    part = folder_of(tmp_path, [half(), grey(255), grey(51), None])
    assert check(part) == ([], ["3 images with a mask: 57% of the area counts on average (20% to 100%)"])
    assert check(part, mask_invert=True)[1][0].endswith(": 43% of the area counts on average (0% to 80%)")
    assert check(part, mask_floor=0.1)[1][0].endswith("(20% to 100%), the rest at least 10% (--mask_floor)")


def test_some_odd_masks_are_noted(tmp_path: Path) -> None:
    ones = half().point(lambda value: value // 255)
    part = folder_of(tmp_path, [grey(0), half(), ones, noise(SIZE)])
    mistakes, notes = check(part)
    names = [tmp_path / "masks" / f"{number}.png" for number in range(4)]
    assert not mistakes and notes[1:] == [
        f"1 mask black everywhere, so that nothing of the image counts: {names[0]}",
        f"1 mask with no value above 1 of 255, almost black; save white as 255: {names[2]}",
        f"1 mask in colour, used by luminance: {names[3]}",
    ]
    assert "only --mask_floor counts" in check(part, mask_floor=0.5)[1][1]


def test_an_image_without_a_mask_is_trained(tmp_path: Path) -> None:
    mistakes, notes = check(folder_of(tmp_path, [grey(0), None]))
    assert not mistakes and "1 mask black everywhere" in notes[1]


@pytest.mark.parametrize("options", [{"mask_invert": True}, {"mask_floor": 0.01}])
def test_black_masks_that_count(tmp_path: Path, options: dict[str, object]) -> None:
    assert not check(folder_of(tmp_path, [grey(0)] * 2), **options)[0]


def test_inverted_white_masks_train_nothing(tmp_path: Path) -> None:
    ((mistake,), _) = check(folder_of(tmp_path, [grey(255)]), mask_invert=True)
    assert "nothing would be trained: the mask of the only image is white, and --mask_invert is set" in mistake
    assert not check(folder_of(tmp_path, [grey(255)]), mask_invert=True, mask_floor=0.5)[0]


def test_transparency_as_mask(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for number in range(3):
        image = noise(SIZE, number)
        image.putalpha(0)
        image.save(tmp_path / "x" / f"{number}.png")
    part = subset(tmp_path / "x", alpha_mask=True, class_tokens="a")
    ((mistake,), _) = check(part)
    assert "nothing would be trained: all 3 images are fully transparent" in mistake
    assert "remove --alpha_mask" in mistake
    assert check(part, mask_invert=True) == (
        [], ["3 images with a mask: 100% of the area counts"],
    )  # fmt: skip
    image.putalpha(half())
    image.save(tmp_path / "x" / "0.png")
    assert check(part)[1][0] == "3 images with a mask: 17% of the area counts on average (0% to 50%)"


def test_regularisation_images_alone_train_no_subject(tmp_path: Path) -> None:
    part = folder_of(tmp_path, [grey(0)] * 2)
    save(tmp_path / "reg" / "a.png", SIZE, caption="a")
    ((mistake,), _) = check(part, subset(tmp_path / "reg", is_reg=True))
    assert "the masks of all 2 images are black" in mistake


def test_an_image_that_is_trained_without_its_mask_too_counts(tmp_path: Path) -> None:
    part = folder_of(tmp_path, [grey(0)])
    mistakes = Mistakes()
    found = scan([dataset(part), dataset(subset(tmp_path / "x"))])
    check_masks(MaskOptions(masked_loss=True), found, None, mistakes)
    assert not mistakes


def test_a_mask_that_cannot_be_decoded_is_named_in_the_plan(tmp_path: Path) -> None:
    noise(SIZE, mode="L").save(tmp_path / "good.png")
    data = bytearray((tmp_path / "good.png").read_bytes())
    data[200:300] = bytes(100)
    part = folder_of(tmp_path, [half(), grey(255)])
    (tmp_path / "masks" / "1.png").write_bytes(data)
    ((mistake,), _) = check(part)
    assert "1 mask cannot be used" in mistake and str(tmp_path / "masks" / "1.png") in mistake


def test_masks_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = folder_of(tmp_path, [half(), noise(SIZE)])
    for path in (tmp_path / "masks").iterdir():
        os.utime(path, (1_600_000_000,) * 2)
    first = check(part, index=tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "read", None)
        assert check(part, index=tmp_path / "index") == first
    grey(0).save(tmp_path / "masks" / "0.png")
    assert check(part, index=tmp_path / "index") != first


def test_without_masks_nothing_is_said(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png", SIZE, caption="a")
    assert check(subset(tmp_path / "x")) == ([], [])


def test_a_mask_that_needs_more_memory_than_allowed_is_not_decoded(tmp_path: Path) -> None:
    """Few bytes of a stranger's mask may unpack to gigabytes."""
    part = folder_of(tmp_path, [half(), grey(255)])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "masks" / "1.png")
    mistakes = Mistakes()
    check_masks(MaskOptions(masked_loss=True), scan([dataset(part)]), None, mistakes, most_memory=1.0)
    ((told),) = [mistake.what for mistake in mistakes]
    assert "1.png: its 20000x20000 pixels need 1.49 GiB" in told and "--max_image_memory" in told
