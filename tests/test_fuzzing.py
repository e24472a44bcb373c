"""Random files for every reader, few of each kind, the same in every run. The long run: tests/fuzzing/runs.py."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import pytest
from hypothesis import strategies as st

from library.checkpoints.header import CheckpointError
from tests.fuzzing import runs
from tests.fuzzing.runs import TARGETS, HangError, fuzz

EXAMPLES = 25


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_is_read_or_refused_with_a_sentence(name: str) -> None:
    fuzz(name, EXAMPLES)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timer of this kind")
def test_a_hang_is_found_in_a_reader_that_catches_every_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(folder: Path, text: str) -> None:
        with contextlib.suppress(Exception):
            time.sleep(5)

    monkeypatch.setitem(TARGETS, "hang", (hang, (st.text(),)))
    monkeypatch.setattr(runs, "SECONDS", 0.1)
    with pytest.raises(HangError):
        fuzz("hang", 1)


def test_too_much_memory_is_found_in_a_reader_that_tells_it_as_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(folder: Path, text: str) -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise CheckpointError("the file is damaged") from error

    monkeypatch.setitem(TARGETS, "memory", (take, (st.text(),)))
    with pytest.raises(AssertionError, match="too much memory"):
        fuzz("memory", 1)
