"""Rules of the flags that say how weights are updated."""

from __future__ import annotations

from library.options.rules.rule_kinds import Excludes, NoEffect, both, differs, off

EXCLUDES = (
    Excludes(
        ("fused_backward_pass",),
        "fused_optimizer_groups",
        "both update the weights during the backward pass",
        "keep one of the two; fused_backward_pass needs less memory",
    ),
)

NO_EFFECT = (
    NoEffect(
        "bf16_rounding",
        both(off("full_bf16"), differs("bf16_rounding", "stochastic")),
        "weights are not bf16 (full_bf16 is not set)",
    ),
    NoEffect(
        "fused_backward_clipping",
        both(off("fused_backward_pass", "fused_optimizer_groups"), differs("fused_backward_clipping", "global")),
        "the backward pass is not fused (fused_backward_pass is not set)",
    ),
)
