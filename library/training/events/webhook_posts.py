"""Events as requests of a webhook: JSON with all their data, or messages for Discord.

Discord's limits: https://docs.discord.com/developers/resources/webhook. Signatures are those of Standard Webhooks:
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from library.messages import readable_bytes, readable_time
from library.training.events.events import Event
from library.training.events.record import content_of, plain
from library.training.events.webhook_config import LEVELS, Webhook

LONGEST = 2000  # characters of a message
MOST_FILES = 10  # of a message
LARGEST = 10_000_000  # bytes of an image that is sent: Discord takes 10 MiB
SHOWN = 8  # values of an evaluation in a message
SEVERITY = {"error": "critical", "training.status": "debug"}
"""Severity of a type; the others are info. What SimpleTuner sends at "critical" ends a run, too."""


@dataclass(frozen=True)
class Post:
    """The body of a request, its content type, and the types of the events in it."""

    body: bytes
    content_type: str
    types: tuple[str, ...]


def severity_of(event: Event, form: str) -> str:
    """The severity of an event. The values of a step are info as data, and debug where people read them."""
    if event.type == "lifecycle.stage" and event.data.get("stage") == "interrupted":
        return "warning"
    if event.data.get("severity") in LEVELS:
        return str(event.data["severity"])
    if event.type == "training.status" and form == "raw":
        return "info"
    return SEVERITY.get(event.type, "info")


def posts_of(events: Sequence[Event], webhook: Webhook, start: Mapping[str, object]) -> list[Post]:
    """The requests for some events, in order. `start`: data of the run's first event."""
    if webhook.form == "raw":
        return [_json_post(event, webhook, start) for event in events]
    return list(_discord_posts(events, webhook, start))


def _json_post(event: Event, webhook: Webhook, start: Mapping[str, object]) -> Post:
    images = [f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}" for _, image in images_of(event)]
    content = content_of(event)
    content["timestamp"] = content.pop("time")
    content |= {
        "severity": severity_of(event, webhook.form),
        "job_id": start.get("run"),
        "name": start.get("name"),
        "message": f"{webhook.prefix} {message_of(event, start)}".lstrip(),
    }
    content |= {"images": images} if images else {}
    return Post(
        json.dumps(plain(content), ensure_ascii=False).encode("utf-8", "replace"), "application/json", (event.type,)
    )


def _discord_posts(events: Sequence[Event], webhook: Webhook, start: Mapping[str, object]) -> Iterator[Post]:
    """As few messages as their limits allow: several events share one."""
    text, files, types = "", list[tuple[str, bytes]](), list[str]()
    for event in events:
        images = images_of(event)
        for part in _parts(f"{webhook.prefix} {escaped(message_of(event, start))}".lstrip()):
            if text and (_length(f"{text}\n{part}") > LONGEST or len(files) + len(images) > MOST_FILES):
                yield _discord_post(text, files, types)
                text, files, types = "", [], []
            text = f"{text}\n{part}" if text else part
        files += images
        types.append(event.type)
    if text:
        yield _discord_post(text, files, types)


def _discord_post(text: str, files: Sequence[tuple[str, bytes]], types: Sequence[str]) -> Post:
    """A message; nobody is notified by what is in it. https://docs.discord.com/developers/reference#uploading-files"""
    attachments = [{"id": number, "filename": name} for number, (name, _) in enumerate(files)]
    content = {"content": text, "allowed_mentions": {"parse": []}, "attachments": attachments}
    message = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    if not files:
        return Post(message, "application/json", tuple(types))
    boundary = uuid.uuid4().hex
    parts = [b'name="payload_json"\r\nContent-Type: application/json\r\n\r\n' + message]
    for number, (name, image) in enumerate(files):
        head = f'name="files[{number}]"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
        parts.append(head.encode("ascii") + image)
    lines = [f"--{boundary}\r\nContent-Disposition: form-data; ".encode("ascii") + part + b"\r\n" for part in parts]
    body = b"".join(lines) + f"--{boundary}--\r\n".encode("ascii")
    return Post(body, f"multipart/form-data; boundary={boundary}", tuple(types))


def images_of(event: Event) -> list[tuple[str, bytes]]:
    """Name (ASCII) and PNG of the image that an event tells of, read from its file now; none if it has gone since, or
    is too large."""
    if event.type != "validation.image" or not isinstance(event.data.get("path"), str):
        return []
    path = Path(str(event.data["path"]))
    try:
        if path.stat().st_size > LARGEST:
            return []
        return [(re.sub(r"[^A-Za-z0-9._-]", "_", path.name), path.read_bytes())]
    except OSError:
        return []


def message_of(event: Event, start: Mapping[str, object]) -> str:
    """An event in words, for people."""
    data, where = event.data, f"{start.get('name')}, step {event.step}"
    if event.type == "lifecycle.stage":
        length = f": {data['total_steps']} steps, {data['epochs']} epochs" if "total_steps" in data else ""
        told = f": {data['message']}" if data.get("message") else ""
        return f"{where}: {data.get('stage')}{length}{told}"
    if event.type == "training.checkpoint":
        return f"{where}: saved {data['path']} ({readable_bytes(cast(int, data['bytes']))})"
    if event.type == "validation.image":
        label = f" ({data['step_label']})" if "step_label" in data else ""
        return f"{where}: {data.get('prompt')}{label}"
    if event.type in ("training.status", "evaluation"):
        values = cast(Mapping[str, float], data["values"])
        told = ", ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:SHOWN])
        more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
        left = data.get("remaining_seconds")
        return f"{where}: {told}{more}" + (f", {readable_time(cast(float, left))} left" if left else "")
    return f"{where}: {data.get('message')}"


def escaped(text: str) -> str:
    """A text that Discord shows as it is: markup is escaped."""
    return re.sub(r"([\\*_~`|<>#\[\]()])", r"\\\1", text)


def _parts(text: str) -> Iterator[str]:
    """A text in parts of at most LONGEST, broken at lines where they are short enough."""
    while _length(text) > LONGEST:
        end = LONGEST // 2 if not text[:LONGEST].isascii() else LONGEST
        line = text.rfind("\n", end // 2, end)
        end = line if line > 0 else end
        yield text[:end]
        text = text[end:].removeprefix("\n")
    if text.strip():
        yield text


def _length(text: str) -> int:
    """UTF-16 code units: the strictest way in which a limit of characters can be counted."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def signature(key: bytes, identifier: str, timestamp: int, body: bytes) -> str:
    """HMAC-SHA256 over `identifier.timestamp.body`, in base64 after `v1,`."""
    signed = f"{identifier}.{timestamp}.".encode("ascii") + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode("ascii")
