"""Rules between flags of DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping

from library.options.groups.deepspeed import DeepSpeedOptions
from library.options.rules.rule_kinds import NoEffect, both, differs, off

_DEFAULTS: Mapping[str, object] = vars(DeepSpeedOptions())

NO_EFFECT = tuple(
    NoEffect(name, both(off("deepspeed"), differs(name, default)), "deepspeed is not set")
    for name, default in _DEFAULTS.items()
    if name not in ("deepspeed", "zero_stage")  # front-ends always send a stage
)
