"""tools/watch.py from its command line. The server is tested in tests/watch."""

from __future__ import annotations

import socketserver
import webbrowser
from pathlib import Path

import pytest

from tests.watch.records import begin, write
from tools import watch


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes at once."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(socketserver.BaseServer, "serve_forever", interrupted)


@pytest.mark.usefixtures("served")
def test_the_address_is_printed_and_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", begin())
    write(tmp_path / "b", begin(), name="dog_slow")
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert watch.main([str(tmp_path / "a"), str(tmp_path / "b"), "--port", "0", "--open"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"Watching dog, dog_slow: {opened[0]} (") and "closed" in told.out
    assert opened[0].startswith("http://127.0.0.1:") and told.err == ""


@pytest.mark.usefixtures("served")
def test_the_whole_network_is_warned_of_and_needs_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, begin())
    words = [str(tmp_path), "--host", "0.0.0.0", "--port", "0"]
    assert watch.main(words) == 0
    told = capsys.readouterr()
    assert "Warning: everybody who can reach this machine" in told.err
    token, address = told.out.splitlines()[:2]
    assert token.startswith("Token, ") and len(token.split()[-1]) >= 32 and token.split()[-1] not in address
    (tmp_path / "token").write_text("the token of this house\n", encoding="utf-8")
    assert watch.main([*words, "--token_file", str(tmp_path / "token")]) == 0
    told = capsys.readouterr()
    assert "the token of this house" not in told.out + told.err and "Token," not in told.out


@pytest.mark.usefixtures("served")
def test_long_records_are_read_before_the_page_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "LONG", 10)
    write(tmp_path, begin())
    assert watch.main([str(tmp_path), "--port", "0"]) == 0
    assert capsys.readouterr().out.startswith(f"Reading {tmp_path / 'dog-run.jsonl'}")


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch.main([]) == 2 and "watch.py output" in capsys.readouterr().err
    assert watch.main([str(tmp_path), str(tmp_path / "gone"), "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert "holds no record" in told and "no such folder" in told
    assert watch.main([str(tmp_path), "--port", "70000"]) == 2 and "--port" in capsys.readouterr().err
    write(tmp_path, begin())
    (tmp_path / "token").write_text("short\n", encoding="utf-8")
    for file, why in (("token", "has 5 characters, fewer than 16"), ("gone", "there is no such file")):
        assert watch.main([str(tmp_path), "--token_file", str(tmp_path / file)]) == 2
        assert why in capsys.readouterr().err
