"""Options of captions: where they are read from and how they change from sample to sample."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.flag import ReadAs, flag

NO_FILES = ".none"
"""A caption extension that no file has: the folder's name is the caption."""


@dataclass(frozen=True)
class CaptionOptions:
    """Caption files, shuffling, dropout, wildcards and weights."""

    caption_extension: str = flag(
        ".caption",
        "File extension of captions; a missing dot is added. Of several, separated by commas, the first that "
        "exists is used. One that no image has, such as none, means the folder's name.",
        read_as=(ReadAs("", NO_FILES, "no caption file is read"),),
        aliases=("caption_extention",),
        may_change_on_resume=True,
    )
    caption_encoding: str = flag(
        "utf-8",
        "Encoding of caption files without a byte order mark, for example shift_jis.",
        may_change_on_resume=True,
    )
    caption_prefix: str | None = flag(None, "Text before every caption, separated by a space.")
    caption_suffix: str | None = flag(None, "Text after every caption, separated by a space.")
    caption_separator: str = flag(",", "Separator between the tags of a caption.")
    secondary_separator: str | None = flag(
        None,
        "Separator between tags that stay together when shuffled or dropped; becomes caption_separator at the end.",
    )
    enable_wildcard: bool = flag(False, "Pick a random line of each caption file, and a random option of each {a|b|c}.")
    shuffle_caption: bool = flag(
        False,
        "Shuffle the tags of a caption each time it is used.",
        metadata="ss_shuffle_caption",
        per_dataset=True,
    )
    keep_tokens: int = flag(
        0,
        "Keep the first n tags in place when tags are shuffled or dropped; 0 = none.",
        at_least=0,
        metadata="ss_keep_tokens",
        per_dataset=True,
    )
    keep_tokens_separator: str = flag("", "Keep all tags before this text in place, and those after a second one.")
    token_warmup_min: int = flag(1, "With token_warmup_step: number of tags at the start.", at_least=0)
    token_warmup_step: float = flag(
        0, "Add tags gradually over this many optimizer steps (below 1: share of the run); 0 = off.", at_least=0
    )
    caption_dropout_rate: float = flag(
        0.0,
        "Probability that an image is trained with an empty caption; 0 = off.",
        at_least=0,
        at_most=1,
        metadata="ss_caption_dropout_rate",
    )
    caption_dropout_every_n_epochs: int = flag(
        0,
        "Train with empty captions in every n-th epoch; 0 = off.",
        at_least=0,
        metadata="ss_caption_dropout_every_n_epochs",
    )
    caption_tag_dropout_rate: float = flag(
        0.0,
        "Probability that a tag is left out of a caption; 0 = off.",
        at_least=0,
        at_most=1,
        metadata="ss_caption_tag_dropout_rate",
    )
    empty_caption: str = flag(
        "encode",
        "Conditioning for an empty or dropped caption: encode = the encoded empty text, zeros = zeros instead of "
        "text encoder outputs, as Stable Diffusion XL draws without a negative prompt.",
        choices=("encode", "zeros"),
        needs="pooled",
    )
    weighted_captions: bool = flag(
        False, "Read (text:1.3), (text) and [text] in captions as weights of that text.", needs="weighted_captions"
    )
