"""The page over HTTP: what it answers, and to whom."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.options.mistakes import UserError
from library.watch import server as module
from library.watch.runs import find_runs
from library.watch.server import PAGE, STATIC, PageServer, open_server
from tests.watch.records import begin, drawn, line, status, write, write_image

TOKEN = "the-token-of-this-house"
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    folder = tmp_path_factory.mktemp("runs") / "output 'ü' 狗"
    write_image(folder / "sample" / f"{'dog' if os.name == 'nt' else 'a<b>&'}.png")
    path = next((folder / "sample").iterdir())
    write(folder, begin(name=SCRIPT), status(1, loss=0.5), drawn(f"output/sample/{path.name}", 1, SCRIPT),
          drawn("output/sample/gone.png", 1, "", "sample/01"), line("notification", 1, message=SCRIPT))  # fmt: skip
    with open_server(find_runs([folder]), "127.0.0.1", 0) as opened:
        thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


def ask(server: PageServer, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_the_page_and_its_files(server: PageServer) -> None:
    for path, (name, kind) in STATIC.items():
        answer, content = ask(server, path)
        assert answer.status == 200 and content == (PAGE / name).read_bytes()
        assert answer.headers["Content-Type"] == kind


def test_a_run_as_the_page_reads_it(server: PageServer) -> None:
    answer, content = ask(server, "/runs.json")
    assert answer.headers["Content-Type"] == "application/json"
    listed = json.loads(content)
    assert listed["first"] == [0] and listed["runs"][0]["name"] == "dog"
    _, content = ask(server, "/runs/0.json")
    run = json.loads(content)
    assert run["prompts"][0]["text"] == SCRIPT and run["messages"][0][2] == SCRIPT
    _, content = ask(server, f"/runs/0.json?version={run['version']}")
    assert set(json.loads(content)) == {"version", "now"}


def test_images(server: PageServer) -> None:
    run = json.loads(ask(server, "/runs/0.json")[1])
    there, gone = (f"/runs/0/images/{prompt['images'][0][1]}" for prompt in run["prompts"])
    answer, content = ask(server, there)
    assert answer.status == 200 and answer.headers["Content-Type"] == "image/png" and content.startswith(b"\x89PNG")
    again, content = ask(server, there, If_None_Match=answer.headers["ETag"])
    assert again.status == 304 and content == b""
    assert ask(server, gone)[0].status == 404


def test_every_answer_has_the_headers_that_keep_scripts_out(server: PageServer) -> None:
    for path in (
        "/",
        "/runs.json",
        "/runs/0.json",
        "/page.js",
        "/nothing",
        "/runs/7.json",
        "/runs/0/images/" + "0" * 20,
    ):
        headers = ask(server, path)[0].headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/../tools/watch.py", "/%2e%2e/server.py", "/page/../server.py", "//etc/passwd", "/etc/passwd", "/page.html",
        "/runs/0/images/..%2f..%2fsecret.png", "/runs/0/images/" + "g" * 20, "/runs/-1.json", "/runs/1.json", "/runs/",
        "/runs/99999999999999999999.json", "/runs/0.json/", "/dog-run.jsonl", "/sample/dog.png", "//[", "http:",
    ],
)  # fmt: skip
def test_nothing_else_is_there(server: PageServer, path: str) -> None:
    answer, content = ask(server, path)
    assert answer.status == 404 and b"<" not in content
    assert answer.headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_changed(server: PageServer, method: str) -> None:
    assert ask(server, "/", method)[0].status == 501


def test_head_has_the_headers_alone(server: PageServer) -> None:
    answer, content = ask(server, "/page.js", "HEAD")
    assert content == b"" and int(answer.headers["Content-Length"]) == (PAGE / "page.js").stat().st_size


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "LOCALHOST:80", "127.0.0.1:6016", "[::1]:6016", "127.1.2.3"]
)
def test_this_machine_may_be_called_so(server: PageServer, host: str) -> None:
    """The port may be that of a tunnel."""
    assert ask(server, "/runs.json", Host=host)[0].status == 200


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:6016", "localhost.evil.example", "192.168.1.5", "127.0.0.1@evil", "a b", "["],
)
def test_a_name_that_leads_here_is_refused(server: PageServer, host: str) -> None:
    """DNS rebinding: a foreign page makes its own name lead to this machine, to read what is here."""
    for path in ("/", "/runs.json", "/runs/0.json"):
        answer, content = ask(server, path, Host=host)
        assert answer.status in (400, 403) and b"dog" not in content


def test_who_listens_to_the_network_is_called_by_any_address(tmp_path: Path) -> None:
    write(tmp_path, begin())
    with open_server(find_runs([tmp_path]), "0.0.0.0", 0) as opened:
        assert not opened.is_local and opened.url.startswith("http://127.0.0.1:")
        called = ("192.168.1.5:6016", "[fe80::1]", "localhost", socket.gethostname())
        assert all(map(opened.is_called, called)) and not opened.is_called("evil.example")


@pytest.fixture(scope="module")
def guarded(server: PageServer) -> Iterator[PageServer]:
    with open_server(server.runs, "127.0.0.1", 0, TOKEN) as opened:
        thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_who_has_the_token_is_answered(guarded: PageServer) -> None:
    run = json.loads(ask(guarded, "/runs/0.json", Authorization=basic(f"me:{TOKEN}"))[1])
    image = run["prompts"][0]["images"][0][1]
    for path in (*STATIC, "/runs.json", "/runs/0.json", f"/runs/0/images/{image}"):
        assert ask(guarded, path, Authorization=basic(f":{TOKEN}"))[0].status == 200, path
        answer, content = ask(guarded, path)
        assert answer.status == 401 and b"dog" not in content
        assert answer.headers["WWW-Authenticate"].startswith("Basic ") and "default-src 'none'" in str(answer.headers)
        assert ask(guarded, path, "HEAD")[0].status == 401


@pytest.mark.parametrize(
    "header",
    ["", TOKEN, f"Bearer {TOKEN}", basic(TOKEN), basic(f":{TOKEN[:-1]}"), basic(f":{TOKEN} "), basic(":"), "Basic",
     "Basic ä", "Basic " + "=" * 50_000, basic(f"{TOKEN}:"), basic(":ü")],
)  # fmt: skip
def test_who_has_another_is_not(guarded: PageServer, header: str) -> None:
    assert not guarded.is_known(header)


def test_a_token_in_the_address_is_none(guarded: PageServer) -> None:
    """Addresses are logged by browsers and proxies."""
    for path in (f"/?token={TOKEN}", f"/runs.json?token={TOKEN}"):
        assert ask(guarded, path)[0].status == 401


def test_whoever_can_be_reached_asks_for_a_token(server: PageServer) -> None:
    tokens = set()
    for _ in range(2):
        with open_server(server.runs, "0.0.0.0", 0) as opened:
            tokens.add(opened.token)
            assert len(opened.token) >= 32 and opened.token not in opened.url
    assert len(tokens) == 2 and server.token == ""


def test_a_request_without_a_host_is_refused(server: PageServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(b"GET /runs.json HTTP/1.0\r\n\r\n")
        assert b" 403 " in connection.makefile("rb").readline()


def test_several_at_once_get_the_same(server: PageServer) -> None:
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(server, "/runs/0.json")[1].partition(b'"stage"')[2]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1 and len(answers) == 8


def test_a_browser_that_goes_away_is_no_error(server: PageServer, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
            connection.sendall(b"GET /uPlot.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert ask(server, "/")[0].status == 200
    assert "Traceback" not in capsys.readouterr().err


def test_a_port_in_use_is_a_mistake_with_the_remedy(server: PageServer) -> None:
    with pytest.raises(UserError, match=f"--port {server.server_port}: another program") as raised:
        open_server(server.runs, "127.0.0.1", server.server_port)
    assert "--port 0" in raised.value.mistakes[0].remedy


@pytest.mark.parametrize("host", ["192.0.2.1", "no such address", "ü" * 70, "", "127.0.0.1.5"])
def test_an_address_of_another_machine_is_a_mistake(
    server: PageServer, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    if host != "192.0.2.1":  # TEST-NET-1: nobody's
        monkeypatch.setattr(module.socketserver.TCPServer, "server_bind", bind)
    with pytest.raises(UserError, match="--host") as raised:
        open_server(server.runs, host, 0)
    assert "127.0.0.1" in raised.value.mistakes[0].remedy
