"""Signals that arrive while processes are started: they wait, and the new processes are out of their reach."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from library.runtime.signals import signals_as_interrupts, starting_processes


@pytest.mark.skipif(os.name == "nt", reason="signals of Windows are not inherited in this way")
def test_an_interrupt_waits_until_processes_are_started_and_does_not_reach_them() -> None:
    """raise_signal ends a Python process with a traceback and not with exit code 0, unless the signal is blocked."""
    process = multiprocessing.get_context("spawn").Process(target=signal.raise_signal, args=(signal.SIGINT,))
    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt), starting_processes():
        os.kill(os.getpid(), signal.SIGINT)
        process.start()
        reached.append("the end of the start")
    process.join()
    assert reached and process.exitcode == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.skipif(os.name == "nt", reason="processes of Windows get no such signal")
def test_a_termination_waits_too() -> None:
    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt), signals_as_interrupts(), starting_processes():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the end of the start")
    assert reached and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_a_signal_nothing_happens() -> None:
    before = signal.getsignal(signal.SIGINT)
    with starting_processes():
        pass
    assert signal.getsignal(signal.SIGINT) is before
