"""Markdown tables whose rows are printed as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.card.children import Child


class Table:
    """A table with these columns. Its head is printed with the first row."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.rows = 0

    def row(self, *cells: str, remark: str = "") -> None:
        """Print a row at once, `remark` in its last column. A vertical bar or line end in a cell would end it."""
        if remark or len(cells) < len(self.columns):
            cells = (*cells, *[""] * (len(self.columns) - len(cells) - 1), remark)
        if not self.rows:
            print(f"| {' | '.join(self.columns)} |\n|{'---|' * len(self.columns)}", flush=True)
        self.rows += 1
        clean = [" ".join(cell.replace("|", "/").split()) for cell in cells]
        print(f"| {' | '.join(clean)} |", flush=True)

    def end(self, child: Child) -> None:
        """Say how a process ended that filled the table, unless it was done."""
        if child.ended not in ("", "done"):
            self.row(f"{child.name}: {child.ended}")


@dataclass
class Bars:
    """What the project wants to reach, beside what was measured."""

    found: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def add(self, what: str, measured: str, bar: str, *, met: bool) -> None:
        """Note one."""
        self.found.append((what, measured, bar, met))

    def show(self, say: Callable[[str], None]) -> None:
        """Print the table of all bars."""
        if not self.found:
            return
        say("\n## bars\n\n| what | measured | bar | |\n|---|---|---|---|")
        for what, measured, bar, met in self.found:
            say(f"| {what} | {measured} | {bar} | {'met' if met else 'NOT MET'} |")


def gigabytes(size: float | None) -> str:
    """Bytes in units of 10^9; "?" if unknown."""
    return "?" if size is None else f"{size / 1e9:.2f} GB"


def seconds_text(seconds: float) -> str:
    """Seconds with four digits."""
    return f"{seconds:.4g}"
