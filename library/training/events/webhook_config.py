"""Read --webhook_config: where events are sent, in which form. SimpleTuner's files are read as they are."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from library.bounded import json_of
from library.messages import listed
from library.options.mistakes import Mistake, Mistakes
from library.options.text_files import read_text

LEVELS = ("debug", "info", "warning", "error", "critical")
"""From the lowest: an event is sent if its severity is at least the level of the webhook."""

ADDRESS = {"discord": "webhook_url", "raw": "callback_url"}
KEYS = {
    "webhook_type": str, "webhook_url": str, "callback_url": str, "log_level": str, "message_prefix": str,
    "ssl_no_verify": bool, "auth_token": str, "secret": str,
}  # fmt: skip


@dataclass(frozen=True)
class Webhook:
    """One receiver. `url`, `auth_token` and `key` (of signatures) are secrets: they are never shown.

    `level`: the lowest severity that is sent. `prefix` stands before each message. `verify`: whether certificates are
    checked.
    """

    form: Literal["discord", "raw"]
    url: str = field(repr=False)
    level: str = "info"
    prefix: str = ""
    verify: bool = True
    auth_token: str = field(default="", repr=False)
    key: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        """Form and host, without what the rest of the address says: that of Discord is a password."""
        parts = urlsplit(self.url)
        return f"{self.form} webhook at {parts.netloc.rpartition('@')[2]}"

    def wants(self, severity: str) -> bool:
        """Whether events of this severity are sent."""
        return LEVELS.index(severity) >= LEVELS.index(self.level)


def decide_webhooks(path: Path | None, mistakes: Mistakes) -> tuple[Webhook, ...]:
    """The webhooks of a file: JSON, an object or a list of objects. Adds mistakes, which show no secret."""
    if path is None:
        return ()
    named = f"--webhook_config {path}"
    text = read_text(path, named)
    if isinstance(text, Mistake):
        mistakes.extend([text])
        return ()
    try:
        tree = json_of(text)
    except ValueError as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        mistakes.add(
            f"{named} is not valid JSON ({where})", 'write {"webhook_type": "raw", "callback_url": "https://…"}'
        )
        return ()
    entries = tree if isinstance(tree, list) else [tree]
    if not entries:
        mistakes.add(f"{named} holds no webhook", "remove the flag, or write an entry")
    webhooks = []
    for number, entry in enumerate(entries, 1):
        place = named if len(entries) == 1 else f"{named}, entry {number}"
        found = list(_mistakes_of(place, entry))
        mistakes.extend(found)
        if not found:
            webhooks.append(_webhook(entry))
    return tuple(webhooks)


def _webhook(entry: Mapping[str, object]) -> Webhook:
    form = entry["webhook_type"]
    assert form == "discord" or form == "raw"
    return Webhook(
        form=form,
        url=str(entry[ADDRESS[form]]).strip(),
        level=str(entry.get("log_level") or "info").lower(),
        prefix=str(entry.get("message_prefix") or ""),
        verify=not entry.get("ssl_no_verify"),
        auth_token=str(entry.get("auth_token") or ""),
        key=signing_key(str(entry.get("secret") or "")),
    )


def _mistakes_of(named: str, entry: object) -> Iterator[Mistake]:
    if not isinstance(entry, dict):
        yield Mistake(f"{named} is no JSON object", "write one object, or a list of objects, with a webhook_type each")
        return
    if unknown := sorted(entry.keys() - KEYS.keys()):
        yield Mistake(f"{named}: unknown key {listed(unknown)}", f"the keys are {', '.join(KEYS)}")
    wrong = [key for key, kind in KEYS.items() if entry.get(key) is not None and not isinstance(entry[key], kind)]
    for key in wrong:
        kind = "true or false" if KEYS[key] is bool else "a text"
        yield Mistake(f"{named}: {key} is not {kind}", f"write {kind}")
    if wrong:
        return
    form = entry.get("webhook_type")
    if form not in ADDRESS:
        yield Mistake(f"{named}: webhook_type is {json.dumps(form)}", 'write "discord" or "raw"')
        return
    yield from _address_mistakes(named, ADDRESS[form], entry.get(ADDRESS[form]))
    level = entry.get("log_level")
    if level and level.lower() not in LEVELS:
        yield Mistake(f"{named}: log_level is {json.dumps(level)}", f"write one of {', '.join(LEVELS)}")
    token = entry.get("auth_token") or ""
    if not (token.isascii() and token.isprintable()):
        yield Mistake(f"{named}: auth_token has characters that no HTTP header can have", "use letters and digits")
    try:
        signing_key(entry.get("secret") or "")
    except ValueError:
        yield Mistake(f"{named}: secret begins with whsec_ and is not base64", "copy it again, or use another text")


def _address_mistakes(named: str, key: str, url: str | None) -> Iterator[Mistake]:
    if not url:
        yield Mistake(f"{named}: {key} is missing", "write the address of the receiver")
        return
    try:
        parts = urlsplit(url.strip())
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or not url.strip().isascii() or not url.strip().isprintable() or " " in url.strip():
        yield Mistake(f"{named}: {key} is not the address of a web server", "write https://host/path")
    elif "@" in parts.netloc:
        yield Mistake(f"{named}: {key} holds a user name", "use auth_token, which is sent as X-API-Key")


def signing_key(secret: str) -> bytes:
    """The key of signatures, as in Standard Webhooks: base64 after `whsec_`; any other text is the key itself. Raises
    ValueError."""
    if secret.startswith("whsec_"):
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    return secret.encode("utf-8")
