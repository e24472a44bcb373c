"""Progress bars: kohya's line, whole lines in files, one line on terminals, and no time that is not work."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

from library.runtime.progress import ProgressBar

# What front-ends look for in the output of kohya's scripts (reference: tqdm's documented bar_format).
LINE = re.compile(r"steps: +(\d+)%\|.{10}\| (\d+)/(\d+) \[(\S+)<(\S+), +(\S+)(?:, avr_loss=(\S+))?\]")


@dataclass
class Clock:
    """A clock that stands still until it is told otherwise."""

    time: float = 1000.0

    def __call__(self) -> float:
        return self.time


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


class Narrow(io.StringIO):
    encoding = "cp1252"  # type: ignore[assignment]


def lines_of(seconds_per_step: float, steps: int) -> list[str]:
    clock, file = Clock(), io.StringIO()
    with ProgressBar("steps", steps, stream=file, now=clock) as bar:
        for _ in range(steps):
            clock.time += seconds_per_step
            bar.update(1, avr_loss=0.125)
    assert "\r" not in file.getvalue() and file.getvalue().endswith("\n")
    return file.getvalue().splitlines()


def test_a_file_gets_whole_lines_as_kohya_writes_them() -> None:
    found = [match.groups() for match in map(LINE.fullmatch, lines_of(4, 6)) if match]
    # after 4, 8, 12 s: a line; after 16, 20 s, 24 s: a line; 6 steps of 4 s take 24 s
    assert found == [
        ("50", "3", "6", "00:12", "00:12", "4.00s/it", "0.125"),
        ("100", "6", "6", "00:24", "00:00", "4.00s/it", "0.125"),
    ]


def test_a_file_gets_at_most_a_line_each_ten_seconds_and_the_last() -> None:
    assert len(lines_of(0.25, 400)) == 10  # 100 s
    assert len(lines_of(0.25, 410)) == 11  # and the last one after 2.5 s more
    assert len(lines_of(0.1, 5)) == 1


def test_pauses_count_neither_in_rate_nor_in_remaining_time() -> None:
    clock, file = Clock(), io.StringIO()
    with ProgressBar("steps", 30, stream=file, now=clock) as bar:
        for _ in range(10):
            clock.time += 2
            bar.update()
            with bar.pause():
                clock.time += 50
                with bar.pause():
                    clock.time += 50
                assert bar.elapsed == 2 * bar.done
    assert bar.elapsed == 20
    assert "10/30 [00:20<00:40,  2.00s/it]" in file.getvalue()


def test_what_was_done_before_is_no_part_of_the_rate() -> None:
    clock, file = Clock(), io.StringIO()
    with ProgressBar("steps", 100, done=90, stream=file, now=clock) as bar:
        clock.time += 10
        bar.update()
    assert "91/100 [00:10<01:30, 10.00s/it]" in file.getvalue()


def test_a_terminal_has_one_line_which_makes_room_for_others() -> None:
    clock, terminal = Clock(), Terminal()
    with ProgressBar("steps", 2, stream=terminal, now=clock) as bar:
        clock.time += 1
        bar.update()
        with bar.making_room():
            terminal.write("saved\n")
        bar.update()
    first, second, *_ = terminal.getvalue().split("\n")
    assert first.endswith(f"\r{' ' * 79}\rsaved")
    states = second.split("\r")
    assert states[0] == "" and all(len(state) == 79 for state in states[1:])
    assert "1/2" in states[1] and "2/2" in states[-1]


def test_a_bar_that_does_not_stay_is_removed_and_a_quick_one_never_seen() -> None:
    clock, terminal, file = Clock(), Terminal(), io.StringIO()
    for stream in (terminal, file):
        with ProgressBar("validation", 2, delay=2, leave=False, stream=stream, now=clock) as bar:
            clock.time += 1
            bar.update()
    assert terminal.getvalue() == file.getvalue() == ""
    with ProgressBar("validation", 2, delay=2, leave=False, stream=terminal, now=clock) as bar:
        clock.time += 3
        bar.update()
    assert "1/2" in terminal.getvalue() and terminal.getvalue().endswith(f"\r{' ' * 79}\r")


def test_nothing_is_shown_where_nothing_is_to_do_or_nobody_looks() -> None:
    terminal = Terminal()
    with ProgressBar("encoding", 0, stream=terminal), ProgressBar("encoding", 1, shown=False, stream=terminal) as bar:
        bar.update()
    assert terminal.getvalue() == ""


def test_items_pass_through_and_are_counted() -> None:
    clock, file = Clock(), io.StringIO()
    assert list(ProgressBar("images", 3, stream=file, now=clock).over("abc")) == ["a", "b", "c"]
    assert "images: 100%" in file.getvalue() and "3/3" in file.getvalue()


def test_bytes_have_units_and_old_code_pages_get_characters_that_they_have() -> None:
    clock, stream = Clock(), Narrow()
    with ProgressBar("downloading", 2_000_000, unit="B", stream=stream, now=clock) as bar:
        clock.time += 10
        bar.update(1_000_000)
    assert "1.00M/2.00M [00:10<00:10, 100kB/s]" in stream.getvalue()
    assert stream.getvalue().isascii() and "#####" in stream.getvalue()
