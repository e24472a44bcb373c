"""Send events to a webhook: a thread with a bounded queue, so that no receiver can make a step wait.

A receiver that does not answer gets everything later, in order, as far as the queue holds it. Where it is full, the
oldest values of steps are dropped first, then the oldest lines of the log and evaluations; starts, ends and errors
never. What an answer refuses is not sent again.
"""

from __future__ import annotations

import itertools
import math
import ssl
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException

from library.training.events.events import Event
from library.training.events.webhook_config import Webhook
from library.training.events.webhook_posts import Post, posts_of, severity_of, signature

QUEUE = 1000  # events
AT_ONCE = 20  # events that are taken from the queue together
TIMEOUT = 10.0  # seconds without a sign of life, after which an attempt has failed
BACKOFF = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds between attempts; the last one from then on
ATTEMPTS = 6  # of a request that is answered with "later"
LATER = (408, 425, 429)  # answers after which another attempt is worth it, like all from 500 on
GATHERING = 2.0  # seconds after a message for people, in which others gather for the next one
PATIENCE = 15.0  # seconds for what is left at the end of a run
DROPPED_FIRST = (("training.status",), ("notification", "evaluation", "validation.image", "training.checkpoint"))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer that refuses: the key in the headers is for this receiver only."""

    def redirect_request(self, *_: object) -> None:
        """No other request."""


@dataclass(frozen=True)
class Answer:
    """What came of an attempt. `status` None: no answer. `wait`: seconds that the receiver asks to wait."""

    status: int | None
    told: str
    wait: float = 0.0

    @property
    def is_accepted(self) -> bool:
        """The receiver has it."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_for_later(self) -> bool:
        """Another attempt may succeed."""
        return self.status is None or self.status in LATER or self.status >= 500


