"""Compare the installed packages with the ranges in pyproject.toml. Reads their metadata, and imports none of them."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from library.options.mistakes import Mistake, UserError
from library.wrong_python import missing_package

ROOT = Path(__file__).resolve().parents[2]
_RANGE = re.compile(r"([a-z0-9-]+)>=([\d.]+)(?:,<([\d.]+))?")


@dataclass(frozen=True)
class Range:
    """The releases of a package that the program runs with: from `lowest` on, below `end` (None: no limit known)."""

    package: str
    lowest: str
    end: str | None

    def __str__(self) -> str:
        return f"{self.package}>={self.lowest}" + (f",<{self.end}" if self.end else "")


def read_ranges(root: Path = ROOT) -> tuple[Range, ...]:
    """The dependencies in pyproject.toml that have a lower limit; none if there is no such file."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except FileNotFoundError:  # the packages were copied out of the project's folder
        return ()
    return tuple(Range(*found.groups()) for line in project["dependencies"] if (found := _RANGE.fullmatch(line)))


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and not needed for --help

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_packages(
    mistakes: Sequence[Mistake] = (),
    ranges: Sequence[Range] | None = None,
    version_of: Callable[[str], str | None] = installed_version,
) -> tuple[str, ...]:
    """Return a note if packages are newer than any release this program was tried with.

    Raises UserError, with `mistakes` before it, if packages are missing or older than their range: releases before it
    lack what the program calls. Newer ones usually work, so they are not refused. A Python without PyTorch is taken for
    the wrong one.
    """
    wrong: list[str] = []
    newer: list[str] = []
    install: list[str] = []
    for range_ in read_ranges() if ranges is None else ranges:
        version = version_of(range_.package)
        if version is None and range_.package == "torch":
            raise UserError((*mistakes, Mistake(*missing_package("torch"))))
        if version is None:
            wrong.append(f"no {range_.package}")
        elif _is_older(version, range_.lowest):
            wrong.append(f"{range_.package} {version} ({range_.lowest} or newer is needed)")
        elif range_.end is not None and not _is_older(version, range_.end):
            newer.append(f"{range_.package} {version} (tried below {range_.end})")
            continue
        else:
            continue
        install.append(f'"{range_}"')
    if importlib.util.find_spec("cv2") is None:  # several packages have it, and exclude each other
        wrong.append("no OpenCV")
        install.append("opencv-python-headless")
    if wrong:
        what = f"the packages of {sys.executable} do not fit: {', '.join(wrong)}"
        raise UserError((*mistakes, Mistake(what, f'"{sys.executable}" -m pip install {" ".join(install)}')))
    if newer:
        return (f"packages newer than this program was tried with: {', '.join(newer)}",)
    return ()


def _is_older(version: str, other: str) -> bool:
    """Whether the release number of `version` is smaller: 4.54.1 < 5.0, and 2.13.0+cpu = 2.13."""
    pairs = zip_longest(_numbers(version), _numbers(other), fillvalue=0)
    return next((one < two for one, two in pairs if one != two), False)


def _numbers(version: str) -> Iterator[int]:
    found = re.match(r"[\d.]*\d", version)
    return map(int, found[0].split(".")) if found else iter(())
