"""The requests of webhooks, in both forms."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from email import message_from_bytes
from pathlib import Path

import pytest

from library.training.events.events import Event, EventType
from library.training.events.webhook_config import Webhook, signing_key
from library.training.events.webhook_posts import Post, message_of, posts_of, severity_of, signature

NOON = datetime(2026, 5, 17, 12, 0, tzinfo=UTC)
START = {"run": "abc", "name": "dog"}
RAW, DISCORD = Webhook("raw", "http://a/", prefix="GPU 1:"), Webhook("discord", "http://a/", prefix="GPU 1:")


def event(type: EventType, **data: object) -> Event:
    return Event(type, NOON, 3, data)


def image(path: Path, prompt: str = "a dog") -> Event:
    return event("validation.image", path=str(path), prompt=prompt)


def test_signatures_are_those_of_standard_webhooks() -> None:
    """The test vector of its libraries."""
    key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_raw_posts_are_the_event_with_its_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (post,) = posts_of([image(tmp_path / "a.png")], RAW, START)
    assert json.loads(post.body) == {
        "type": "validation.image", "timestamp": "2026-05-17T12:00:00.000Z", "step": 3, "severity": "info",
        "job_id": "abc", "name": "dog", "message": "GPU 1: dog, step 3: a dog",
        "data": {"path": str(tmp_path / "a.png"), "prompt": "a dog"},
        "images": ["data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()],
    }  # fmt: skip


def test_an_image_that_is_gone_or_too_large_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.training.events.webhook_posts.LARGEST", 3)
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    for name in ("a.png", "gone.png"):
        (post,) = posts_of([image(tmp_path / name)], RAW, START)
        assert "images" not in json.loads(post.body)


def taken_apart(post: Post) -> list[tuple[str, bytes]]:
    """Content-Disposition and content of the parts of a form, by the standard library."""
    message = message_from_bytes(f"Content-Type: {post.content_type}\r\n\r\n".encode() + post.body)
    return [(str(part["Content-Disposition"]), part.get_payload(decode=True)) for part in message.get_payload()]  # type: ignore[union-attr,misc]


def test_discord_takes_ten_files_in_a_message(tmp_path: Path) -> None:
    paths = [tmp_path / f"ä {number}.png" for number in range(12)]
    for path in paths:
        path.write_bytes(path.name.encode() + b"\r\n--\x00")
    first, second = posts_of([image(path) for path in paths], DISCORD, START)
    parts = taken_apart(first)
    assert len(parts) == 11 and len(taken_apart(second)) == 3
    content = json.loads(parts[0][1])
    assert content["content"].count("GPU 1: dog, step 3: a dog") == 10
    assert content["allowed_mentions"] == {"parse": []} and content["attachments"][9] == {
        "id": 9,
        "filename": "_9.png",
    } | {"filename": "__9.png"}
    assert [part[1] for part in parts[1:]] == [path.read_bytes() for path in paths[:10]]
    assert parts[1][0] == 'form-data; name="files[0]"; filename="__0.png"'


@pytest.mark.parametrize("letter", ["x", "ä", "犬", "🐶", "*", "\n"])
def test_discord_messages_have_2000_characters_at_most(letter: str) -> None:
    texts = [letter * 4500, "short", letter * 1990]
    posts = posts_of([event("notification", message=text) for text in texts], DISCORD, START)
    contents = [json.loads(post.body)["content"] for post in posts]
    assert all(len(content.encode("utf-16-le")) <= 4000 for content in contents)
    together = "".join(contents).replace("\\", "").replace("\n", "")
    assert together.count(letter.strip()) >= (6490 if letter.strip() else 1) and "short" in together


def test_lines_share_a_message() -> None:
    posts = posts_of([event("notification", message=f"line {number}") for number in range(20)], DISCORD, START)
    assert len(posts) == 1 and len(json.loads(posts[0].body)["content"].splitlines()) == 20


def test_text_is_never_markup_in_discord() -> None:
    (post,) = posts_of([event("notification", message="**a** <@1> [b](http://c) _d_ @everyone")], DISCORD, START)
    content = json.loads(post.body)
    assert "\\*\\*a\\*\\* \\<@1\\> \\[b\\]\\(http://c\\) \\_d\\_ @everyone" in content["content"]
    assert content["allowed_mentions"] == {"parse": []}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (event("lifecycle.stage", stage="started", total_steps=9, epochs=2), "started: 9 steps, 2 epochs"),
        (event("lifecycle.stage", stage="interrupted", message="saved"), "interrupted: saved"),
        (event("training.checkpoint", path="a.safetensors", bytes=2_100_000_000), "saved a.safetensors (2.1 GB)"),
        (event("training.status", values={"loss": 0.12345}, remaining_seconds=120.0), "loss 0.1235, 2 min left"),
        (event("evaluation", values={f"v{n}": 1.0 for n in range(9)}), "v7 1 and 1 more"),
        (event("error", message="- full"), "- full"),
    ],
)
def test_every_event_has_words(told: Event, message: str) -> None:
    said = message_of(told, START)
    assert said.startswith("dog, step 3: ") and said.endswith(message)


def test_values_of_steps_are_no_messages_for_people_unless_asked_for() -> None:
    assert not DISCORD.wants(severity_of(event("training.status"), "discord"))
    assert RAW.wants(severity_of(event("training.status"), "raw"))
