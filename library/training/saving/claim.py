"""Before a run writes: claim the names of its files, and clear away what a killed process left in its folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from library.runtime.run_lock import writing_alone
from library.training.saving.outputs import Outputs
from library.whole_files import remove_leftovers


@contextmanager
def claimed(outputs: Outputs, folders: Iterable[Path | None], say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on the files of a run while this is open, and first clear its `folders`. Raises UserError if
    another run has the lock. Of several processes only the one that writes does so, for all of them."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with writing_alone(outputs.directory, outputs.final_stem(), say):
        clear_leftovers((outputs.directory, *folders), say)
        yield


def clear_leftovers(folders: Iterable[Path | None], say: Callable[[str], None]) -> None:
    """Remove what killed processes left in these folders, and complete changes of folders that were cut off."""
    for folder in dict.fromkeys(folders):
        for line in () if folder is None else remove_leftovers(folder):
            say(line)
