"""Strict renaming of tensors in both directions, from the rows of one table.

A row names a module (or a single parameter) in the diffusers and in the original layout. `{i}` and the like are
counters; the original side may calculate with them: `{s*i+j+1}`. `expand` turns rows into rules for one model's sizes.
Keys without a rule raise an error that lists them: nothing is dropped or guessed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from library.checkpoints.header import CheckpointError
from library.checkpoints.lazy import LazyTensor, stacked
from library.messages import counted, listed

# module      both sides have `.weight` and, mostly, `.bias`
# parameter   the names are whole keys
# conv 1x1    a module whose weight is Linear (2-D) in diffusers and a 1x1 convolution (4-D) in original files
# stacked     whole keys; query, key and value are one tensor in original files
# transposed  whole keys; a matrix (in, out) in original files, a Linear's weight (out, in) in diffusers
Form = Literal["module", "parameter", "conv 1x1", "stacked", "transposed"]
_STACKED = "{q,k,v}"


@dataclass(frozen=True)
class Row:
    """One row of a table: a name in the diffusers layout and in the original layout."""

    diffusers: str
    original: str
    form: Form = "module"


def within(diffusers: str, original: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """Prefix the rows of a block with the block's name on either side."""
    return tuple(Row(f"{diffusers}.{row.diffusers}", f"{original}.{row.original}", row.form) for row in rows)


@dataclass(frozen=True)
class Sizes:
    """Upper bounds of a table's counters, and values used in names (one, or one per i)."""

    counters: Mapping[str, int]
    values: Mapping[str, int | Sequence[int]]

    def __hash__(self) -> int:
        return hash(frozenset(self.counters.items()))  # mappings have none


@dataclass(frozen=True)
class Rule:
    """One tensor of an original file and its name in diffusers, or three names if it is stacked."""

    diffusers: tuple[str, ...]
    original: str
    form: Form


def _value(expression: str, known: Mapping[str, int]) -> int:
    """Evaluate a sum of products of counters and numbers, such as `s*i+j+1` or `t-i-1`."""
    total = 0
    for sign, term in re.findall(r"([+-]?)([^+-]+)", expression):
        product = -1 if sign == "-" else 1
        for factor in term.split("*"):
            product *= int(factor) if factor.isdigit() else known[factor]
        total += product
    return total


def _fill(template: str, known: Mapping[str, int]) -> str:
    return re.sub(r"\{([^{},]+)\}", lambda match: str(_value(match[1], known)), template)


@lru_cache(maxsize=64)  # asked for again each time that a file of the model is read or written
def expand(rows: tuple[Row, ...], sizes: Sizes) -> tuple[Rule, ...]:
    """Expand rows to rules for a model of these sizes. A model need not have all of them."""
    rules: list[Rule] = []
    for row in rows:
        letters = sorted(set(re.findall(r"\{([a-z])\}", row.diffusers)))
        for numbers in itertools.product(*(range(sizes.counters[letter]) for letter in letters)):
            known = dict(zip(letters, numbers, strict=True))
            for name, value in sizes.values.items():
                known[name] = value if isinstance(value, int) else value[known.get("i", 0)]
            rules += _rules(_fill(row.diffusers, known), _fill(row.original, known), row.form)
    return tuple(rules)


def _rules(diffusers: str, original: str, form: Form) -> list[Rule]:
    if form == "stacked":
        return [Rule(tuple(diffusers.replace(_STACKED, letter) for letter in "qkv"), original, form)]
    if form in ("parameter", "transposed"):
        return [Rule((diffusers,), original, form)]
    return [
        Rule((f"{diffusers}.{leaf}",), f"{original}.{leaf}", form if leaf == "weight" else "module")
        for leaf in ("weight", "bias")
    ]


def _check_known(unknown: Sequence[str], where: str) -> None:
    if unknown:
        raise CheckpointError(
            f"{where}: {counted(len(unknown), 'unknown tensor')}: {listed(sorted(unknown), 8)}. "
            "The model is of another kind, or of a newer variant that is not supported."
        )


def flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a 1x1 convolution's weight as a Linear weight; any other shape unchanged."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _transposed(tensor: LazyTensor, where: str) -> LazyTensor:
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{where}: not a matrix, but of shape {tensor.shape}. The file is damaged.")
    return tensor.transposed()


def to_diffusers(tensors: Mapping[str, LazyTensor], rules: Iterable[Rule], where: str) -> dict[str, LazyTensor]:
    """Rename from the original layout. Raises CheckpointError, starting with `where`, for keys without a rule."""
    by_name = {rule.original: rule for rule in rules}
    _check_known([name for name in tensors if name not in by_name], where)
    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        rule = by_name[name]
        if rule.form == "stacked":
            third = tensor.shape[0] // 3
            renamed.update({key: tensor.rows(n * third, (n + 1) * third) for n, key in enumerate(rule.diffusers)})
        elif rule.form == "conv 1x1":
            renamed[rule.diffusers[0]] = tensor.reshape(flat_shape(tensor.shape))
        elif rule.form == "transposed":
            renamed[rule.diffusers[0]] = _transposed(tensor, f"{where}: {name}")
        else:
            renamed[rule.diffusers[0]] = tensor
    return renamed


def to_original(tensors: Mapping[str, LazyTensor], rules: Iterable[Rule], where: str) -> dict[str, LazyTensor]:
    """Rename to the original layout, the inverse of to_diffusers. Raises CheckpointError for keys without a rule."""
    known = [rule for rule in rules if rule.diffusers[0] in tensors]
    covered = {name for rule in known for name in rule.diffusers}
    _check_known([name for name in tensors if name not in covered], where)
    renamed: dict[str, LazyTensor] = {}
    for rule in known:
        parts = [tensors[name] for name in rule.diffusers if name in tensors]
        if len(parts) != len(rule.diffusers):
            missing = [name for name in rule.diffusers if name not in tensors]
            raise CheckpointError(f"{where}: {listed(missing)} missing beside {rule.diffusers[0]}. Get the file again.")
        tensor = stacked(parts) if rule.form == "stacked" else parts[0]
        if rule.form == "conv 1x1" and len(tensor.shape) == 2:
            tensor = tensor.reshape((*tensor.shape, 1, 1))
        elif rule.form == "transposed":
            tensor = _transposed(tensor, f"{where}: {rule.diffusers[0]}")
        renamed[rule.original] = tensor
    return renamed
