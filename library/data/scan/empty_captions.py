"""Check that not all images are trained with an empty caption, unless the user says so by a dropout of 100 %."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from library.data.captions import longest_texts, process
from library.data.scan.caption_files import normal_extension
from library.messages import counted
from library.options.datasets import CaptionSettings, SubsetSpec
from library.options.mistakes import Mistake

if TYPE_CHECKING:
    from library.data.scan.image_record import ImageRecord

_DELIBERATE = "to train without captions, set --caption_dropout_rate 1"


def check_captions(records: Sequence[ImageRecord], subsets: Sequence[SubsetSpec]) -> Mistake | None:
    """A mistake if every training image has an empty caption in every epoch. Without training images, the
    regularisation images are checked."""
    trained = [record for record in records if not record.is_reg] or records
    if not trained or any(not _is_empty(record.caption, subsets[record.subset].captions) for record in trained):
        return None
    used = [subsets[number] for number in dict.fromkeys(record.subset for record in trained)]
    if all(subset.captions.dropout_rate >= 1 for subset in used):
        return None
    what = f"{counted(len(trained), 'training image')}, all with an empty caption in every epoch"
    for key, value, remedy in (
        ("caption_dropout_every_n_epochs", 1, "set it to 2 or more, or to 0 for no dropout"),
        ("caption_tag_dropout_rate", 1, "set it below 1"),
    ):
        if places := [subset.origin for subset in used if _empties(subset.captions, key)]:
            cause = f"{key} = {value} ({', '.join(dict.fromkeys(places))})"
            return Mistake(f"{cause}: {what}", f"{remedy}; {_DELIBERATE}")
    return Mistake(what, f"{_remedy(trained[0], used[0])}; {_DELIBERATE}")


def _is_empty(caption: str, settings: CaptionSettings) -> bool:
    """Whether the caption is empty in every sample."""
    if settings.dropout_rate >= 1 or settings.dropout_every_n_epochs == 1:
        return True
    if settings.tag_dropout_rate >= 1:
        always = replace(settings, dropout_rate=0.0, dropout_every_n_epochs=0)
        return not process(caption, always, random.Random(0), 1).strip()
    return not any(text.strip() for text in longest_texts(caption, settings))


def _empties(settings: CaptionSettings, key: str) -> bool:
    if key == "caption_dropout_every_n_epochs":
        return settings.dropout_every_n_epochs == 1
    return settings.tag_dropout_rate >= 1


def _remedy(record: ImageRecord, subset: SubsetSpec) -> str:
    """Where to write captions, told by one of the images and its subset."""
    if subset.caption_source == "metadata":
        return f'write "caption" or "tags" for each image in {subset.metadata_file}'
    if subset.caption_source == "file_name":
        return "give the images names that describe them"
    ending = normal_extension(subset.caption_extensions[0]) if subset.caption_extensions else ".txt"
    tokens = (
        "name the folder like 10_sks dog" if subset.origin.startswith("--") else f"set class_tokens ({subset.origin})"
    )
    if record.from_file:  # an empty file: class tokens are for images without one
        tokens = "train on the class tokens" if subset.class_tokens else tokens
        return f"write each caption into its {ending} file, or delete the empty files and {tokens}"
    return f"write each caption into a {ending} file with the name of its image, or {tokens}"
