"""Rules between flags of the averages of the weights."""

from __future__ import annotations

from collections.abc import Mapping

from library.options.groups.averaging import AveragingOptions
from library.options.rules.rule_kinds import Excludes, NoEffect, both, differs, is_one_of, off

_DEFAULTS: Mapping[str, object] = vars(AveragingOptions())
_OF_BOTH = ("ema_update_interval", "ema_device")

EXCLUDES = (Excludes(("ema_decay",), "ema_horizon", "a horizon is turned into a decay", "keep one of the two"),)

NO_EFFECT = (
    *(
        NoEffect(name, both(off("use_ema"), differs(name, default)), "use_ema is not set")
        for name, default in _DEFAULTS.items()
        if name not in ("use_ema", "posthoc_ema_snapshots", *_OF_BOTH)
    ),
    *(
        NoEffect(
            name,
            both(both(off("use_ema"), off("posthoc_ema_snapshots")), differs(name, default)),
            "neither use_ema nor posthoc_ema_snapshots is set",
        )
        for name, default in _DEFAULTS.items()
        if name in _OF_BOTH
    ),
    NoEffect(
        "use_ema",
        both(is_one_of("ema_save", "none"), is_one_of("ema_validation", "none")),
        "the average is neither saved (ema_save none) nor looked at (ema_validation none)",
        " except in training states",
    ),
)
