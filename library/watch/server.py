"""Serve the page and the runs over HTTP: to this machine, unless asked otherwise.

Nothing but the page's own files, the runs' data and the images that they name is served, and only to who asks for this
machine by its name or address: the Host header is checked, as a foreign page whose own name leads here (DNS rebinding)
could otherwise read the answers. Where other machines reach the page, it asks for a token too. Browsers send it in a
header (HTTP's Basic authentication, as the password), so that it stands in no address, history or log.
"""

from __future__ import annotations

import base64
import errno
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import socketserver
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from library.options.mistakes import Mistake, UserError
from library.watch.runs import IMAGE_TYPES, Runs

PAGE = Path(__file__).resolve().parent / "page"
STATIC = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/elements.js": ("elements.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/previews.js": ("previews.js", "text/javascript; charset=utf-8"),
    "/uPlot.js": ("uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    "/uPlot.css": ("uPlot.min.css", "text/css; charset=utf-8"),
}
JSON = "application/json"
HEADERS = {
    # no text of a run can become a script: only the files above run
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",  # other pages cannot show the images
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask again; images are answered by their ETag
}
TOKEN_BYTES = 24  # random ones: 192 bits
IDLE = 60.0  # seconds after which a connection that asks for nothing is closed


class PageServer(ThreadingHTTPServer):
    """An HTTP server of some runs at an address. `is_local`: only this machine can reach it. `token`: what who asks
    must know; "": nothing."""

    daemon_threads = True
    # On Windows the option lets two programs have one port.
    allow_reuse_address = os.name != "nt"

    def __init__(self, runs: Runs, host: str, port: int, token: str = "") -> None:
        self.runs = runs
        self.token = token
        self.hosts = {"localhost", host.lower()}
        self.is_local = is_loopback(host)
        if not self.is_local:
            self.hosts |= {socket.gethostname().lower(), f"{socket.gethostname()}.local".lower()}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        """Bind, without looking up the machine's name, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def is_called(self, host: str) -> bool:
        """Whether a Host header names this machine. The port may be that of a tunnel."""
        found = re.fullmatch(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d+)?", host.lower())
        if found is None:
            return False
        name = found[1] or found[2]
        return name in self.hosts or (is_loopback(name) if self.is_local else _is_address(name))

    def is_known(self, authorization: str) -> bool:
        """Whether an Authorization header has the token, compared in constant time; any user name will do."""
        if not self.token:
            return True
        kind, _, coded = authorization.partition(" ")
        try:
            _, _, given = base64.b64decode(coded, validate=True).partition(b":")
        except ValueError:
            return False
        return kind.lower() == "basic" and hmac.compare_digest(given, self.token.encode("utf-8"))

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = str(self.server_address[0])
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Dreamfolder", ""
    timeout = IDLE
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"

    def do_GET(self) -> None:
        """Answer: see the module."""
        if not self.server.is_called(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN, "this address is not one of the page: use the one that was printed")
            return
        if not self.server.is_known(self.headers.get("Authorization", "")):
            self.send_error(HTTPStatus.UNAUTHORIZED, "give the token that was printed when the page was opened")
            return
        path, _, query = self.path.partition("?")
        if path in STATIC:
            name, kind = STATIC[path]
            self._send((PAGE / name).read_bytes(), kind)
        elif path == "/runs.json":
            self._send(self._list(), JSON)
        elif found := re.fullmatch(r"/runs/(\d{1,6})\.json", path):
            self._run(int(found[1]), parse_qs(query).get("version", [""])[0])
        elif found := re.fullmatch(r"/runs/(\d{1,6})/images/([0-9a-f]{20})", path):
            self._image(int(found[1]), found[2])
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "there is nothing here")

    do_HEAD = do_GET

    def _list(self) -> bytes:
        runs = [{"name": run.name, "folder": str(run.record.path.parent)} for run in self.server.runs.look()]
        return json.dumps({"runs": runs, "first": self.server.runs.first_shown()}).encode("ascii")

    def _run(self, number: int, known: str) -> None:
        runs = self.server.runs.look()
        if number >= len(runs):
            self.send_error(HTTPStatus.NOT_FOUND, "there is no such run")
            return
        self._send(runs[number].answer(known), JSON)

    def _image(self, number: int, key: str) -> None:
        runs = self.server.runs.look()
        path = runs[number].image(key) if number < len(runs) else None
        try:
            content, facts = (None, None) if path is None else (path.read_bytes(), path.stat())
        except OSError:
            content, facts = None, None
        if path is None or content is None or facts is None:
            self.send_error(HTTPStatus.NOT_FOUND, "the image is not there any more")
            return
        self._send(content, IMAGE_TYPES[path.suffix.lower()], f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"')

    def _send(self, content: bytes, kind: str, tag: str = "") -> None:
        is_known = bool(tag) and self.headers.get("If-None-Match") == tag
        self.send_response(HTTPStatus.NOT_MODIFIED if is_known else HTTPStatus.OK)
        if tag:
            self.send_header("ETag", tag)
        if not is_known:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD" and not is_known:
            self.wfile.write(content)

    def send_response(self, code: int, message: str | None = None) -> None:
        """Ask for the token where it is missing: the browser then opens a dialog."""
        super().send_response(code, message)
        if code == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="Dreamfolder", charset="UTF-8"')

    def end_headers(self) -> None:
        """Add the headers that every answer has."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print no line per request."""


def open_server(runs: Runs, host: str, port: int, token: str = "") -> PageServer:
    """A server that listens; `port` 0: any that is free. Without a `token` it makes one where other machines reach it.
    Raises UserError."""
    if not token and not is_loopback(host):
        token = secrets.token_urlsafe(TOKEN_BYTES)
    try:
        return PageServer(runs, host, port, token)
    except OSError as error:
        raise UserError([_mistake(error, host, port)]) from error
    except UnicodeError as error:  # an empty or overlong part of a name
        raise UserError([Mistake(f"--host {host} is no address", "use an address of this machine")]) from error


def _mistake(error: OSError, host: str, port: int) -> Mistake:
    remedy = "--port 0 takes one that is free"
    if error.errno == errno.EADDRINUSE or (os.name == "nt" and error.errno == errno.EACCES):
        return Mistake(f"--port {port}: another program uses this port, perhaps another page of this kind", remedy)
    if error.errno == errno.EACCES:
        return Mistake(f"--port {port}: this port is reserved for the system", remedy)
    return Mistake(f"--host {host}: {error.strerror or error}", "use an address of this machine, such as 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address, or the name localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
