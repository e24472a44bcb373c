"""Webhooks against a real server that hangs, fails, lies and comes back: nothing ever waits for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler

import pytest

from library.training.events.events import Event, Events, EventType
from library.training.events.webhook_config import Webhook
from library.training.events.webhook_posts import signature
from library.training.events.webhooks import QUEUE, WebhookSink
from tests.training.events import receiver as behaviours
from tests.training.events.receiver import Receiver, free_port, receiving, status

NOON = datetime(2026, 5, 17, 12, 0, tzinfo=UTC)
START = {"stage": "started", "run": "abc", "name": "dog"}
SOON = (0.01,)


def event(type: EventType, step: int = 1, **data: object) -> Event:
    return Event(type, NOON, step, data)


def loss(step: int) -> Event:
    return event("training.status", step, values={"loss": 0.5})


END = event("lifecycle.stage", 9, stage="finished")


def sink(receiver: Receiver, said: list[str], webhook: Webhook | None = None, **limits: object) -> WebhookSink:
    chosen = {"backoff": SOON, "patience": 30.0, **limits}
    return WebhookSink(webhook or Webhook("raw", receiver.url), START, said.append, **chosen)  # type: ignore[arg-type]


def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen in 30 s")


def test_events_arrive_in_order() -> None:
    said: list[str] = []
    with receiving() as receiver:
        hook = sink(receiver, said)
        for each in (event("lifecycle.stage", 0, **START), loss(1), loss(2), END):
            hook.write(each)
        hook.close()
    first, *_, last = receiver.events()
    assert [each["step"] for each in receiver.events()] == [0, 1, 2, 9] and not said
    assert (first["type"], first["job_id"], first["timestamp"]) == (
        "lifecycle.stage",
        "abc",
        "2026-05-17T12:00:00.000Z",
    )
    assert last["data"] == {"stage": "finished"} and last["message"] == "dog, step 9: finished"


def test_nothing_waits_for_a_receiver_that_hangs() -> None:
    """All events are taken while the server holds the first request, and the queue stays bounded. Errors, the start and
    the end are not among the dropped ones; what is dropped is counted."""
    said: list[str] = []
    with receiving(behaviours.hang) as receiver:
        hook = sink(receiver, said, limit=20)
        hook.write(event("lifecycle.stage", 0, **START))
        assert receiver.held.acquire(timeout=30)
        for step in range(1, 101):
            hook.write(loss(step))
            hook.write(event("notification", step, message="x"))
        hook.write(event("error", 100, message="full"))
        assert len(receiver.arrived) == 1, "the server still holds the first one"
        assert len(hook._waiting) == 20 and sum(hook.lost.values()) == 181
        receiver.behave = None
        receiver.released.set()
        hook.close()
    arrived = [each["type"] for each in receiver.events()]
    assert sorted(arrived) == sorted(["lifecycle.stage", "error", *["notification"] * 19])
    assert receiver.events()[-1]["step"] == 100
    assert said[-1].endswith("not delivered: 81 notification, 100 training.status")


@pytest.mark.parametrize(
    "behave",
    [behaviours.close_midway, behaviours.talk_nonsense, status(500), status(429, Retry_After="0"), status(408)],
)
def test_a_receiver_that_fails_and_comes_back_gets_everything(behave: behaviours.Behaviour) -> None:
    said: list[str] = []
    with receiving() as receiver:
        attempts = []

        def fail_twice(receiver: Receiver, handler: object) -> None:
            attempts.append(1)
            if len(attempts) == 2:
                receiver.behave = None
            behave(receiver, handler)  # type: ignore[arg-type]

        receiver.behave = fail_twice
        hook = sink(receiver, said, Webhook("raw", receiver.url, key=b"k"))
        hook.write(loss(1))
        hook.write(END)
        hook.close()
    assert [each["step"] for each in receiver.events()] == [1, 9] and len(receiver.arrived) == 4
    assert len({headers["webhook-id"] for headers, _ in receiver.arrived}) == 2, "attempts of one event have one id"
    assert ["wait and are sent later" in said[0], "answers again" in said[1], len(said)] == [True, True, 2]


def test_a_receiver_that_starts_later_gets_everything() -> None:
    said: list[str] = []
    port = free_port()
    webhook = Webhook("raw", f"http://127.0.0.1:{port}/")
    hook = WebhookSink(webhook, START, said.append, backoff=SOON)
    hook.write(loss(1))
    until(lambda: hook._problem)
    with receiving(port=port) as receiver:
        hook.write(END)
        hook.close()
        assert [each["step"] for each in receiver.events()] == [1, 9]
    assert "refused" in said[0] and f"raw webhook at 127.0.0.1:{port}" in said[0]


def test_the_end_waits_a_bounded_time_for_a_dead_receiver() -> None:
    """And says what was not delivered. The end goes first."""
    said: list[str] = []
    hook = WebhookSink(Webhook("raw", f"http://127.0.0.1:{free_port()}/"), START, said.append, patience=0.2)
    hook.write(loss(1))
    until(lambda: hook._problem)
    for each in (loss(2), END):
        hook.write(each)
    hook.close()
    assert [each.type for each in hook._waiting][:1] in (["lifecycle.stage"], ["training.status"])
    assert "not delivered: 1 lifecycle.stage, 2 training.status; the last problem: " in said[-1]


@pytest.mark.parametrize("code", [400, 401, 404, 413, 302])
def test_what_is_refused_is_not_sent_again(code: int) -> None:
    said: list[str] = []
    with receiving(status(code, Location="http://127.0.0.1:1/elsewhere")) as receiver:
        hook = sink(receiver, said, Webhook("raw", receiver.url, auth_token="the-token"))
        for step in (1, 2, 3):
            hook.write(loss(step))
        hook.close()
        assert len(receiver.arrived) == 3
    assert f"HTTP {code}" in said[0] and "not sent again" in said[0]
    assert "not delivered: 3 training.status" in said[-1] and len(said) == 2
    assert not [line for line in said if "pass-word" in line or "the-token" in line]


def test_an_event_that_always_fails_does_not_hold_the_others() -> None:
    with receiving() as receiver:

        def fail_at_one(receiver: Receiver, handler: behaviours.BaseHTTPRequestHandler) -> None:
            poisoned = json.loads(receiver.arrived[-1][1])["step"] == 1
            receiver.answer(handler, 500 if poisoned else 200)

        receiver.behave = fail_at_one
        hook = sink(receiver, [])
        hook.write(loss(1))
        hook.write(loss(2))
        until(lambda: len(receiver.arrived) == 7)
        hook.close()
    assert hook.lost == {"training.status": 1}


def test_requests_are_signed_and_carry_the_token() -> None:
    with receiving() as receiver:
        hook = sink(receiver, [], Webhook("raw", receiver.url, auth_token="the-token", key=b"key"))
        hook.write(END)
        hook.close()
    headers, body = receiver.accepted[0]
    assert headers["x-api-key"] == "the-token" and headers["content-type"] == "application/json"
    sent_at = int(headers["webhook-timestamp"])
    assert abs(sent_at - time.time()) < 600
    assert headers["webhook-signature"] == signature(b"key", headers["webhook-id"], sent_at, body)


def test_a_level_leaves_out_what_is_below_it() -> None:
    with receiving() as receiver:
        hook = sink(receiver, [], Webhook("raw", receiver.url, level="critical"))
        for each in (loss(1), event("error", 2, message="full"), END):
            hook.write(each)
        hook.close()
    assert [each["type"] for each in receiver.events()] == ["error"]


def test_the_queue_is_bounded_by_default() -> None:
    hook = WebhookSink(Webhook("raw", f"http://127.0.0.1:{free_port()}/"), START, lambda line: None, patience=0)
    for step in range(3 * QUEUE):
        hook.write(loss(step))
    assert len(hook._waiting) <= QUEUE
    hook.close()


def test_messages_for_people_gather_and_the_end_does_not_wait() -> None:
    """The first goes at once; what follows within the pause is one message, at the latest when the run ends."""
    with receiving() as receiver:
        hook = sink(receiver, [], Webhook("discord", receiver.url), gathering=60.0)
        hook.write(event("notification", message="first"))
        until(lambda: receiver.accepted)
        for number in range(5):
            hook.write(event("notification", message=f"line {number}"))
        hook.close()
    contents = [each["content"] for each in receiver.events()]
    assert len(contents) == 2 and contents[1].count("line") == 5


def test_the_end_waits_for_all_sinks_together() -> None:
    """All are told that the run ends before one is waited for: here the first is answered once the other was told."""
    said: list[str] = []

    def answer_late(receiver: Receiver, handler: BaseHTTPRequestHandler) -> None:
        receiver.released.wait(60)
        receiver.answer(handler, 204)

    with receiving(answer_late) as receiver:

        class Other:
            def write(self, event: Event) -> None:
                pass

            def end(self) -> None:
                receiver.released.set()

            def close(self) -> None:
                pass

        events = Events(sinks=[sink(receiver, said, patience=5.0), Other()])
        events.emit("notification", {"message": "x"})
        events.close()
    assert not said
