"""Convert a dataset file between kohya's and SimpleTuner's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.dataset_config.kohya import FLAG, read_kohya
from library.options.dataset_config.simpletuner import read_backend
from library.options.dataset_config.sizes import NOT_GIVEN
from library.options.dataset_config.source import read_source
from library.options.dataset_config.write import to_kohya, to_simpletuner
from library.options.datasets import BucketSettings, DatasetSpec, SubsetSpec
from library.options.mistakes import Mistake, UserError

Dialect = Literal["kohya", "simpletuner"]

_ORIGIN = "built-in default"
BUILT_IN = DatasetSpec(_ORIGIN, BucketSettings(NOT_GIVEN), (SubsetSpec(None, _ORIGIN),))
"""Defaults without a command line."""


@dataclass(frozen=True)
class Converted:
    """The text of the new file, notes about the old one, and what the new one cannot express (`lost`)."""

    dialect: Dialect
    text: str
    notes: tuple[str, ...]
    lost: tuple[str, ...]


def convert(path: Path, to: Dialect | None = None) -> Converted:
    """Convert a file to `to`, or to the other format. Raises UserError with all mistakes of the file."""
    dialect = _dialect(path)
    described = (
        read_backend(path, BUILT_IN) if dialect == "simpletuner" else read_kohya(path, BUILT_IN, masked_loss=True)
    )
    if described.mistakes:
        raise UserError(described.mistakes)
    target: Dialect = to or ("kohya" if dialect == "simpletuner" else "simpletuner")
    written = to_kohya(described.datasets) if target == "kohya" else to_simpletuner(described.datasets)
    return Converted(target, written.text, described.notes, written.lost)


def _dialect(path: Path) -> Dialect:
    """The format of a file: SimpleTuner's is a list, kohya's a table."""
    source = read_source(path, FLAG)
    if isinstance(source, Mistake):
        raise UserError([source])
    return "simpletuner" if isinstance(source.tree, list) else "kohya"
