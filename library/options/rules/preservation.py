"""Rules between flags of preservation."""

from __future__ import annotations

from collections.abc import Mapping

from library.options.groups.preservation import PreservationOptions
from library.options.rules.rule_kinds import NoEffect, both, differs


def _has_no_class_prompt(values: Mapping[str, object]) -> bool:
    anchors = values["preservation"]
    return not any(str(anchor).startswith("class_prompt") for anchor in (anchors if isinstance(anchors, tuple) else ()))


def _compares_nothing(values: Mapping[str, object]) -> bool:
    if values["preservation_base"] == "auto":
        return False
    anchors = values["preservation"]
    if not isinstance(anchors, tuple) or not anchors:
        return values["data_backend_config"] is None  # there, regularisation images mean base_prediction
    return all(str(anchor).startswith("reg_images") for anchor in anchors)


NO_EFFECT = (
    NoEffect("preservation_base", _compares_nothing, "no anchor of preservation compares with the base model"),
    *(
        NoEffect(name, _has_no_class_prompt, "class_prompt is not among the anchors of preservation")
        for name in ("preservation_identifier", "preservation_class")
    ),
    NoEffect(
        "preservation_draws",
        both(
            differs("preservation_base", "cached"),
            differs("preservation_draws", PreservationOptions.preservation_draws),
        ),
        "preservation_base is not cached",
    ),
)
