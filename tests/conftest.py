"""What holds for every test: no network, no graphics card unless asked for, as few threads as small tensors want."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_TESTS = Path(__file__).resolve().parent

# Before any test imports torch or the hub's client, and inherited by the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
    # As the program sets them before it imports these: whichever test is first to import them, and under whose stderr.
    DIFFUSERS_VERBOSITY="error",
    TRANSFORMERS_VERBOSITY="error",
    # Child processes do not see the guard below; what speaks HTTP in them finds nobody at home.
    HTTP_PROXY="http://127.0.0.1:9",
    HTTPS_PROXY="http://127.0.0.1:9",
    NO_PROXY="localhost,127.0.0.1",
    http_proxy="http://127.0.0.1:9",
    https_proxy="http://127.0.0.1:9",
    no_proxy="localhost,127.0.0.1",
)
# What is remembered about images is forgotten with the tests. Each process of a parallel run has its own.
_CACHE = tempfile.TemporaryDirectory(prefix="dreamfolder tests ", ignore_cleanup_errors=True)
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# The same numbers with and without a card; CUDA_VISIBLE_DEVICES=0 ./run_tests.sh shows the tests one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Miniature tensors lose more to handing out work than more threads win.
os.environ.setdefault("OMP_NUM_THREADS", "1")


class NetworkUsedError(OSError):
    """A test reached for the network. An OSError: to the code under test it looks like a network that is off."""


def _refuse_unless_local(address: Any) -> None:
    """Raise NetworkUsedError unless a socket address is on this machine: loopback, or no IP address at all."""
    if not isinstance(address, tuple):
        return
    host = address[0]
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return
    try:
        local = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        local = False  # a name: looking it up is already the network
    if not local:
        raise NetworkUsedError(f"the tests run without a network; something reached for {address!r}")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection, datagram and name look-up that would leave this machine."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex, sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto
    look_up = socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_unless_local(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_unless_local(address)
        return connect_ex(self, address)

    def guarded_sendto(self: socket.socket, data: Any, *rest: Any) -> int:
        _refuse_unless_local(rest[-1])
        return sendto(self, data, *rest)

    def guarded_look_up(host: Any, *rest: Any, **keywords: Any) -> Any:
        _refuse_unless_local((host,))
        return look_up(host, *rest, **keywords)

    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    patch.setattr(socket.socket, "sendto", guarded_sendto)
    patch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield
    patch.undo()


# What --quick runs: what neither trains nor starts a process nor builds whole models. Single tests are marked slow.
_QUICK = (
    "benchmarks/", "checkpoints/", "data/", "networks/arithmetic/", "networks/formats/", "networks/names/",
    "objective/", "options/", "runtime/", "training/plan/", "training/precache/test_plan.py",
    "training/preview/test_plan.py", "training/validation/test_plan.py",
    "test_conftest.py", "test_docs.py", "test_house.py",
)  # fmt: skip
# What takes longest for its number of tests comes first, or one core would be alone with it in the end.
_LONG = (
    "tests/examples/", "tests/sampling/", "tests/test_command.py", "tests/test_mistakes.py", "tests/tools/",
    "tests/training/",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick`, also for run_tests.sh, which hands its arguments on."""
    parser.addoption("--quick", action="store_true", help="only what a minute is enough for: see docs/architecture.md")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files that are not quick unread: importing what they need takes as long as many of the others."""
    if not config.getoption("quick") or collection_path.is_dir():
        return None
    return None if collection_path.relative_to(_TESTS).as_posix().startswith(_QUICK) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole runs and programs before what is quick; the order within is kept."""
    if config.getoption("quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))
