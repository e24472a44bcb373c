"""The suite cannot use the network: the guard of conftest.py, shown."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest


def test_nothing_leaves_this_machine() -> None:
    # 192.0.2.0/24 is set aside for documentation (RFC 5737): nobody is there to answer in any case.
    with pytest.raises(OSError, match="without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with socket.socket() as unconnected, pytest.raises(OSError, match="without a network"):
        unconnected.connect_ex(("192.0.2.1", 80))
    with socket.socket(type=socket.SOCK_DGRAM) as unconnected, pytest.raises(OSError, match="without a network"):
        unconnected.sendto(b"", ("192.0.2.1", 53))
    with pytest.raises(OSError, match="without a network"):
        socket.getaddrinfo("huggingface.co", 443)


def test_connections_inside_this_machine_work() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_child_processes_find_no_network_either() -> None:
    program = """
import urllib.error, urllib.request
try:
    urllib.request.urlopen("http://192.0.2.1/", timeout=5)
except urllib.error.URLError as error:
    print(type(error.reason).__name__)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert answer.stdout.strip() == "ConnectionRefusedError", answer
