"""Rules between flags of preservation."""

from __future__ import annotations

from collections.abc import Mapping

from library.options.rules.rule_kinds import NoEffect


def _has_no_class_prompt(values: Mapping[str, object]) -> bool:
    anchors = values["preservation"]
    return not any(str(anchor).startswith("class_prompt") for anchor in (anchors if isinstance(anchors, tuple) else ()))


def _is_not_cached(values: Mapping[str, object]) -> bool:
    return values["preservation_base"] != "cached" and values["preservation_draws"] != 8


NO_EFFECT = (
    *(
        NoEffect(name, _has_no_class_prompt, "class_prompt is not among the anchors of preservation")
        for name in ("preservation_identifier", "preservation_class")
    ),
    NoEffect("preservation_draws", _is_not_cached, "preservation_base is not cached"),
)
