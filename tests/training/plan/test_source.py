"""What a model's family has no use for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from library.families.sd import SD1
from library.options.mistakes import Mistakes
from library.options.parse import parse
from library.training.plan.source import check_capabilities

NO_CAPABILITY = replace(SD1, capabilities=frozenset())


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("", 0),
        ("--clip_skip 1", 0),
        ("--clip_skip 2", 0),
        ("--clip_skip 3", 1),
        ("--max_token_length 75 --no_token_padding=false --v2=false", 0),
        ("--max_token_length 225 --v2", 2),
    ],
)
def test_what_front_ends_always_write_asks_for_nothing(flags: str, refused: int) -> None:
    """kohya_ss sends clip_skip 1, LoRA_Easy_Training_Scripts 2, whatever the model is."""
    mistakes = Mistakes()
    check_capabilities(NO_CAPABILITY, parse(flags.split()).options, mistakes)
    assert len(mistakes) == refused
