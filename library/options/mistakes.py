"""Mistakes of the user, collected and reported together, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One thing the user has to change. `what`: flag or file, value, where it came from; `remedy`: what to do."""

    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.what}\n    -> {self.remedy}" if self.remedy else self.what


class UserError(Exception):
    """Raised for mistakes that only the user can correct; str() lists all of them, one block each."""

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes: tuple[Mistake, ...] = tuple(mistakes)
        super().__init__(*self.mistakes)

    def __str__(self) -> str:
        return "\n".join(f"- {mistake}" for mistake in self.mistakes)


class Mistakes:
    """A list of mistakes without duplicates, so that all of a run are reported together."""

    def __init__(self, found: Iterable[Mistake] = ()) -> None:
        self._found: list[Mistake] = []
        self.extend(found)

    def add(self, what: str, remedy: str = "") -> None:
        """Add a mistake."""
        self.extend((Mistake(what, remedy),))

    def extend(self, mistakes: Iterable[Mistake]) -> None:
        """Add mistakes, skipping those already in the list."""
        for mistake in mistakes:
            if mistake not in self._found:
                self._found.append(mistake)

    def __iter__(self) -> Iterator[Mistake]:
        return iter(tuple(self._found))

    def __len__(self) -> int:
        return len(self._found)

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_if_any(self) -> None:
        """Raise UserError with all mistakes if there are any."""
        if self._found:
            raise UserError(self._found)
