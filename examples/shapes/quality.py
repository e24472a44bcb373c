"""Render the kept results of all comparisons as the table of docs/quality.md.

    python -m examples.shapes.quality [--results output/shapes/evaluation/compare.json ...] [--page docs/quality.md]

Results come from `python -m examples.shapes.compare TABLE --seeds 1 2 3`, which keeps those of all its tables in one
file; files of several machines can be given together. The table has a row for each way that was measured, with the mean
over its seeds and, in brackets, the least and the most. A row of the page stays if the files have fewer seeds of its
way. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.shapes.compare import TABLES
from examples.shapes.evaluate import OUTPUT, ROOT
from library.whole_files import write_text

PAGE = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- rendered by examples/shapes/quality.py -->\n", "<!-- end -->\n"
COLUMNS = {"subject": "Subject", "moved": "Moved", "broken": "Broken"}

Results = Mapping[str, Mapping[int, Mapping[str, float]]]
"""By way and seed, the values of examples.shapes.compare.Result."""


def read_results(files: Sequence[Path]) -> Results:
    """The results of all files; of one way and seed that is in several, the last file's."""
    results: dict[str, dict[int, Mapping[str, float]]] = {}
    for file in files:
        for key, values in json.loads(file.read_text(encoding="utf-8")).items():
            way, _, seed = key.rpartition(" --seed ")
            results.setdefault(way, {})[int(seed)] = values
    return results


def render(results: Results, page: str = "") -> str:
    """The table, and a line on what it lacks. `page`: where rows stand that were measured before."""
    lines = ["| Comparison | Way | Seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    before = {tuple(cells[:2]): cells[2:] for cells in _rows(page)}
    missing = []
    for table, ways in TABLES.items():
        for name, way in ways.items():
            cells = max(_cells(results.get(way, {})), before.get((table, name), []), key=_number_of_seeds)
            if cells:
                lines.append(f"| {' | '.join([table, name, *cells])} |")
            else:
                missing.append(f"{table}: {name}")
    text = "\n".join(lines) + "\n"
    return text + (f"\nNot measured yet: {'; '.join(missing)}.\n" if missing else "")


def _rows(page: str) -> list[list[str]]:
    """The cells of all rows between the marks of a page, without the head."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "%" in line]


def _number_of_seeds(cells: Sequence[str]) -> int:
    """The number of seeds of a row, given from its seeds on."""
    return len(cells[0].split(",")) if cells else 0


def _cells(by_seed: Mapping[int, Mapping[str, float]]) -> list[str]:
    """The cells of a row from its seeds on; none without a seed."""
    if not by_seed:
        return []
    seeds = ", ".join(map(str, sorted(by_seed)))
    return [seeds, *(_spread(name, [values[name] for values in by_seed.values()]) for name in COLUMNS)]


def _spread(name: str, values: Sequence[float]) -> str:
    """`86.7% (81.7% to 90.0%)`; of one seed its value."""
    form = ".3f" if name == "moved" else ".1%"
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def fill_in(page: str, table: str) -> str:
    """The page with this table between its marks. Raises ValueError without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + "\n" + table + "\n" + END + after


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, fill in the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[OUTPUT / "compare.json"])
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(words)
    gone = [file for file in options.results if not file.is_file()]
    if gone:
        parser.error(f"--results {gone[0]} is not there: run python -m examples.shapes.compare first")
    page = options.page.read_text(encoding="utf-8")
    table = render(read_results(options.results), page)
    write_text(options.page, fill_in(page, table))
    print(table, end="")


if __name__ == "__main__":
    main()
