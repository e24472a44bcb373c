"""Rules between flags of what happens block by block."""

from __future__ import annotations

from library.options.rules.rule_kinds import Implies, NoEffect, both, is_one_of, off, on

_POLICY = "gradient_checkpointing_policy"

IMPLIES = tuple(
    Implies(
        switch,
        both(on(switch), is_one_of(_POLICY, "attention")),
        _POLICY,
        "all",
        "the results of attention cannot be kept out of compiled blocks",
    )
    for switch in ("torch_compile", "compile")
)

NO_EFFECT = (
    NoEffect(
        _POLICY,
        both(off("gradient_checkpointing"), is_one_of(_POLICY, "attention", "half")),
        "gradient_checkpointing is not set",
    ),
    NoEffect(
        "cpu_offload_checkpointing",
        both(on("cpu_offload_checkpointing"), off("gradient_checkpointing")),
        "gradient_checkpointing is not set",
    ),
    NoEffect(
        _POLICY,
        both(is_one_of(_POLICY, "attention"), on("xformers")),
        "xformers attention is recomputed",
    ),
)