@dataclass
class WebhookSink:
    """A sink that sends events to one webhook. `start`: data of the run's first event. `say` writes a log line; only
    the thread of the run calls it. `limit` of the queue, `timeout`, `backoff`, `patience` and `gathering`: see
    above."""

    webhook: Webhook
    start: Mapping[str, object]
    say: Callable[[str], None]
    limit: int = QUEUE
    timeout: float = TIMEOUT
    backoff: Sequence[float] = BACKOFF
    patience: float = PATIENCE
    gathering: float = GATHERING
    lost: Counter[str] = field(default_factory=Counter, init=False)
    _waiting: list[Event] = field(default_factory=list, init=False)
    _in_flight: tuple[str, ...] = field(default=(), init=False)
    _to_say: list[str] = field(default_factory=list, init=False)
    _said: set[str] = field(default_factory=set, init=False)
    _problem: str = field(default="", init=False)
    _ends_at: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        context = ssl.create_default_context()
        if not self.webhook.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._opener = urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=context))
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        """Take an event: see events.Sink."""
        if not self.webhook.wants(severity_of(event, self.webhook.form)):
            return
        with self._changed:
            self._waiting.append(event)
            if len(self._waiting) > self.limit:
                self._drop_one()
            self._changed.notify()
        self._say_what_is_new()

    def end(self) -> None:
        """Send what is left within `patience` seconds, starts, ends and errors first if it may be too much."""
        with self._changed:
            if self._problem or len(self._waiting) > AT_ONCE:
                self._waiting.sort(key=lambda event: any(event.type in types for types in DROPPED_FIRST))
            self._ends_at = time.monotonic() + self.patience
            self._changed.notify()

    def close(self) -> None:
        """Wait until what is left is sent, for the rest of `patience`, and say what was not sent."""
        if self._ends_at is None:
            self.end()
        self._thread.join(max(0.0, self._seconds_left()) + 1)
        self._say_what_is_new()
        with self._changed:
            lost = self.lost + Counter(event.type for event in self._waiting) + Counter(self._in_flight)
        if lost:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(lost.items()))
            reason = f"; the last problem: {self._problem}" if self._problem else ""
            self.say(f"{self.webhook}: not delivered: {kinds}{reason}")

    def _say_what_is_new(self) -> None:
        with self._changed:
            lines, self._to_say = self._to_say, []
        for line in lines:
            self.say(f"{self.webhook}: {line}")

    def _drop_one(self) -> None:
        """Drop the oldest event of the kinds that matter least; nothing if there is none."""
        for types in DROPPED_FIRST:
            for place, event in enumerate(self._waiting):
                if event.type in types:
                    self.lost[event.type] += 1
                    del self._waiting[place]
                    return

    def _work(self) -> None:
        while events := self._take():
            for post in posts_of(events, self.webhook, self.start):
                delivered = self._deliver(post)
                with self._changed:
                    self.lost.update(() if delivered else post.types)
                    self._in_flight = ()
            if self.webhook.form == "discord" and self._ends_at is None:
                self._pause(self.gathering)

    def _take(self) -> list[Event]:
        """The next events, when there are some; none at the end."""
        with self._changed:
            while not self._waiting and self._ends_at is None:
                self._changed.wait()
            if self._seconds_left() <= 0:
                return []
            count = 1 if self.webhook.form == "raw" else AT_ONCE
            events, self._waiting = self._waiting[:count], self._waiting[count:]
            self._in_flight = tuple(event.type for event in events)
            return events

    def _deliver(self, post: Post) -> bool:
        """Send a request until it is accepted, or there is no use. Returns whether it was accepted."""
        identifier = f"msg_{uuid.uuid4().hex}"
        for attempt in itertools.count():
            answer = self._attempt(post, identifier)
            self._note(answer)
            if answer.is_accepted:
                return True
            if not answer.is_for_later or (answer.status is not None and attempt + 1 >= ATTEMPTS):
                return False
            if not self._pause(max(self.backoff[min(attempt, len(self.backoff) - 1)], answer.wait)):
                return False
        raise AssertionError("attempts are counted for ever")

    def _attempt(self, post: Post, identifier: str) -> Answer:
        webhook, timestamp = self.webhook, int(time.time())
        headers = {"Content-Type": post.content_type, "User-Agent": "Dreamfolder"}
        if webhook.auth_token:
            headers["X-API-Key"] = webhook.auth_token
        if webhook.key:
            headers |= {"webhook-id": identifier, "webhook-timestamp": str(timestamp)}
            headers["webhook-signature"] = signature(webhook.key, identifier, timestamp, post.body)
        request = urllib.request.Request(webhook.url, post.body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=max(0.1, min(self.timeout, self._seconds_left()))) as response:
                return Answer(response.status, f"HTTP {response.status}")
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, f"HTTP {error.code} {error.reason}", seconds_to_wait(error.headers))
        except OSError as error:
            return Answer(None, str(getattr(error, "reason", error)) or type(error).__name__)
        except (HTTPException, ValueError) as error:  # their texts may hold the address, which may be a password
            return Answer(None, f"no HTTP ({type(error).__name__})")

    def _note(self, answer: Answer) -> None:
        """Remember what is to be said: a problem and its end, each once."""
        if answer.is_accepted:
            line = "it answers again" if self._problem else ""
        elif answer.is_for_later:
            line = f"events wait and are sent later: {answer.told}"
        else:
            line = f"what it refuses is not sent again: {answer.told}"
        kind = line.partition(":")[0]
        with self._changed:
            self._problem = "" if answer.is_accepted else answer.told
            if line and kind not in self._said:
                self._said.add(kind)
                self._to_say.append(line)

    def _pause(self, seconds: float) -> bool:
        """Wait, until the run ends at the latest if it goes on now. Returns whether there is time for an attempt."""
        with self._changed:
            is_ending = self._ends_at is not None
            ends = time.monotonic() + min(seconds, self._seconds_left())
            while time.monotonic() < ends and is_ending == (self._ends_at is not None):
                self._changed.wait(ends - time.monotonic())
            return self._seconds_left() > 0

    def _seconds_left(self) -> float:
        return math.inf if self._ends_at is None else self._ends_at - time.monotonic()


def seconds_to_wait(headers: Message) -> float:
    """The Retry-After of an answer in seconds, at most a minute; 0 without one, or for a date."""
    try:
        return min(60.0, max(0.0, float(headers.get("Retry-After", 0))))
    except ValueError:
        return 0.0
