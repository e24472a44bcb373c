"""Parse argv and --config_file into frozen options, with the origin of each value and all mistakes at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from library.options import future_flags, render
from library.options.config_file import find_config_file, read_config_file, with_toml
from library.options.convert_values import UNSET, BadValue, convert, format_value, shown
from library.options.flag import Flag, Script
from library.options.frontend_keys import adapter_file_of_ranks
from library.options.future_flags import FUTURE_FLAGS, FutureFlagValue
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.rules.apply_rules import DEFAULT, Settings, apply_rules
from library.options.rules.program_flags import drop_foreign_flags
from library.options.simpletuner_config import Target
from library.options.sources import COMMAND_LINE, RawOption, read_command_line
from library.options.train_options import FLAGS, TrainOptions, build
from library.options.unknown_names import check_unknown_names

_ALIASES: Mapping[str, str] = MappingProxyType({alias: flag.name for flag in FLAGS.values() for alias in flag.aliases})


@dataclass(frozen=True)
class Program:
    """A program that takes the options of training.

    `script` selects the flags of one kind of training (None: of all); `name` is the file that users start; `defaults`
    replaces defaults of flags; `flags` are the program's own flags by name; `unneeded` are required flags that this
    program does not require; `help` returns the text of --help.
    """

    script: Script | None = None
    flags: Mapping[str, Flag] = field(default_factory=dict)
    unneeded: frozenset[str] = frozenset()
    help: Callable[[], str] = render.help_text
    name: str = ""
    defaults: Mapping[str, object] = field(default_factory=dict)


def _training(name: str, script: Script, defaults: Mapping[str, object] = MappingProxyType({})) -> Program:
    help = partial(render.help_text, script=script, name=name, defaults=defaults)
    return Program(script, help=help, name=name, defaults=defaults)


# As in sd-scripts, only train_db.py trains the text encoder by default.
_TEXT_ENCODER_OFF: Mapping[str, object] = MappingProxyType({"train_text_encoder": False})

DREAMBOOTH = _training("train_db.py", "train_db.py")
ADAPTERS = _training("train_network.py", "train_network.py")
SDXL = _training("sdxl_train.py", "train_db.py", _TEXT_ENCODER_OFF)
SDXL_ADAPTERS = _training("sdxl_train_network.py", "train_network.py")
FINE_TUNING = _training("fine_tune.py", "train_db.py", _TEXT_ENCODER_OFF)
PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {program.name: program for program in (DREAMBOOTH, ADAPTERS, SDXL, SDXL_ADAPTERS, FINE_TUNING)}
)
"""The training programs by the file that users start."""


@dataclass(frozen=True)
class Parsed:
    """The options, where each value comes from, and what to report.

    `origins` gives for every flag "command line", the file's name or "default". `set_by_user` holds the flags that the
    user set. `program_values` holds the values of the program's own flags (Program.flags). `given` holds those of
    them whose values differ from the program's defaults. A flag with a mistake has its default (the resolution
    512,512), so that the images are checked too before all mistakes are reported. Without `is_complete` the options of
    a file are missing: no other mistake would be true, so report these alone. `with_choices`: parse again, with options
    that the program chose; those of the user override them.
    """

    options: TrainOptions
    origins: Mapping[str, str]
    set_by_user: frozenset[str]
    notes: tuple[str, ...]
    mistakes: tuple[Mistake, ...]
    program_values: Mapping[str, object] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    is_complete: bool = True
    with_choices: Callable[[Sequence[RawOption]], Parsed] | None = None

    def check_complete(self) -> None:
        """Raise UserError unless `is_complete`."""
        if not self.is_complete:
            raise UserError(self.mistakes)


def parse(
    argv: Sequence[str] | None = None, program: Program = DREAMBOOTH, choices: Sequence[RawOption] = ()
) -> Parsed:
    """Read the command line (without the program's name; None: sys.argv) and the --config_file it names. `choices`:
    options that hold where neither sets them.

    User errors are collected in Parsed.mistakes, not raised. --help prints the help and exits with status 0.
    """
    flags = {name: replace(flag, default=program.defaults.get(name, flag.default)) for name, flag in FLAGS.items()}
    known = {**flags, **program.flags}
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        _print_help(program)
    mistakes, notes = Mistakes(), list[str]()
    on_command_line = _canonical(read_command_line(words, partial(_kind_of, known), mistakes))
    writes_config = _is_on(on_command_line, "output_config")
    in_file, is_complete = [], True
    try:
        in_file = [] if writes_config else _canonical(_from_file(on_command_line, known, program, mistakes, notes))
    except UserError as error:
        mistakes.extend(error.mistakes)
        is_complete = False
    notes += _repeated(on_command_line, known)
    merged = adapter_file_of_ranks(
        # the command line comes last and overrides
        {entry.name: entry for entry in [*choices, *in_file, *on_command_line]}
    )

    settings = drop_foreign_flags(_own_flags(merged, known, mistakes, notes), flags, program.script, program.name)
    later_values = _later_flags(merged)
    unknown = [entry for entry in merged.values() if entry.name not in known and entry.name not in FUTURE_FLAGS]
    misnamed, ignored_keys = check_unknown_names(
        unknown, [*known, *_ALIASES], merged, allow=settings.values["allow_unknown_keys"] is True
    )
    mistakes.extend(misnamed)
    notes += ignored_keys
    effective = settings
    if is_complete:
        effective = apply_rules(settings, complete=not writes_config, unneeded=program.unneeded, script=program.script)
    refused, ignored = future_flags.check_future_flags(later_values, effective.values)
    mistakes.extend(effective.mistakes)
    mistakes.extend(refused)
    notes += effective.notes
    notes += [future_flags.describe_ignored(ignored)] if ignored else []
    return Parsed(
        build(effective.values),
        MappingProxyType(dict(effective.origins)),
        effective.set_by_user,
        tuple(notes),
        tuple(mistakes),
        {name: effective.values[name] for name in program.flags},
        frozenset(name for name in effective.set_by_user if effective.values[name] != known[name].default),
        is_complete,
        partial(parse, words, program),
    )


def _print_help(program: Program) -> NoReturn:
    print(program.help(), flush=True)
    raise SystemExit(0)


def _kind_of(known: Mapping[str, Flag], name: str) -> str | None:
    name = _ALIASES.get(name, name)
    if name in known:
        return known[name].kind
    return FUTURE_FLAGS[name].kind if name in FUTURE_FLAGS else None


def _canonical(entries: Iterable[RawOption]) -> list[RawOption]:
    """Rename aliases to their flags; within one source the alias wins, as users of caption_extention expect."""
    by_name, by_alias = list[RawOption](), list[RawOption]()
    for entry in entries:
        if entry.name in _ALIASES:
            by_alias.append(replace(entry, name=_ALIASES[entry.name]))
        else:
            by_name.append(entry)
    return by_name + by_alias


def _is_on(entries: list[RawOption], name: str) -> bool:
    raw = next((entry.raw for entry in reversed(entries) if entry.name == name), False)
    try:
        return convert(FLAGS[name], raw)[0] is True
    except BadValue:
        return False  # reported where the flag itself is read


def _from_file(
    on_command_line: list[RawOption],
    known: Mapping[str, Flag],
    program: Program,
    mistakes: Mistakes,
    notes: list[str],
) -> Iterator[RawOption]:
    """Yield the options of the --config_file, if there is one. Raises UserError for a file that cannot be used."""
    named = next((str(entry.raw) for entry in reversed(on_command_line) if entry.name == "config_file"), "")
    if not named.strip():
        return
    path = find_config_file(Path(os.path.expanduser(named)))
    if path is None:
        what, remedy = "there is no such file", "check the path; .toml and .json may be omitted"
        if os.path.isdir(os.path.expanduser(named)):
            what, remedy = "this is a folder, not a file", "name the file in it"
        raise UserError([Mistake(f"--config_file {named} ({COMMAND_LINE}): {what}", remedy)])
    given = frozenset(entry.name for entry in on_command_line)
    target = Target(program.script, given, {*known, *_ALIASES}, _is_on(on_command_line, "allow_unknown_keys"))
    entries = list(read_config_file(path, target, mistakes, notes))
    if any(entry.holds_tables for entry in entries) and not any(_kind_of(known, entry.name) for entry in entries):
        what = f"--config_file {named} ({COMMAND_LINE}) contains no option of this program"
        raise UserError([Mistake(what, "name a file of training options, not a front-end's project or a dataset file")])
    for entry in entries:
        if entry.name not in known or not known[entry.name].only_on_command_line:
            yield entry
        elif entry.raw not in ("", False):
            notes.append(f"{entry.name} in {entry.origin} is ignored: it works only on the command line")


def _repeated(entries: list[RawOption], known: Mapping[str, Flag]) -> Iterator[str]:
    last: dict[str, RawOption] = {}
    for entry in entries:
        before = last.get(entry.name)
        if before is not None and before.raw != entry.raw:
            used = shown(known[entry.name], entry.raw) if entry.name in known else format_value(entry.raw)
            yield f"--{entry.name} is given more than once on the command line: {used} is used"
        last[entry.name] = entry


def _own_flags(
    merged: Mapping[str, RawOption], known: Mapping[str, Flag], mistakes: Mistakes, notes: list[str]
) -> Settings:
    """The value of every flag of this version; an invalid value is a mistake and leaves the default."""
    values: dict[str, object] = {name: flag.default for name, flag in known.items()}
    origins = dict.fromkeys(known, DEFAULT)
    faulty: set[str] = set()
    for name, entry in merged.items():
        if name not in known:
            continue
        try:
            value, why = convert(known[name], entry.raw)
        except BadValue as bad:
            what = f"--{name} = {shown(known[name], entry.raw)} ({entry.origin}) {bad.fault}"
            mistakes.add(what, bad.remedy)
            faulty.add(name)
            continue
        if value is not UNSET:
            values[name], origins[name] = value, entry.origin
        if why:
            notes.append(
                f"--{name} = {shown(known[name], entry.raw)} ({entry.origin}) is read as {format_value(value)}: {why}"
            )
    values["caption_extension"] = _with_dot(str(values["caption_extension"]))
    values["config_file"] = _with_toml(values["config_file"])
    set_by_user = frozenset(name for name, origin in origins.items() if origin != DEFAULT)
    return Settings(
        values, origins, set_by_user, frozenset(faulty), defaults={name: known[name].default for name in known}
    )


def _later_flags(merged: Mapping[str, RawOption]) -> dict[str, FutureFlagValue]:
    """The flags of later versions that are set. A value of a wrong type stays raw: the flag is refused anyway."""
    future_flags_set: dict[str, FutureFlagValue] = {}
    for name, entry in merged.items():
        if name not in FUTURE_FLAGS:
            continue
        try:
            value, _ = convert(FUTURE_FLAGS[name].flag(), entry.raw)
        except BadValue:
            value = entry.raw
        if value is not UNSET:
            future_flags_set[name] = FutureFlagValue(FUTURE_FLAGS[name], value, entry.origin)
    return future_flags_set


def _with_dot(extension: str) -> str:
    return extension if extension.startswith(".") else f".{extension}"


def _with_toml(named: object) -> object:
    """The --config_file to read or write, with its extension."""
    if not isinstance(named, Path):
        return named
    return find_config_file(named) or with_toml(named)
