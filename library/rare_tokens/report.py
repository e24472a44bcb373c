"""What is printed and saved about candidates and checked names. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_text
from library.options.mistakes import Mistake, UserError
from library.rare_tokens.candidates import LONGEST, Name, meanings
from library.rare_tokens.ranking import Ranked

SEVERAL = (
    "Other words are written with these tokens too, so training changes them with it; the model has to learn the "
    "tokens together, and they take more of the 75 tokens of each caption. Better: a name of one token."
)
LOOK = (
    "The word lists know English words, names and abbreviations: few brands, no other languages, and not what the "
    "images showed that the model was trained on (sks is a rifle). Draw a few images of the model before you decide, "
    'such as "a photo of {token} {class_word}": the class should look as it does without the token.'
)


def table(ranked: Sequence[Ranked]) -> Iterator[str]:
    """The lines of a table of names, one name per line."""
    several = any(len(each.measures) > 1 for each in ranked)
    header = ["", "token", "id", "rarity"]
    if any(each.likeness is not None for each in ranked):
        header.append("like")
    if any(each.measures for each in ranked):
        header += ["norm", "nearest word", "moves", *(["rarity of"] if several else [])]
    rows = [header, *(_row(place, each) for place, each in enumerate(ranked, 1))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(place: int, each: Ranked) -> list[str]:
    cells = [str(place), each.name.text, _ids(each.name), f"{each.rarity:.1%}"]
    if each.likeness is not None:
        cells.append(f"{each.likeness:.2f}")
    if each.measures:
        one = each.measures[each.worst]
        cells += [f"{one.norm:.1%}", f"{one.closeness:.2f} {one.word}", f"{one.moved:.3f}"]
        cells += [each.worst] if len(each.measures) > 1 else []
    return cells


def _ids(name: Name) -> str:
    """`48136`, or where the tokenizers differ `48136, 512`."""
    return ", ".join(dict.fromkeys("+".join(map(str, ids)) for ids in name.ids.values()))


def describe_check(each: Ranked, candidates: int) -> Iterator[str]:
    """The lines about a name to check."""
    name, word = each.name, each.name.text.lower().strip()
    if name.tokens == 1:
        yield f"{name.text}: one token ({_ids(name)})"
    else:
        spelled = dict.fromkeys(" + ".join(pieces) for pieces in name.pieces.values())
        yield f"{name.text}: {name.tokens} tokens, {', '.join(spelled)} ({_ids(name)})"
        yield f"  {SEVERAL}"
    if name.text != name.text.lower():
        yield f"  It is read in lower case: {name.text.lower()}."
    if word in meanings():
        yield f"  It is {meanings()[word]}: the model knows something by it."
    elif len(word) > LONGEST or not (word.isascii() and word.isalpha()):
        yield f"  The word lists have words of up to {LONGEST} letters a to z: they do not know whether it is a word."
    if not each.measures and name.tokens == 1:
        yield f"  At least as rare as {each.rarity:.1%} of the {candidates:,} candidates, by the order of the merges."
    if not each.measures:
        return
    yield f"  At least as rare as {each.rarity:.1%} of the {candidates:,} candidates."
    for encoder, one in each.measures.items():
        yield (
            f"  {encoder}: norm {one.norm:.1%} from the median; nearest common word {one.word} ({one.closeness:.2f}); "
            f"moves the prompt by {one.moved:.3f}"
        )


def save(path: Path, model: str, candidates: Sequence[Ranked], checked: Sequence[Ranked]) -> None:
    """Write a .json or .csv file, atomically. `model`: the file or the family. Raises UserError."""
    if path.suffix.lower() == ".json":
        content = {"model": model, "candidates": list(map(_record, candidates)), "checked": list(map(_record, checked))}
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    else:
        rows = [_flat(each, "candidate") for each in candidates] + [_flat(each, "checked") for each in checked]
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except (CheckpointError, OSError) as error:
        raise UserError([Mistake(f"--save_to {path} cannot be written ({error})", "choose another path")]) from error


def _record(each: Ranked) -> dict[str, Any]:
    record: dict[str, Any] = {"token": each.name.text, "rarity": each.rarity, "ids": each.name.ids}
    if each.likeness is not None:
        record["likeness"] = each.likeness
    if each.measures:
        record["measures"] = {encoder: asdict(one) for encoder, one in each.measures.items()}
    return record


def _flat(each: Ranked, kind: str) -> Mapping[str, Any]:
    row = {"token": each.name.text, "kind": kind, "rarity": each.rarity}
    row |= {f"{encoder}_ids": " ".join(map(str, ids)) for encoder, ids in each.name.ids.items()}
    row |= {} if each.likeness is None else {"likeness": each.likeness}
    for encoder, one in each.measures.items():
        row |= {f"{encoder}_{key}": value for key, value in asdict(one).items()}
    return row
