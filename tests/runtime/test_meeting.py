"""Processes end together, with the failure of the first that failed. Two ranks in one process; a store in memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from library.options.mistakes import Mistake, UserError
from library.runtime import meeting as room
from library.runtime.launch import Launch
from library.runtime.meeting import Failure, Meeting, RankError

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24463")


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Meeting, Meeting]]:
    monkeypatch.setattr(room, "_ALIKE", 0.1)
    monkeypatch.setattr(room, "_VOTE", 0.1)
    store = dist.HashStore()
    first, second = (Meeting(Launch(rank, 2, rank, 2), store, store) for rank in (0, 1))
    before = signal.getsignal(signal.SIGTERM)
    yield first, second
    signal.signal(signal.SIGTERM, before)


def test_a_rank_that_is_left_alone_ends_with_the_error_of_the_other(pair: tuple[Meeting, Meeting]) -> None:
    first, second = pair
    own = UserError((Mistake("a file is gone", "bring it back"),))
    assert second.agree(own) is own
    others = first.agree(LOST)
    assert isinstance(others, UserError) and others.mistakes == own.mistakes
    assert first.agree(KeyboardInterrupt()) is others  # once and for all


def test_the_first_of_two_errors_counts(pair: tuple[Meeting, Meeting]) -> None:
    first, second = pair
    one, two = UserError((Mistake("one"),)), UserError((Mistake("two"),))
    assert first.agree(one) is one
    assert str(second.agree(two)) == str(one)


def test_a_program_error_is_shown_with_its_traceback(pair: tuple[Meeting, Meeting]) -> None:
    first, second = pair
    try:
        raise ZeroDivisionError("of the second")
    except ZeroDivisionError as error:
        assert second.agree(error) is error
    shown = first.agree(LOST)
    assert isinstance(shown, RankError)
    assert "process 2 of 2" in str(shown) and "test_meeting.py" in str(shown) and "of the second" in str(shown)


def test_an_interrupt_keeps_what_the_process_itself_says(pair: tuple[Meeting, Meeting]) -> None:
    first, second = pair
    second.agree(KeyboardInterrupt("nothing was saved"))
    own = KeyboardInterrupt("the last saved model is x")
    assert first.agree(own) is own


def test_all_come_to_the_same_error_or_none_waits_for_the_others(pair: tuple[Meeting, Meeting]) -> None:
    first, second = pair
    with ThreadPoolExecutor(1) as others:
        other = others.submit(second.all_alike, "same")
        assert first.all_alike("same") and other.result()


def test_different_errors_are_not_alike(pair: tuple[Meeting, Meeting]) -> None:
    first, second = pair
    with ThreadPoolExecutor(1) as others:
        other = others.submit(second.all_alike, "at step 2")
        assert not first.all_alike("at step 3") and not other.result()


def test_a_rank_that_comes_after_the_first_has_given_up_gets_its_answer(pair: tuple[Meeting, Meeting]) -> None:
    first, second = pair
    assert not first.all_alike("same") and not second.all_alike("same")


@pytest.mark.skipif(os.name != "posix", reason="processes are looked up by their numbers")
def test_a_process_that_ended_without_a_word_is_named(pair: tuple[Meeting, Meeting]) -> None:
    first, _ = pair
    import socket
    import subprocess
    import sys

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    first.store.set("rank/0", f"{socket.gethostname()} {os.getpid()}")
    first.store.set("rank/1", f"{socket.gethostname()} {ended.pid}")
    error = first.agree(LOST)
    assert isinstance(error, UserError) and "process 2 of 2 ended without a message" in error.mistakes[0].what
    assert "--resume" in error.mistakes[0].remedy
    assert "Traceback" not in str(error)


def test_a_process_that_does_not_answer_is_told_apart(pair: tuple[Meeting, Meeting]) -> None:
    error = pair[0].agree(RuntimeError("Timed out waiting 60000ms for recv operation to complete"))
    assert isinstance(error, UserError) and "--ddp_timeout" in error.mistakes[0].remedy


def test_an_error_that_only_looks_like_a_lost_process_stays(pair: tuple[Meeting, Meeting]) -> None:
    error = ValueError("timeout must be a number")
    assert pair[0].agree(error) is error


def test_all_leave_when_the_writer_has_told(pair: tuple[Meeting, Meeting], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = pair
    thread = threading.Thread(target=second.end, args=(2,))
    thread.start()
    first.end(2)
    thread.join()
    assert capsys.readouterr().err == ""


def test_a_failed_rank_does_not_wait_for_a_writer_that_waits_for_it(
    pair: tuple[Meeting, Meeting], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair
    monkeypatch.setattr(room, "_STUCK_AFTER", 0.01)
    second.agree(UserError((Mistake("of the second"),)))
    watching = threading.Thread(target=first.watch, daemon=True)
    watching.start()
    second.end(2)  # its exit breaks the connection, which wakes the writer
    assert str(first.agree(LOST)) == "- of the second"
    watching.join()
    assert capsys.readouterr().err == ""


def test_failures_survive_the_store() -> None:
    for error in (UserError((Mistake("a", "b"), Mistake("c"))), KeyboardInterrupt("x")):
        again = Failure.of(1, error).error(2)
        assert type(again) is type(error) and str(again) == str(error)
