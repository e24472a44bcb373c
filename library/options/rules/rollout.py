"""Rules between flags of scheduled sampling."""

from __future__ import annotations

from collections.abc import Mapping

from library.options.groups.rollout import RolloutOptions
from library.options.rules.rule_kinds import NoEffect, both, differs, is_one_of, off

_PREFIX = "scheduled_sampling_"
_ON = f"{_PREFIX}max_step_offset"
_RAMP = f"{_PREFIX}ramp_steps"
_STRIDE = f"{_PREFIX}stride"
_INFERENCE = f"{_PREFIX}inference_steps"
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
    NoEffect(_ON, _rolls_nothing, "no sample is rolled: their share is 0 in every step"),
    *(
        NoEffect(name, both(off(_RAMP), differs(name, _DEFAULTS[name])), f"{_RAMP} is not set")
        for name in (f"{_PREFIX}ramp_shape", f"{_PREFIX}prob_start", f"{_PREFIX}prob_end")
    ),
    NoEffect(
        _INFERENCE,
        both(is_one_of(_STRIDE, "training"), differs(_INFERENCE, _DEFAULTS[_INFERENCE])),
        f"{_STRIDE} is training",
    ),
)
