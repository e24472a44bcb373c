"""Rules between flags for training the text encoders of a whole model."""

from __future__ import annotations

from collections.abc import Mapping

from library.options.rules.rule_kinds import Condition, Implies, NoEffect, Requires, off, on

_RATES = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2")
_CACHES = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")


def _all(*conditions: Condition) -> Condition:
    return lambda values: all(condition(values) for condition in conditions)


def _is_set(name: str) -> Condition:
    """0 counts as set: the encoder is not trained."""
    return lambda values: values[name] is not None


def _stops_later(values: Mapping[str, object]) -> bool:
    stop = values["stop_text_encoder_training"]
    return isinstance(stop, int) and stop > 0


REQUIRES = tuple(
    Requires(
        (cache, flag),
        _all(on(cache, "train_text_encoder"), off("network_module", *_CACHES[:place])),  # one mistake for both caches
        off(flag),
        "cached text encoder outputs cannot train the text encoder",
        "remove one of the two",
        set_by_user=("train_text_encoder",) if flag == "train_text_encoder" else (),
    )
    for place, cache in enumerate(_CACHES)
    for flag in (*_RATES, "train_text_encoder")
)

IMPLIES = (
    Implies(
        "cache_text_encoder_outputs",
        _all(on("cache_text_encoder_outputs", "train_text_encoder"), off("network_module")),
        "stop_text_encoder_training",
        -1,
        "the text encoder is not trained (stop_text_encoder_training -1): its outputs are cached",
    ),
    Implies(
        "cache_text_encoder_outputs",
        _all(on("cache_text_encoder_outputs"), off("network_module")),
        "train_text_encoder",
        False,
    ),
)

NO_EFFECT = (
    *(
        NoEffect(name, off("train_text_encoder"), "the text encoder is not trained (train_text_encoder is off)")
        for name in _RATES
    ),
    NoEffect(
        "stop_text_encoder_training",
        _all(off("train_text_encoder"), _stops_later),
        "the text encoder is not trained (train_text_encoder is off)",
    ),
    *(
        NoEffect("learning_rate_te", _is_set(name), f"{name} sets its learning rate", f" on the {which} text encoder")
        for name, which in (("learning_rate_te1", "first"), ("learning_rate_te2", "second"))
    ),
)
