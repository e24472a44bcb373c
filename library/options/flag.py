"""One dataclass field is one flag: argument of the command line, TOML key, row of the docs, metadata key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

# What a model family can do, or has; a flag may need it. A family of the project names its own in Family.capabilities.
Capability = Literal[
    "aesthetic_score",
    "block_lr",
    "chunks",
    "clip_skip",
    "hand_over",
    "inference_yaml",
    "pooled",
    "size_conditioning",
    "snr",
    "text_encoder_rates",
    "unpadded",
    "v2",
    "v_prediction",
    "weighted_captions",
]

# A kind of training, by its first program.
Script = Literal["train_db.py", "train_network.py"]

# The annotation of a field says what the flag takes; the words are those shown to users. A flag with choices may also
# be annotated with the Literal of them: it takes text.
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
    """A value that front-ends write and what it stands for; a `why` is told, none means that both say the same."""

    written: object
    value: object
    why: str = ""


@dataclass(frozen=True)
class Flag:
    """Everything known about one flag. `group` is the attribute of TrainOptions with the field, `kind` is of KINDS."""

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
    zero_is_off: bool = False  # 0 says "not set": the default then stands
    pairs: bool = False  # a list whose members are key=value
    aliases: tuple[str, ...] = ()
    read_as: tuple[ReadAs, ...] = ()
    needs: Capability | None = None  # what a model family must have for the flag to have a meaning
    neutral: tuple[Any, ...] = ()  # further values that ask a family without the capability for nothing
    script: Script | None = None  # the only kind of training that has it; None: all have it
    neutral_elsewhere: tuple[Any, ...] = ()  # further values that ask another kind of training for nothing
    metadata: str | None = None  # key under which a saved file tells the value
    per_dataset: bool = False  # where a file describes several datasets, each of them tells it in ss_datasets instead
    secret: bool = False  # its value is never shown, written or logged
    private: bool = False  # a text that may be a path: like paths it is not logged, as it may say more than is wanted
    only_on_command_line: bool = False  # a --config_file cannot set it
    # A resumed run may have another value: it says where things lie, costs only time or memory, or another fact of
    # the run's identity says it better.
    may_change_on_resume: bool = False


def flag(  # noqa: PLR0913 - a fact of the flag each
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
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
    """A dataclass field that is a flag. Returns Any, like dataclasses.field, so that fields keep their annotation."""
    facts = {
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "below": below,
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
    """The flags of one group in the order of its fields. `options` is a dataclass whose fields were made by flag().

    A fact that holds for all flags of a group stands at its class: `may_change_on_resume: ClassVar[bool] = True`.
    """
    all_may_change: bool = getattr(options, "may_change_on_resume", False)
    for field in dataclasses.fields(options):
        annotation = str(field.type).removesuffix(" | None")
        kind = "text" if field.metadata["choices"] and annotation not in KINDS else KINDS[annotation]
        found = Flag(name=field.name, group=group, kind=kind, default=field.default, **field.metadata)
        yield dataclasses.replace(found, may_change_on_resume=True) if all_may_change else found
