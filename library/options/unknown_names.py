"""Names that no flag has: what each one is, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from library.options import frontend_keys, written_elsewhere
from library.options.convert_values import OFF, format_value
from library.options.future_flags import FUTURE_FLAGS
from library.options.mistakes import Mistake
from library.options.sources import COMMAND_LINE, RawOption
from library.options.train_options import FLAGS

MISSPELT = 0.9  # similarity from which a key of a file is surely a misspelt flag
SUGGESTION = 0.6  # similarity from which a flag is suggested
ALLOW = "--allow_unknown_keys"


def check_unknown_names(
    unknown: Collection[RawOption], known: Collection[str], given: Mapping[str, RawOption], *, allow: bool
) -> tuple[list[Mistake], list[str]]:
    """Mistakes and notes for names that no flag has.

    On the command line each is a mistake. A key of a file is one unless it is off or a front-end's own; `allow`
    (--allow_unknown_keys) turns it into a note, unless it is surely a misspelt flag. `known`: the names of this
    program's flags; `given`: all options by name.
    """
    mistakes, notes = list[Mistake](), list[str]()
    rest: dict[str, list[RawOption]] = {}
    for entry in unknown:
        if entry.origin == COMMAND_LINE:
            what = f"--{entry.name} ({COMMAND_LINE}) is not a flag of this program"
            mistakes.append(Mistake(what, _remedy(entry, known) or "--help lists all flags"))
        elif not frontend_keys.is_silent(entry.name, entry.raw) and not _is_given_elsewhere(entry, given):
            nearest = None if frontend_keys.is_known(entry.name) else _closest_name(entry.name, known, MISSPELT)
            if nearest:
                mistakes.append(Mistake(f"{_show(entry)} ({entry.origin}) is not a flag", f"did you mean {nearest}?"))
            else:
                rest.setdefault(entry.origin, []).append(entry)
    for origin, entries in rest.items():
        on = [] if allow else [entry for entry in entries if not _is_off(entry.raw)]
        mistakes += _unknown_keys(origin, on, known)
        off = [entry.name for entry in entries if entry not in on]
        notes += [f"unknown keys in {origin}, ignored: {', '.join(off)}"] if off else []
    return mistakes, notes


def _unknown_keys(origin: str, entries: list[RawOption], known: Collection[str]) -> Iterator[Mistake]:
    """A mistake for each key with something to write instead, and one for all others of the file."""
    others = []
    for entry in entries:
        remedy = _remedy(entry, known)
        if remedy:
            yield Mistake(f"{_show(entry)} ({origin}) is not a flag", f"{remedy}; or train without it: {ALLOW}")
        else:
            others.append(_show(entry))
    if others:
        what = f"{origin} sets what this program does not know: {', '.join(others)}"
        yield Mistake(what, f"remove {'it' if len(others) == 1 else 'them'}, or add {ALLOW} to train without")


def _remedy(entry: RawOption, known: Collection[str]) -> str:
    in_file = entry.origin != COMMAND_LINE
    words = entry.raw if isinstance(entry.raw, list) else [entry.raw]
    text = " ".join(format_value(word).strip('"') for word in words)
    if elsewhere := written_elsewhere.way_out(entry.name, text, in_file=in_file):
        return elsewhere
    nearest = _closest_name(entry.name, known, SUGGESTION)
    return f"did you mean {nearest if in_file else f'--{nearest}'}?" if nearest else ""


def _is_given_elsewhere(entry: RawOption, given: Mapping[str, RawOption]) -> bool:
    """Whether a front-end's field (conv_dim) stands in the arguments too, where it has its effect."""
    argument = written_elsewhere.argument_of(entry.name)
    if argument is None or argument[0] not in given:
        return False
    raw = given[argument[0]].raw
    pairs = " ".join(map(str, raw)) if isinstance(raw, list) else str(raw)
    return re.search(rf"(^|[\s,;]){re.escape(argument[1])}\s*=", pairs) is not None


def _is_off(raw: object) -> bool:
    """Whether a value asks for nothing: "", [], {}, false, 0, and their texts."""
    return not raw or (isinstance(raw, str) and raw.strip().lower() in ("", "none", *OFF))


def _show(entry: RawOption) -> str:
    """Name and value; only the name of what may be a misspelt secret."""
    from difflib import get_close_matches

    secrets = [flag.name for flag in FLAGS.values() if flag.secret]
    if get_close_matches(entry.name.replace("-", "_"), secrets, 1, SUGGESTION):
        return entry.name
    return f"{entry.name} = {format_value(entry.raw)}"


def _closest_name(name: str, known: Collection[str], cutoff: float) -> str | None:
    """The closest flag of this program, else the closest of later versions."""
    from difflib import get_close_matches  # imported late: only needed for an unknown name

    plain = name.replace("-", "_")
    found = get_close_matches(plain, known, n=1, cutoff=cutoff) or get_close_matches(plain, FUTURE_FLAGS, 1, MISSPELT)
    return next(iter(found), None)
