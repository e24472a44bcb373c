"""Rules between flags of preservation."""

from __future__ import annotations

from collections.abc import Mapping

from library.options.rules.rule_kinds import NoEffect


def _has_no_class_prompt(values: Mapping[str, object]) -> bool:
    anchors = values["preservation"]
    return not any(str(anchor).startswith("class_prompt") for anchor in (anchors if isinstance(anchors, tuple) else ()))


NO_EFFECT = tuple(
    NoEffect(name, _has_no_class_prompt, "class_prompt is not among the anchors of preservation")
    for name in ("preservation_identifier", "preservation_class")
)
