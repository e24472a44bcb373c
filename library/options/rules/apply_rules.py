"""Apply the rules between flags: effective values, a note for each change, and all mistakes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from library.options.convert_values import format_value
from library.options.flag import Script
from library.options.mistakes import Mistake
from library.options.rules.general import DATASET_FILES, EXCLUDES, IMPLIES, NO_EFFECT, OVERRIDES, REQUIRED, REQUIRES
from library.options.rules.rule_kinds import Implies, Overrides
from library.options.train_options import FLAGS

LATENT_STRIDE = 8  # pixels per latent; image sides are multiples of it
SMALLEST_SIDE = 64
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
    wrong_sizes = list(_check_sizes(settings))
    from_file = any(settings.values[name] for name in DATASET_FILES)
    if complete and (wrong_sizes or (settings.values["resolution"] is None and not from_file)):
        settings = _reset_sizes(settings)
    for overrides in OVERRIDES:
        settings = _override(settings, overrides)
    for implies in IMPLIES:
        settings = _imply(settings, implies)
    settings = _round_bucket_limits(settings)
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


def _number(settings: Settings, name: str) -> int:
    value = settings.values[name]
    if not isinstance(value, int):
        raise TypeError(f"{name} is not an integer flag")
    return value


def _check_sizes(settings: Settings) -> Iterator[Mistake]:
    """Check that sides are multiples of the latent stride (or bucket steps) and within the bucket limits."""
    sides = settings.values["resolution"]
    buckets = bool(settings.values["enable_bucket"])
    if settings.faulty & (set(_SIZES) if buckets else {"resolution"}):
        return
    steps = _number(settings, "bucket_reso_steps") if buckets else LATENT_STRIDE
    if steps % LATENT_STRIDE:
        yield Mistake(
            f"{settings.describe('bucket_reso_steps')} is not a multiple of {LATENT_STRIDE}", "use 64, 32, 16 or 8"
        )
        return
    if isinstance(sides, tuple):
        yield from _check_resolution(settings, sides, steps, buckets=buckets)
    if not _has_bucket_limits(settings):
        return
    least, most = _number(settings, "min_bucket_reso"), _number(settings, "max_bucket_reso")
    if least > most:
        yield Mistake(
            f"{settings.describe('min_bucket_reso')} is more than {settings.describe('max_bucket_reso')}",
            "swap the two values",
        )
    elif isinstance(sides, tuple):
        yield from _check_limits(settings, sides, least, most)


def _has_bucket_limits(settings: Settings) -> bool:
    """Without upscaling, a bucket is as large as its images and the limits have no meaning."""
    return bool(settings.values["enable_bucket"]) and not settings.values["bucket_no_upscale"]


def _check_resolution(settings: Settings, sides: tuple[int, ...], steps: int, *, buckets: bool) -> Iterator[Mistake]:
    if any(side % steps for side in sides):
        nearest = ",".join(str(max(SMALLEST_SIDE, round(side / steps) * steps)) for side in sides)
        by = f"{steps} ({settings.describe('bucket_reso_steps')})" if buckets else str(steps)
        yield Mistake(
            f"{settings.describe('resolution')} is not divisible by {by}", f"use for example --resolution {nearest}"
        )
    elif min(sides) < SMALLEST_SIDE:
        yield Mistake(
            f"{settings.describe('resolution')} is below {SMALLEST_SIDE} pixels", f"use at least {SMALLEST_SIDE}"
        )


def _check_limits(settings: Settings, sides: tuple[int, ...], least: int, most: int) -> Iterator[Mistake]:
    if min(sides) < least:
        yield Mistake(
            f"{settings.describe('resolution')} is smaller than {settings.describe('min_bucket_reso')}, "
            "the shortest side of a bucket",
            f"set --min_bucket_reso to at most {min(sides)}",
        )
    if max(sides) > most:
        yield Mistake(
            f"{settings.describe('resolution')} is larger than {settings.describe('max_bucket_reso')}, "
            "the longest side of a bucket",
            f"set --max_bucket_reso to at least {max(sides)}",
        )


def _round_bucket_limits(settings: Settings) -> Settings:
    """Widen bucket limits to multiples of the steps: the minimum down, the maximum up."""
    steps = _number(settings, "bucket_reso_steps")
    if not _has_bucket_limits(settings) or steps % LATENT_STRIDE:
        return settings
    least, most = _number(settings, "min_bucket_reso"), _number(settings, "max_bucket_reso")
    widened = {"min_bucket_reso": max(steps, least // steps * steps), "max_bucket_reso": -(-most // steps) * steps}
    for name, value in widened.items():
        if value != settings.values[name]:
            note = f"{settings.describe(name)} becomes {value}, a multiple of {settings.describe('bucket_reso_steps')}"
            settings = replace(settings, values={**settings.values, name: value}, notes=(*settings.notes, note))
    return settings
