"""Files of --webhook_config: SimpleTuner's are read, every mistake is named, and no secret is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.options.mistakes import Mistakes
from library.training.events.webhook_config import Webhook, decide_webhooks

SECRET = "pass-word"
URL = f"https://example.com/api/{SECRET}"


def read(tmp_path: Path, tree: object) -> tuple[tuple[Webhook, ...], list[str]]:
    (tmp_path / "hooks.json").write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    mistakes = Mistakes()
    webhooks = decide_webhooks(tmp_path / "hooks.json", mistakes)
    return webhooks, [str(mistake) for mistake in mistakes]


def test_simpletuners_files(tmp_path: Path) -> None:
    """The examples of its documentation, alone and in a list."""
    discord = {"webhook_type": "discord", "webhook_url": URL, "message_prefix": "a", "log_level": "critical"}
    raw = {"webhook_type": "raw", "callback_url": URL, "auth_token": SECRET, "ssl_no_verify": True, "secret": "s"}
    assert read(tmp_path, discord) == ((Webhook("discord", URL, "critical", "a"),), [])
    both, mistakes = read(tmp_path, [discord, raw])
    assert both[1] == Webhook("raw", URL, verify=False, auth_token=SECRET, key=b"s") and not mistakes
    assert decide_webhooks(None, Mistakes()) == ()


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    (webhook,), _ = read(tmp_path, {"webhook_type": "raw", "callback_url": URL, "auth_token": SECRET, "secret": SECRET})
    assert SECRET not in repr(webhook) + str(webhook) and str(webhook) == "raw webhook at example.com"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"webhook_type": "slack"}, 'webhook_type is "slack"'),
        ({"webhook_type": None}, "webhook_type is null"),
        ({"callback_url": ""}, "callback_url is missing"),
        ({"callback_url": f"ftp://{SECRET}"}, "callback_url is not the address"),
        ({"callback_url": f"http://a:b:c/{SECRET}"}, "callback_url is not the address"),
        ({"callback_url": f"http:///{SECRET}"}, "callback_url is not the address"),
        ({"callback_url": f"http://a/{SECRET}\nb"}, "callback_url is not the address"),
        ({"callback_url": f"http://[{SECRET}"}, "callback_url is not the address"),
        ({"callback_url": f"http://me:{SECRET}@host/"}, "holds a user name"),
        ({"log_level": "loud"}, 'log_level is "loud"'),
        ({"log_level": 3}, "log_level is not a text"),
        ({"ssl_no_verify": "yes"}, "ssl_no_verify is not true or false"),
        ({"auth_token": f"{SECRET}\r\nX: y"}, "auth_token has characters"),
        ({"secret": f"whsec_{SECRET}"}, "secret begins with whsec_"),
        ({"urls": SECRET}, "unknown key urls"),
    ],
)
def test_mistakes(change: dict[str, object], words: str, tmp_path: Path) -> None:
    good = {"webhook_type": "raw", "callback_url": URL}
    webhooks, mistakes = read(tmp_path, [good, good | change])
    assert len(webhooks) == 1 and len(mistakes) == 1
    assert words in mistakes[0] and "entry 2" in mistakes[0] and SECRET not in mistakes[0]


@pytest.mark.parametrize("tree", ["", "{", f'{{"a": "{SECRET}" "b"}}', "[" * 9999, "3", "null", [], [3], '"a"'])
def test_what_is_no_webhook(tree: object, tmp_path: Path) -> None:
    webhooks, mistakes = read(tmp_path, tree)
    assert not webhooks and len(mistakes) == 1 and "--webhook_config" in mistakes[0] and SECRET not in mistakes[0]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    mistakes = Mistakes()
    assert not decide_webhooks(tmp_path / "no.json", mistakes) and len(mistakes) == 1
