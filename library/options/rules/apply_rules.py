"""Apply the rules between flags: effective values, a note for each change, and all mistakes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from library.options.convert_values import format_value
from library.options.datasets import BucketSettings
from library.options.flag import Script
from library.options.mistakes import Mistake, Mistakes
from library.options.rules.bucket_sizes import usable_sizes, whole_steps
from library.options.rules.general import DATASET_FILES, EXCLUDES, IMPLIES, NO_EFFECT, OVERRIDES, REQUIRED, REQUIRES
from library.options.rules.rule_kinds import Implies, Overrides
from library.options.train_options import FLAGS

DEFAULT = "default"  # origin of a value that the user did not set
_SIZES = ("resolution", "bucket_reso_steps", "min_bucket_reso", "max_bucket_reso")
_PLACEHOLDER = (512, 512)  # for a missing or wrong resolution; fits the defaults of the other sizes


@dataclass(frozen=True)
class Settings:
    """The value and origin of every flag, and which flags the user set."""

    values: Mapping[str, object]
    origins: Mapping[str, str]
    set_by_user: frozenset[str]
    faulty: frozenset[str] = frozenset()  # flags with an unreadable value: rules do not check their defaults
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=dict)  # of the running program

    def describe(self, name: str) -> str:
        """A flag for messages: name, value and origin."""
        value = self.values[name]
        if value is None or value == "" or value == ():
            return f"no --{name}"
        if FLAGS[name].secret:
            return f"--{name} ({self.origins[name]})"
        if isinstance(value, tuple):
            value = ",".join(str(member) for member in value)
        text = "" if value is True else f" = {format_value(value)}"
        return f"--{name}{text} ({self.origins[name]})"


def apply_rules(
    settings: Settings, *, complete: bool = True, unneeded: Collection[str] = (), script: Script | None = None
) -> Settings:
    """Apply all rules and return the effective settings. `script` is the kind of training (Program.script).

    `complete`: check that all required flags are set, except those `unneeded`. If a rule is broken, one of its flags
    is reset to its default, so that later checks (images, optimizer) do not report the same mistake again.
    """
    mistakes = list(_missing(settings, unneeded, script)) if complete else []
    for broken_flag, mistake in [*_unmet(settings), *_excluded(settings)]:
        mistakes.append(mistake)
        settings = _at_default(settings, broken_flag)
    notes = tuple(_without_effect(settings))
    settings, wrong_sizes = _use_sizes(settings)
    from_file = any(settings.values[name] for name in DATASET_FILES)
    if complete and (wrong_sizes or (settings.values["resolution"] is None and not from_file)):
        settings = _reset_sizes(settings)
    for overrides in OVERRIDES:
        settings = _override(settings, overrides)
    for implies in IMPLIES:
        settings = _imply(settings, implies)
    all_mistakes = (*settings.mistakes, *mistakes, *wrong_sizes)
    return replace(settings, notes=(*settings.notes, *notes), mistakes=all_mistakes)


def _at_default(settings: Settings, name: str) -> Settings:
    return replace(
        settings,
        values={**settings.values, name: settings.defaults.get(name, FLAGS[name].default)},
        origins={**settings.origins, name: DEFAULT},
        set_by_user=settings.set_by_user - {name},
    )


def _reset_sizes(settings: Settings) -> Settings:
    for name in _SIZES:
        settings = _at_default(settings, name)
    return replace(settings, values={**settings.values, "resolution": _PLACEHOLDER})


def _missing(settings: Settings, unneeded: Collection[str], script: Script | None) -> Iterator[Mistake]:
    for row in REQUIRED:
        if row.script not in (None, script):
            continue
        is_set = settings.values[row.flag] is not None or any(settings.values[name] for name in row.unless)
        if not is_set and row.flag not in unneeded and row.flag not in settings.faulty:
            yield Mistake(f"--{row.flag} is not set: {row.why}", row.remedy)


def _unmet(settings: Settings) -> Iterator[tuple[str, Mistake]]:
    for row in REQUIRES:
        applies = settings.faulty.isdisjoint(row.flags) and settings.set_by_user.issuperset(row.set_by_user)
        if applies and row.when(settings.values) and not row.holds(settings.values):
            what = f"{' with '.join(settings.describe(name) for name in row.flags)}: {row.why}"
            yield row.flags[0], Mistake(what, row.remedy)


def _excluded(settings: Settings) -> Iterator[tuple[str, Mistake]]:
    for row in EXCLUDES:
        flag = next((name for name in row.flags if settings.values[name]), None)
        if flag and settings.values[row.other]:
            what = f"{settings.describe(flag)} with {settings.describe(row.other)}: {row.why}"
            yield row.other, Mistake(what, row.remedy)


def _without_effect(settings: Settings) -> Iterator[str]:
    for row in NO_EFFECT:
        if settings.values[row.flag] and row.when(settings.values):
            yield f"{settings.describe(row.flag)} has no effect{row.scope}: {row.why}"


def _override(settings: Settings, row: Overrides) -> Settings:
    both_set = {row.winner, row.loser} <= settings.set_by_user
    if not (both_set and settings.values[row.winner] and settings.values[row.loser]):
        return settings
    note = f"{settings.describe(row.winner)} overrides {settings.describe(row.loser)}: {row.why}"
    values = {**settings.values, row.loser: row.reset[0]} if row.reset else settings.values
    return replace(settings, values=values, notes=(*settings.notes, note))


def _imply(settings: Settings, row: Implies) -> Settings:
    if not row.when(settings.values) or settings.values[row.target] == row.value:
        return settings
    notes = (*settings.notes, f"{row.why} ({settings.origins[row.cause]})") if row.why else settings.notes
    values = {**settings.values, row.target: row.value}
    origins = {**settings.origins, row.target: settings.origins[row.cause]}
    return replace(settings, values=values, origins=origins, notes=notes)


def _use_sizes(settings: Settings) -> tuple[Settings, tuple[Mistake, ...]]:
    """Replace sizes by those that training can use, and check them. Dataset files check their own sizes."""
    values = settings.values
    sides = values["resolution"]
    by_area = bool(values["enable_bucket"] or values["data_backend_config"])
    if settings.faulty & (set(_SIZES) if by_area else {"resolution"}) or values["dataset_config"]:
        return settings, ()
    mistakes, notes = Mistakes(), list[str]()
    sizes = BucketSettings(
        (sides[0], sides[1]) if isinstance(sides, tuple) else _PLACEHOLDER,
        enabled=by_area,
        no_upscale=bool(values["bucket_no_upscale"]),
        smallest=_number(settings, "min_bucket_reso"),
        largest=_number(settings, "max_bucket_reso"),
        step=_number(settings, "bucket_reso_steps"),
    )

    def describe(name: str, value: object) -> str:
        return replace(settings, values={**values, name: value}).describe(name)

    if values["data_backend_config"]:
        sizes = whole_steps(sizes, describe, notes)
    elif sides is not None:
        sizes = usable_sizes(sizes, describe, mistakes, notes)
    usable = {
        "resolution": sides and sizes.resolution,
        "bucket_reso_steps": sizes.step,
        "min_bucket_reso": sizes.smallest,
        "max_bucket_reso": sizes.largest,
    }
    return replace(settings, values={**values, **usable}, notes=(*settings.notes, *notes)), tuple(mistakes)


def _number(settings: Settings, name: str) -> int:
    value = settings.values[name]
    if not isinstance(value, int):
        raise TypeError(f"{name} is not an integer flag")
    return value
