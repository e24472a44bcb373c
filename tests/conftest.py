"""Settings of all tests: no network, no GPU unless CUDA_VISIBLE_DEVICES selects one, one thread."""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.pretend_device.device import Device

_TESTS = Path(__file__).resolve().parent

# Set before any test imports torch or huggingface_hub, and inherited by child processes.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
    # As the program sets them: whichever test imports these packages first.
    DIFFUSERS_VERBOSITY="error",
    TRANSFORMERS_VERBOSITY="error",
    # The guard below does not reach child processes; there HTTP fails at a proxy that does not exist.
    HTTP_PROXY="http://127.0.0.1:9",
    HTTPS_PROXY="http://127.0.0.1:9",
    NO_PROXY="localhost,127.0.0.1",
    http_proxy="http://127.0.0.1:9",
    https_proxy="http://127.0.0.1:9",
    no_proxy="localhost,127.0.0.1",
)
# The index of image files is kept here, for the time of the tests. Each process of a parallel run has its own.
_CACHE = tempfile.TemporaryDirectory(prefix="dreamfolder tests ", ignore_cleanup_errors=True)
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# The same numbers with and without a GPU; CUDA_VISIBLE_DEVICES=0 ./run_tests.sh tests on one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# With miniature tensors, more threads cost more than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Imports and thousands of tests are kept to the end, and each collection would look through them: a tenth of the time.
gc.disable()


class NetworkUsedError(OSError):
    """A test tried to use the network. An OSError, so that the code under test handles it like a missing network."""


def _check_local(address: Any) -> None:
    """Raise NetworkUsedError unless a socket address is local: loopback, or no IP address."""
    if not isinstance(address, tuple):
        return
    host = address[0]
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return
    try:
        local = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        local = False  # a host name: its look-up would use the network
    if not local:
        raise NetworkUsedError(f"tests run without a network, but one tried to reach {address!r}")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Block connections, datagrams and name look-ups to other machines."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex, sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto
    look_up = socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _check_local(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _check_local(address)
        return connect_ex(self, address)

    def guarded_sendto(self: socket.socket, data: Any, *rest: Any) -> int:
        _check_local(rest[-1])
        return sendto(self, data, *rest)

    def guarded_look_up(host: Any, *rest: Any, **keywords: Any) -> Any:
        _check_local((host,))
        return look_up(host, *rest, **keywords)

    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    patch.setattr(socket.socket, "sendto", guarded_sendto)
    patch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield
    patch.undo()


@pytest.fixture
def device() -> Iterator[Device]:
    """The pretend device, chosen by all runs of a test: see "A card without a card" in docs/architecture.md."""
    from tests.pretend_device.device import chosen

    with chosen() as made:
        yield made


# Run by --quick: tests that neither train, start processes nor build whole models. Exceptions are marked slow.
_QUICK = (
    "benchmarks/", "checkpoints/", "data/", "networks/arithmetic/", "networks/formats/", "networks/names/",
    "objective/", "options/", "runtime/", "training/plan/", "training/precache/test_plan.py",
    "training/preview/test_plan.py", "training/validation/test_plan.py",
    "watch/", "test_conftest.py", "test_docs.py", "test_house.py",
)  # fmt: skip
# The slowest files run first, or one core would be left with them at the end.
_LONG = (
    "tests/examples/", "tests/sampling/", "tests/test_command.py", "tests/test_docs_commands.py",
    "tests/test_mistakes.py", "tests/tools/", "tests/training/",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--quick`, which run_tests.sh passes on."""
    parser.addoption(
        "--quick", action="store_true", help="only the tests that take a minute together: see docs/architecture.md"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --quick, do not collect other files: their imports alone take long."""
    if not config.getoption("quick") or collection_path.is_dir():
        return None
    return None if collection_path.relative_to(_TESTS).as_posix().startswith(_QUICK) else True


def pytest_collection_finish() -> None:
    """Collect garbage again, but only what the tests themselves make."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slow files first, without changing the order within."""
    if config.getoption("quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))
