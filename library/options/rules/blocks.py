"""Rules between flags of what happens block by block."""

from __future__ import annotations

from library.options.rules.rule_kinds import Implies, NoEffect, both, differs, is_one_of, off, on

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

_UNCOMPILED = off("torch_compile", "compile")
_NOT_COMPILED = "blocks are not compiled (neither torch_compile nor compile is set)"

NO_EFFECT = (
    NoEffect(
        "dynamo_backend",
        both(off("torch_compile"), differs("dynamo_backend", "inductor")),
        "torch_compile is not set; compile has compile_backend",
    ),
    NoEffect(
        "compile_backend",
        both(off("compile"), differs("compile_backend", "inductor")),
        "compile is not set; torch_compile has dynamo_backend",
    ),
    NoEffect("compile_mode", both(_UNCOMPILED, differs("compile_mode", "default")), _NOT_COMPILED),
    NoEffect("compile_dynamic", both(_UNCOMPILED, is_one_of("compile_dynamic", "true")), _NOT_COMPILED),
    NoEffect("compile_fullgraph", _UNCOMPILED, _NOT_COMPILED),
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
