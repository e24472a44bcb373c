"""A web server on this machine that receives events, and behaves as well as a test wants."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[["Receiver", BaseHTTPRequestHandler], None]


@dataclass
class Receiver:
    """What arrived, as (headers in lower case, body). `behave` answers; None: 204. `held`: requests that `hang` holds
    until `released`."""

    behave: Behaviour | None = None
    arrived: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    accepted: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    held: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def events(self) -> list[dict[str, Any]]:
        """What was accepted, as JSON."""
        return [json.loads(body) for _, body in self.accepted]

    def answer(self, handler: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


def hang(receiver: Receiver, handler: BaseHTTPRequestHandler) -> None:
    """Take the request and say nothing."""
    receiver.held.release()
    receiver.released.wait(60)
    close_midway(receiver, handler)


def close_midway(receiver: Receiver, handler: BaseHTTPRequestHandler) -> None:
    """End the connection within the answer."""
    handler.wfile.write(b"HTTP/1.1 2")
    handler.close_connection = True


def talk_nonsense(receiver: Receiver, handler: BaseHTTPRequestHandler) -> None:
    """Answer in no known language."""
    handler.wfile.write(b"\x00\xff hello\r\n\r\n")
    handler.close_connection = True


def status(code: int, **headers: str) -> Behaviour:
    return lambda receiver, handler: receiver.answer(handler, code, **headers)


@contextmanager
def receiving(behave: Behaviour | None = None, port: int = 0) -> Iterator[Receiver]:
    """Run the server in this context; a `port` of 0 is any that is free."""
    receiver = Receiver(behave)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = (
                {name.lower(): value for name, value in self.headers.items()},
                self.rfile.read(int(self.headers["Content-Length"])),
            )
            receiver.arrived.append(request)
            if receiver.behave is not None:
                receiver.behave(receiver, self)
            else:
                receiver.accepted.append(request)
                receiver.answer(self, 204)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    receiver.url = f"http://127.0.0.1:{server.server_port}/hooks/pass-word"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
