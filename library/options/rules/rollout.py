"""Rules between flags of scheduled sampling."""

from __future__ import annotations

from collections.abc import Mapping

from library.options.groups.rollout import RolloutOptions
from library.options.rules.rule_kinds import NoEffect, both, differs, is_one_of, off

_PREFIX = "scheduled_sampling_"
_ON = f"{_PREFIX}max_step_offset"
_RAMP = f"{_PREFIX}ramp_steps"
_DEFAULTS = vars(RolloutOptions())


def _rolls_nothing(values: Mapping[str, object]) -> bool:
    """Whether the share of rolled samples is 0 from the first step to the last."""
    last = values[f"{_PREFIX}probability"]
    if not values[_RAMP]:
        return not last
    end = values[f"{_PREFIX}prob_end"]
    return not (values[f"{_PREFIX}prob_start"] or (last if end is None else end))


NO_EFFECT = (
    *(
        NoEffect(name, both(off(_ON), differs(name, default)), f"{_ON} is not set")
        for name, default in _DEFAULTS.items()
        if name != _ON
    ),
    NoEffect(_ON, _rolls_nothing, f"no sample is rolled ({_PREFIX}probability is 0)"),
    *(
        NoEffect(f"{_PREFIX}{name}", both(off(_RAMP), differs(f"{_PREFIX}{name}", default)), f"{_RAMP} is not set")
        for name, default in (("ramp_shape", "linear"), ("prob_start", 0.0), ("prob_end", None))
    ),
    NoEffect(
        f"{_PREFIX}inference_steps",
        both(is_one_of(f"{_PREFIX}stride", "training"), differs(f"{_PREFIX}inference_steps", 28)),
        f"{_PREFIX}stride is training",
    ),
)
