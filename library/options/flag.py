"""Define a flag as one dataclass field: command-line argument, TOML key, row of the docs and metadata key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

# Capabilities of a model family (Family.capabilities) that a flag may need.
Capability = Literal[
    "aesthetic_score",
    "block_lr",
    "chunks",
    "clip_skip",
    "hand_over",
    "inference_yaml",
    "pooled",
    "rollout",
    "size_conditioning",
    "snr",
    "text_encoder_rates",
    "unpadded",
    "v2",
    "v_prediction",
    "weighted_captions",
]

# A kind of training, named after its first program.
Script = Literal["train_db.py", "train_network.py"]

# Annotation of a field -> type of the flag as shown to users. A flag with choices may also be annotated with their
# Literal: its type is text.
KINDS = {
    "bool": "switch",
    "int": "integer",
    "float": "number",
    "int | float": "steps or share",
    "str": "text",
    "Path": "path",
    "Path | str": "path or URL",
    "tuple[str, ...]": "list",
    "tuple[float, ...]": "numbers",
    "tuple[Path, ...]": "paths",
    "tuple[int, int]": "width,height",
    "tuple[float, float]": "from,to",
}


@dataclass(frozen=True)
class ReadAs:
    """A value that front-ends write and the value it stands for (None: not set). A `why` is shown as a note."""

    written: object
    value: object
    why: str = ""


@dataclass(frozen=True)
class Flag:
    """Everything known about one flag. `group` is its attribute of TrainOptions, `kind` a value of KINDS."""

    name: str
    group: str
    kind: str
    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    too_low: str = ""  # what to do about a value below at_least, where another number is not the answer
    zero_is_off: bool = False  # 0 means not set: the default is used
    pairs: bool = False  # a list of key=value
    aliases: tuple[str, ...] = ()
    read_as: tuple[ReadAs, ...] = ()
    needs: Capability | None = None  # capability without which the flag has no meaning
    neutral: tuple[Any, ...] = ()  # more values that are accepted, without effect, by a family without the capability
    script: Script | None = None  # the only kind of training with this flag; None: all
    neutral_elsewhere: tuple[
        Any, ...
    ] = ()  # more values that are accepted, without effect, by another kind of training
    metadata: str | None = None  # metadata key of the value in a saved file
    per_dataset: bool = False  # with several datasets, each writes it into ss_datasets instead
    secret: bool = False  # the value is never shown, written or logged
    private: bool = False  # a text that may be a path: like paths it is not logged, as it may contain private names
    only_on_command_line: bool = False  # ignored in a --config_file
    # A resumed run may use another value: it only names a place, affects only time or memory, or another fact of the
    # run's identity covers it.
    may_change_on_resume: bool = False


def flag(  # noqa: PLR0913 - each argument is a fact of the flag
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    too_low: str = "",
    zero_is_off: bool = False,
    pairs: bool = False,
    aliases: tuple[str, ...] = (),
    read_as: tuple[ReadAs, ...] = (),
    needs: Capability | None = None,
    neutral: tuple[Any, ...] = (),
    script: Script | None = None,
    neutral_elsewhere: tuple[Any, ...] = (),
    metadata: str | None = None,
    per_dataset: bool = False,
    secret: bool = False,
    private: bool = False,
    only_on_command_line: bool = False,
    may_change_on_resume: bool = False,
) -> Any:
    """Return a dataclass field for a flag, typed Any like dataclasses.field, so that fields keep their annotation."""
    facts = {
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "below": below,
        "too_low": too_low,
        "zero_is_off": zero_is_off,
        "pairs": pairs,
        "aliases": aliases,
        "read_as": read_as,
        "needs": needs,
        "neutral": neutral,
        "script": script,
        "neutral_elsewhere": neutral_elsewhere,
        "metadata": metadata,
        "per_dataset": per_dataset,
        "secret": secret,
        "private": private,
        "only_on_command_line": only_on_command_line,
        "may_change_on_resume": may_change_on_resume,
    }
    return dataclasses.field(default=default, metadata=facts)


def flags_of(group: str, options: type[Any]) -> Iterator[Flag]:
    """Yield the flags of a group in field order. `options` is a dataclass whose fields were made by flag().

    `may_change_on_resume: ClassVar[bool] = True` on the class applies to all its flags.
    """
    all_may_change: bool = getattr(options, "may_change_on_resume", False)
    for field in dataclasses.fields(options):
        annotation = str(field.type).removesuffix(" | None")
        kind = "text" if field.metadata["choices"] and annotation not in KINDS else KINDS[annotation]
        known = Flag(name=field.name, group=group, kind=kind, default=field.default, **field.metadata)
        yield dataclasses.replace(known, may_change_on_resume=True) if all_may_change else known
