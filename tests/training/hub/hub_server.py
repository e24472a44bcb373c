"""A stand-in for the Hugging Face Hub: the routes that huggingface_hub uses to make a repository, to commit files
(small ones in the commit, large ones by Git LFS) and to download a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_" + "Secret9" * 5
SMALL = 1000  # bytes up to which a file stands in the commit itself
SHA = "a" * 40


@dataclass
class Hub:
    """What the server holds: `files` by path, and for a repository that exists whether it is private. `refuse(method,
    path)` returns a status to answer with in place of serving a request, or None; it may also wait."""

    url: str = ""
    repository: str = "me/dog"
    is_private: bool | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, authorization
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    released: threading.Event = field(default_factory=threading.Event)

    def serve(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and content of an answer: JSON, or bytes."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            assert f"{asked['organization']}/{asked['name']}" == self.repository
            self.is_private = asked.get("private", asked.get("visibility") == "private")  # before 2.0, and since
            return 200, {"url": f"{self.url}/{self.repository}", "id": self.repository}
        if self.is_private is None:
            return 404, {"error": "Repository not found"}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(each) for each in json.loads(body)["objects"]]}
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid, "what arrives is not what was announced"
            self.objects[oid] = body
            return 200, {}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(each) for each in json.loads(body)["files"]]}
        if "/commit/" in path:
            return 200, self._commit(body)
        if "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": len(of), "oid": SHA} for name, of in self.files.items()]
            return 200, tree
        if (found := re.search(r"/resolve/[^/]+/(.+)", path)) is not None:
            return (200, self.files[found[1]]) if found[1] in self.files else (404, {"error": "Entry not found"})
        siblings = [{"rfilename": name} for name in self.files]
        return 200, {"id": self.repository, "private": self.is_private, "sha": SHA, "siblings": siblings}

    def _place(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.url}/lfs/{asked['oid']}", "header": {}}
        return {**asked, "authenticated": True, "actions": {"upload": upload}}

    def _mode(self, asked: dict[str, Any]) -> dict[str, Any]:
        mode = "regular" if asked["size"] <= SMALL else "lfs"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}

    def _commit(self, body: bytes) -> dict[str, Any]:
        names = []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            else:
                continue
            names.append(value["path"])
        self.commits.append(names)
        return {"commitUrl": f"{self.url}/{self.repository}/commit/{SHA}", "commitOid": SHA, "hookOutput": ""}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run the server in this context, and let huggingface_hub use it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Authorization", "")))
            status = hub.refuse(self.command, path)
            code, content = hub.serve(self.command, path, body) if status is None else (status, {"error": "refused"})
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(sent)))
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", SHA)
            self.send_header("ETag", f'"{hashlib.sha256(sent).hexdigest()}"')
            if code == 404 and hub.is_private is None:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub talk to the server, without its pauses, by plain HTTP."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
