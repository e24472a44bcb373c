"""What a sample's caption is made from, and what happens to it each time it is read."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import flag


@dataclass(frozen=True)
class CaptionOptions:
    """Caption files, shuffling, dropout, wildcards and weights."""

    caption_extension: str = flag(
        ".caption",
        "File ending of the captions beside the images; a missing dot is added. Several, separated by commas: the "
        "first that is there counts.",
        aliases=("caption_extention",),
        may_change_on_resume=True,
    )
    caption_encoding: str = flag(
        "utf-8", "Encoding of caption files that have no byte order mark, such as shift_jis.", may_change_on_resume=True
    )
    caption_prefix: str | None = flag(None, "Text that is put before every caption, with a blank between.")
    caption_suffix: str | None = flag(None, "Text that is put after every caption, with a blank between.")
    caption_separator: str = flag(",", "What separates the tags of a caption.")
    secondary_separator: str | None = flag(
        None, "Joins tags that are to travel together; becomes caption_separator once all is done."
    )
    enable_wildcard: bool = flag(
        False, "Choose one line of a caption file by chance, and one of {a|b|c} wherever a caption says so."
    )
    shuffle_caption: bool = flag(
        False,
        "Shuffle the tags of a caption anew each time it is read.",
        metadata="ss_shuffle_caption",
        per_dataset=True,
    )
    keep_tokens: int = flag(
        0,
        "With shuffled or dropped tags: the first so many stay where they are.",
        at_least=0,
        metadata="ss_keep_tokens",
        per_dataset=True,
    )
    keep_tokens_separator: str = flag(
        "", "Text in a caption before which all tags stay where they are; after a second one they stay too."
    )
    token_warmup_min: int = flag(1, "With token_warmup_step: the tags that are there from the beginning.", at_least=0)
    token_warmup_step: float = flag(
        0, "Optimiser steps (below 1: share of the run) until all tags are there; 0 = from the beginning.", at_least=0
    )
    caption_dropout_rate: float = flag(
        0.0,
        "Chance that an image is shown with an empty caption.",
        at_least=0,
        at_most=1,
        metadata="ss_caption_dropout_rate",
    )
    caption_dropout_every_n_epochs: int = flag(
        0,
        "In every n-th epoch all captions are empty; 0 = never.",
        at_least=0,
        metadata="ss_caption_dropout_every_n_epochs",
    )
    caption_tag_dropout_rate: float = flag(
        0.0,
        "Chance that a tag is left out of a caption.",
        at_least=0,
        at_most=1,
        metadata="ss_caption_tag_dropout_rate",
    )
    empty_caption: str = flag(
        "encode",
        "What an empty or dropped caption becomes: encode = an empty text, read like any other, zeros = zeros in place "
        "of the text encoders' outputs, as Stable Diffusion XL draws without a negative prompt.",
        choices=("encode", "zeros"),
        needs="pooled",
    )
    weighted_captions: bool = flag(
        False, "Read (text:1.3), (text) and [text] in captions as weights of that text.", needs="weighted_captions"
    )
