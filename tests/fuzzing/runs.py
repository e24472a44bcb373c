"""Random files for every reader: `python -m tests.fuzzing.runs --examples 2000 --seed 1 --memory 8`.

The law: a sentence for the user, or success; never another error, a hang, or memory that the file does not have.
tests/test_fuzzing.py runs a few examples of each kind, the same in every run. Each crash that was found is a test.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzzing import files, readers, values

SECONDS = 20  # that one example may take; a thousand times what it needs

TARGETS: dict[str, tuple[Callable[..., None], tuple[st.SearchStrategy[Any], ...]]] = {
    "safetensors": (readers.header, (values.damaged(files.safetensors()),)),
    "pickles": (readers.header, (files.pickles(),)),
    "pickles of states": (readers.state_pickle, (files.pickles(),)),
    "train_state.json": (readers.state, (values.damaged(files.state_heads()) | values.JSONS,)),
    "datasets in TOML": (functools.partial(readers.dataset, name="d.toml"), (values.TOMLS,)),
    "datasets in JSON": (functools.partial(readers.dataset, name="d.json"), (values.JSONS,)),
    "options in TOML": (functools.partial(readers.config, name="c.toml"), (values.TOMLS,)),
    "options in JSON": (functools.partial(readers.config, name="c.json"), (values.JSONS,)),
    "prompts in text": (functools.partial(readers.prompts, name="p.txt"), (files.PROMPT_LINES,)),
    "prompts in TOML": (functools.partial(readers.prompts, name="p.toml"), (files.PROMPTS_IN_TOML,)),
    "prompts in JSON": (functools.partial(readers.prompts, name="p.json"), (files.PROMPTS_IN_JSON,)),
    "metadata in JSON": (functools.partial(readers.metadata, name="m.json"), (values.JSONS,)),
    "metadata in JSON lines": (functools.partial(readers.metadata, name="m.jsonl"), (values.LINES,)),
    "captions": (readers.caption, (values.CAPTIONS, values.SETTINGS)),
    "caption files": (readers.caption_file, (values.damaged(values.CAPTIONS.map(lambda text: text.encode("utf-16"))),)),
    "folder names": (
        readers.folder_names,
        (st.lists(values.TEXT | st.from_regex(r"\d{1,40}_\w{0,9}", fullmatch=True), max_size=5),),
    ),
    "images": (readers.image, (files.IMAGES,)),
    "latents in npz": (functools.partial(readers.latents, name="x.npz"), (files.ARCHIVES,)),
    "latents in our format": (functools.partial(readers.latents, name="x.safetensors"), (files.OWN,)),
    "model folders": (readers.model_folder, (values.JSONS, values.JSONS, values.JSONS)),
    "PEFT configurations": (readers.peft, (files.PEFT,)),
    "adapters": (readers.adapter, (files.ADAPTERS,)),
    "webhooks": (readers.webhooks, (values.JSONS,)),
    "boxes": (readers.boxes, (values.JSONS,)),
    "shards": (readers.shards, (files.TARS,)),
    "patterns of shards": (readers.shard_pattern, (files.SHARD_PATTERNS,)),
    "tables of shards": (readers.shard_table, (files.TABLES_OF_SHARDS,)),
}


class HangError(BaseException):
    """An example took too long. No Exception, as readers of pickles turn any of these into a sentence."""


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError(f"more than {SECONDS} s")

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The errors that led to an error, which a sentence may hide. Each once: a chain of errors may be a ring."""
    passed: list[BaseException] = []
    while error is not None and not any(error is other for other in passed):
        passed.append(error)
        yield error
        error = error.__cause__ or error.__context__


def fuzz(name: str, examples: int, *, number: int | None = None) -> None:
    """Run one target. `number`: the seed; None: the same examples in every run. Raises what a reader must not raise."""
    function, strategies = TARGETS[name]
    said = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        phases=[Phase.generate] if number is None else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    with tempfile.TemporaryDirectory(prefix="fuzz ") as place:

        def check(arguments: tuple[Any, ...]) -> None:
            with _in_time():
                try:
                    if isinstance(function, functools.partial):
                        function(Path(place), content=arguments[0])
                    else:
                        function(Path(place), *arguments)
                except readers.TOLD as error:
                    assert str(error).strip() and len(str(error)) < 100_000
                    assert not any(isinstance(each, MemoryError) for each in _causes(error)), "it took too much memory"

        run = said(given(st.tuples(*strategies))(check))
        (run if number is None else seed(number)(run))()


def main() -> int:
    """The long run. Returns the exit code: 1 if anything was found."""
    import resource  # not on Windows

    parser = argparse.ArgumentParser(description="random files for every reader")
    parser.add_argument("--examples", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of addresses that the process may have")
    parser.add_argument("--only", nargs="*", default=list(TARGETS))
    chosen = parser.parse_args()
    most = int(chosen.memory * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    failed = 0
    for name in chosen.only:
        try:
            fuzz(name, chosen.examples, number=chosen.seed)
            print(f"{name}: {chosen.examples} examples", flush=True)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed += 1
            print(f"{name}: FOUND {type(error).__name__}", flush=True)
            traceback.print_exc(limit=-6)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
