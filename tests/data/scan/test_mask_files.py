"""A mask belongs to the image with its name."""

from __future__ import annotations

import unicodedata

from library.data.scan.mask_files import find_masks


def test_a_mask_has_its_images_name_with_any_ending() -> None:
    names = ["a.png", "sub/b.jpg", "c.d.webp", "e.png"]
    found, spare = find_masks(names, ["a.PNG", "sub/b.png", "c.d.jpeg"])
    assert found == {"a.png": "a.PNG", "sub/b.jpg": "sub/b.png", "c.d.webp": "c.d.jpeg"}
    assert spare == ()


def test_folders_of_names_count() -> None:
    found, spare = find_masks(["sub/a.png", "c.d.png"], ["a.png", "c.png", "other/a.png"])
    assert found == {}
    assert spare == ("a.png", "c.png", "other/a.png")


def test_letter_case_and_double_endings_of_names_do_not_matter() -> None:
    names = ["B.png", "sub/c.PNG", "d.jpg", "e.png"]
    found, spare = find_masks(names, ["b.png", "Sub/C.webp", "d.jpg.png", "e-masklabel.png", "E.x.png"])
    assert found == dict(zip(names, ("b.png", "Sub/C.webp", "d.jpg.png", "e-masklabel.png"), strict=True))
    assert spare == ("E.x.png",)


def test_a_mask_of_one_image_is_not_given_to_another_by_its_letter_case() -> None:
    assert find_masks(["a.png", "A.png"], ["a.png"])[0] == {"a.png": "a.png"}
    assert find_masks(["a.png", "A.png"], ["A.PNG", "a.png"])[0] == {"a.png": "a.png", "A.png": "A.PNG"}


def test_of_two_masks_the_one_with_the_same_ending_counts() -> None:
    masks = ["a.jpg", "a.png", "a.webp"]
    assert find_masks(["a.webp"], masks) == ({"a.webp": "a.webp"}, ("a.jpg", "a.png"))
    assert find_masks(["a.bmp"], masks) == ({"a.bmp": "a.jpg"}, ("a.png", "a.webp"))
    found, spare = find_masks(["a.png", "a.jpg", "a.bmp"], ["a.jpg", "a.PNG"])
    assert found == {"a.png": "a.PNG", "a.jpg": "a.jpg", "a.bmp": "a.PNG"}  # capitals come first
    assert spare == ()


def test_the_two_ways_to_write_a_letter_are_one_name() -> None:
    composed, apart = (unicodedata.normalize(form, "プードル_é") for form in ("NFC", "NFD"))
    assert composed != apart
    assert find_masks([f"{composed}.png"], [f"{apart}.png"])[0] == {f"{composed}.png": f"{apart}.png"}
