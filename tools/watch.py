"""Follow a run in the browser: curves, previews, speed, memory, time left, plan and messages.

python tools/watch.py output
python tools/watch.py output/dog output/dog_slow
python tools/watch.py output --port 0 --open

The run may be going on or have ended, and is not affected. Ctrl-C closes the page.
"""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import readable_bytes
from library.options.flag import flag
from library.options.mistakes import Mistake, UserError
from library.options.text_files import read_text
from library.options.tool_command import Tool, run_tool
from library.watch.runs import find_runs
from library.watch.server import PageServer, open_server

LONG = 10_000_000  # bytes of a record, which take a second or more
SHORTEST_TOKEN = 16  # characters
OPEN_TO_ALL = (
    "Warning: everybody who can reach this machine over the network and has the token sees the images, prompts and "
    "options of the runs, and nothing is encrypted. For yourself alone leave --host out and use a tunnel: "
    "ssh -L {port}:127.0.0.1:{port} HOST"
)


@dataclass(frozen=True)
class WatchOptions:
    """Command-line options."""

    run: Path | None = flag(None, "the --output_dir of a run, or its record (NAME-run.jsonl)")
    beside: Path | None = flag(None, "a second run, shown beside the first")
    port: int = flag(6016, "the page's port; 0 = any that is free", at_least=0, at_most=65535)
    host: str = flag("127.0.0.1", "the address to listen on; 0.0.0.0 = the whole network, which needs a token then")
    token_file: Path | None = flag(None, "a file whose first line is the token; without it a new one is printed")
    open: bool = flag(False, "open the page in the browser")


def work(options: WatchOptions) -> None:
    """Serve the page until Ctrl-C. Raises UserError."""
    runs = find_runs(place for place in (options.run, options.beside) if place is not None)
    for run in runs.look():  # read now what is long, so that the page comes at once
        if (size := run.record.path.stat().st_size) > LONG:
            print(f"Reading {run.record.path} ({readable_bytes(size)}) ...", flush=True)
        run.answer("")
    with open_server(runs, options.host, options.port, read_token(options.token_file)) as server:
        say_where(server, has_file=options.token_file is not None)
        if options.open:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("The page is closed.")


def say_where(server: PageServer, *, has_file: bool) -> None:
    """Print what is shown, the page's address, and the token unless the user's own file has it."""
    names = ", ".join(run.name for run in server.runs.look())
    if not server.is_local:
        print(OPEN_TO_ALL.format(port=server.server_port), file=sys.stderr)
    if server.token and not has_file:
        print(f"Token, as the password in the browser's dialog (any name will do): {server.token}", flush=True)
    print(f"Watching {names}: {server.url} (Ctrl-C closes the page; the run goes on)", flush=True)


def read_token(path: Path | None) -> str:
    """The token in a file; "" without one. Raises UserError."""
    if path is None:
        return ""
    text = read_text(path, f"--token_file {path}")
    if isinstance(text, Mistake):
        raise UserError([text])
    token = (text.splitlines() or [""])[0].strip()
    if len(token) < SHORTEST_TOKEN:
        what = f"--token_file {path}: its first line has {len(token)} characters, fewer than {SHORTEST_TOKEN}"
        raise UserError([Mistake(what, 'write one of: python -c "import secrets; print(secrets.token_urlsafe())"')])
    return token


TOOL = Tool(
    "Follow a run in the browser, going on or ended.",
    "python tools/watch.py RUN_FOLDER [SECOND_RUN_FOLDER] [--port N] [--open] [--host ADDRESS]",
    WatchOptions,
    work,
    required={"run": "give the --output_dir of a run: watch.py output"},
    positional=("run", "beside"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Serve the page. Returns the exit code: 0 done, 2 user error."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
