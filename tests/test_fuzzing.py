"""Random files for every reader, few of each kind, the same in every run. The long run: `python -m tests.fuzzing`."""

from __future__ import annotations

import pytest

from tests.fuzzing import TARGETS, fuzz

EXAMPLES = 25


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_is_read_or_refused_with_a_sentence(name: str) -> None:
    fuzz(name, EXAMPLES)
