# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.9"]
# ///
"""ironflow.py: events become durable work, in one file. MIT, the ironflow.py authors.

    python ironflow.py
    curl -X POST http://localhost:9123/api/v1/events \\
         -H "Content-Type: application/json" \\
         -d '{"name": "order.placed", "data": {"orderId": "ord_123"}}'

An *event* comes in by HTTP and is on disk before the caller hears yes. Each *function*
whose *trigger* matches gets a *run*: steps that are done once, whose results are kept,
so that a crash resumes and does not repeat. A *worker* pulls runs by long polling, or
the server *pushes* them to an HTTP endpoint. Whoever *subscribes* to a pattern is told,
at once and in order, of every event and every change.

The life of one event, and who carries it:

    1. `post_events` reads it from the socket and asks the journal to accept it
    2. `Journal.write` puts the wish in a queue; the writer thread takes many at once
    3. `accept_event` records it, and a run for each function it triggers; `hear` wakes
       the runs that wait for it
    4. `lease_to_offers` hands those runs to workers that wait, in the same transaction
    5. `JournalFile.commit` puts all of that on disk, once for everybody in the batch
    6. the caller hears yes, and `poll_jobs` answers the worker with its job
    7. the worker does a step and reports; `record_steps` keeps the result for good
    8. it reports an end, or what the run waits for; `settle` decides what becomes of it
    9. whoever dies on the way: `turn_clock` sees the lease end and the run is due again
   10. each of these left a row in `journal`, the one order of all that happened;
       `Stream.tell` tells those who watch, as soon as it is on disk

What holds, always: whatever was acknowledged survives kill -9 and power loss; a step
recorded as completed never runs again; what happens, happens in one transaction.

What is not here yet: pausing and patching of runs. It is refused with a sentence, never
ignored.

The file reads from top to bottom: words and laws (2 to 5), the way in (6), the engine
(7), the disk (8), the ways out (9 to 11), the server (12), its command line (13).
"""

# ======================================================================================
# 1. Preface: imports and limits
# ======================================================================================

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import heapq
import hmac
import http.client
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from errno import EADDRINUSE
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache, partial
from itertools import count, groupby, islice, product
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar
from urllib.parse import SplitResult, quote, unquote, urlencode, urljoin, urlsplit
from weakref import WeakValueDictionary

try:
    import aiohttp
    from aiohttp import HttpVersion11, WSMessage, WSMsgType, web
    from aiohttp.abc import AbstractResolver
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.http import HttpProcessingError
    from yarl import URL
except ModuleNotFoundError as missing:
    if missing.name != "aiohttp" or __name__ != "__main__":
        raise
    print("ironflow.py needs aiohttp, which this Python does not have: run `pip install"
          " aiohttp`, or start it with `uv run ironflow.py`.", file=sys.stderr)
    raise SystemExit(2) from None

try:  # the extra `speed`; the verdict on any input is the same with and without it
    import orjson
except ModuleNotFoundError:
    orjson = None

__version__ = "0.1.0"
PROTOCOL_VERSION = "0.53.0"  # the public SDKs' release whose wire protocol this speaks
OLDEST_SQLITE = (3, 37, 0)  # STRICT tables

log = logging.getLogger("ironflow")
T = TypeVar("T")
Future: TypeAlias = "asyncio.Future[Any]"
KIB, MIB = 1024, 1024 * 1024

@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller may ask for, and how long a worker may be silent.

    Sizes are bytes of JSON text, times are seconds. Whoever exceeds one is told its
    name, the size found and the flag that changes it.
    """

    event_bytes: int = MIB  # --max-event-bytes: name, data and metadata of one event
    step_bytes: int = 4 * MIB  # --max-step-bytes: one step's output, one run's output
    body_bytes: int = 64 * MIB  # --max-body-bytes: one request
    steps: int = 10_000  # --max-steps: steps of one run
    lost_leases: int = 10  # --max-lost-leases: in a row without a new step, then pause
    lease_s: float = 90.0  # --lease-seconds: how long a silent worker keeps a run

    @property
    def reservation_s(self) -> float:
        """How long a job that was handed out waits for its ack."""
        return min(15.0, self.lease_s)

EVENTS_PER_REQUEST = 1_000
STEPS_PER_REPORT = 500  # no SDK sends more
UPDATES_PER_REQUEST = 500
YIELDS = ("sleep", "wait_for_event", "invoke_function", "invoke_function_async")
MAX_NESTING = 200
MAX_KEY_BYTES = 255  # of an idempotency key, as in the SDKs
MAX_ERROR_TEXT = 64 * KIB  # of an error message that a run keeps
MAX_INT32 = 2**31 - 1
POLL_HOLD_S = 10  # for workers that do not say `wait`: JS and Go
MAX_POLL_HOLD_S = 25  # Python's transport gives up at 30
WORKER_LIVE_S = 90.0  # silent for longer: disconnected
LAST_SLOT_S = 1.0  # see `PullDesk.spare_a_slot`
GONE_AFTER_S = 1.0  # an ack comes within milliseconds; see `PullDesk.look_after`

# ======================================================================================
# 2. Words
# ======================================================================================
# The nouns of this file, as rows: frozen, changed only by `replace`. A column of the
# journal file has the name of the attribute, so that `Run(*row)` is the whole mapping.
# JSON that only passes through (an event's data, a step's output) stays text from the
# socket to the disk and back: it is parsed once, when it comes in, to be judged.
# The types say how a value looks on the wire: see `members`. Names of lengths of time
# end in `_s` or `_ms`.

RunStatus = Literal["waiting_for_capacity", "running", "waiting", "paused",
                    "completed", "failed", "cancelled"]
StepStatus = Literal["completed", "failed", "sleeping", "waiting", "timed_out"]
Json = str  # JSON text
Instant = float  # Unix seconds, with three decimals

@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event as a caller hands it in; or data for a topic, or a function's input."""
    name: str  # the event's, the topic's, or the id of the function that is invoked
    data: Json = "{}"
    version: int = 1
    metadata: Json | None = None
    idempotency_key: str | None = None
    source: str = "api"  # or invoke, cron
    subject: str | None = None  # the run inside which it was emitted
    kind: str = "event"  # or topic

@dataclass(frozen=True, slots=True)
class Event(NewEvent):
    """An event on disk; `seq` is its place in the journal's one order."""
    event_id: str = ""
    seq: int = 0
    at: Instant = 0.0

@dataclass(frozen=True, slots=True)
class Accepted:
    """What the caller of `accept_event` hears: the event's id, the runs it started."""
    event_id: str
    run_ids: list[str]

@dataclass(frozen=True, slots=True)
class Retry:
    """When a failed attempt is tried again (defaults: the SDKs' own)."""
    max_attempts: int = 3
    initial_delay_ms: int = 1_000
    backoff_factor: float = 2.0
    max_delay_ms: int = 300_000
    on_exhausted: str = "fail"  # or "pause"

    def delay_s(self, attempt: int, retry_after_ms: int | None) -> float:
        """Seconds between the end of `attempt` (from 1) and the start of the next."""
        delay_ms: float = self.max_delay_ms
        with contextlib.suppress(OverflowError):  # 10.0 ** 400: far beyond any cap
            delay_ms = self.initial_delay_ms * self.backoff_factor ** (attempt - 1)
        wanted_ms = delay_ms if retry_after_ms is None else retry_after_ms
        return min(wanted_ms, self.max_delay_ms) / 1000

    def to_text(self) -> Json:
        return dumps(columns_of(self))

    @staticmethod
    @lru_cache(maxsize=512)
    def from_text(text: Json) -> Retry:
        return Retry(**json.loads(text))

@dataclass(frozen=True, slots=True)
class NewFunction:
    """A registration as it came in, checked: `config` holds the wire's members."""
    function_id: str
    config: Json
    retry: Json
    triggers: list[Trigger]

@dataclass(frozen=True, slots=True)
class Trigger:
    """What starts a function: an event's name or pattern, perhaps a CEL test of it,
    perhaps a cron expression whose ticks emit it."""
    event: str
    expression: str = ""
    cron: str = ""

@dataclass(frozen=True, slots=True)
class Function:
    """A registered function. Its triggers have a table of their own as well."""
    function_id: str
    config: Json
    retry: Json
    status: str
    version: int
    created_at: Instant
    updated_at: Instant

    @property
    def asks(self) -> dict[str, Any]:
        """Its registration: what it asks of its runs, as the wire has it."""
        return registration(self.config)

    @property
    def endpoint(self) -> str:
        """Where its runs are pushed to while no worker carries it; empty: nowhere."""
        pushed = "PUSH" in self.asks.get("preferredMode", "")
        return str(self.asks.get("endpointUrl", "")) if pushed else ""

@lru_cache(maxsize=512)
def registration(config: Json) -> dict[str, Any]:
    return dict(json.loads(config))

@dataclass(frozen=True, slots=True)
class Run:
    """One function working on one event, as it stands now.

    Everything down to `created_at` is immutable. `fence` grows with every lease and is
    the wire's `execution_seq`; a lease that ended leaves fence, token and worker in
    place, so that its holder may take it back until somebody else was handed the run.
    """

    run_id: str
    function_id: str
    function_version: int
    event_seq: int
    event_id: str
    event_name: str
    retry: Json
    parent_run_id: str | None  # of an invoked run
    parent_step_id: str | None
    actor_id: str | None
    created_at: Instant
    status: RunStatus
    attempt: int  # from 1; grows when a try fails, not on a replay
    fence: int
    lease_token: str | None
    lease_until: Instant | None
    worker_id: str | None
    acked: int  # 1 once the holder of the lease was heard of
    due_at: Instant | None  # when queued: since; when waiting: until
    held: int | None  # 1 while in line for a place, see `admit`; None: needs none
    lost_leases: int  # that ended in a row without a newly recorded step
    settled_fence: int | None  # the last lease that reported an end ...
    settled_as: str | None  # ... and how: completed, failed, yielded
    woken_fence: int | None  # the lease during or before which a wait last ended ...
    woken_seq: int | None  # ... and where in the journal that was
    output: Json | None
    error: Json | None
    started_at: Instant | None
    ended_at: Instant | None
    updated_at: Instant

    @property
    def policy(self) -> Retry:
        return Retry.from_text(self.retry)

    @property
    def job_id(self) -> str:
        """A name for this dispatch, new with each lease, that leads back to the run."""
        return f"job_{self.run_id.removeprefix('run_')}_{self.fence}"

def run_and_fence(job_id: str) -> tuple[str, int | None]:
    """The run and fence that a job id names; a bare run id names any fence."""
    head, _, fence = job_id.rpartition("_")
    if head.startswith("job_") and re.fullmatch(r"[0-9]{1,15}", fence):
        return f"run_{head.removeprefix('job_')}", int(fence)
    return job_id, None

@dataclass(frozen=True, slots=True)
class ReportedStep:
    """A step as a worker reports it: run to its end, one way or the other."""
    step_id: str  # the SDK's: opaque, compared and returned verbatim
    name: str
    type: str  # invoke, compensate, sleep, wait_for_event, invoke_function
    status: StepStatus
    output: Json | None
    error: Json | None
    duration_ms: int | None
    compensation_for: str | None
    started_at: Instant | None
    ended_at: Instant | None

@dataclass(frozen=True, slots=True)
class Step(ReportedStep):
    """One recorded piece of a run. `sequence` counts from 0 within the run."""
    run_id: str
    sequence: int
    attempt: int
    created_at: Instant
    updated_at: Instant
    sleep_until: Instant | None = None
    wait_event_name: str | None = None
    wait_timeout: Instant | None = None  # of a wait, and of an invoke
    child_run_id: str | None = None
    input: Json | None = None  # what a wait has to show to people

    @property
    def deadline(self) -> float:
        """When it ends by itself, while it is pending."""
        return self.sleep_until or self.wait_timeout or 0.0

@dataclass(frozen=True, slots=True)
class Yield:
    """Why a worker let go of a run before its end."""
    kind: str  # sleep, wait_for_event, invoke_function, invoke_function_async
    step_id: str
    name: str
    until: float = 0.0  # of a sleep
    timeout_s: float = 0.0  # of a wait or an invoke
    target: str = ""  # the event's name or pattern; the function's id
    match: str = ""  # "": any event
    match_value: Json | None = None
    input: Json | None = None  # of a function; a wait's payload
    seen: int = 0  # up to this `seq` there was no answer to the wait

@dataclass(frozen=True, slots=True)
class Timer:
    """Something that a function has to come at an instant.

    A `tick`: `key` is the cron expression, `event` what it emits. A `debounce`: `key`
    is the value, `seq` the event that starts a run when there was silence.
    """

    kind: Literal["tick", "debounce"]
    function_id: str
    key: str
    event: str
    due_at: Instant
    seq: int | None = None
    first_at: Instant | None = None  # of a debounce

@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where runs are pushed to, while requests to it fail: its circuit breaker.

    Closed while `open_s` is 0; open until an instant; then half open: one run goes to
    see. What was sent before `since`, a place in the journal, says no more of it.
    """

    url: str
    failures: int = 0  # in a row
    open_s: float = 0.0
    open_until: Instant | None = None
    since: int = 0

    @property
    def state(self) -> str:
        half = "half_open" if self.open_s else "closed"
        return half if self.open_until is None else "open"

@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says of a leased run; `status` as on the wire."""
    status: Literal["ack", "progress", "completed", "failed", "yielded"]
    fence: int
    lease_token: str | None  # None: the server's own word on an unreadable report
    steps: list[ReportedStep] = field(default_factory=list)
    step_offset: int | None = None
    output: Json = "null"
    error: dict[str, Any] = field(default_factory=dict)
    yields: list[Yield] = field(default_factory=list)

@dataclass(frozen=True, slots=True)
class Worker:
    """A process that pulls runs, as it registered itself."""
    worker_id: str
    hostname: str
    function_ids: Json  # a list of strings
    max_concurrent_jobs: int
    labels: Json
    version: Json  # {"sdk", "runtime"}
    connected: int
    registered_at: Instant

@dataclass(frozen=True, slots=True)
class Job:
    """A leased run with all that a worker needs to carry it on."""
    run: Run
    event: Event
    steps: list[Step]  # those that a replay finds done
    next_sequence: int
    function: Function | None = None  # as it is registered now
    seq: int = 0  # the journal's last, when this was leased
    secrets: dict[str, str] = field(default_factory=dict, repr=False)

@dataclass(frozen=True, slots=True)
class Message:
    """A row of the journal as a subscriber sees it."""
    seq: int
    at: Instant
    topic: str
    event_id: str
    data: Json

@dataclass(frozen=True, slots=True)
class Interest:
    """What a subscriber wants to be told of."""
    patterns: tuple[str, ...]  # one of them has to match: see `spread`
    filter: str = ""  # CEL; empty: all of it

@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of the journal, read for an interest."""
    messages: list[Message]  # oldest first
    seq: int  # up to there it was looked at
    ended: bool  # there was no more

@dataclass(frozen=True, slots=True)
class ConsumerGroup:
    """Subscribers that share the messages of one pattern: each message goes to one."""
    name: str
    pattern: str
    filter: str = ""
    group_id: str = ""
    ack_mode: str = "auto"  # or manual
    backpressure: str = "buffer"
    max_inflight: int = 100  # dealt out and not acked
    max_redeliveries: int = 3  # then a message is a dead letter
    redeliver_delay_ms: int = 5_000  # after a nak that does not say
    metadata: Json = "{}"
    position: int = -1  # the last that was dealt out; -1 before it exists: from now on
    created_at: Instant = 0.0
    updated_at: Instant = 0.0

@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that a group was given and is not done with."""
    name: str  # the group's
    seq: int
    state: str = "out"  # later: nak'd; due; dead
    member: str = ""  # who has it, or had it
    misses: int = 0  # deliveries that came to nothing
    due_at: Instant = 0.0  # out: until then it has to be acked; dead: since

@dataclass(frozen=True, slots=True)
class Topic:
    """What programs published under one name."""
    name: str
    message_count: int
    first_seq: int
    last_seq: int
    first_message_at: Instant
    last_message_at: Instant

@dataclass(frozen=True, slots=True)
class Look:
    """A page as somebody asks for it: beyond a cursor, or else from the newest on."""
    limit: int
    cursor: int | str | None = None
    newer: bool = False  # the page on the newer side of the cursor
    offset: int = 0

@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Rows, newest first."""
    rows: list[T]
    total: int  # how many match in all, of the newest SCAN_ROWS
    capped: bool  # there are older ones, which were not looked at
    cursor: Any  # to go on from; None at the end

@lru_cache(maxsize=64)
def column_names(row: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(row))

def columns_of(row: Any) -> dict[str, Any]:
    """A row as a dict. `asdict` would copy every value, at ten times the price."""
    return {name: getattr(row, name) for name in column_names(row.__class__)}

class Clock:
    """The machine's clocks, in seconds, read here alone. Tests have their own."""

    def wall(self) -> float:
        """Unix time. Steps when somebody sets the machine's clock."""
        return round(time.time(), 3)

    def steady(self) -> float:
        """Never steps; its zero means nothing."""
        return time.monotonic()

class Ids:
    """Short, URL-safe, time-ordered names: 48 bits of milliseconds, then 52 at random.

    Ordered, so that new rows go to the right end of each index however large the file
    is, and so that "newest first" is the order of the names. Within one millisecond,
    or when the clock steps back, the next is a little more than the one before.
    `randbits` takes the place of both sources of chance, for a life that repeats.
    """

    ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # for reading aloud, typing by hand
    PAIRS = ["".join(pair) for pair in product(ALPHABET, repeat=2)]  # ten bits each

    def __init__(self, randbits: Callable[[int], int] | None = None) -> None:
        self._randbits = randbits or random.Random(secrets.randbits(256)).getrandbits
        self._secret_bits, self._last = randbits or secrets.randbits, 0

    def new(self, prefix: str, now: float) -> str:
        """`prefix`, an underscore and 20 characters."""
        number = (round(now * 1000) & (1 << 48) - 1) << 52 | self._randbits(52)
        if number <= self._last:
            number = self._last + 1 + self._randbits(20)
        self._last = number
        return f"{prefix}_{self._spell(number)}"

    @classmethod
    def first(cls, prefix: str, instant: float) -> str:
        """The least id that can be made at an instant: times are ranges of ids."""
        return f"{prefix}_{cls._spell((round(instant * 1000) & (1 << 48) - 1) << 52)}"

    def token(self) -> str:
        """A secret that a lease's holder proves itself with."""
        return f"lt_{self._spell(self._secret_bits(100))}"

    @classmethod
    def _spell(cls, number: int) -> str:
        return "".join([cls.PAIRS[number >> at & 1023] for at in range(90, -1, -10)])

def to_rfc3339(instant: float) -> str:
    """2026-01-01T00:00:00.123Z; what is beyond the year 9999 as its end."""
    moment = datetime.fromtimestamp(min(instant, 253_402_300_799.0), UTC)
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"

def from_rfc3339(text: str) -> float:
    """Unix seconds of a timestamp with an offset. Raises ValueError, OverflowError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a timestamp needs an offset, such as Z")
    return round(moment.astimezone(UTC).timestamp(), 3)

UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

def duration_s(text: str) -> float:
    """Seconds of a duration such as 500ms, 1h30m or 1.5d. Raises ValueError."""
    if not re.fullmatch(r"([0-9]+(\.[0-9]+)?(ms|[smhdw]))+", text):
        raise ValueError(f"{text[:40]!r} is no duration such as 500ms, 1h30m or 30d")
    parts = re.findall(r"([0-9.]+)(ms|[smhdw])", text)
    return sum(float(number) * UNITS_S[unit] for number, unit in parts)

# --- JSON in and out ------------------------------------------------------------------
# Refused: NaN, numbers that overflow a double, integers beyond 64 bits, lone
# surrogates, NUL in a key, nesting over 200. orjson would turn a large integer into a
# float and json would let an infinity pass, so neither is asked: whatever could hold
# such a thing shows in the bytes, and only then the slow and strict reading is done.

SUSPECT = re.compile(
    rb"[0-9]{19}"  # an integer near 64 bits, or a longer one
    rb"|(?:^|[\[:,\s])-?[0-9.]+[eE]\+?[0-9]{3}"  # 1e308 or more; not in a UUID
    rb"|\\u(?:[dD][89a-fA-F]|0000)")  # half a pair, NUL
HALF_A_PAIR = re.compile("[\ud800-\udfff]")
TOO_DEEP = f"body is nested deeper than {MAX_NESTING} levels"

def parse_json(body: bytes) -> Any:
    """The value that `body` holds. Raises InvalidInput that says what is wrong."""
    opened = body.count(b"[") + body.count(b"{") if len(body) > 2 * MAX_NESTING else 0
    harmless = opened <= MAX_NESTING and not SUSPECT.search(body)
    try:
        if harmless and orjson:
            with contextlib.suppress(ValueError):  # for the sentence, ask json again
                return orjson.loads(body)
        value = (_from_text if harmless else _strictly).decode(body.decode())
    except ValueError as error:  # no UTF-8, or no JSON
        raise InvalidInput(f"body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidInput(TOO_DEEP) from None
    if not harmless:
        check_value(value)
    return value

def check_integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise InvalidInput(
            f"integer {digits[:24]} needs more than 64 bits: send a string")
    return int(digits)

def check_float(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise InvalidInput(
            f"{digits[:24]} is no finite double: send null or a string instead")
    return number

def check_value(value: Any, depth: int = 0) -> None:
    """Refuse what a JSON text can spell but nobody else could read back."""
    if isinstance(value, str):
        if HALF_A_PAIR.search(value):
            raise InvalidInput("a string holds half of a surrogate pair: send whole"
                               " characters")
    elif isinstance(value, dict | list):
        if depth == MAX_NESTING:
            raise InvalidInput(TOO_DEEP)
        if isinstance(value, dict) and any("\0" in key for key in value):
            raise InvalidInput("a key holds a NUL character: leave it out")
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            check_value(inner, depth + 1)

_to_text = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_from_text = json.JSONDecoder(parse_constant=check_float)
_strictly = json.JSONDecoder(parse_int=check_integer, parse_float=check_float,
                             parse_constant=check_float)

def dumps(value: Any) -> Json:
    """Compact JSON text of a value that came through `parse_json`, or of our own."""
    text: Json = orjson.dumps(value).decode() if orjson else _to_text.encode(value)
    return text

def join(members: Mapping[str, Json | None]) -> Json:
    """An object from texts that are JSON already; None means that the member is absent.

    Absent, never null: the SDKs drop messages in which an unset member is null.
    """
    found = [f'"{name}":{text}' for name, text in members.items() if text is not None]
    return "{" + ",".join(found) + "}"

def listed(texts: Iterable[Json]) -> Json:
    return f"[{','.join(texts)}]"

def as_texts(values: dict[str, Any]) -> dict[str, Json | None]:
    return {name: None if value is None else dumps(value)
            for name, value in values.items()}

def stamp(instant: Instant) -> Json:
    return f'"{to_rfc3339(instant)}"'

def members(row: Any, names: str) -> dict[str, Json | None]:
    """Attributes of a row as JSON text; `id=run_id` is one under another name."""
    return {wire: None if (value := get(row)) is None else write(value)
            for wire, get, write in spelled(row.__class__, names)}

@lru_cache(maxsize=64)
def spelled(row: Any, names: str) -> list[tuple[str, Any, Callable[[Any], Json]]]:
    """Of each name: what the wire calls it, how to get it, and how it is written."""
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(row)}
    writers: dict[str, Callable[[Any], Json]] = {
        "Json": str, "int": str, "Instant": stamp}
    pairs = [name.split("=") for name in names.split()]
    return [(pair[0], attrgetter(pair[-1]), writers.get(kinds.get(pair[-1], ""), dumps))
            for pair in pairs]

def in_camel(members: dict[str, Json | None]) -> dict[str, Json | None]:
    return {camel(name): text for name, text in members.items()}

@lru_cache(maxsize=1024)
def camel(snake: str) -> str:
    return re.sub("_(.?)", lambda found: found[1].upper(), snake)

@lru_cache(maxsize=1024)
def snake(camel: str) -> str:
    return re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), camel)

# ======================================================================================
# 3. Errors
# ======================================================================================
# One sentence each: what was wrong, where, and what to do. They are raised anywhere and
# become an answer in one place, `error_response`. Whatever is not one of these is a
# mistake of ours: logged whole, answered bare.

class IronflowError(Exception):
    """An answer other than yes. `code` is the Connect code, `status` the HTTP status.

    `error`, where it is set, replaces the sentence in the REST body's member `error`:
    the workers of the SDKs read the two fence codes there (Python 0.53). `word` is the
    code on a WebSocket.
    """

    status, code, word = 500, "internal", "INTERNAL_ERROR"
    error: str | None = None
    headers: dict[str, str] = {}

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __init_subclass__(cls, **answer: Any) -> None:
        for name, value in answer.items():
            setattr(cls, name, value)

class InvalidInput(IronflowError, status=400, code="invalid_argument",
                   word="INVALID_OPTION"):
    """The request cannot be understood, or asks for what cannot be."""

class InvalidPattern(InvalidInput, word="INVALID_PATTERN"):
    """A pattern that no topic could match."""

class InvalidFilter(InvalidInput, word="INVALID_FILTER"):
    """A filter that is no CEL, or that needs the extra."""

class OutOfRange(InvalidInput, code="out_of_range", word="OUT_OF_RANGE"):
    """A place in the journal that is not there, or not any more."""

class FailedPrecondition(IronflowError, status=400, code="failed_precondition"):
    """Understood, but not possible in the state that things are in."""

class Unauthenticated(IronflowError, status=401, code="unauthenticated",
                      headers={"WWW-Authenticate": "Bearer"}):
    """No key, or not the right one. Workers stop for good when they hear this."""

class Forbidden(IronflowError, status=403, code="permission_denied"):
    """A host or an origin that this server does not answer."""

class NotFound(IronflowError, status=404, code="not_found", word="NOT_FOUND"):
    """No such run, event, function, worker or door."""

class GroupDeleted(NotFound, word="GROUP_DELETED"):
    """The consumer group that a subscription belonged to."""

class MethodNotAllowed(IronflowError, status=405, code="unimplemented"):
    """There is such a door, for other methods."""

class AlreadyExists(IronflowError, status=409, code="already_exists"):
    """An idempotency key that belongs to something else."""

class StaleFence(IronflowError, status=409, code="aborted", error="STALE_EXECUTION"):
    """A report with an old fence: the run was leased again, or ended, after that."""

class RunNotRunning(IronflowError, status=409, code="aborted", error="RUN_NOT_RUNNING"):
    """A final report for a run that ended some other way."""

class TooMany(IronflowError, status=429, code="resource_exhausted",
              word="LIMIT_EXCEEDED"):
    """More than one caller may have at a time."""

class TooLarge(IronflowError, status=413, code="resource_exhausted"):
    """A limit was exceeded; the sentence names it, the size, and the flag."""

    def __init__(self, what: str, size: int, limit: int, flag: str) -> None:
        super().__init__(f"{what} is {size} bytes, the limit is {limit}: send less, or "
                         f"start the server with a larger {flag}")

class DeadlineExceeded(IronflowError, status=504, code="deadline_exceeded"):
    """The caller's own patience is over."""

class Unimplemented(IronflowError, status=501, code="unimplemented"):
    """In the protocol, but not in this server."""

class Unavailable(IronflowError, status=503, code="unavailable",
                  headers={"Retry-After": "1"}):
    """The journal cannot be written right now; whether this was kept is unknown."""

class Overloaded(Unavailable):
    """Too much is in flight; nothing of this request was kept."""

class DiskFull(IronflowError, status=507, code="resource_exhausted",
               headers={"Retry-After": "5"}):
    """No room on the disk. Writing resumes by itself when there is."""

class StartError(Exception):
    """The server cannot start; the message is the one sentence to show."""

# ======================================================================================
# 4. Patterns
# ======================================================================================
# Names are dot-separated segments. In a pattern `*` stands for exactly one segment and
# `>`, at the end, for one or more; both only as whole segments. Everything here is a
# function of its arguments.

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
WORD = r"[^*>\s\x00-\x1f\x7f-\x9f.]+"
PLAIN = re.compile(rf"{WORD}(\.{WORD})*")
PATTERN = re.compile(r"((\*|[^*>.]*)\.)*(\*|>|[^*>.]*)")
RESERVED = ("events:", "system.", "entity:", "public.")

def check_event_name(name: str) -> str:
    """An event's name, as given: free text without wildcards or control characters."""
    if not name:
        raise InvalidInput("event name is empty: give the event a name, such as "
                           "order.placed")
    if CONTROL.search(name):
        raise InvalidInput("event name holds a control character: leave it out")
    if is_wild(name):
        raise InvalidInput(f"event name {name[:80]!r} has a segment that is a wildcard:"
                           " `*` and `>` are for triggers and subscriptions, an event"
                           " has a plain name")
    return name

def check_trigger(pattern: str) -> str:
    """A trigger's event name or pattern. Raises InvalidInput if it could not match."""
    if CONTROL.search(pattern):
        raise InvalidInput("trigger event holds a control character: leave it out")
    if not PATTERN.fullmatch(pattern):
        raise InvalidInput(f"trigger {pattern[:80]!r}: `*` and `>` stand for whole "
                           "segments, and `>` can only be the last")
    return pattern

def check_plain(what: str, name: str) -> str:
    """Dot segments, none empty; no wildcard, blank or control character."""
    if not PLAIN.fullmatch(name):
        raise InvalidInput(f"{what} {name[:80]!r}: use words with dots between them, no"
                           " `*`, `>`, blank or empty one, such as orders.shipped")
    return name

check_function_id = partial(check_plain, "function id")

def check_topic(topic: str) -> str:
    """A topic to publish on. Raises InvalidInput for one that none could watch."""
    if check_plain("topic", topic).startswith(RESERVED):
        raise InvalidInput(f"topic {topic[:80]!r}: {', '.join(RESERVED)} are the "
                           "server's own: choose another beginning")
    return topic

def is_wild(pattern: str) -> bool:
    return not {"*", ">"}.isdisjoint(pattern.split("."))

def matches(pattern: str, name: str) -> bool:
    """Whether `name` is one of those that `pattern` stands for."""
    wanted, found = pattern.split("."), name.split(".")
    if wanted[-1] == ">":  # for one segment or more
        wanted[-1:] = ["*"] * max(1, len(found) - len(wanted) + 1)
    return len(wanted) == len(found) and all(
        w in ("*", f) for w, f in zip(wanted, found, strict=True))

# --- Topics and their subscribers -----------------------------------------------------
# What is told has a topic: events:NAME, topic:NAME, system.run.ID.created. Dotted, a
# prefix is a segment of its own, so that `matches` holds for topics as well.

PREFIX = re.compile("^(?:events|topic|entity):")
LENIENT = re.compile(r"system\.[^.]+\.\*")
WATCHED = re.compile(rf"((\*|{WORD})\.)*(\*|>|{WORD})")
MAX_PATTERN = 1_024  # characters

def check_pattern(pattern: str) -> str:
    """A subscriber's pattern. Raises InvalidPattern if no topic could match it."""
    if not WATCHED.fullmatch(PREFIX.sub("", pattern)):
        raise InvalidPattern(
            f"pattern {pattern[:80]!r}: use words with dots between them; `*` stands "
            "for one whole word and `>`, at the end, for one or more, such as "
            "events:order.* or system.run.>")
    if len(pattern) > MAX_PATTERN:
        raise InvalidPattern(f"pattern has {len(pattern)} characters: send up to "
                             f"{MAX_PATTERN}")
    return pattern

def spread(pattern: str) -> list[str]:
    """The dotted patterns that a subscriber's stands for.

    Without a prefix it means events and topics, `>` alone everything. `system.run.*`
    means every change of every run, which has a segment more (JS 0.29).
    """
    if pattern == ">" or PREFIX.match(pattern):
        return [dotted(pattern)]
    if pattern.startswith("system."):
        return [f"{pattern}.*" if LENIENT.fullmatch(pattern) else pattern]
    return [f"events:.{pattern}", f"topic:.{pattern}"]

def dotted(topic: str) -> str:
    return PREFIX.sub(r"\g<0>.", topic)

def selects(pattern: str, topic: str) -> bool:
    """Whether a subscriber with this pattern is told of this topic."""
    return any(matches(each, dotted(topic)) for each in spread(pattern))

@dataclass
class Index(Generic[T]):
    """Who has a pattern that a name matches: says what `matches` says, at a price that
    depends on the name's segments alone. A tree of them: what is below each is in
    `nodes`, who has a pattern that ends there is below None."""

    nodes: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.nodes)

    def add(self, pattern: str, owner: T) -> None:
        node = self.nodes
        for segment in pattern.split("."):
            node = node.setdefault(segment, {})
        node.setdefault(None, {})[owner] = True

    def remove(self, pattern: str, owner: T) -> None:
        """Leaves nothing behind."""
        node, above = self.nodes, []
        for key in [*pattern.split("."), None]:
            above.append((node, key))
            node = node[key]
        del node[owner]
        for node, key in reversed(above):
            if not node[key]:
                del node[key]

    def find(self, name: str) -> dict[T, bool]:
        found: dict[T, bool] = {}
        nodes = [self.nodes]
        for segment in name.split("."):
            for node in nodes:
                if ">" in node:
                    found.update(node[">"][None])
            # in a name `*` and `>` are words like any other
            keys = ("*",) if segment in ("*", ">") else ("*", segment)
            nodes = [node[key] for node in nodes for key in keys if key in node]
        for node in nodes:
            found.update(node.get(None, ()))
        return found

# ======================================================================================
# 5. Rules
# ======================================================================================
# What may become of a run, and when. Everything here is pure: it takes rows and `now`
# and returns rows. No clock, no SQL, no network, so a test is a call and an assert.
# Every status change is in NEXT; if it is not there, it cannot happen.

NEXT: dict[RunStatus, frozenset[RunStatus]] = {
    "waiting_for_capacity": frozenset({"running", "paused", "cancelled"}),
    "running": frozenset({"waiting_for_capacity", "waiting", "paused",
                          "completed", "failed", "cancelled"}),
    "waiting": frozenset({"waiting_for_capacity", "paused", "failed", "cancelled"}),
    "paused": frozenset({"waiting_for_capacity", "failed", "cancelled"}),
    "failed": frozenset({"waiting_for_capacity"}),  # a person may resume it
    "cancelled": frozenset({"waiting_for_capacity"}),  # this one too
    "completed": frozenset(),
}
TERMINAL = frozenset({"completed", "failed", "cancelled"})

def leased(run: Run, worker_id: str, token: str, hold_s: float, acked: bool,
           now: float) -> Run:
    """A due run, handed out: a new fence, held for a lease, or until the ack."""
    return replace(run, status="running", fence=run.fence + 1, lease_token=token,
                   lease_until=now + hold_s, worker_id=worker_id, acked=int(acked),
                   due_at=None, started_at=run.started_at or now)

def check_fence(run: Run, said: Report) -> None:
    """Only the newest lease of a run may report, and only while the run is not over.

    A lease that ended is still the newest: its holder may report until somebody else
    was handed the run. What moves the fence or drops the token ends that right.
    """
    held = run.lease_token is not None and run.fence == said.fence
    if held and said.lease_token in (None, run.lease_token):
        return
    if run.status in TERMINAL and said.status not in ("ack", "progress"):
        raise RunNotRunning(f"run {run.run_id} is {run.status}: drop this result")
    raise StaleFence(f"the lease with fence {said.fence} of run {run.run_id} is over, "
                     f"the run is {run.status} with fence {run.fence}: drop this "
                     "result")

def renewed(run: Run, lease_s: float, now: float) -> Run:
    """A lease whose holder was heard of; one that had ended is taken back."""
    until = max(now + lease_s, run.lease_until or 0.0)
    return replace(run, status="running", lease_until=until, acked=1, due_at=None)

def lease_ended(run: Run, max_lost: int, now: float) -> Run:
    """Due again, same attempt: a crash spends none. Too often in a row: paused."""
    lost = replace(run, lost_leases=run.lost_leases + 1)
    if lost.lost_leases < max_lost:
        return queued(replace(lost, lease_until=None), now)
    return parked(lost, failure("WORKER_LOST", (
        f"{lost.lost_leases} workers in a row took this run and were not heard of "
        "again, without recording a step: look at the worker's log, then resume the "
        "run")))

def failure(code: str, message: str) -> Json:
    """An error of a run that is not its function's own."""
    return dumps({"message": message, "code": code})

def parked(run: Run, error: Json) -> Run:
    """Stopped until a person resumes it."""
    return replace(unleased(run), status="paused", due_at=None, error=error)

def unleased(run: Run) -> Run:
    """Nobody's: no report of any earlier lease will be taken."""
    return replace(run, lease_token=None, lease_until=None, acked=0)

def settled(run: Run, how: str) -> Run:
    """The holder let go; its report, should it come twice, is recognised."""
    return replace(unleased(run), settled_fence=run.fence, settled_as=how,
                   lost_leases=0)

def completed(run: Run, output: Json, now: float) -> Run:
    return replace(settled(run, "completed"), status="completed", output=output,
                   error=None, ended_at=now)

def attempt_failed(run: Run, error: dict[str, Any], now: float) -> Run:
    """The next attempt later, or the end: failed, or paused if the policy says so.

    `error` is the report's: message, and optionally code, retryable (the flag alone
    decides, whatever the SDK) and retry_after_ms.
    """
    run, policy, retryable = settled(run, "failed"), run.policy, error.get("retryable")
    advice = ("retryable", "retry_after_ms")
    kept = dumps({name: value for name, value in error.items() if name not in advice})
    if retryable and run.attempt < policy.max_attempts:
        due_at = now + policy.delay_s(run.attempt, error.get("retry_after_ms"))
        return replace(run, status="waiting", attempt=run.attempt + 1, due_at=due_at,
                       error=kept)
    if retryable and policy.on_exhausted == "pause":
        return parked(run, kept)
    return ended_in_failure(run, kept, now)

def ended_in_failure(run: Run, error: Json, now: float) -> Run:
    return replace(unleased(run), status="failed", error=error, due_at=None,
                   ended_at=now)

def waiting(run: Run, until: float) -> Run:
    """Let go, until something that it waits for ends, or an instant at the latest."""
    return replace(run, status="waiting", due_at=until)

def queued(run: Run, now: float) -> Run:
    """Due: the next worker that asks gets it, those queued before it first.

    One that needs places stands in line for them, unless it has them already.
    """
    held = run.held if run.status == "running" or run.held is None else 1
    return replace(run, status="waiting_for_capacity", due_at=now, held=held)

BREAKER = {"failureThreshold": 5, "openDurationMs": 60_000,
           "maxOpenDurationMs": 600_000}

def struck(endpoint: Endpoint, breaker: dict[str, int], sent: int, seq: int,
           now: float) -> Endpoint:
    """An endpoint that a request did not reach: too many in a row open its breaker, a
    failed probe for twice as long. What was sent before it opened changes nothing."""
    bounds, open_s = BREAKER | breaker, endpoint.open_s
    if open_s and sent <= endpoint.since:
        return endpoint
    failures = endpoint.failures + 1
    if not open_s and failures < bounds["failureThreshold"]:
        return replace(endpoint, failures=failures)
    open_s = min(2 * open_s or bounds["openDurationMs"] / 1000,
                 bounds["maxOpenDurationMs"] / 1000)
    return Endpoint(endpoint.url, failures, open_s, now + open_s, seq)

def cancelled(run: Run, reason: str, now: float) -> Run:
    """Over, from any live status; the fence moves, so that its holder hears of it."""
    message = "the run was cancelled" + (f": {reason}" if reason else "")
    return replace(unleased(run), status="cancelled", fence=run.fence + 1, due_at=None,
                   error=failure("CANCELLED", message), ended_at=now)

# --- What an event must show ----------------------------------------------------------
# Tests are paths (orderId, data.orderId, event.data.orderId and $.data.orderId are one
# place), or CEL, for which the extra `cel` is needed. Values are compared as text, so
# that 7, 7.0 and "7" are the same, whichever language wrote them.

PATH = re.compile(r"[^\s=!<>&|()\[\]'\"+*?,]+")
EQUALS = re.compile(rf"({PATH.pattern})\s*==\s*(\"[^\"\\]*\"|'[^'\\]*'|"
                    r"-?[0-9]+(\.[0-9]+)?|true|false|null)")

def value_at(path: str | None, data: Json) -> str | None:
    """The value at a path into an event's data, as text; None if there is none."""
    if not path:
        return None
    value = parsed(data)
    for key in re.sub(r"^((\$\.|event\.)?data|\$)\.", "", path).split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return as_text(value)

@lru_cache(maxsize=8)
def parsed(data: Json) -> Any:
    return json.loads(data)

def as_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)

@lru_cache(maxsize=1024)
def compiled(expression: str) -> Any:
    """A CEL program. Raises InvalidInput: where it is wrong, or which extra to add."""
    try:
        import cel
        return cel.compile(expression)
    except ModuleNotFoundError:
        raise InvalidInput(
            f"{expression[:80]!r} is CEL, which needs the extra `cel`: run `pip install"
            " common-expression-language`, then start the server again") from None
    except ValueError as error:
        raise InvalidInput(f"{expression[:80]!r} is no CEL: {error}") from None

def holds(expression: str, event: NewEvent) -> bool:
    """Whether an event passes a trigger's or a wait's expression."""
    data, metadata = parsed(event.data), json.loads(event.metadata or "{}")
    about = columns_of(event) | {"data": data, "metadata": metadata}
    if isinstance(event, Event):
        about |= {"id": event.event_id, "timestamp": to_rfc3339(event.at)}
    return is_true(expression, about | {"event": about})

def is_true(expression: str, about: dict[str, Any]) -> bool:
    """Whether it holds; not of what lacks a thing that the expression looks at."""
    try:
        return compiled(expression).execute(about) is True
    except InvalidInput as error:  # the extra was there when this was registered
        log.warning("%s", error)
    except BaseException as error:  # a panic of the library is not an Exception
        level = logging.DEBUG if isinstance(error, Exception) else logging.ERROR
        log.log(level, "%s: %r", expression, error)
    return False

def passes(filter: str, message: Message) -> bool:
    """Whether a subscriber with this filter is told of a message."""
    return not filter or is_true(filter, {
        "data": parsed(message.data), "topic": message.topic,
        "name": PREFIX.sub("", message.topic), "timestamp": to_rfc3339(message.at)})

def observed(test: str, event: NewEvent) -> str | None:
    """What an event shows to a test."""
    if not test or PATH.fullmatch(test):
        return value_at(test, event.data) if test else ""
    return "true" if holds(test, event) else None

def condition(match: str, given: Json | None, trigger: Json) -> tuple[str, str | None]:
    """A test, and what an event must show to it; None: what none can show.

    A bare path asks for the value that the run's own trigger has there (JS, Go), `path
    == "literal"` and a path with `given` for that one (Python). Raises InvalidInput.
    """
    if not match:
        return "", ""
    if given is not None and PATH.fullmatch(match):
        return match, as_text(json.loads(given))
    if found := EQUALS.fullmatch(match):
        quoted = found[2][0] in "'\""
        return found[1], found[2][1:-1] if quoted else as_text(json.loads(found[2]))
    if PATH.fullmatch(match):
        return match, value_at(match, trigger)
    compiled(match)
    return match, "true"

# --- Cron -----------------------------------------------------------------------------

CRON = (("second", 0, 59, ""), ("minute", 0, 59, ""), ("hour", 0, 23, ""),
        ("day of month", 1, 31, ""),
        ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
        ("day of week", 0, 7, "sun mon tue wed thu fri sat"))

@lru_cache(maxsize=512)
def cron_fields(expression: str) -> list[list[int]]:
    """The values of each of the six fields, in order. Raises InvalidInput."""
    texts = expression.lower().split()
    where = f"cron {expression[:80]!r}"
    if len(texts) not in (5, 6):
        raise InvalidInput(f"{where} has {len(texts)} fields: send 5, or 6 with seconds"
                           " first, such as */5 * * * *")
    found = []
    for (what, low, high, names), text in zip(CRON, ["0", *texts][-6:], strict=True):
        try:
            ranges = [cron_range(part, low, high, names.split())
                      for part in text.split(",")]
        except ValueError:
            raise InvalidInput(f"{where}: {text[:40]!r} is no {what}: send {low} to "
                               f"{high}, *, a-b, a,b or */n") from None
        found.append(sorted({value for each in ranges for value in each}))
    found[5] = sorted({day % 7 for day in found[5]})  # Sunday is 0 and 7
    return found

def cron_range(part: str, low: int, high: int, names: list[str]) -> range:
    """The values of *, 5, 1-5, */2, 1-5/2 or 5/2 (from 5 on). Raises ValueError."""
    numbers = re.sub(r"\b[a-z]+\b", lambda word: str(names.index(word[0]) + low), part)
    if not (found := re.fullmatch(r"(\*|([0-9]+)(-[0-9]+)?)(/[0-9]+)?", numbers)):
        raise ValueError
    _, first, last, step = found.groups()
    begin = int(first or low)
    end = int(last[1:]) if last else high if step or not first else begin
    if not low <= begin <= end <= high:
        raise ValueError
    return range(begin, end + 1, int(step[1:]) if step else 1)

def next_tick(expression: str, after: float) -> float:
    """The first instant after `after`, in Unix seconds, that a cron expression names.

    UTC; 5 fields, or 6 with seconds first; with both day fields restricted, either will
    do, as everywhere since Vixie's cron. Raises InvalidInput, also for what never is.
    """
    seconds, minutes, hours, days, months, weekdays = cron_fields(expression)
    either = not any(text.startswith("*") for text in (
        expression.split()[-3], expression.split()[-1]))
    begin = datetime.fromtimestamp(math.floor(after) + 1, UTC)
    day, earliest = begin.date(), (begin.hour, begin.minute, begin.second)
    for _ in range(366 * 9):  # 29 February may be eight years away
        on_day, on_weekday = day.day in days, day.isoweekday() % 7 in weekdays
        fits = on_day or on_weekday if either else on_day and on_weekday
        if day.month in months and fits:
            for hour in (h for h in hours if h >= earliest[0]):
                for minute in (m for m in minutes if (hour, m) >= earliest[:2]):
                    for second in seconds:
                        if (hour, minute, second) >= earliest:
                            return datetime(day.year, day.month, day.day, hour, minute,
                                            second, tzinfo=UTC).timestamp()
        day, earliest = day + timedelta(days=1), (0, 0, 0)
    raise InvalidInput(f"cron {expression[:80]!r} names a day that never comes")

# ======================================================================================
# 6. The way in
# ======================================================================================
# HTTP: read, ask, answer. A handler turns JSON into the words of chapter 2, asks the
# journal, and turns what it hears into JSON; the wire's spellings live here and in
# chapters 10 and 11 alone. What every request has in common (who may ask, how errors
# look, CORS) is in `Api.gate`, once. Below it is aiohttp's low-level server, which
# hands us every request; a table of doors replaces its router and saves a sixth of the
# time. Facts of the wire: the public SDKs, Python 0.53 and JS 0.29.

CONNECT = "/ironflow.v1."
PUBLIC_PATHS = frozenset({
    "/health", "/ready", "/metrics", "/api/v1/capabilities",
    f"{CONNECT}IronflowService/GetCapabilities"})
BODIES_IN_FLIGHT = 256 * MIB
PARSED_IN_THREAD = MIB  # larger bodies would hold up everybody else
JSON_HEADERS = {"Content-Type": "application/json"}
CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "Content-Type, Authorization,"
    " X-Ironflow-Environment, X-Ironflow-Environment-ID, X-Ironflow-SDK,"
    " X-Ironflow-Run-ID, If-Match, If-None-Match, Connect-Protocol-Version,"
    " Connect-Timeout-Ms",
    "Access-Control-Expose-Headers": "ETag, Ironflow-Poll-Wait",
    "Access-Control-Max-Age": "7200", "Vary": "Origin"}
BY_QUERY = ("/ws", "/api/v1/stream")  # browsers cannot send headers there
BINARY = re.compile("application/(connect[+])?proto")
GO = re.compile("Go-http-client/|connect-go/")
# What a request's path has for {names}; its bytes that `Api.in_flight` counts.
request_key: Any = getattr(web, "RequestKey", lambda name, _: name)  # aiohttp 3.14
GIVEN, HELD = request_key("given", dict), request_key("held", int)
Handler: TypeAlias = "Callable[[Api, web.BaseRequest], Awaitable[web.StreamResponse]]"

def doors() -> dict[str, Handler]:
    """Every door there is. A worker may say POST or, as Go does, PUT."""
    service, pubsub = f"POST {CONNECT}IronflowService", f"POST {CONNECT}PubSubService"
    runs, worker = "/api/v1/runs", "/api/v1/workers/{worker_id}"
    functions, function = "/api/v1/functions", "/api/v1/functions/{function_id}"
    handlers: dict[Handler, list[str]] = {
        get_health: ["GET /health", f"{service}/Health"],
        get_ready: ["GET /ready"],
        get_capabilities: ["GET /api/v1/capabilities", f"{service}/GetCapabilities"],
        get_info: [f"{service}/Info"],
        post_events: ["POST /api/v1/events"],
        trigger: [f"{service}/Trigger", f"{service}/Emit", f"{pubsub}/Emit"],
        trigger_batch: [f"{service}/TriggerBatch"],
        trigger_sync: [f"{service}/TriggerSync"],
        invoke_function: [f"{service}/InvokeFunction",
                          f"{service}/InvokeFunctionSync"],
        publish_data: ["POST /api/v1/publish", f"{pubsub}/Publish"],
        list_topics: [f"{pubsub}/ListTopics"],
        get_topic_stats: [f"{pubsub}/GetTopicStats"],
        list_events: ["GET /api/v1/events"],
        list_event_names: ["GET /api/v1/events/names"],
        get_event: ["GET /api/v1/events/{event_id}"],
        post_function: [f"{service}/RegisterFunction"],
        list_functions: [f"GET {functions}", f"{service}/ListFunctions"],
        get_function: [f"GET {function}", f"{service}/GetFunction"],
        post_status: [f"POST {function}/status", f"{service}/UpdateFunctionStatus"],
        remove_function: [f"DELETE {function}", f"{service}/DeleteFunction"],
        get_workers: ["GET /api/v1/workers"],
        list_runs: [f"GET {runs}", f"{service}/ListRuns"],
        get_run: [f"GET {runs}/{{run_id}}", f"{service}/GetRun"],
        list_steps: [f"GET {runs}/{{run_id}}/steps", f"{service}/GetRunSteps"],
        cancel: [f"POST {runs}/{{run_id}}/cancel", f"{service}/CancelRun"],
        # from here on: chapter 9
        get_ws: ["GET /ws"],
        get_stream: ["GET /api/v1/stream"],
        post_subscribe: [f"{pubsub}/Subscribe"],
        create_consumer_group: [f"{pubsub}/CreateConsumerGroup"],
        get_consumer_group: [f"{pubsub}/GetConsumerGroup"],
        list_consumer_groups: [f"{pubsub}/ListConsumerGroups"],
        update_consumer_group: [f"{pubsub}/UpdateConsumerGroup"],
        delete_consumer_group: [f"{pubsub}/DeleteConsumerGroup"],
        join_consumer_group: [f"{pubsub}/JoinConsumerGroup"],
        ack_event: [f"{pubsub}/AckEvent"],
        list_dead: ["GET /api/v1/consumer-groups/{name}/dead"],
        replay_dead: ["POST /api/v1/consumer-groups/{name}/replay"],
        # chapter 10
        post_worker: [f"POST {worker}/register", f"PUT {worker}/register"],
        post_heartbeat: [f"POST {worker}/heartbeat", f"PUT {worker}/heartbeat"],
        poll_jobs: [f"GET {worker}/jobs"],
        put_updates: [f"PUT {worker}/jobs"],
        put_update: [f"PUT {worker}/jobs/{{job_id}}"],
        put_ack: [f"PUT {worker}/jobs/{{job_id}}/ack"],
    }
    return {door: handler for handler, doors in handlers.items() for door in doors}

# --- What every request has in common -------------------------------------------------

@dataclass(frozen=True, slots=True)
class Guard:
    """Who may ask. Without a key the network is the fence: loopback only, and no web
    page of another site may use the user's browser to reach it."""

    api_key: str | None = None
    dev: bool = False
    allow_hosts: frozenset[str] = frozenset()
    cors_origins: frozenset[str] = frozenset()

    def check(self, method: str, path: str, headers: Mapping[str, str],
              token: str = "") -> None:
        """Raises Unauthenticated or Forbidden."""
        if self.dev:
            return
        if self.api_key is not None:
            if method != "OPTIONS" and path not in PUBLIC_PATHS:
                given = headers.get("Authorization") or f"Bearer {token}"
                self._check_key(given, self.api_key)
            return
        name = host_name(headers.get("Host", ""))
        if not is_loopback(name) and name not in self.allow_hosts:
            raise Forbidden(f"host {name[:80]!r} is not served: use localhost, or "
                            "start the server with --allow-host NAME")
        origin = headers.get("Origin", "http://localhost")
        site = host_name(origin.partition("://")[2])
        if not is_loopback(site) and origin not in self.cors_origins:
            raise Forbidden(f"origin {origin[:80]!r} may not call this server: start "
                            "it with --cors-origin ORIGIN")

    def _check_key(self, header: str, key: str) -> None:
        scheme, _, given = header.partition(" ")
        # compared as a whole, so that the time taken tells nothing of the key
        same = hmac.compare_digest(given.strip().encode(errors="replace"), key.encode())
        if scheme.lower() != "bearer" or not same:
            raise Unauthenticated("authentication required: send `Authorization: "
                                  "Bearer KEY` with the server's IRONFLOW_API_KEY")

@lru_cache(maxsize=256)
def host_name(host: str) -> str:
    """The name in a Host header or after an origin's scheme, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""

LOOPBACK = re.compile(r"(.*\.)?localhost|127(\.[0-9]{1,3}){3}|::1")

def is_loopback(name: str) -> bool:
    return LOOPBACK.fullmatch(name) is not None

class Doors:
    """The table of doors: which handler a method and a path lead to."""

    def __init__(self, doors: dict[str, Handler]) -> None:
        self._doors = doors
        self._named = {
            re.compile(door.replace("{", "(?P<").replace("}", ">[^/]*)")): handler
            for door, handler in doors.items() if "{" in door}

    def find(self, method: str, path: str) -> tuple[Handler, dict[str, str]]:
        """The handler, and what stands in the path for its `{names}`.

        Raises NotFound, Unimplemented (Connect), MethodNotAllowed.
        """
        door = f"{'GET' if method == 'HEAD' else method} {path}"
        if door in self._doors and "{" not in path:
            return self._doors[door], {}
        for named, handler in self._named.items():
            if found := named.fullmatch(door):
                given = found.groupdict().items()
                return handler, {name: unquote(text) for name, text in given}
        methods = [door.split()[0] for door in self._doors if door.endswith(f" {path}")]
        if methods:
            raise MethodNotAllowed(
                f"{path[:120]} takes {', '.join(methods)}, not {method}")
        if path.startswith(CONNECT):
            raise Unimplemented(f"{path[:120]} is not supported by this server yet")
        raise NotFound(f"{method} {path[:120]}: there is no such door here")

@dataclass(slots=True)
class Api:
    """What the handlers need, and the gate that they all stand behind."""
    journal: Journal
    desk: PullDesk
    pushes: PushDesk
    watch: Watch
    guard: Guard
    limits: Limits
    environment: str
    clock: Clock
    doors: Doors
    started_at: float
    in_flight: int = 0  # bytes of request bodies in memory

    async def gate(self, request: web.BaseRequest) -> web.StreamResponse:
        """Who may ask, what errors look like, CORS: the same for every door."""
        response: web.StreamResponse
        method = request.method
        path = request.rel_url.raw_path  # also of the absolute form, behind a proxy
        try:
            self._admit(request, path)
            if method == "OPTIONS":
                response = web.Response(status=204)
            else:
                handler, given = self.doors.find(method, path)
                if given:
                    request[GIVEN] = given
                response = await handler(self, request)
        except IronflowError as error:
            response = error_response(path, error)
        except (web.RequestPayloadError, HttpProcessingError) as error:
            why = f"the request's body cannot be read: {error}"
            response = error_response(path, InvalidInput(why))
        except Exception:
            log.exception("%s %s", method, path)
            bare = IronflowError("internal error: see the log")
            response = error_response(path, bare)
        finally:
            self.let_go(request)
        if response.status != 403:
            response.headers.update(cors(request))
        return response

    def _admit(self, request: web.BaseRequest, path: str) -> None:
        """Raises what is wrong with a request, whichever door it wants."""
        method, headers = request.method, request.headers
        query = request.query if path in BY_QUERY else {}
        self.guard.check(method, path, headers, query.get("token", ""))
        if method != "OPTIONS":
            self._check_environment(headers, query.get("env"))
            if BINARY.match(headers.get("Content-Type", "")):
                raise Unimplemented(
                    "binary protobuf is not supported by this server yet: send JSON, "
                    "for example events to POST /api/v1/events")

    def _check_environment(self, headers: Mapping[str, str], named: str | None
                           ) -> None:
        """One server, one environment; data of two can never mix."""
        named = named or headers.get("X-Ironflow-Environment")
        named = named or headers.get("X-Ironflow-Environment-ID")
        if named and named not in (self.environment, "default"):
            raise InvalidInput(
                f"this server serves the environment {self.environment!r}, not "
                f"{named[:80]!r}: start another with `--env NAME --db FILE --port PORT`"
            )

    async def read_json(self, request: web.BaseRequest) -> Any:
        """What the body holds. Raises as `read_body`, and InvalidInput."""
        body = await self.read_body(request)
        if not body and is_connect(request):
            return {}
        if len(body) > PARSED_IN_THREAD:
            return await asyncio.to_thread(parse_json, body)
        return parse_json(body)

    async def read_body(self, request: web.BaseRequest) -> bytes:
        """The body, within the limits. Raises TooLarge, Overloaded."""
        self._check_size(announced := request.content_length or 0)
        if request.headers.get("Expect", "").lower() == "100-continue":  # curl, 1 MiB
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        if request.content.is_eof() and announced:  # arrived with its head, as most do
            return self._hold(request, request.content.read_nowait())
        parts = [self._hold(request, part) async for part in request.content.iter_any()]
        return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > (limit := self.limits.body_bytes):
            raise TooLarge("the request's body", size, limit, "--max-body-bytes")

    def _hold(self, request: web.BaseRequest, part: bytes) -> bytes:
        """A part of its body, counted."""
        self._check_size(held := request.get(HELD, 0) + len(part))
        if self.in_flight + len(part) > BODIES_IN_FLIGHT:
            raise Overloaded("too many large requests at once: try again in a moment")
        self.in_flight += len(part)
        request[HELD] = held
        return part

    def let_go(self, request: web.BaseRequest) -> None:
        """Its body is not in memory any more."""
        self.in_flight -= request.pop(HELD, 0)

def cors(request: web.BaseRequest) -> dict[str, str]:
    """What lets a web page of another site read the answer."""
    if (origin := request.headers.get("Origin")) is None:
        return {}
    return CORS_HEADERS | {"Access-Control-Allow-Origin": origin}

def is_connect(request: web.BaseRequest) -> bool:
    return request.raw_path.startswith(CONNECT)

def error_response(path: str, error: IronflowError) -> web.Response:
    """The one place where an error becomes an answer; each SDK reads another member."""
    body = error_body(error)
    if path.startswith(CONNECT):
        del body["error"]
    text = _to_text.encode(body).encode(errors="replace")  # it may quote any header
    return web.Response(body=text, status=error.status,
                        headers=JSON_HEADERS | error.headers)

def error_body(error: IronflowError) -> dict[str, str]:
    return {"error": error.error or error.message, "code": error.code,
            "message": error.message}

def answer(text: Json, status: int = 200) -> web.Response:
    return web.Response(body=text.encode(), status=status, headers=JSON_HEADERS)

class Fields:
    """One JSON object of a request, or its query: a member under any of its spellings.

    A member is asked for in camelCase and found in snake_case too; null is unset. A
    wrong type or value raises InvalidInput that names the member.
    """

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, Mapping):
            raise InvalidInput(
                f"{where or 'body'} is {kind_of(value)}: send a JSON object")
        self.all, self.where = value, f"{where}." if where else ""

    def get(self, *names: str) -> Any:
        for name in names:
            for spelling in (name, snake(name)):
                if (value := self.all.get(spelling)) is not None:
                    return value
        return None

    def _typed(self, names: tuple[str, ...], kind: Any, wanted: str, default: T) -> T:
        value: T | None = self.get(*names)
        disguised = isinstance(value, bool) and kind is not bool  # an int, to Python
        if value is not None and (disguised or not isinstance(value, kind)):
            raise self._wrong(names, kind_of(value), wanted)
        return default if value is None else value

    def _wrong(self, names: tuple[str, ...], found: str, wanted: str) -> InvalidInput:
        return InvalidInput(f"{self.where}{names[0]} is {found}: send {wanted}")

    def text(self, *names: str, default: str = "") -> str:
        return self._typed(names, str, "a string", default)

    def flag(self, *names: str) -> bool:
        return self._typed(names, bool, "true or false", False)

    def items(self, name: str, most: int = MAX_INT32) -> list[Any]:
        found = self._typed((name,), list, "a list", list[Any]())
        if len(found) > most:
            raise InvalidInput(f"{len(found)} {name} in one request: send up to {most}")
        return found

    def objects(self, name: str, most: int = MAX_INT32) -> list[Fields]:
        """The objects in a list, each knowing its place."""
        items = enumerate(self.items(name, most))
        return [Fields(item, f"{name}[{i}]") for i, item in items]

    def inner(self, *names: str) -> Fields:
        """The object under a name; an empty one if it is unset."""
        return Fields(self._typed(names, dict, "an object", {}), self.where + names[0])

    def judge(self, name: str, test: Callable[[], object]) -> None:
        """Say where it stands, if a test refuses a member."""
        try:
            test()
        except InvalidInput as error:
            raise InvalidInput(f"{self.where}{name}: {error}") from None

    def number(self, *names: str) -> float | None:
        return self._typed(names, (int, float), "a number", None)

    def whole(self, *names: str, default: int = 0, low: int = 0,
              high: int = 2**53) -> int:
        """An integer within bounds; Go and protobuf write some as 7.0 or "7"."""
        value = self._typed(names, (int, float, str), "a whole number", None)
        if value is None:
            return default
        if not re.fullmatch(r"-?[0-9]{1,18}(\.0)?", str(value)):
            raise self._wrong(names, repr(str(value)[:40]), "a whole number")
        if not low <= (number := int(float(value))) <= high:
            raise self._wrong(names, str(number), f"{low} to {high}")
        return number

    def instant(self, *names: str) -> float | None:
        """Unix seconds of a timestamp with an offset (RFC 3339)."""
        wanted = "a timestamp such as 2026-01-01T00:00:00Z"
        value: str | None = self._typed(names, str, wanted, None)
        try:
            return None if value is None else from_rfc3339(value)
        except (ValueError, OverflowError):
            raise self._wrong(names, repr(value)[:40], wanted) from None

def kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean",
             int: "a number", float: "a number", type(None): "missing or null"}
    return kinds.get(type(value), "something else")

def is_empty(value: Any) -> bool:
    """Unset, in any of the ways in which the SDKs spell it."""
    if isinstance(value, dict | list):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value in (None, "", 0, False)

# --- Health ---------------------------------------------------------------------------

async def get_health(api: Api, request: web.BaseRequest) -> web.Response:
    now = to_rfc3339(api.clock.wall())
    return answer(dumps({"status": "ok", "timestamp": now, "version": __version__}))

async def get_ready(api: Api, request: web.BaseRequest) -> web.Response:
    """GET /ready: 503 while the last write failed; `journal` tells files apart."""
    issues = [api.journal.last_trouble] if api.journal.last_trouble else []
    body = {"status": "not ready" if issues else "ready", "issues": issues,
            "warnings": [], "journal": api.journal.journal_id}
    return answer(dumps(body), 503 if issues else 200)

async def get_capabilities(api: Api, request: web.BaseRequest) -> web.Response:
    """GET /api/v1/capabilities: only what is built."""
    return answer(dumps({
        "transports": ["connectrpc", "websocket"], "features": [],
        "version": PROTOCOL_VERSION, "auth_required": bool(api.guard.api_key)}))

async def get_info(api: Api, request: web.BaseRequest) -> web.Response:
    """IronflowService/Info; the runtime stands where the SDKs look for Go's."""
    read = api.journal.read
    return answer(dumps({
        "version": __version__, "goVersion": f"python {sys.version.split()[0]}",
        "startedAt": to_rfc3339(api.started_at),
        "functionCount": len(await read(Queries.functions)),
        "activeRuns": await read(Queries.active_runs),
        "connectedWorkers": len(await read(Queries.connected_workers))}))

# --- Events ---------------------------------------------------------------------------

async def post_events(api: Api, request: web.BaseRequest) -> web.Response:
    """POST /api/v1/events: one, or an array all or nothing. Answers once on disk."""
    body, run_id = await api.read_json(request), emitted_by(request)
    if not isinstance(body, list):
        accepted = await hand_in(api, run_id, accept_event, Fields(body), "name")
        return answer(accepted_to_rest(accepted))
    items = Fields({"events": body}).objects("events", EVENTS_PER_REQUEST)
    events = [read_event(item, "name", api.limits, run_id) for item in items]
    size = sum(map(size_of, events))
    done = await api.journal.write(accept_events, events, size=size)
    return answer(join({"events": listed(map(accepted_to_rest, done))}))

async def hand_in(api: Api, run_id: str | None, rule: Callable[..., T], body: Fields,
                  name_member: str, **more: Any) -> T:
    """What a rule made of the event that `read_event` found, once that is on disk."""
    event = read_event(body, name_member, api.limits, run_id, **more)
    return await api.journal.write(rule, event, size=size_of(event))

async def trigger(api: Api, request: web.BaseRequest) -> web.Response:
    body, run_id = Fields(await api.read_json(request)), emitted_by(request)
    # the browser's invoke(id) comes by Trigger
    rule = accept_call if request.raw_path.endswith("/Trigger") else accept_event
    return answer(accepted_to_connect(await hand_in(api, run_id, rule, body, "event")))

async def trigger_batch(api: Api, request: web.BaseRequest) -> web.Response:
    """IronflowService/TriggerBatch: each event is judged alone and has its answer."""
    body, run_id = Fields(await api.read_json(request)), emitted_by(request)
    items = body.items("events", EVENTS_PER_REQUEST)

    async def accept(i: int, item: Any) -> Json:
        try:
            body = Fields(item, f"events[{i}]")
            return accepted_to_connect(
                await hand_in(api, run_id, accept_event, body, "event"))
        except IronflowError as error:
            return dumps({"error": {"message": error.message, "code": error.code}})

    results = await asyncio.gather(*[accept(i, item) for i, item in enumerate(items)])
    return answer(join({"results": listed(results)}))

def read_event(body: Fields, name_member: str, limits: Limits, run_id: str | None,
               check: Callable[[str], str] = check_event_name, **more: str) -> NewEvent:
    """An event as the SDKs spell it; an error says where in an array it is."""
    try:
        name = check(body.text(name_member))
        key = body.text("idempotencyKey") or None
        if key is not None and (len(key.encode()) > MAX_KEY_BYTES or "\0" in key):
            raise InvalidInput(f"idempotencyKey: send up to {MAX_KEY_BYTES} bytes, no"
                               " NUL")
        data, metadata = body.get("data", "dataValue"), body.get("metadata")
        if metadata is not None:
            metadata = dumps(body.inner("metadata").all)
        if data is None and not body.all.keys() & {"data", "dataValue", "data_value"}:
            data = {}
        version = body.whole("version", high=MAX_INT32) or 1
        event = NewEvent(name, dumps(data), version, metadata, key, subject=run_id,
                         **more)
        if (size := size_of(event)) > (limit := limits.event_bytes):
            raise TooLarge(what_it_is(event)[:80], size, limit, "--max-event-bytes")
        return event
    except IronflowError as error:
        if not error.message.startswith(body.where):
            error.message = f"{body.where[:-1]}: {error.message}"
        raise

def size_of(event: NewEvent) -> int:
    """Bytes of its name, data and metadata."""
    texts = (event.name, event.data, event.metadata or "")
    return sum(len(text) if text.isascii() else len(text.encode()) for text in texts)

def emitted_by(request: web.BaseRequest) -> str | None:
    """The run inside which a call was made; the SDKs' handlers say so."""
    run_id = request.headers.get("X-Ironflow-Run-ID") or None
    if run_id is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", run_id):
        raise InvalidInput(
            "X-Ironflow-Run-ID is no run id: send the run's id, or leave it out")
    return run_id

def accepted_to_rest(accepted: Accepted) -> Json:
    event_id, run_ids = dumps(accepted.event_id), dumps(accepted.run_ids)
    return join({"event_id": event_id, "id": event_id, "run_ids": run_ids,
                 "eventId": event_id, "runIds": run_ids})

def accepted_to_connect(accepted: Accepted) -> Json:
    return dumps({"runIds": accepted.run_ids, "eventId": accepted.event_id})

async def list_events(api: Api, request: web.BaseRequest) -> web.Response:
    """GET /api/v1/events: newest first; `cursor` goes to older pages, `before` back."""
    asks = await asked(api, request)
    limit = min(asks.whole("limit") or 20, 200)
    older, newer = (asks.whole(name) or None for name in ("cursor", "before"))
    if older and newer:
        raise InvalidInput("cursor and before: send one of them")
    look = Look(limit, older or newer, newer=newer is not None)
    page = await api.journal.read(
        Queries.events, filters(asks, "name", "names", "source", "search"), look)
    rows, after = page.rows, page.cursor
    before = rows[0].seq if rows and older else None
    if newer:
        before, after = after, rows[-1].seq if rows else None
    return answer(join(as_texts({
        "count": len(rows), "limit": limit, "approx_total": page.total,
        "approx_total_capped": page.capped,
        "has_prev": before is not None, "prev_cursor": str(before or ""),
        "has_next": after is not None, "next_cursor": str(after or ""),
    }) | {"events": listed(map(event_to_rest, rows))}))

def filters(asks: Fields, *names: str, **more: str) -> dict[str, Any]:
    """Those of a list's filters that are set; `since` and `until` are instants."""
    texts = more | {name: asks.text(camel(name)) for name in names}
    found = texts | {name: asks.instant(name) for name in ("since", "until")}
    return {name: value for name, value in found.items() if value not in ("", None)}

async def list_event_names(api: Api, request: web.BaseRequest) -> web.Response:
    """GET /api/v1/events/names, in the order of names: those of the newest events."""
    wanted = filters(await asked(api, request), "source")
    rows = await api.journal.read(Queries.event_names, wanted)
    scanned = sum(seen for _, _, seen in rows)
    return answer(dumps({
        "names": [{"name": name, "count": count} for name, count, _ in rows if count],
        "scanned": scanned, "scan_cap": SCAN_ROWS, "truncated": scanned == SCAN_ROWS}))

async def get_event(api: Api, request: web.BaseRequest) -> web.Response:
    event_id = request[GIVEN]["event_id"]
    return answer(event_to_rest(await api.journal.read(known, Event, event_id)))

# What a worker is told of an event, and what everybody else is told too.
EVENT = "id=event_id timestamp=at name data version metadata source idempotency_key"

def event_to_rest(event: Event) -> Json:
    """An event for readers: it started what it starts when it was recorded."""
    return join(members(event, f"{EVENT} created_at=at run_id=subject")
                | {"processed": "true"})

# --- Calls that wait ------------------------------------------------------------------

DEFAULT_WAIT_MS = 30_000

async def trigger_sync(api: Api, request: web.BaseRequest) -> web.Response:
    """IronflowService/TriggerSync: an event, and how the runs that it started ended."""
    body, run_id = Fields(await api.read_json(request)), emitted_by(request)
    wait_s = patience(request, body)
    accepted = await hand_in(api, run_id, accept_awaited, body, "event")
    results = await wait_for_ends(api, request, accepted.run_ids, wait_s)
    return answer(join({"eventId": dumps(accepted.event_id),
                        "results": listed(results)}))

async def invoke_function(api: Api, request: web.BaseRequest) -> web.Response:
    """IronflowService/InvokeFunction, and InvokeFunctionSync, which waits."""
    body, run_id = Fields(await api.read_json(request)), emitted_by(request)
    wait_s = patience(request, body)
    accepted = await hand_in(api, run_id, accept_event, body, "functionId",
                             check=check_function_id, source="invoke")
    waits, found = request.raw_path.endswith("Sync"), accepted.run_ids
    if waits:
        found = await wait_for_ends(api, request, found, wait_s)
    if not found:  # a key of long ago: see `forget_old`
        raise NotFound(f"the run of event {accepted.event_id} is not kept any more")
    if waits:
        return answer(join({"result": found[0]}))
    ids = as_texts({"run_id": found[0], "event_id": accepted.event_id})
    return answer(join(ids | in_camel(ids)))

def patience(request: web.BaseRequest, body: Fields) -> float:
    """Seconds that a caller waits; it is answered before it gives up by itself."""
    wait_ms = body.whole("timeoutMs", high=MAX_INT32) or DEFAULT_WAIT_MS
    deadline = request.headers.get("Connect-Timeout-Ms", "")
    if re.fullmatch("[0-9]{1,10}", deadline):
        wait_ms = min(wait_ms, int(deadline) * 9 // 10)
    return wait_ms / 1000

async def wait_for_ends(api: Api, request: web.BaseRequest, run_ids: list[str],
                        wait_s: float) -> list[Json]:
    """How each run ended, or how it stands when the time is over or the server stops.

    Cancelling ends the waiting alone; the runs go on.
    """
    api.let_go(request)  # or a few large ones that wait would keep all others out
    ends = {run_id: api.journal.end_of(run_id) for run_id in run_ids}
    runs = await api.journal.read(Queries.runs_by_id, run_ids)  # none ends unnoticed
    if going_on := [ends[run.run_id] for run in runs if run.status not in TERMINAL]:
        await api.desk.first_of(asyncio.gather(*going_on), wait_s)
        runs = await api.journal.read(Queries.runs_by_id, run_ids)
    return [result_to_connect(request, run, api.clock.wall()) for run in runs]

def result_to_connect(request: web.BaseRequest, run: Run, now: float) -> Json:
    """A run's end, for who waited; `waitTimedOut`, if there was none in time."""
    took_s = (run.ended_at or now) - run.created_at
    found = members(run, "run_id function_id status output error")
    return to_connect(request, run, found | {
        "duration_ms": str(max(0, round(took_s * 1000))),
        "wait_timed_out": dumps(run.status not in TERMINAL)})

# --- Topics ---------------------------------------------------------------------------

async def publish_data(api: Api, request: web.BaseRequest) -> web.Response:
    """PubSubService/Publish, POST /api/v1/publish: data for whoever watches a topic."""
    body, run_id = Fields(await api.read_json(request)), emitted_by(request)
    seq, duplicate = await hand_in(api, run_id, publish, body, "topic",
                                   check=check_topic, kind="topic")
    found = {"eventId": f"seq_{seq}", "sequence": str(seq), "duplicate": duplicate}
    if not is_connect(request):
        found |= {"event_id": f"seq_{seq}", "sequence": seq}
    return answer(dumps(found))

async def list_topics(api: Api, request: web.BaseRequest) -> web.Response:
    topics = await api.journal.read(Queries.topics)
    return answer(join({"topics": listed(
        join(in_camel(members(topic, "name first_message_at last_message_at"))
             | {"messageCount": f'"{topic.message_count}"', "consumerCount": "0"})
        for topic in topics)}))

async def get_topic_stats(api: Api, request: web.BaseRequest) -> web.Response:
    """GetTopicStats {topic}: zeros for one that nobody published on."""
    name = check_topic((await asked(api, request)).text("topic"))
    found = await api.journal.read(Queries.topics, name)
    topic = found[0] if found else Topic(name, 0, 0, 0, 0.0, 0.0)
    return answer(dumps({
        "name": name, "messageCount": str(topic.message_count), "consumerCount": 0,
        "lag": "0", "firstSeq": str(topic.first_seq), "lastSeq": str(topic.last_seq)}))

# --- Functions and workers ------------------------------------------------------------

async def post_function(api: Api, request: web.BaseRequest) -> web.Response:
    """IronflowService/RegisterFunction: an upsert; the same again changes nothing."""
    body = Fields(await api.read_json(request))
    if endpoint := body.text("endpointUrl"):
        body.judge("endpointUrl", lambda: api.pushes.reach.check(endpoint))
    function, created = await api.journal.write(register_function, read_function(body))
    where = f"function {function.function_id!r}"
    warnings = [f"{where} asks for the secret {name!r}, which the server does not have:"
                " its runs wait until --secrets-file has it"
                for name in api.desk.offers.secrets.missing(function)]
    if function.endpoint and not api.pushes.signing_key:
        warnings.append(f"{where}: requests to its endpoint are not signed, anybody "
                        "could send the like: start the server, and the endpoint, with "
                        "IRONFLOW_SIGNING_KEY")
    for warning in warnings:
        log.warning("%s", warning)
    return answer(join({
        "function": function_to_connect(function), "created": dumps(created),
        "warnings": dumps(warnings) if warnings else None}))

def read_function(body: Fields) -> NewFunction:
    """A registration under any SDK's spelling. Nothing is silently ignored."""
    function_id = check_function_id(body.text("id"))
    triggers = [read_trigger(item, function_id) for item in body.objects("triggers")]
    retry = read_retry(body.inner("retry"))
    config = {
        "id": function_id, "name": body.text("name") or function_id,
        "description": body.text("description"),
        "triggers": [{name: text for name, text in columns_of(each).items() if text}
                     for each in triggers],
        "retry": {camel(name): value for name, value in columns_of(retry).items()},
        "timeoutMs": body.whole("timeoutMs", high=MAX_INT32),
        "preferredMode": read_mode(body), "recording": body.flag("recording"),
        "recordingProfile": body.text("recordingProfile"),
        "recordingRetention": body.get("recordingRetention"),
        "metadata": body.inner("metadata").all, **read_bounds(body),
    }
    return NewFunction(function_id, dumps(config), retry.to_text(), triggers)

def read_bounds(body: Fields) -> dict[str, Any]:
    """What a function asks of its runs beside retries; what is unset is left out."""
    found: dict[str, Any] = {}
    for name, needed, more in (("concurrency", "limit", ""), (
            "throttle", "limit periodMs", ""), ("debounce", "periodMs", "maxWaitMs"), (
            "circuitBreaker", "", " ".join(BREAKER))):
        if is_empty((said := body.inner(name)).all):
            continue
        numbers = {each: said.whole(each, high=MAX_INT32)
                   for each in f"{needed} {more}".split()}
        if not all(map(numbers.get, needed.split())):
            raise InvalidInput(f"{name}: send {needed.replace(' ', ' and ')}, from 1")
        for least, most in ("periodMs", "maxWaitMs"), (
                "openDurationMs", "maxOpenDurationMs"):
            if 0 < numbers.get(most, 0) < numbers[least]:
                raise InvalidInput(f"{name}: {most} is less than {least}: send more")
        members = numbers | {"key": read_path(said, "key")}
        found[name] = {each: value for each, value in members.items() if value}
    cancel_on = [{"event": check_trigger(item.text("event")),
                  "match": item.text("match")} for item in body.objects("cancelOn")]
    for each in cancel_on:
        if not each["event"]:
            raise InvalidInput("cancelOn: name the event that cancels runs")
        condition(each["match"], None, "null")
    secrets = body.items("secrets")
    if not all(isinstance(name, str) and name for name in secrets):
        raise InvalidInput("secrets: send a list of names")
    others = {"actorKey": read_path(body, "actorKey"), "cancelOn": cancel_on,
              "secrets": list(dict.fromkeys(secrets)),
              "endpointUrl": body.text("endpointUrl")}
    return found | {name: value for name, value in others.items() if value}

def read_path(body: Fields, name: str) -> str:
    """A path into an event's data, such as customer.id."""
    path = body.text(name)
    if path and not PATH.fullmatch(path):
        raise InvalidInput(f"{body.where}{name} is {path[:80]!r}: send a path into the "
                           "event's data, such as customer.id")
    return path

def read_trigger(item: Fields, function_id: str) -> Trigger:
    """What starts a function: an event or a cron expression, perhaps both.

    A tick without an event has one of its own, which anybody may emit as well.
    """
    event, cron, test = map(item.text, ("event", "cron", "expression"))
    if not event and not cron:
        raise InvalidInput(f"{item.where}event is empty: name the event that starts"
                           " the function, or send cron")
    if cron:
        event = check_event_name(event or f"cron.{function_id}")
        item.judge("cron", lambda: next_tick(cron, 0.0))
    if test:
        item.judge("expression", lambda: compiled(test))
    return Trigger(check_trigger(event), test, cron)

def read_retry(body: Fields) -> Retry:
    """The policy; a member that is unset or zero, as Go sends it, is the default."""
    said: dict[str, Any] = {
        "max_attempts": body.whole("maxAttempts", high=10_000),
        "initial_delay_ms": body.whole("initialDelayMs", high=MAX_INT32),
        "backoff_factor": body.number("backoffFactor"),
        "max_delay_ms": body.whole("maxDelayMs", high=MAX_INT32),
        "on_exhausted": body.text("onExhausted")}
    retry = Retry(**{name: value for name, value in said.items() if value})
    if (word := retry.on_exhausted) not in ("fail", "pause"):
        raise InvalidInput(f"retry.onExhausted is {word[:40]!r}: send fail or pause")
    if not 0 < (factor := retry.backoff_factor) <= 1000:
        raise InvalidInput(
            f"retry.backoffFactor is {factor}: send more than 0, up to 1000")
    return retry

def read_mode(body: Fields) -> str:
    """An endpoint without a mode means push. Push without an endpoint is what Go sends
    for all: a worker may take it."""
    word = read_word(body, "execution_mode", "preferredMode", "mode")
    word = word or ("push" if body.text("endpointUrl") else "pull")
    return f"EXECUTION_MODE_{word.upper()}"

ENUMS = {  # the words that stand for 1, 2, 3 ... in the SDKs' messages
    "execution_mode": ["push", "pull"],
    "function_status": ["active", "paused", "archived"],
    "run_status": ["pending", "running", "completed", "failed", "cancelled", "paused",
                   "waiting_for_capacity", "waiting"],
    "ack_mode": ["auto", "manual"], "ack_type": ["ack", "nak", "term"],
    "backpressure_mode": ["drop", "block", "buffer"],
    "consumer_group_status": ["active", "paused", "deleted"],
}

def read_enum(value: Any, enum: str) -> str:
    """The word for a value in any spelling, RUN_STATUS_FAILED, FAILED, failed or 4;
    none for an unknown one."""
    words, word = ENUMS[enum], str(value).lower().removeprefix(f"{enum}_")
    if re.fullmatch("[1-9]", word) and int(word) <= len(words):
        return words[int(word) - 1]
    return word if word in words else ""

def read_word(body: Fields, enum: str, *names: str) -> str:
    """The word under a name, none if it is unset. Raises InvalidInput."""
    word = read_enum(value := body.get(*names), enum)
    if not word and not is_empty(value) and "unspecified" not in str(value).lower():
        raise InvalidInput(f"{body.where}{names[0]} is {str(value)[:40]!r}: send "
                           f"{' or '.join(ENUMS[enum])}")
    return word

def function_to_connect(function: Function, next_run: str | None = None) -> Json:
    found = in_camel(members(function, "version created_at updated_at"))
    return join(found | as_texts(function.asks | {
        "status": f"FUNCTION_STATUS_{function.status.upper()}", "nextRun": next_run}))

async def list_functions(api: Api, request: web.BaseRequest) -> web.Response:
    """ListFunctions, GET /api/v1/functions: in the order of ids, a thousand a page."""
    asks = await asked(api, request)
    name, status = asks.text("name"), read_enum(asks.get("status"), "function_status")
    mode = read_enum(asks.get("mode"), "execution_mode")
    found = [
        function for function in await api.journal.read(Queries.functions)
        if name in function.function_id and status in ("", function.status)
        and mode in ("", read_enum(
            function.asks["preferredMode"], "execution_mode"))]
    offset, cursor = asks.whole("offset"), asks.text("cursor")
    offset += sum(function.function_id <= cursor for function in found)
    page = found[offset : offset + (asks.whole("limit", high=1000) or 1000)]
    more = offset + len(page) < len(found)
    rows = await functions_to_wire(api, request, page)
    cursor = page[-1].function_id if more and page else ""
    return answer_list(request, "functions", rows, cursor, len(found))

async def get_function(api: Api, request: web.BaseRequest) -> web.Response:
    function_id = (await asked(api, request)).text("functionId", "id")
    function = await api.journal.read(known, Function, function_id)
    return answer((await functions_to_wire(api, request, [function]))[0])

async def post_status(api: Api, request: web.BaseRequest) -> web.Response:
    """UpdateFunctionStatus {id, status}: active, paused or archived."""
    asks = await asked(api, request)
    function_id, status = asks.text("functionId", "id"), asks.get("status")
    if not (word := read_enum(status, "function_status")):
        raise InvalidInput(f"status is {str(status)[:40]!r}: send active, paused or "
                           "archived")
    function = await api.journal.write(set_status, function_id, word)
    return answer((await functions_to_wire(api, request, [function]))[0])

async def remove_function(api: Api, request: web.BaseRequest) -> web.Response:
    function_id = (await asked(api, request)).text("functionId", "id")
    await api.journal.write(delete_function, function_id)
    return answer("{}")

async def functions_to_wire(api: Api, request: web.BaseRequest,
                            functions: list[Function]) -> list[Json]:
    """In the caller's shape; without `workers`, or with `missing_secrets`, a function's
    runs wait, visibly."""
    ticks = await api.journal.read(Queries.next_ticks)
    next_run = {name: to_rfc3339(tick) for name, tick in ticks.items()}
    if is_connect(request):
        return [function_to_connect(each, next_run.get(each.function_id))
                for each in functions]
    workers = await api.journal.read(Queries.connected_workers)
    endpoints = await api.journal.read(Queries.endpoints)
    carried = Counter(f for worker in workers for f in json.loads(worker.function_ids))
    rows = [function_to_rest(each) | {
        "workers": carried[each.function_id],
        "breaker": breaker(endpoints.get(each.endpoint, Endpoint(each.endpoint))),
        "next_run": next_run.get(each.function_id),
        "missing_secrets": api.desk.offers.secrets.missing(each) or None}
        for each in functions]
    return [join(as_texts(row)) for row in rows]

def breaker(endpoint: Endpoint) -> dict[str, Any] | None:
    until = endpoint.open_until
    about = {"state": endpoint.state, "failures": endpoint.failures}
    about |= {"open_until": to_rfc3339(until)} if until else {}
    return about if endpoint.url else None

def function_to_rest(function: Function) -> dict[str, Any]:
    """The union of the two published row shapes (docs, JS 0.29)."""
    config, retry = function.asks, Retry.from_text(function.retry)
    mode = read_enum(config["preferredMode"], "execution_mode")
    return {
        "id": function.function_id, "slug": function.function_id,
        "name": config["name"], "description": config["description"],
        "status": function.status, "preferred_mode": mode, "execution_mode": mode,
        "triggers": config["triggers"], "retry_attempts": retry.max_attempts,
        "retry_delay_ms": retry.initial_delay_ms, "retry_backoff": retry.backoff_factor,
        "timeout_ms": config["timeoutMs"], "metadata": config["metadata"],
        **{snake(name): config[name] for name in (
            "concurrency", "throttle", "debounce", "cancelOn", "actorKey", "secrets",
            "endpointUrl", "circuitBreaker") if name in config},
        "version": function.version, "created_at": to_rfc3339(function.created_at),
        "updated_at": to_rfc3339(function.updated_at),
    }

async def get_workers(api: Api, request: web.BaseRequest) -> web.Response:
    """GET /api/v1/workers: those connected now, with the runs they hold."""
    held, seen = await api.journal.read(Queries.held_runs), api.desk.seen
    workers = [
        join(members(worker, "id=worker_id hostname function_ids labels version"
                             " registered_at max_concurrent=max_concurrent_jobs") | {
            "active_jobs": str(held.get(worker.worker_id, 0)),
            "last_heartbeat": stamp(
                seen.get(worker.worker_id, (0.0, worker.registered_at))[1]),
            "transport": '"polling"'})
        for worker in await api.journal.read(Queries.connected_workers)]
    return answer(join({"workers": listed(workers), "count": str(len(workers))}))

# --- Runs -----------------------------------------------------------------------------
# Each call has a REST and a Connect form; `asked` reads both, `.._to_wire` writes both.

async def asked(api: Api, request: web.BaseRequest) -> Fields:
    """What a call asks for, wherever it says so: in its path, its query or its body."""
    body = await api.read_json(request) if request.body_exists else {}
    path = {camel(name): text for name, text in request.get(GIVEN, {}).items()}
    query = {name: text for name, text in request.query.items() if text}
    return Fields({**Fields(body).all, **query, **path})

async def get_run(api: Api, request: web.BaseRequest) -> web.Response:
    run_id = (await asked(api, request)).text("runId", "id")
    return answer(run_to_wire(request, *await api.journal.read(run_and_more, run_id)))

async def cancel(api: Api, request: web.BaseRequest) -> web.Response:
    """CancelRun {id, reason}, POST /api/v1/runs/{id}/cancel; the run as it is then."""
    asks = await asked(api, request)
    run_id = asks.text("runId", "id")
    await api.journal.write(cancel_run, run_id, asks.text("reason"))
    return answer(run_to_wire(request, *await api.journal.read(run_and_more, run_id)))

def run_and_more(journal: Queries, run_id: str) -> tuple[Run, Json, str]:
    """A run, its input, and the way by which it goes out."""
    run = known(journal, Run, run_id)
    function = journal.find(Function, function_id=run.function_id)
    pushed = ("://" in run.worker_id if run.worker_id else
              function is not None and function.endpoint)
    return run, journal.input_of(run), "push" if pushed else "pull"

async def list_runs(api: Api, request: web.BaseRequest) -> web.Response:
    """ListRuns, GET /api/v1/runs: newest first, 50 a page; the cursor is a run's id."""
    asks = await asked(api, request)
    words = [read_enum(value, "run_status") for value in asks.items("statuses")]
    wanted = filters(asks, "function_id", "event_id", "search",
                     status=read_enum(asks.get("status"), "run_status"),
                     statuses=",".join(filter(None, words)))
    if (cursor := asks.text("cursor")) and not re.fullmatch("run_[0-9a-z]+", cursor):
        raise InvalidInput(f"cursor is {cursor[:40]!r}: send the last page's, a run id")
    look = Look(asks.whole("limit", high=1000) or 50, cursor or None,
                offset=asks.whole("offset", high=SCAN_ROWS))  # else: the cursor
    page = await api.journal.read(Queries.runs, wanted, look)
    rows = [run_to_wire(request, *each) for each in page.rows]
    return answer_list(request, "runs", rows, page.cursor, page.total)

def answer_list(request: web.BaseRequest, what: str, rows: list[Json],
                cursor: str | None, total: int) -> web.Response:
    found = as_texts({"next_cursor": cursor or "", "total_count": total})
    found = found | {what: listed(rows)}
    if is_connect(request):
        return answer(join(in_camel(found)))
    return answer(join(found | {"count": str(len(rows))}))

def run_to_wire(request: web.BaseRequest, run: Run, data: Json, mode: str) -> Json:
    """A run in the caller's shape: REST in snake_case, Connect in camelCase."""
    found = members(run, "id=run_id function_id event_id event_name worker_id status"
                         " attempt output error function_version created_at updated_at"
                         " started_at ended_at max_attempts=policy.max_attempts"
                         " actor_id parent_run_id parent_step_id")
    found |= {"input": data, "execution_mode": f'"{mode}"'}
    if not is_connect(request):
        return join(found)
    found["execution_mode"] = f'"EXECUTION_MODE_{mode.upper()}"'
    return to_connect(request, run, found)

def to_connect(request: web.BaseRequest, run: Run, found: dict[str, Json | None]
               ) -> Json:
    """In Connect JSON Go reads RUN_STATUS_COMPLETED, everybody else `completed`."""
    if GO.match(request.headers.get("User-Agent", "")):
        found["status"] = f'"RUN_STATUS_{run.status.upper()}"'
    for name in ("input", "output"):
        if (value := found.get(name)) is not None and not value.startswith("{"):
            found[f"{name}_value"] = value
    return join(in_camel(found))

async def list_steps(api: Api, request: web.BaseRequest) -> web.Response:
    """GetRunSteps {run_id}, GET /api/v1/runs/{id}/steps: all of them, in sequence."""
    run_id = (await asked(api, request)).text("runId", "id")
    await api.journal.read(known, Run, run_id)
    steps = await api.journal.read(Queries.steps, run_id)
    return answer(join({"steps": listed(step_to_wire(request, step) for step in steps),
                        "count": str(len(steps))}))

def step_to_wire(request: web.BaseRequest, step: Step) -> Json:
    found = members(step, "run_id step_id name step_type=type sequence status output"
                          " error attempt duration_ms compensation_for sleep_until"
                          " started_at ended_at created_at updated_at wait_event_name"
                          " wait_timeout child_run_id input")
    found["id"] = f'"step_{step.run_id.removeprefix("run_")}_{step.sequence}"'
    if not is_connect(request):
        return join(found)
    found["step_type"] = f'"STEP_TYPE_{step.type.upper()}"'
    found["status"] = f'"STEP_STATUS_{step.status.upper()}"'
    for name in ("input", "output"):
        if not (found[name] or "{").startswith("{"):
            found[f"{name}_value"] = found.pop(name)
    return join(in_camel(found))

# ======================================================================================
# 7. The engine
# ======================================================================================
# Every decision, as synchronous functions over a transaction: `rule(tx, ..., now)`.
# They know no SQL, no HTTP, no clock, and never wait. A rule looks before it writes:
# one that refuses has changed nothing, so its neighbours in the same commit need not
# notice. What a rule changes, a row of `journal` says in the same transaction.

def accept_event(tx: Transaction, event: NewEvent, now: float, *,
                 or_named: bool = False, awaited: bool = False) -> Accepted:
    """Record an event and a run for each function it triggers: all or nothing.

    A repeat, by its idempotency key, gets the answer that the first one got and leaves
    no trace. Raises AlreadyExists if the key belongs to something else; for an event
    whose runs are `awaited`, FailedPrecondition if one is debounced; for an invocation,
    NotFound, and FailedPrecondition if the function is paused or archived.
    """
    if (first := find_original(tx, event, {})) is not None:
        return Accepted(first.event_id, tx.run_ids_of(first.seq))
    if awaited and any("debounce" in each.asks for each in triggered(tx, event)):
        raise FailedPrecondition(f"{what_it_is(event)} starts a function with debounce:"
                                 " its run comes later, emit without waiting")
    called = [the_named(tx, event)] if event.source == "invoke" else []
    kept = tx.append_event(event, tx.ids.new("evt", now), now)
    functions = called or triggered(tx, kept)
    if not called:
        hear(tx, kept, now)  # before its own runs begin to listen
        named = tx.find(Function, function_id=event.name) if or_named else None
        if not functions and named is not None and named.status == "active":
            functions = [named]
    run_ids = [start_run(tx, function, kept, now) for function in functions
               if called or not debounce(tx, function, kept, now)]
    return Accepted(kept.event_id, run_ids)

def triggered(tx: Transaction, event: NewEvent) -> list[Function]:
    """Active functions with a trigger that the event passes, in the order of ids."""
    return [function for function, tests in tx.functions_triggered_by(event.name)
            if "" in tests or any(holds(test, event) for test in tests)]

def accept_call(tx: Transaction, event: NewEvent, now: float) -> Accepted:
    """As `accept_event`; if it triggers nothing, its name may be a function's id."""
    return accept_event(tx, event, now, or_named=True)

def accept_awaited(tx: Transaction, event: NewEvent, now: float) -> Accepted:
    return accept_event(tx, event, now, awaited=True)

def the_named(tx: Transaction, event: NewEvent) -> Function:
    """The function that an invocation is named after, if it may be started."""
    function = known(tx, Function, event.name)
    if function.status != "active":
        raise FailedPrecondition(f"function {event.name!r} is {function.status}: set "
                                 "its status to active to start runs of it")
    return function

def publish(tx: Transaction, event: NewEvent, now: float) -> tuple[int, bool]:
    """Record data for a topic; its `seq`, and whether it was there before.

    It starts nothing. Raises AlreadyExists as `accept_event`.
    """
    first = find_original(tx, event, {})
    return (first or tx.append_event(event, None, now)).seq, first is not None

def accept_events(tx: Transaction, events: list[NewEvent],
                  now: float) -> list[Accepted]:
    """Record many events in order, all of them or none.

    Raises AlreadyExists, with the index of the event whose key belongs to another.
    """
    names: dict[str, str] = {}
    for i, event in enumerate(events):
        try:
            find_original(tx, event, names)
        except AlreadyExists as error:
            raise AlreadyExists(f"events[{i}]: {error.message}") from None
    return [accept_event(tx, event, now) for event in events]

def find_original(tx: Transaction, event: NewEvent,
                  names: dict[str, str]) -> Event | None:
    """The event on disk that has this one's key; `names`: of keys met on the way.

    A second, different event must not be swallowed as if it were the first again.
    """
    if (key := event.idempotency_key) is None:
        return None
    first = tx.find(Event, idempotency_key=key)
    owner = what_it_is(first) if first else names.setdefault(key, what_it_is(event))
    if owner != what_it_is(event):
        raise AlreadyExists(f"idempotency key {key!r} belongs to {owner}: use another "
                            f"key for {what_it_is(event)}")
    return first

def what_it_is(event: NewEvent) -> str:
    """In words; what has the same words and the same key is the same."""
    kind = "an invocation of" if event.source == "invoke" else f"the {event.kind}"
    return f"{kind} {event.name!r}"

def start_run(tx: Transaction, function: Function, event: Event, now: float,
              parent: tuple[str, str] | None = None) -> str:
    """A run of one function for one event, due at once or in line; its id."""
    run_id, asks, places = tx.ids.new("run", now), function.asks, dict[str, str]()
    for kind, name in PLACES.items():
        if name in asks:
            places[kind] = value_at(asks[name].get("key"), event.data) or ""
    if "actorKey" in asks and (actor := value_at(asks["actorKey"], event.data)):
        places["actor"] = actor
    tx.insert_run(run_id, function, event, now, parent, places)
    tx.append("run", "created", run_id, CREATED, now)
    if places:
        admit(tx, run_id, function.function_id)
    for each in asks.get("cancelOn", ()):
        test, value = condition(each["match"], None, event.data)
        if value is not None:  # else no event will ever do
            tx.insert_wait(run_id, None, each["event"], test, value)
    return run_id

PLACES = {"lane": "concurrency", "gate": "throttle"}
CREATED = '{"status":"waiting_for_capacity","attempt":1}'

def admit(tx: Transaction, run_id: str, function_id: str) -> set[str]:
    """Give a run its places, if there is one in each of its bounds; else: what is full.

    A bound of a function (concurrency, throttle, actor) has so many places for each
    value of its key. A ready run has all of its places, and keeps them until it sleeps,
    waits or ends; that of a throttle for a period after its first start.
    """
    function = tx.find(Function, function_id=function_id)
    asks = function.asks if function else {}
    limits = {kind: asks.get(name, {}).get("limit", MAX_INT32)
              for kind, name in PLACES.items()}
    limits["actor"] = 1 if "actorKey" in asks else MAX_INT32
    full = {f"{kind} {value}" for kind, value in tx.lines_of(run_id)
            if tx.places_taken(function_id, kind, value) >= limits[kind]}
    if not full:
        tx.let_in(run_id, function_id)
    return full

def hand_on(tx: Transaction, function_id: str, places: Iterable[tuple[str, str]]
            ) -> None:
    """Places were left: admit who stands in line for them, the longest due first."""
    full: set[str] = set()  # what keeps others in these lines waiting
    lines = list(places)
    while firsts := [first for kind, value in lines if f"{kind} {value}" not in full
                     for first in tx.first_in_line(function_id, kind, value, full)]:
        full |= admit(tx, min(firsts)[1], function_id)

def change_places(tx: Transaction, old: Run, new: Run, now: float) -> None:
    """Hand on the places of a run that lets go, or stand in line for them again."""
    if new.status == "running" and old.started_at is None:
        function = tx.find(Function, function_id=new.function_id)
        throttle = function.asks.get("throttle", {}) if function else {}
        tx.pass_gate(new.run_id, now + throttle.get("periodMs", 0) / 1000)
    elif new.status == "waiting_for_capacity" and new.held:
        tx.move(new.run_id, "off", "line", now)
        admit(tx, new.run_id, new.function_id)
    elif new.status not in ("running", "waiting_for_capacity"):
        hand_on(tx, new.function_id, tx.move(new.run_id, "in", "off", now))

def debounce(tx: Transaction, function: Function, event: Event, now: float) -> bool:
    """Put off the function's one run until there is silence; this is its event now.

    False if the function does not ask for that.
    """
    if (quiet := function.asks.get("debounce")) is None:
        return False
    key = value_at(quiet.get("key"), event.data) or ""
    old = tx.find(Timer, kind="debounce", function_id=function.function_id, key=key)
    first_at = (old and old.first_at) or now
    due_at = min(now + max(quiet["periodMs"] / 1000, MIN_DEBOUNCE_S),
                 first_at + quiet.get("maxWaitMs", math.inf) / 1000)
    tx.save(Timer("debounce", function.function_id, key, "", due_at, event.seq,
                  first_at))
    return True

def hear(tx: Transaction, event: Event, now: float) -> None:
    """Wake the runs that wait for such an event; cancel those that it ends.

    Of the waits of one run that ask for the same, it answers the oldest.
    """
    for name, test in tx.listened_for(event.name):
        answered: set[str] = set()
        value = observed(test, event)
        waits = [] if value is None else tx.waits(name, test, value)
        for wait_id, run_id, step_id in waits:
            run = known(tx, Run, run_id)
            if run.status in TERMINAL or run_id in answered:
                continue
            if step_id is None:
                end_family(tx, run, f"event {event.name} ({event.event_id})", now)
                continue
            step = tx.find(Step, run_id=run_id, step_id=step_id)
            if step is not None and step.status == "waiting" and step.deadline > now:
                answered.add(run_id)
                tx.take(wait_id, event.seq)
                end_step(tx, step, "completed", now, output=event_object(event))
                wake(tx, run, now)

def wake(tx: Transaction, run: Run, now: float) -> None:
    """A wait of this run ended: it is due, unless it is at work, or fails just now."""
    woken = replace(run, woken_fence=run.fence, woken_seq=tx.last_seq)
    if run.status == "waiting" and run.settled_as == "yielded":
        woken = queued(woken, now)
    become(tx, run, woken, now)

def event_object(event: Event) -> Json:
    """An event as a wait returns it, in every SDK."""
    return join(in_camel(members(event, EVENT)))

def become(tx: Transaction, old: Run, new: Run, now: float) -> Run:
    """Store a run as a rule of chapter 5 made it; a change of status leaves its row."""
    new = replace(new, updated_at=now)
    tx.update_run(new)
    if new.status == old.status:
        return new
    assert new.status in NEXT[old.status], f"{new.run_id}: {old.status} -> {new.status}"
    if new.held is not None:
        change_places(tx, old, new, now)
    change: dict[str, Any] = {"status": new.status, "attempt": new.attempt}
    if new.status == "running":
        change["workerId"] = new.worker_id
    if new.error is not None and (new.status == "failed" or new.error != old.error):
        change["error"] = json.loads(new.error)
    verb = new.status if new.status in TERMINAL else "updated"
    tx.append("run", verb, new.run_id, change, now)
    if new.status in TERMINAL:
        tx.delete_waits(new.run_id)
        if new.parent_run_id is not None:
            child_ended(tx, new, now)
    return new

def known(tx: Queries, row: type[T], row_id: str) -> T:
    """The event, function, run, worker or group with this id. Raises NotFound."""
    noun = snake(row.__name__).strip("_")
    key = "name" if row is ConsumerGroup else f"{noun}_id"
    if (found := tx.find(row, **{key: row_id})) is None:
        noun = noun.replace("_", " ")
        raise NotFound(f"{noun} {row_id[:80]!r} " + (
            "not found" if row is not Worker
            else "never registered here: register it first"))
    return found

# --- Functions and workers ------------------------------------------------------------

def register_function(tx: Transaction, new: NewFunction,
                      now: float) -> tuple[Function, bool]:
    """The function as it is stored now, and whether it was not there before.

    Registering again what is there already changes nothing, and writes nothing: a
    thousand workers may start at once.
    """
    old = tx.find(Function, function_id=new.function_id)
    if old is not None and (old.config, old.retry) == (new.config, new.retry):
        return old, False
    known = (old.status, old.version + 1, old.created_at) if old else ("active", 1, now)
    function = Function(new.function_id, new.config, new.retry, *known, updated_at=now)
    tx.save_function(function)
    tx.forget_endpoints()
    tx.set_triggers(new.function_id, new.triggers)
    ticks = [Timer("tick", new.function_id, each.cron, each.event,
                   next_tick(each.cron, now)) for each in new.triggers if each.cron]
    tx.set_ticks(new.function_id, ticks)
    stand_in_line(tx, new.function_id)
    say_of_function(tx, "updated" if old else "registered", function, now)
    return function, old is None

def stand_in_line(tx: Transaction, function_id: str) -> None:
    """Admit its queued runs anew: the bounds of a function may have changed."""
    for line in tx.line_up(function_id):
        hand_on(tx, function_id, [line])

def say_of_function(tx: Transaction, verb: str, function: Function,
                    now: float) -> None:
    change = {"id": function.function_id, "version": function.version,
              "status": function.status}
    tx.append("function", verb, function.function_id, change, now)

def set_status(tx: Transaction, function_id: str, status: str, now: float) -> Function:
    """Only an active function starts runs; those that exist go on. Raises NotFound."""
    old = known(tx, Function, function_id)
    if old.status == status:
        return old
    function = replace(old, status=status, updated_at=now)
    tx.save_function(function)
    say_of_function(tx, "updated", function, now)
    return function

def delete_function(tx: Transaction, function_id: str, now: float) -> None:
    """It starts no more runs; those that exist go on, if a worker still carries it."""
    function = known(tx, Function, function_id)
    tx.delete_function(function_id)
    tx.forget_endpoints()
    stand_in_line(tx, function_id)
    say_of_function(tx, "deleted", function, now)

def register_worker(tx: Transaction, worker: Worker, now: float) -> None:
    """Remember a worker for good: one that ever registered is never told 404 again."""
    old = tx.find(Worker, worker_id=worker.worker_id)
    if old is not None and old == replace(worker, registered_at=old.registered_at):
        return
    if old is not None and old.function_ids != worker.function_ids:
        leave_actors(tx, old.worker_id, now)
        tx.touched.update(json.loads(old.function_ids))
    tx.save(worker)
    if old is None or not old.connected:
        tx.append("worker", "connected", worker.worker_id, {"status": "connected"}, now)

def note_worker(tx: Transaction, worker_id: str, connected: bool, now: float) -> None:
    """A worker was heard of again, or not for too long. Raises NotFound if unknown."""
    worker = known(tx, Worker, worker_id)
    if worker.connected != connected:
        tx.save(replace(worker, connected=int(connected)))
        leave_actors(tx, worker_id, now)
        tx.miss(worker_id, False)
        tx.touched.update(json.loads(worker.function_ids))  # which may have an endpoint
        verb = "connected" if connected else "disconnected"
        tx.append("worker", verb, worker_id, {"status": verb}, now)

def leave_actors(tx: Transaction, worker_id: str, now: float) -> None:
    """A worker seems to be gone: let the actors it had go to others."""
    if tx.delete_actors(worker_id):
        tx.touched.update(json.loads(known(tx, Worker, worker_id).function_ids))

def hung_up(tx: Transaction, worker_id: str, now: float) -> None:
    """Its poll broke off: until it asks again, its functions go to their endpoints."""
    leave_actors(tx, worker_id, now)
    tx.miss(worker_id, True)
    tx.touched.update(json.loads(known(tx, Worker, worker_id).function_ids))

# --- Offers: who would take work now --------------------------------------------------
# Nothing polls the database. A held poll is an offer, and so is a free push slot: as
# the last act of each batch the writer leases what is due to the offers. So an event
# reaches a waiting worker, or an endpoint, by the commit that records it. Between the
# loop (which makes and withdraws offers) and the writer (which takes them) stands one
# lock; a poll that times out and the batch that would serve it cannot both win.

@dataclass(slots=True, eq=False)
class Offer:
    """Room for up to `slots` runs at one worker, made by a held poll; or for one at the
    endpoint `url`, made by `Offers.slot`.

    `answer` is called once, on the event loop, after the commit that leased the jobs,
    with the jobs or with an error. A withdrawn offer is never answered. `acked` says
    that the worker takes the answer for its ack: its jobs have a whole lease.
    """

    worker_id: str
    slots: int
    answer: Callable[[list[Job] | IronflowError], None]
    acked: bool = False
    url: str = ""
    which: str = "done"  # steps: JS and Go would read a failed call as a success
    functions: list[str] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    error: IronflowError | None = None
    state: Literal["open", "taken", "over"] = "open"

class Offers:
    """All that stand, by function, oldest first. The writer alone looks at those.

    `push` gets each run that was leased to one of the `push_slots`, after the commit.
    """

    def __init__(self, limits: Limits, secrets: Secrets | None = None,
                 push_slots: int = 0,
                 push: Callable[[Any], None] = lambda got: None) -> None:
        self._limits, self.secrets = limits, secrets or Secrets()
        self.push_slots, self._push = push_slots, push
        self._pushing: Counter[str] = Counter()  # requests under way, by endpoint
        self._left: set[str] = set()  # functions that were left without a slot
        self._lock = threading.Lock()
        self._fresh: list[Offer] = []  # made since the last batch
        self._taken: list[Offer] = []  # by the batch that is not committed yet
        self._standing: dict[str, list[Offer]] = {}
        self.look_anew = False  # at all that is due: a batch was void, a file changed

    def add(self, offer: Offer) -> None:
        with self._lock:
            self._fresh.append(offer)

    def withdraw(self, offer: Offer) -> bool:
        """Whether the offer was still open; if not, its answer is on the way."""
        with self._lock:
            if was_open := offer.state == "open":
                offer.state = "over"
            return was_open

    def take(self, offer: Offer) -> bool:
        with self._lock:
            if offer.state == "open":
                offer.state = "taken"
                self._taken.append(offer)
            return offer.state == "taken"

    def open_slots(self, count: int) -> None:
        self.push_slots, self.look_anew = count, True

    def free_slots(self) -> int:
        return max(0, self.push_slots - self._pushing.total())

    def slot(self, url: str) -> Offer | None:
        """Room for one more request to an endpoint; else none, until `freed`.

        The last tenth is for endpoints that have few: a slow one may not take all.
        """
        with self._lock:
            free = self.free_slots()
            if self._pushing[url] >= 9 * free:
                return None
            self._pushing[url] += 1
            offer = Offer(shown(url), 1, self._push, acked=True, url=url,
                          which="told", state="taken")
            self._taken.append(offer)
            return offer

    def leave(self, function_id: str) -> None:
        """Look at it again when there is a free slot. The writer's alone: no lock."""
        self._left.add(function_id)

    def freed(self, url: str) -> None:
        """A request to an endpoint is over."""
        with self._lock:
            self._pushing[url] -= 1
            self._pushing += Counter()  # forgets those that have none

    def hand_out(self, tx: Transaction, now: float) -> None:
        """Lease due runs of the functions this batch touched, and to the new offers."""
        with self._lock:
            fresh = [offer for offer in self._fresh if offer.state != "over"]
            self._fresh = []
        for offer in fresh:
            try:
                worker = known(tx, Worker, offer.worker_id)
            except NotFound as error:
                offer.error = error
                self.take(offer)
                continue
            tx.miss(offer.worker_id, False)
            offer.functions = json.loads(worker.function_ids)
            if '"runtime":"python-' in worker.version:
                offer.which = "told"
            for function_id in offer.functions:
                self._standing[function_id] = [*self.standing(function_id), offer]
            tx.touched.update(offer.functions)
        pushed = tx.endpoints_of_functions() if self.push_slots else {}
        if self.look_anew:
            self.look_anew = False
            tx.touched.update(self._standing, pushed)
        if self._left and self.free_slots():
            tx.touched |= self._left
            self._left.clear()
        wanted = [f for f in tx.touched if f in pushed or self._standing.get(f)]
        while wanted and lease_to_offers(tx, self, wanted, self._limits, now):
            pass  # some went to workers of their own: perhaps there is room for others

    def standing(self, function_id: str) -> list[Offer]:
        return [offer for offer in self._standing.get(function_id, ())
                if offer.state != "over" and len(offer.jobs) < offer.slots]

    def room(self, function_ids: list[str]) -> int:
        able = {offer for f in function_ids for offer in self.standing(f)}
        return sum(offer.slots for offer in able)

    def best_for(self, function_id: str, worker_id: str | None) -> Offer | None:
        """The one with the fewest jobs so far, oldest first; it is taken now."""
        able = sorted((offer for offer in self.standing(function_id)
                       if worker_id in (None, offer.worker_id)),
                      key=lambda offer: len(offer.jobs))
        return next(filter(self.take, able), None)

    def committed(self) -> list[Offer]:
        """Those that this batch filled; they stand no longer."""
        filled, self._taken = self._taken, []
        for offer in filled:
            offer.state = "over"
        return filled

    def rolled_back(self) -> None:
        """The batch is void: those it filled stand again, as new ones."""
        self.look_anew = True
        void, self._taken = self._taken, []
        for offer in void:
            if offer.url:
                self.freed(offer.url)
                continue
            offer.jobs, offer.error, offer.state = [], None, "open"
            self.add(offer)

def lease_to_offers(tx: Transaction, offers: Offers, functions: list[str],
                    limits: Limits, now: float) -> bool:
    """Lease due runs of `functions` to the offers that stand, the longest due first.

    Returns whether it leased some and left others out.
    """
    some, others, due = False, False, []
    room, asked = offers.room(functions), dict[str, tuple[Any, str, dict[str, str]]]()
    for function_id in functions:
        function = tx.find(Function, function_id=function_id)
        names = function.asks.get("secrets", []) if function else []
        secrets, url = offers.secrets.of(names), where_to_push(tx, function)
        asked[function_id] = function, url, secrets
        workers = [offer.worker_id for offer in offers.standing(function_id)]
        most = offers.free_slots() + 1 if url else room
        if len(secrets) == len(names) and (url or workers):  # else its runs wait
            due.append(tx.due_runs(function_id, None if url else workers, most))
            if url and len(due[-1]) == most:
                offers.leave(function_id)
    for run in heapq.merge(*due, key=lambda run: (run.due_at, run.run_id)):
        function, url, secrets = asked[run.function_id]
        bound_to = None if url else tx.worker_of_actor(run)
        offer = (slot_at(tx, offers, url, run.function_id, now) if url else
                 offers.best_for(run.function_id, bound_to))
        if offer is None:
            others |= not url
            continue
        some = True
        hold_s = limits.lease_s if offer.acked else limits.reservation_s
        held = become(tx, run, leased(
            run, offer.worker_id, tx.ids.token(), math.inf if url else hold_s,
            offer.acked, now), now)
        if run.actor_id is not None and bound_to is None and not url:
            tx.bind_actor(held)
        event = tx.find(Event, seq=run.event_seq)
        assert event is not None, f"{run.run_id} lost its trigger"  # a foreign key ...
        offer.jobs.append(Job(held, event, tx.steps(run.run_id, offer.which),
                              tx.next_sequence(run.run_id), function, tx.last_seq,
                              secrets))
    return some and others

# --- Pushes ---------------------------------------------------------------------------
# A run that is pushed has no lease that ends: its holder is this process, which knows
# when the request is over; and after a crash of its own, that all of them are.

def shown(url: str) -> str:
    """A URL for people; what stands in its query may be a secret."""
    return url.partition("?")[0]

def where_to_push(tx: Transaction, function: Function | None) -> str:
    """The endpoint that may take runs of a function now: no worker carries it, and the
    breaker is not open."""
    if function is None or not function.endpoint or tx.carries(function.function_id):
        return ""
    endpoint = tx.find(Endpoint, url=function.endpoint)
    return "" if endpoint and endpoint.open_until else function.endpoint

def slot_at(tx: Transaction, offers: Offers, url: str, function_id: str, now: float
            ) -> Offer | None:
    """Room for a run at an endpoint. Of one that is half open, for one run; should that
    not be heard of, for one more after the same time."""
    endpoint = tx.find(Endpoint, url=url) or Endpoint(url)
    if endpoint.open_until:
        return None
    if (offer := offers.slot(url)) is None:
        offers.leave(function_id)
    elif endpoint.open_s:
        tx.save(replace(endpoint, open_until=now + endpoint.open_s))
    return offer

def push_ended(tx: Transaction, job: Job, said: Report | None, reached: bool,
               limits: Limits, now: float) -> None:
    """What came of a push, for its run and for the breaker of its endpoint.

    `said` is the endpoint's outcome; or if that was not `reached`, why: that spends no
    attempt while the breaker is open. A run that ended meanwhile is left alone; without
    a word (nobody wants it any more) there is but a free slot.
    """
    if said is None or job.function is None:
        return
    endpoint = tx.find(Endpoint, url=job.function.endpoint)
    if reached and endpoint is not None:
        tx.delete_endpoint(endpoint.url)
        if endpoint.open_s:
            say_of_endpoint(tx, "closed", endpoint.url, {}, now)
    elif not reached and tx.functions_at(job.function.endpoint):
        old = endpoint or Endpoint(job.function.endpoint)
        breaker = job.function.asks.get("circuitBreaker", {})
        new = struck(old, breaker, job.seq, tx.last_seq, now)
        tx.save(new)
        if new.since != old.since:
            say_of_endpoint(tx, "opened", new.url, {
                "failures": new.failures, "error": said.error["message"],
                "openUntil": to_rfc3339(now + new.open_s)}, now)
    run = tx.find(Run, run_id=job.run.run_id)
    if run is None or (run.fence, run.status) != (job.run.fence, "running"):
        return
    if reached or endpoint is None or not endpoint.open_s:
        report(tx, run.job_id, said, limits, now)
    else:
        error = {name: said.error[name] for name in ("message", "code")}
        become(tx, run, queued(replace(unleased(run), error=dumps(error)), now), now)

def say_of_endpoint(tx: Transaction, what: str, url: str, change: dict[str, Any],
                    now: float) -> None:
    """Its breaker opened or closed: the functions behind it are told."""
    for function_id in tx.functions_at(url):
        tx.touched.add(function_id)
        about = {"id": function_id, "endpointUrl": shown(url)} | change
        tx.append("function", f"breaker_{what}", function_id, about, now)

def resume(tx: Transaction, limits: Limits, now: float) -> float:
    """At start, before the first slot: what was under way when this server died."""
    for run in tx.pushed_runs():
        become(tx, run, queued(unleased(run), now), now)
    tx.recall_deliveries()
    return tx.next_instant()

# --- Reports --------------------------------------------------------------------------

def report(tx: Transaction, job_id: str, said: Report, limits: Limits,
           now: float) -> None:
    """What a worker says of its run: ack, progress, completed, failed or yielded.

    The same final report twice is answered the same way and changes nothing. Raises
    NotFound for a run never heard of, StaleFence and RunNotRunning as `check_fence`.
    """
    run_id, fence = run_and_fence(job_id)
    if (run := tx.find(Run, run_id=run_id)) is None:
        raise NotFound(f"job {job_id[:80]!r} belongs to no run of this journal")
    if run.settled_fence == said.fence and run.settled_as == said.status:
        return
    if fence is not None and fence != said.fence:
        raise StaleFence(f"job {job_id} is fence {fence}, this report carries "
                         f"{said.fence}")
    check_fence(run, said)
    held = renewed(run, limits.lease_s, now)
    if run.status != "running":  # the lease had ended, nobody took it: it is back
        run = become(tx, run, held, now)
    if said.status == "ack":
        become(tx, run, held, now)
        return
    try:
        if record_steps(tx, held, said, limits, now):
            held = replace(held, lost_leases=0)
        if said.status != "progress":
            held = settle(tx, held, said, limits, now)
    except Unkept as why:  # refused, it would be dropped, and the run go round for ever
        how = "failed" if said.status == "progress" else said.status
        held = ended_in_failure(settled(held, how), failure(*why.args), now)
    become(tx, run, held, now)

class Unkept(Exception):
    """A code, and a sentence: why this report ends its run in failure."""

def record_steps(tx: Transaction, run: Run, said: Report, limits: Limits,
                 now: float) -> int:
    """Keep reported steps for good; how many are new. Raises Unkept.

    A step recorded as completed stays as it is, whatever is said of it later: replays
    have been built on its output. A failed one gives way to the next try's row.
    """
    fresh, following = 0, tx.next_sequence(run.run_id)
    for i, step in enumerate(said.steps):
        check_output(f"the output of step {step.name!r}", step.output, limits)
        old = tx.find(Step, run_id=run.run_id, step_id=step.step_id)
        if old is not None and old.status == "completed":
            continue
        if old is None:
            check_room(following, step.name, limits)
        sequence = old.sequence if old else max(following, (said.step_offset or 0) + i)
        following = max(following, sequence + 1)
        fresh += 1
        keep_step(tx, old, Step(
            **columns_of(replace(step, ended_at=step.ended_at or now)),
            run_id=run.run_id, sequence=sequence, attempt=run.attempt,
            created_at=old.created_at if old else now, updated_at=now))
    return fresh

def keep_step(tx: Transaction, old: Step | None, step: Step) -> Step:
    """Store a step; subscribers hear `created` once, then how it ended."""
    tx.save(step)
    run_id, step_id, at = step.run_id, step.step_id, step.updated_at
    change: dict[str, Any] = {"status": step.status, "attempt": step.attempt}
    if step.status == "failed":  # the next try will have times of its own
        change["startedAt"] = step.started_at and to_rfc3339(step.started_at)
    if old is None:
        tx.append("step", "created", run_id, change, at, step_id)
    if step.status == "failed":
        change |= {"error": json.loads(step.error or "null"),
                   "endedAt": step.ended_at and to_rfc3339(step.ended_at),
                   "durationMs": step.duration_ms}
    if step.status not in PENDING:
        verb = "updated" if step.status == "timed_out" else step.status
        tx.append("step", verb, run_id, change, at, step_id)
    return step

def check_output(what: str, output: Json | None, limits: Limits) -> None:
    if (size := len((output or "").encode())) > (limit := limits.step_bytes):
        raise Unkept("STEP_OUTPUT_TOO_LARGE", (
            f"{what} is {size} bytes, the limit is {limit}: keep large results "
            "elsewhere and return where they are, or start the server with a larger "
            "--max-step-bytes"))

def check_room(sequence: int, name: str, limits: Limits) -> None:
    if sequence >= limits.steps:
        raise Unkept("TOO_MANY_STEPS", (
            f"step {name!r} is one more than the {limits.steps} that a run may have: "
            "split the work, or start the server with a larger --max-steps"))

def settle(tx: Transaction, run: Run, said: Report, limits: Limits, now: float) -> Run:
    """What becomes of a run whose worker let go of it. Raises Unkept."""
    if said.status == "failed":
        return attempt_failed(run, said.error, now)
    if said.status == "completed":
        check_output("the output of the run", said.output, limits)
        return completed(run, said.output, now)
    run = settled(run, "yielded")
    for wish in said.yields:
        step = tx.find(Step, run_id=run.run_id, step_id=wish.step_id)
        if step is None:
            step = begin_step(tx, run, wish, limits, now)
            if step.status not in PENDING:
                run = replace(run, woken_fence=run.fence, woken_seq=tx.last_seq)
        elif step.status == "failed" and run.woken_fence != run.fence:
            # it failed before this lease: JS and Go are not told, see `Offer`
            cause = json.loads(step.error or "{}").get("message", "it failed")
            raise Unkept("INVOKE_FAILED", f"step {step.name!r}: {cause}")
        elif step.status not in PENDING:
            run = replace(run, woken_fence=run.fence)
    if run.woken_fence == run.fence:  # something ended that the worker did not know of
        return queued(run, now)
    return wait_on(tx, run, now)

# --- Waits: sleeps, events, other runs ------------------------------------------------
# Each is a step that is pending until it ends by what it waits for, or by its deadline.
# Branches yield one at a time, and a replay yields again what is pending: such a step
# keeps its deadline, and one that is over makes the run due at once.

PENDING = ("sleeping", "waiting")
SLICE = 50  # events looked at in one statement: each may be a mebibyte
MIN_DEBOUNCE_S = 1.0

def begin_step(tx: Transaction, run: Run, wish: Yield, limits: Limits,
               now: float) -> Step:
    """The row of what a run waits for from now on. Raises Unkept."""
    sequence, asleep = tx.next_sequence(run.run_id), wish.kind == "sleep"
    check_room(sequence, wish.name, limits)
    if wish.kind not in YIELDS:
        raise Unkept("UNSUPPORTED_YIELD", (
            f"step {wish.name!r} yielded {wish.kind!r}, which is not supported by this "
            "server: the run ends here"))
    kind = wish.kind.removesuffix("_async")
    step = Step(
        wish.step_id, wish.name, kind, "sleeping" if asleep else "waiting", output=None,
        error=None, duration_ms=None, compensation_for=None, started_at=now,
        ended_at=None, run_id=run.run_id, sequence=sequence, attempt=run.attempt,
        created_at=now, updated_at=now, sleep_until=wish.until if asleep else None,
        wait_timeout=None if asleep else now + wish.timeout_s)
    if asleep:
        return keep_step(tx, None, step)
    if kind == "invoke_function":
        return begin_child(tx, run, wish, step, limits, now)
    step = replace(step, wait_event_name=wish.target, input=wish.input)
    return begin_to_listen(tx, run, wish, keep_step(tx, None, step), now)

def begin_child(tx: Transaction, run: Run, wish: Yield, step: Step, limits: Limits,
                now: float) -> Step:
    """Start the run that a step asks for, and wait for its end if it says so."""
    event = NewEvent(wish.target, wish.input or "null", source="invoke",
                     subject=run.run_id)
    check_output(f"the input of {wish.target!r}", event.data, limits)
    try:
        function = the_named(tx, event)
    except IronflowError as error:
        keep_step(tx, None, step)
        return invoke_failed(tx, step, "not_found", error.message, now)
    child = tx.append_event(event, tx.ids.new("evt", now), now)
    child_id = start_run(tx, function, child, now, (run.run_id, step.step_id))
    step = keep_step(tx, None, replace(step, child_run_id=child_id))
    if wish.kind == "invoke_function":
        return step
    return end_step(tx, step, "completed", now, output=dumps({"run_id": child_id}))

def invoke_failed(tx: Transaction, step: Step, status: str, cause: str,
                  now: float) -> Step:
    how = {"timed_out": "did not end in time", "not_found": "could not be started",
           "cancelled": "was cancelled"}
    sentence = f"function {step.name!r} {how.get(status, status)}: {cause}"
    return end_step(tx, step, "failed", now, error=dumps({
        "message": sentence, "function_id": step.name, "cause": cause,
        "child_run_id": step.child_run_id or "", "status": status}))

def child_ended(tx: Transaction, child: Run, now: float) -> None:
    """Tell the parent that waits for it; one that has gone on does not care."""
    parent = tx.find(Run, run_id=child.parent_run_id)
    step = tx.find(Step, run_id=child.parent_run_id, step_id=child.parent_step_id)
    if parent is None or step is None or step.status != "waiting" or (
            parent.status in TERMINAL):
        return
    if child.status == "completed":
        end_step(tx, step, "completed", now, output=child.output)
    else:
        cause = json.loads(child.error or "{}").get("message") or child.status
        invoke_failed(tx, step, child.status, cause, now)
    wake(tx, parent, now)

def begin_to_listen(tx: Transaction, run: Run, wish: Yield, step: Step,
                    now: float) -> Step:
    """Wait for an event, unless its answer came before the question."""
    try:
        test, value = condition(wish.match, wish.match_value, tx.input_of(run))
    except InvalidInput as error:
        raise Unkept("UNSUPPORTED_MATCH", f"step {step.name!r}: {error}") from None
    event, _ = early_answer(tx, run, wish)
    if value is not None:  # else no event will ever do
        tx.insert_wait(run.run_id, step.step_id, wish.target, test, value,
                       event.seq if event else None)
    if event is None:
        return step
    return end_step(tx, step, "completed", now, output=event_object(event))

def early_answer(tx: Queries, run: Run, wish: Yield) -> tuple[Event | None, int]:
    """The event that answers a wait already, and up to which `seq` there is no other.

    It comes after the one that an equal wait took; else after the run's trigger if it
    has to match, or after the run's last wait ended if any will do. Whatever comes
    while an equal wait is pending belongs to that.
    """
    test, value = condition(wish.match, wish.match_value, tx.input_of(run))
    taken = tx.taken(run.run_id, wish.target, test, value)
    if value is None or None in taken:
        return None, wish.seen
    begin = run.event_seq if wish.match else run.woken_seq or run.event_seq
    seen = max(max((seq for seq in taken if seq), default=begin), wish.seen)
    while events := tx.events_after(wish.target, seen, SLICE):
        for event in events:
            if matches(wish.target, event.name) and observed(test, event) == value:
                return event, event.seq - 1
        seen = events[-1].seq
    return None, seen

def look_back(journal: Queries, run_id: str, said: Report) -> Report:
    """Look for early answers where it holds up nobody; the rule looks only beyond."""
    run, wishes = journal.find(Run, run_id=run_id), said.yields
    with contextlib.suppress(InvalidInput):  # for the rule to say
        wishes = [wish if run is None or wish.kind != "wait_for_event" else
                  replace(wish, seen=early_answer(journal, run, wish)[1])
                  for wish in said.yields]
    return replace(said, yields=wishes)

def end_step(tx: Transaction, step: Step, status: StepStatus, now: float,
             output: Json | None = None, error: Json | None = None) -> Step:
    return keep_step(tx, step, replace(step, status=status, output=output, error=error,
                                       ended_at=now, updated_at=now))

def wait_on(tx: Transaction, run: Run, now: float) -> Run:
    """What a run that let go does now: it waits for the next deadline of its steps,
    is due because of one that is over, or failed because nothing answered a wait."""
    deadlines, over = [], False
    for step in tx.steps(run.run_id, "pending"):
        if step.deadline > now:
            deadlines.append(step.deadline)
            continue
        over = True
        if step.type == "sleep":
            end_step(tx, step, "completed", now, output="null")
        elif step.type == "invoke_function":
            invoke_failed(tx, step, "timed_out", "it goes on", now)
        else:
            end_step(tx, step, "timed_out", now)
            sentence = (f"wait for event {step.wait_event_name!r} timed out (step "
                        f"{step.name!r})")
            return ended_in_failure(run, failure("WAIT_TIMEOUT", sentence), now)
    if over or not deadlines:
        return queued(replace(run, woken_fence=run.fence, woken_seq=tx.last_seq), now)
    return waiting(run, min(deadlines))

# --- Consumer groups ------------------------------------------------------------------

ACK_S = 30.0  # after which a message goes to another member

def create_group(tx: Transaction, new: ConsumerGroup, now: float) -> ConsumerGroup:
    """A group that begins with what comes from now on. Raises AlreadyExists."""
    if tx.find(ConsumerGroup, name=new.name) is not None:
        raise AlreadyExists(f"consumer group {new.name!r} exists: update it, or choose "
                            "another name")
    return join_group(tx, new, now)

def join_group(tx: Transaction, wanted: ConsumerGroup, now: float) -> ConsumerGroup:
    """The group that a member joins; a new one, if there is none of its name.

    Raises InvalidInput if it watches something else.
    """
    group = tx.find(ConsumerGroup, name=wanted.name)
    if group is None:
        begin = tx.last_seq if wanted.position < 0 else wanted.position
        group = replace(wanted, group_id=tx.ids.new("grp", now), position=begin,
                        created_at=now, updated_at=now)
        tx.save(group)
    if wanted.pattern != group.pattern or wanted.filter not in ("", group.filter):
        raise InvalidInput(
            f"consumer group {group.name!r} watches {group.pattern!r}"
            + f" with the filter {group.filter!r}" * bool(group.filter)
            + ": subscribe with these, or name another group")
    return group

def update_group(tx: Transaction, name: str, changes: dict[str, Any], now: float
                 ) -> ConsumerGroup:
    group = replace(known(tx, ConsumerGroup, name), **changes, updated_at=now)
    tx.save(group)
    tx.rung.add(name)
    return group

def delete_group(tx: Transaction, name: str, now: float) -> None:
    known(tx, ConsumerGroup, name)
    tx.delete_group(name)
    tx.rung.add(name)

def deal(tx: Transaction, name: str, group_id: str, seqs: list[int],
         members: list[str], now: float) -> tuple[list[Delivery], int]:
    """Deal messages out to members, each to who has the fewest: those that are due
    again, then new ones. What was dealt, and the group's position.

    Raises NotFound, also if the name is another group's now.
    """
    group = known(tx, ConsumerGroup, name)
    if group.group_id != group_id:
        raise NotFound(f"consumer group {group_id} not found")
    held = tx.held_by_members(name)
    room = group.max_inflight - held.total()
    dealt = tx.due_deliveries(name, max(room, 0))
    new = [seq for seq in seqs if seq > group.position][: max(room - len(dealt), 0)]
    dealt += [Delivery(name, seq) for seq in new]
    for i, each in enumerate(dealt):
        member = min(members, key=lambda member: held[member])
        held[member] += 1
        dealt[i] = replace(each, state="out", member=member, due_at=now + ACK_S)
        tx.save(dealt[i])
    if new:
        tx.save(group := replace(group, position=new[-1]))
    return dealt, group.position

def acked(tx: Transaction, name: str, seqs: list[int], how: str, delay_s: float | None,
          now: float) -> None:
    """Members are done with messages, or, by nak, want them again later. That counts
    also when it is late, a nak while somebody has the message. Raises NotFound."""
    group = known(tx, ConsumerGroup, name)
    if delay_s is None:
        delay_s = group.redeliver_delay_ms / 1000
    for seq in seqs:
        found = tx.find(Delivery, name=name, seq=seq)
        if found is None or found.state == "dead":
            continue
        if how != "nak":
            tx.delete_delivery(found)
        elif found.state == "out":
            missed(tx, group, found, now + delay_s, now)
    tx.rung.add(name)

def acked_event(tx: Transaction, name: str, event_id: str, how: str,
                delay_s: float | None, now: float) -> None:
    acked(tx, name, tx.seqs_of(event_id), how, delay_s, now)

def missed(tx: Transaction, group: ConsumerGroup, delivery: Delivery, due_at: float,
           now: float) -> None:
    """A delivery came to nothing: again at an instant, or never."""
    misses, state = delivery.misses + 1, "due" if due_at <= now else "later"
    if misses > group.max_redeliveries:
        state, due_at = "dead", now
    tx.save(replace(delivery, misses=misses, state=state, due_at=due_at))
    tx.rung.add(group.name)

def member_left(tx: Transaction, name: str, member: str, now: float) -> None:
    """What it held is due again."""
    if (group := tx.find(ConsumerGroup, name=name)) is not None:
        for each in tx.deliveries_to(name, member):
            missed(tx, group, each, now, now)

def revive(tx: Transaction, name: str, event_ids: list[str] | None, now: float) -> int:
    """Deal dead letters out again, as if they were new: all, or those; how many."""
    known(tx, ConsumerGroup, name)
    wanted = None if event_ids is None else {
        seq for event_id in event_ids for seq in tx.seqs_of(event_id)}
    dead = [each for each in tx.dead_letters(name, 0, -1)
            if wanted is None or each.seq in wanted]
    for each in dead:
        tx.save(replace(each, state="due", misses=0, due_at=now))
    tx.rung.add(name)
    return len(dead)

# --- Time, and people -----------------------------------------------------------------

def heartbeat(tx: Transaction, worker_id: str, job_ids: list[str], limits: Limits,
              now: float) -> None:
    """Renew the leases of the jobs a worker lists, those past half their length.

    Only those it lists: a worker drops a job from the list to let its lease end. A
    young lease is left alone, so that a storm of heartbeats writes nothing.
    """
    known(tx, Worker, worker_id)
    for run_id, fence in map(run_and_fence, job_ids):
        run = tx.find(Run, run_id=run_id)
        if run is None or run.lease_token is None or run.worker_id != worker_id:
            continue
        young = run.acked and (run.lease_until or 0.0) - now > limits.lease_s / 2
        if fence in (None, run.fence) and not young:
            become(tx, run, renewed(run, limits.lease_s, now), now)

def give_back(tx: Transaction, run_id: str, fence: int, sent: bool, limits: Limits,
              now: float) -> None:
    """The worker was seen to vanish: the run is due again at once.

    Of a job that was sent, only until its ack: from then on it may be worked on.
    """
    run = tx.find(Run, run_id=run_id)
    if run is None or (run.fence, run.status) != (fence, "running"):
        return
    if not (sent and run.acked):
        become(tx, run, lease_ended(run, limits.lost_leases, now), now)

def turn_clock(tx: Transaction, limits: Limits, now: float) -> float:
    """Do what is due at `now`; the instant at which to come back."""
    for run in tx.overdue("running", now):
        become(tx, run, lease_ended(run, limits.lost_leases, now), now)
        leave_actors(tx, run.worker_id or "", now)
    for run in tx.overdue("waiting", now):
        run = known(tx, Run, run.run_id)  # one before it may have woken it
        if run.status == "waiting":
            retry = run.settled_as == "failed"
            become(tx, run, queued(run, now) if retry else wait_on(tx, run, now), now)
    emitted: set[tuple[str, str]] = set()
    for timer in tx.overdue_timers(now):
        key = {"function_id": timer.function_id, "key": timer.key, "event": timer.event}
        if tx.find(Timer, kind=timer.kind, **key) == timer:  # not moved by a tick
            strike(tx, timer, emitted, now)
    for function_id, kind, value in tx.free_gates(now):
        hand_on(tx, function_id, [(kind, value)])
    for endpoint in tx.overdue_endpoints(now):
        tx.save(replace(endpoint, open_until=None))
        tx.touched.update(tx.functions_at(endpoint.url))
    for each in tx.overdue_deliveries(now):
        if each.state == "out":
            missed(tx, known(tx, ConsumerGroup, each.name), each, now, now)
        else:
            tx.save(replace(each, state="due"))
            tx.rung.add(each.name)
    return tx.next_instant()

def strike(tx: Transaction, timer: Timer, emitted: set[tuple[str, str]], now: float
           ) -> None:
    """A debounce starts its run; a tick emits its event, once for all that were missed
    and for all functions that have the same trigger."""
    function = tx.find(Function, function_id=timer.function_id)
    if timer.kind == "tick":
        tx.save(replace(timer, due_at=next_tick(timer.key, now)))
        tick = (timer.key, timer.event)
        if function and function.status == "active" and tick not in emitted:
            emitted.add(tick)
            data = dumps({"scheduled_at": to_rfc3339(timer.due_at)})
            accept_event(tx, NewEvent(timer.event, data, source="cron"), now)
        return
    tx.delete_timer(timer)
    if function is not None and (event := tx.find(Event, seq=timer.seq)) is not None:
        start_run(tx, function, event, now)

def keep_leases(tx: Transaction, limits: Limits, now: float) -> float:
    """Each lease starts anew: the server was away, its workers were not.

    So too when somebody set the wall clock: what was leased between that and its
    discovery is in the new time, the rest in the old one, and no row says which.
    """
    tx.bring_forward(now)
    tx.renew_deliveries(now + ACK_S)
    tx.renew_leases(now + limits.lease_s, acked=True)
    tx.renew_leases(now + limits.reservation_s, acked=False)
    return tx.next_instant()

def cancel_run(tx: Transaction, run_id: str, reason: str, now: float) -> Run:
    """End a live run; a cancelled one is answered as it is.

    Raises NotFound, and FailedPrecondition if it completed or failed.
    """
    run = known(tx, Run, run_id)
    if run.status == "cancelled":
        return run
    if run.status in TERMINAL:
        raise FailedPrecondition(f"run {run_id} is {run.status}: only a live run can "
                                 "be cancelled")
    return end_family(tx, run, reason, now)

def end_family(tx: Transaction, run: Run, reason: str, now: float) -> Run:
    """End a live run, and with it the runs that it waits for, and theirs."""
    ended = become(tx, run, cancelled(run, reason, now), now)
    doomed = tx.children_waited_for(run.run_id)
    while doomed:
        child = doomed.pop()
        if child.status not in TERMINAL:
            why = f"its parent {child.parent_run_id} was cancelled"
            become(tx, child, cancelled(child, why, now), now)
            doomed += tx.children_waited_for(child.run_id)
    return ended

def forget_old(tx: Transaction, retain_s: float, after: int, now: float) -> int | None:
    """Delete a few rows older than that, from `after` on; where to go on, or None.

    Ended runs go with their steps, and then the events that started them. A live run
    stays, and so does its event; what the journal said of it goes.
    """
    if tx.delete_ended_runs(now - retain_s):
        return after
    return tx.delete_rows(now - retain_s, after)

# ======================================================================================
# 8. The journal
# ======================================================================================
# One SQLite file, and the only SQL of this program. `JournalFile` is the file in one
# thread: open it, execute a batch of rules in one transaction, commit. `Journal` puts a
# writer thread in front and readers beside it.
#
# Group commit: one disk flush costs as much as hundreds of inserts, so the writer takes
# whatever came in while it was flushing, runs all of it in one transaction, flushes
# once and answers everybody. No waiting window: with few callers the flush itself is
# short, with many it is the window.
#
# Nothing in this process may open or close the file, its -wal or -shm except through
# sqlite3: closing such a descriptor drops the POSIX locks that SQLite holds, a curious
# `sqlite3` that exits then takes itself for the last one and deletes the live WAL, and
# acknowledged rows are gone. Hence the sibling .lock file.
# In the schema, REAL is an instant in Unix seconds.

SCHEMA = """
-- What this file is: its own id, the environment it belongs to.
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

-- The one order of all that happened. Only appended to; `seq` only grows and is never
-- given twice. Rows of kind run and step hold what changed, their tables the rest.
CREATE TABLE journal (
  seq       INTEGER PRIMARY KEY AUTOINCREMENT,
  at        REAL NOT NULL,
  kind      TEXT NOT NULL,           -- event, run, step, function, worker
  name      TEXT NOT NULL,           -- the event's name; of the others, the verb
  subject   TEXT,                    -- run, function or worker; of an event, the run
                                     -- inside which it was emitted
  step      TEXT,                    -- step id
  data      TEXT NOT NULL,           -- JSON
  event_id  TEXT CHECK ((kind = 'event') = (event_id IS NOT NULL)),
  version   INTEGER, source TEXT, idempotency_key TEXT,
  metadata  TEXT                     -- JSON object
) STRICT;
CREATE INDEX journal_by_name ON journal (kind, name, seq);
CREATE INDEX journal_by_subject ON journal (subject, seq) WHERE subject IS NOT NULL;
CREATE UNIQUE INDEX journal_by_event ON journal (event_id) WHERE event_id IS NOT NULL;
CREATE UNIQUE INDEX journal_by_key ON journal (idempotency_key)
  WHERE idempotency_key IS NOT NULL;

-- The same under the names that subscribers use: SELECT * FROM topic ORDER BY seq.
CREATE VIEW topic AS
SELECT seq, datetime(at, 'unixepoch') AS utc,
       CASE kind
       WHEN 'event' THEN 'events:' || name
       WHEN 'step' THEN 'system.run.' || subject || '.step.' || step || '.' || name
       ELSE 'system.' || kind || '.' || subject || '.' || name END AS topic, data
  FROM journal;

-- A function, as it was last registered; `version` grows when that changed.
CREATE TABLE function (
  function_id  TEXT PRIMARY KEY,
  config       TEXT NOT NULL,        -- JSON, the members of the wire
  retry        TEXT NOT NULL,        -- JSON, copied into each run
  status       TEXT NOT NULL CHECK (status IN ('active', 'paused', 'archived')),
  version      INTEGER NOT NULL, created_at REAL NOT NULL, updated_at REAL NOT NULL
) STRICT;

-- Which events start it. A wild one has `*` or `>` among its segments.
CREATE TABLE function_trigger (
  event        TEXT NOT NULL,
  function_id  TEXT NOT NULL REFERENCES function,
  wild         INTEGER NOT NULL CHECK (wild IN (0, 1)),
  PRIMARY KEY (event, function_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX function_trigger_wild ON function_trigger (wild) WHERE wild = 1;
CREATE INDEX function_trigger_of ON function_trigger (function_id);

-- A run: one function working on one event. Only its newest lease may report (fence).
-- What the columns mean is said in the class `Run`.
CREATE TABLE run (
  run_id       TEXT PRIMARY KEY,
  function_id  TEXT NOT NULL, function_version INTEGER NOT NULL,
  event_seq    INTEGER NOT NULL REFERENCES journal (seq),  -- its input is there
  event_id     TEXT NOT NULL, event_name TEXT NOT NULL,
  retry        TEXT NOT NULL,        -- JSON
  created_at   REAL NOT NULL,
  status       TEXT NOT NULL CHECK (status IN ('waiting_for_capacity', 'running',
                 'waiting', 'paused', 'completed', 'failed', 'cancelled')),
  attempt      INTEGER NOT NULL DEFAULT 1 CHECK (attempt >= 1),
  fence        INTEGER NOT NULL DEFAULT 0,
  lease_token  TEXT,
  lease_until  REAL CHECK ((status = 'running') = (lease_until IS NOT NULL)),
  worker_id    TEXT, acked INTEGER NOT NULL DEFAULT 0,
  due_at       REAL CHECK (status <> 'waiting_for_capacity' OR due_at IS NOT NULL),
  lost_leases  INTEGER NOT NULL DEFAULT 0,
  settled_fence INTEGER, settled_as TEXT,
  output       TEXT, error TEXT,     -- JSON
  started_at   REAL, ended_at REAL, updated_at REAL NOT NULL,
  CHECK (status NOT IN ('completed', 'failed', 'cancelled', 'waiting', 'paused')
         OR lease_token IS NULL)
) STRICT;
CREATE INDEX run_due ON run (function_id, due_at, run_id)
  WHERE status = 'waiting_for_capacity';
CREATE INDEX run_timer ON run (due_at) WHERE status = 'waiting' AND due_at IS NOT NULL;
CREATE INDEX run_lease ON run (lease_until) WHERE status = 'running';
CREATE INDEX run_of_event ON run (event_seq);
CREATE INDEX run_of_function ON run (function_id, run_id);
CREATE INDEX run_of_status ON run (status, run_id);

-- A recorded piece of a run; `sequence` counts from 0 within it.
CREATE TABLE step (
  run_id       TEXT NOT NULL REFERENCES run,
  sequence     INTEGER NOT NULL CHECK (sequence >= 0),
  step_id      TEXT NOT NULL,        -- the SDK's, verbatim
  name         TEXT NOT NULL, type TEXT NOT NULL,
  status       TEXT NOT NULL CHECK (status IN ('completed', 'failed', 'sleeping',
                 'waiting', 'timed_out')),
  output       TEXT, error TEXT,     -- JSON
  attempt      INTEGER NOT NULL, duration_ms INTEGER, compensation_for TEXT,
  sleep_until  REAL CHECK (type = 'sleep' OR sleep_until IS NULL),
  started_at   REAL, ended_at REAL, created_at REAL NOT NULL, updated_at REAL NOT NULL,
  PRIMARY KEY (run_id, sequence),
  UNIQUE (run_id, step_id)
) STRICT;

-- A worker that ever registered; when it was last seen is known to the server alone.
CREATE TABLE worker (
  worker_id    TEXT PRIMARY KEY,
  hostname     TEXT NOT NULL,
  function_ids TEXT NOT NULL,        -- JSON list
  max_concurrent_jobs INTEGER NOT NULL,
  labels       TEXT NOT NULL, version TEXT NOT NULL,  -- JSON objects
  connected    INTEGER NOT NULL, registered_at REAL NOT NULL
) STRICT;
"""
TOPICS = """
-- A page of events is found without a look at what lies between them.
CREATE INDEX journal_events ON journal (seq) WHERE kind = 'event';

-- Kind `topic`: what programs published. Invocations are nobody's to watch.
DROP VIEW topic;
CREATE VIEW topic AS
SELECT seq, datetime(at, 'unixepoch') AS utc,
       CASE kind
       WHEN 'event' THEN 'events:' || name
       WHEN 'topic' THEN 'topic:' || name
       WHEN 'step' THEN 'system.run.' || subject || '.step.' || step || '.' || name
       ELSE 'system.' || kind || '.' || subject || '.' || name END AS topic, data
  FROM journal WHERE source IS NOT 'invoke';
"""
LANGUAGE = """
-- A child knows who invoked it.
ALTER TABLE run ADD COLUMN parent_run_id TEXT;
ALTER TABLE run ADD COLUMN parent_step_id TEXT;
ALTER TABLE run ADD COLUMN actor_id TEXT;
ALTER TABLE run ADD COLUMN held INTEGER CHECK (held IN (0, 1));
ALTER TABLE run ADD COLUMN woken_fence INTEGER;
ALTER TABLE run ADD COLUMN woken_seq INTEGER;
DROP INDEX run_due;
CREATE INDEX run_due ON run (function_id, due_at, run_id)
  WHERE status = 'waiting_for_capacity' AND held IS NOT 1;

-- The places that a run needs in the bounds of its function, for the value of each key.
CREATE TABLE place (
  run_id TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('lane', 'actor', 'gate')),
  function_id TEXT NOT NULL, value TEXT NOT NULL,
  state  TEXT NOT NULL CHECK (state IN ('in', 'line', 'off', 'passed')),
  due_at REAL NOT NULL,              -- in line since; a gate passed: taken until
  PRIMARY KEY (run_id, kind)
) STRICT, WITHOUT ROWID;
CREATE INDEX place_in ON place (function_id, kind, value, state, due_at, run_id);
CREATE INDEX place_passed ON place (due_at) WHERE state = 'passed';

ALTER TABLE step ADD COLUMN wait_event_name TEXT;
ALTER TABLE step ADD COLUMN wait_timeout REAL;
ALTER TABLE step ADD COLUMN child_run_id TEXT;
ALTER TABLE step ADD COLUMN input TEXT;                -- JSON

-- What runs listen for; without a step: what cancels them. `taken`: the answer's seq.
CREATE TABLE wait (
  wait_id  INTEGER PRIMARY KEY,
  run_id   TEXT NOT NULL REFERENCES run, step_id TEXT,
  event    TEXT NOT NULL, test TEXT NOT NULL, value TEXT NOT NULL,
  taken    INTEGER
) STRICT;
CREATE INDEX wait_for ON wait (event, test, value, wait_id) WHERE taken IS NULL;
CREATE INDEX wait_of ON wait (run_id);

-- What functions have to come: cron ticks, debounced events.
CREATE TABLE timer (
  kind     TEXT NOT NULL CHECK (kind IN ('tick', 'debounce')),
  function_id TEXT NOT NULL, key TEXT NOT NULL, event TEXT NOT NULL,
  due_at   REAL NOT NULL,
  seq      INTEGER REFERENCES journal (seq), first_at REAL,
  PRIMARY KEY (kind, function_id, key, event)
) STRICT, WITHOUT ROWID;
CREATE INDEX timer_due ON timer (due_at);
CREATE INDEX timer_of_event ON timer (seq) WHERE seq IS NOT NULL;

-- The worker that had the last run of each actor.
CREATE TABLE actor (
  function_id TEXT NOT NULL, actor_id TEXT NOT NULL, worker_id TEXT NOT NULL,
  PRIMARY KEY (function_id, actor_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX actor_at ON actor (worker_id);

-- A trigger may have a CEL expression ('' for none) that events must pass.
CREATE TABLE new_trigger (
  event TEXT NOT NULL, function_id TEXT NOT NULL REFERENCES function,
  expression TEXT NOT NULL, wild INTEGER NOT NULL CHECK (wild IN (0, 1)),
  PRIMARY KEY (event, function_id, expression)
) STRICT, WITHOUT ROWID;
INSERT INTO new_trigger SELECT event, function_id, '', wild FROM function_trigger;
DROP TABLE function_trigger;
ALTER TABLE new_trigger RENAME TO function_trigger;
CREATE INDEX function_trigger_wild ON function_trigger (wild) WHERE wild = 1;
CREATE INDEX function_trigger_of ON function_trigger (function_id);
"""
PUSH = """
-- Endpoints that requests did not reach, and their circuit breakers.
CREATE TABLE endpoint (
  url       TEXT PRIMARY KEY,
  failures  INTEGER NOT NULL,        -- in a row
  open_s    REAL NOT NULL,           -- 0: closed
  open_until REAL,                   -- unset while open_s is set: half open
  since     INTEGER NOT NULL         -- the journal's last seq when it was opened
) STRICT;
"""
STREAM = """
-- Kinds that are few among many are found without a look at what lies between them.
CREATE INDEX journal_of_kind ON journal (kind, seq)
  WHERE kind NOT IN ('event', 'run', 'step');

-- Up to here rows were deleted: nobody may resume from before.
INSERT INTO meta SELECT 'forgotten', coalesce(max(seq) - 1, 0) FROM journal new
 WHERE seq > 1 AND NOT EXISTS (SELECT 1 FROM journal WHERE seq = new.seq - 1);

-- Subscribers that share the messages of a pattern between them; `position` is the
-- last that was dealt out. What the columns mean is said in the class `ConsumerGroup`.
CREATE TABLE consumer_group (
  name         TEXT PRIMARY KEY, group_id TEXT NOT NULL,
  pattern      TEXT NOT NULL, filter TEXT NOT NULL,
  ack_mode     TEXT NOT NULL, backpressure TEXT NOT NULL,
  max_inflight INTEGER NOT NULL, max_redeliveries INTEGER NOT NULL,
  redeliver_delay_ms INTEGER NOT NULL,
  metadata     TEXT NOT NULL,        -- JSON object
  position     INTEGER NOT NULL,
  created_at   REAL NOT NULL, updated_at REAL NOT NULL
) STRICT;

-- What was dealt out and is not done: with a member, put off, due again, or given up.
CREATE TABLE delivery (
  name    TEXT NOT NULL REFERENCES consumer_group, seq INTEGER NOT NULL,
  state   TEXT NOT NULL CHECK (state IN ('out', 'later', 'due', 'dead')),
  member  TEXT NOT NULL, misses INTEGER NOT NULL,
  due_at  REAL NOT NULL,             -- out: ack missed then; dead: since
  PRIMARY KEY (name, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX delivery_due ON delivery (name, state, due_at, seq);
CREATE INDEX delivery_timer ON delivery (due_at) WHERE state IN ('out', 'later');
"""
MIGRATIONS = [SCHEMA, TOPICS, LANGUAGE, PUSH, STREAM]  # [n]: from version n to n + 1
APPLICATION_ID = 0x49524F4E  # "IRON", so that `file` and we know our own

BATCH_RULES, BATCH_BYTES = 500, 8 * MIB
QUEUE_BYTES = 64 * MIB
FOLD_BYTES, WAL_BYTES = 4 * MIB, 64 * MIB  # fold the log now and then; truncate it
IDLE_S = 1.0  # after the last write, until the log is folded into the file
FOREIGN_LOCK_S = 5  # how long somebody else may hold the write lock
READERS = 2
SCAN_ROWS = 50_000  # looked at for one page of a list, and counted for its total
SWEPT = 500  # old rows deleted in one transaction
LOOKED_AT, SLICE_BYTES = 1_000, 256 * KIB  # rows, and bytes found, in one `Slice`
BEHIND_AT_ONCE = 200  # timers handled in one transaction
PAGE_BYTES = 16 * MIB  # a page of a list ends early when it gets this large
ROWS_AT_ONCE = 50  # new rows in one statement
JOURNAL_ROW = ("seq", "at", "kind", "name", "subject", "step", "data", "event_id",
               "version", "source", "idempotency_key", "metadata")
RUN_ROW = ("run_id", "function_id", "function_version", "event_seq", "event_id",
           "event_name", "retry", "status", "created_at", "due_at", "updated_at",
           "parent_run_id", "parent_step_id", "actor_id", "held")

@lru_cache(maxsize=64)
def columns(row: Any, form: str = "{}", after: str = "") -> str:
    """The columns of a row, each in a form, from the one after `after` on."""
    names = column_names(row)
    return ", ".join(map(form.format, names[names.index(after) + 1 if after else 0 :]))

@lru_cache(maxsize=64)
def select(row: Any, *keys: str) -> str:
    """The statement that finds a row by some of its columns."""
    tests = " AND ".join(f"{key} = :{key}" for key in keys)
    return f"SELECT {columns(row)} FROM {table_of(row)} WHERE {tests}"

def table_of(row: Any) -> str:
    return "journal" if row is Event else snake(row.__name__).strip("_")

@lru_cache(maxsize=4 * ROWS_AT_ONCE)
def insert(table: str, names: tuple[str, ...], count: int = 1) -> str:
    marks = ", ".join([f"({', '.join('?' * len(names))})"] * count)
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES {marks}"

def with_ids(wanted: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Instants as the ids that are made then; `until` is included."""
    later_s = {"since": 0.0, "until": 0.001}
    return wanted | {name: Ids.first(prefix, wanted[name] + later_s[name])
                     for name in wanted.keys() & later_s.keys()}

class Queries:
    """What can be asked of the file. Each fetches all and closes its cursor at once."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def find(self, row: type[T], **key: Any) -> T | None:
        kind: Any = row
        found = self._db.execute(select(kind, *key), key).fetchone()
        return None if found is None else row(*found)

    def runs_by_id(self, run_ids: list[str]) -> list[Run]:
        found = [self.find(Run, run_id=run_id) for run_id in run_ids]
        return [run for run in found if run]

    def _rows(self, row: type[T], source: str, **params: Any) -> list[T]:
        """Rows of a table as the words of chapter 2: `source` is all after FROM."""
        kind: Any = row
        cursor = self._db.execute(f"SELECT {columns(kind)} FROM {source}", params)
        return [row(*values) for values in cursor.fetchall()]

    def _column(self, sql: str, **params: Any) -> list[Any]:
        return [value for value, in self._db.execute(sql, params).fetchall()]

    def _value(self, sql: str, **params: Any) -> Any:
        found = self._db.execute(sql, params).fetchone()
        return found[0] if found else None

    def meta(self, name: str) -> Any:
        return self._value("SELECT value FROM meta WHERE name = :name", name=name)

    def functions(self) -> list[Function]:
        return self._rows(Function, "function ORDER BY function_id")

    def endpoints(self) -> dict[str, Endpoint]:
        """Those that requests did not reach, by URL."""
        return {each.url: each for each in self._rows(Endpoint, "endpoint")}

    def connected_workers(self) -> list[Worker]:
        return self._rows(Worker, "worker WHERE connected = 1 ORDER BY registered_at")

    def held_runs(self) -> dict[str, int]:
        """How many runs each worker holds."""
        return dict(self._db.execute(
            "SELECT worker_id, count(*) FROM run WHERE status = 'running' GROUP BY 1"
        ).fetchall())

    def run_ids_of(self, event_seq: int) -> list[str]:
        """The runs that an event started, in the order in which it started them."""
        sql = "SELECT run_id FROM run WHERE event_seq = :seq ORDER BY run_id"
        return self._column(sql, seq=event_seq)

    def input_of(self, run: Run) -> Json:
        sql = "SELECT data FROM journal WHERE seq = :seq"
        return str(self._value(sql, seq=run.event_seq))

    EVENTS_BETWEEN = {
        "since": "seq >= (SELECT seq FROM journal WHERE event_id >= :since"
                 " ORDER BY event_id LIMIT 1)",
        "until": "seq <= (SELECT seq FROM journal WHERE event_id < :until"
                 " ORDER BY event_id DESC LIMIT 1)"}
    FROM_SOURCES = "instr(',' || :source || ',', ',' || source || ',') > 0"

    def events(self, wanted: dict[str, Any], look: Look) -> Page[Event]:
        """Events that match what is wanted: any of name (a part of it), names and
        source (with commas between them), since, until, search."""
        one = wanted.get("names", ",")
        one = "" if "," in one else one  # an index finds the events of one name
        by_index = ({"names": "name = :names"} if one else {}) | self.EVENTS_BETWEEN
        by_row = {"names": "instr(',' || :names || ',', ',' || name || ',')",
                  "name": "instr(name, :name)", "source": self.FROM_SOURCES,
                  "search": "instr(name || ' ' || event_id || ' ' || data, :search)"}

        def fetch(seq: int) -> tuple[Event, int]:
            (event,) = self._rows(Event, "journal WHERE seq = :seq", seq=seq)
            return event, len(event.data)

        index = "journal_by_name" if one else "journal_events"
        source = f"journal INDEXED BY {index} WHERE kind = 'event'"
        return self._look(look, source, "seq", by_index, by_row,
                          with_ids(wanted, "evt"), fetch)

    def event_names(self, wanted: dict[str, Any]) -> list[tuple[str, int, int]]:
        """Names among the newest SCAN_ROWS events between since and until: how many
        have each and are from one of the sources wanted, and how many have it."""
        span = "".join(f" AND {test}" for name, test in self.EVENTS_BETWEEN.items()
                       if name in wanted)
        test = self.FROM_SOURCES if "source" in wanted else "1"
        return self._db.execute(
            f"""
            SELECT name, sum({test}), count(*) FROM (
              SELECT name, source FROM journal INDEXED BY journal_events
               WHERE kind = 'event'{span} ORDER BY seq DESC LIMIT {SCAN_ROWS})
             GROUP BY name ORDER BY name
            """, with_ids(wanted, "evt")).fetchall()

    def runs(self, wanted: dict[str, Any], look: Look) -> Page[tuple[Run, Json, str]]:
        """Runs that match what is wanted, each as in `run_and_more`: any of event_id,
        status, function_id, statuses (with commas between them), since, until,
        search."""
        tests = {
            "event_id": "event_seq = (SELECT seq FROM journal"
                        " WHERE event_id = :event_id)",
            "status": "status = :status", "function_id": "function_id = :function_id"}
        best = next((name for name in tests if name in wanted), "")
        by_index = {best: tests.pop(best, ""), "since": "run_id >= :since",
                    "until": "run_id < :until"}
        by_row = tests | {
            "statuses": "instr(',' || :statuses || ',', ',' || status || ',')",
            "search": "instr(run_id || ' ' || function_id || ' ' || event_name,"
                      " :search)"}

        def fetch(run_id: str) -> tuple[tuple[Run, Json, str], int]:
            run, data, mode = run_and_more(self, run_id)
            return (run, data, mode), len(data) + len(run.output or "")

        return self._look(look, "run WHERE 1", "run_id", by_index, by_row,
                          with_ids(wanted, "run"), fetch)

    def _look(self, look: Look, source: str, key: str, by_index: dict[str, str],
              by_row: dict[str, str], wanted: dict[str, Any],
              fetch: Callable[[Any], tuple[T, int]]) -> Page[T]:
        """A page of what passes all tests that are `wanted`, newest first.

        Those `by_row` are tried on SCAN_ROWS rows and no more: there the page ends,
        perhaps empty, with a cursor to go on from; the count is of the newest so many.
        A page ends early, too, once it holds 16 MiB.
        """
        step, order = (">", "ASC") if look.newer else ("<", "DESC")
        whole = " AND ".join([source, *[by_index[n] for n in by_index if n in wanted]])
        part = whole if look.cursor is None else f"{whole} AND {key} {step} :cursor"
        tests = [by_row[n] for n in by_row if n in wanted and n not in by_index]
        judged = f"SELECT {key} AS found, {' AND '.join(tests) or 1} AS passes FROM"
        given = wanted | {"cursor": look.cursor, "limit": look.limit + 1,
                          "offset": look.offset}
        total, scanned = self._db.execute(
            f"""
            SELECT count(*) FILTER (WHERE passes), count(*)
              FROM ({judged} {whole} ORDER BY {key} DESC LIMIT {SCAN_ROWS})
            """, given).fetchone()
        keys = self._column(  # a subquery that has a LIMIT hands its rows on in order
            f"""
            SELECT found FROM ({judged} {part} ORDER BY {key} {order}
                                LIMIT {SCAN_ROWS if tests else -1})
             WHERE passes LIMIT :limit OFFSET :offset
            """, **given)
        page, size = list[T](), 0
        for found in keys[:look.limit]:
            row, weight = fetch(found)
            page.append(row)
            if (size := size + weight) > PAGE_BYTES:
                break
        cursor = keys[len(page) - 1] if len(page) < len(keys) else None
        if cursor is None and tests:  # the last row that was looked at, if more follow
            last = self._column(f"SELECT {key} FROM {part} ORDER BY {key} {order}"
                                f" LIMIT 2 OFFSET {SCAN_ROWS - 1}", **given)
            cursor = last[0] if len(last) == 2 else None
        return Page(page[::-1] if look.newer else page, total,
                    scanned == SCAN_ROWS, cursor)

    def topics(self, name: str | None = None) -> list[Topic]:
        """What programs published on: all topics, or one."""
        sql = f"""SELECT name, n, first, last,
                         (SELECT at FROM journal WHERE seq = first),
                         (SELECT at FROM journal WHERE seq = last)
                    FROM (SELECT name, count(*) n, min(seq) first, max(seq) last
                            FROM journal WHERE kind = 'topic'
                             {"" if name is None else "AND name = :name"}
                           GROUP BY name)"""
        return [Topic(*row) for row in self._db.execute(sql, {"name": name}).fetchall()]

    def active_runs(self) -> int:
        """Runs that are neither over nor paused."""
        return int(self._value("SELECT count(*) FROM run WHERE status IN"
                               " ('waiting_for_capacity', 'running', 'waiting')"))

    STEPS = {"all": "1", "done": "status = 'completed'",
             "told": "(status = 'completed' OR status = 'failed'"
                     " AND type = 'invoke_function')",
             "pending": "status IN ('sleeping', 'waiting')"}

    def steps(self, run_id: str, which: str = "all") -> list[Step]:
        """The recorded steps of a run, in sequence: all, those done, those pending;
        `told` are those done and the invokes that failed."""
        source = f"step WHERE run_id = :id AND {self.STEPS[which]} ORDER BY sequence"
        return self._rows(Step, source, id=run_id)

    def taken(self, run_id: str, event: str, test: str, value: str | None
              ) -> list[int | None]:
        """Of the waits of a run for the same: which event each took, None if none."""
        sql = """SELECT taken FROM wait WHERE run_id = :run_id AND step_id IS NOT NULL
                    AND event = :event AND test = :test AND value = :value"""
        return self._column(sql, run_id=run_id, event=event, test=test, value=value)

    def events_after(self, name: str, seq: int, limit: int) -> list[Event]:
        """Emitted events after a `seq`, oldest first: of a name; for a pattern, all."""
        index = "events" if is_wild(name) else "by_name"
        named = "" if is_wild(name) else "AND name = :name"
        return self._rows(Event, f"""
            journal INDEXED BY journal_{index} WHERE kind = 'event' {named}
            AND seq > :seq AND source IS NOT 'invoke' ORDER BY seq LIMIT :limit""",
            name=name, seq=seq, limit=limit)

    def next_ticks(self) -> dict[str, float]:
        """Of each function with a cron trigger, when it starts next."""
        return dict(self._db.execute("SELECT function_id, min(due_at) FROM timer"
                                     " WHERE kind = 'tick' GROUP BY 1").fetchall())

    @property
    def last_seq(self) -> int:
        sql = "SELECT seq FROM sqlite_sequence WHERE name = 'journal'"
        return int(self._value(sql) or 0)

    def check_since(self, seq: int) -> None:
        """Raises OutOfRange if what came after a `seq` is not all there."""
        first, last = int(self.meta("forgotten")) + 1, self.last_seq
        if not first - 1 <= seq <= last:
            raise OutOfRange(
                f"cannot go on after {seq}: this journal has {first} to {last}; "
                + (f"what was older is deleted, go on after {first - 1}" if seq < first
                   else "is it a restored backup? go on without a place"))

    def messages(self, interest: Interest, after: int, exact: bool = True) -> Slice:
        """What subscribers are told of the rows after a `seq`, so many at a time.

        Raises OutOfRange if some of those rows are deleted, and it has to be `exact`.
        """
        if exact:
            self.check_since(after)
        rows, seq = self._selected(interest, after)
        found, size = list[Message](), 0
        for row in rows:
            message = self.message(row)
            if passes(interest.filter, message):
                found.append(message)
                size += len(message.data)
            if size > SLICE_BYTES:
                return Slice(found, message.seq, False)
        return Slice(found, seq or self.last_seq, seq is None)

    def selected_before(self, interest: Interest, before: int
                        ) -> tuple[list[int], int | None]:
        """Of LOOKED_AT rows before a `seq`, newest first: those that an interest
        selects; how far back that went, None for the journal's begin. What retention
        left of older times has holes and is not replayed."""
        rows, seq = self._selected(interest, before, back=True)
        forgotten = int(self.meta("forgotten"))
        return [row[0] for row in rows if row[0] > forgotten and (
            not interest.filter or passes(interest.filter, self.message(row)))], seq

    ROW = "seq, at, kind, name, subject, step, NULL, event_id"  # data: if it is wanted

    def _selected(self, interest: Interest, seq: int, back: bool = False
                  ) -> tuple[list[tuple[Any, ...]], int | None]:
        """The rows beyond a `seq` that an interest selects, the nearest first, before
        its filter; up to where that looked, None if there was no more."""
        way, order = ("<", "DESC") if back else (">", "ASC")
        given: dict[str, Any] = {"seq": seq}
        spans = dict.fromkeys(span(each, i, given)
                              for i, each in enumerate(interest.patterns))
        some = f"AND seq {way} :seq ORDER BY seq {order} LIMIT {LOOKED_AT}"
        parts = [f"SELECT * FROM (SELECT {self.ROW} FROM journal {test} AND source"
                 f" IS NOT 'invoke' {some})" for test in spans]
        rows = self._db.execute(
            f"{' UNION '.join(parts)} ORDER BY seq {order} LIMIT {LOOKED_AT}", given
        ).fetchall()
        index = Index[int]()
        for each in interest.patterns:
            index.add(each, 0)
        return ([row for row in rows if index.find(dotted(topic_of(*row[2:6])))],
                rows[-1][0] if len(rows) == LOOKED_AT else None)

    def message(self, row: tuple[Any, ...]) -> Message:
        """What subscribers are told of a row of the journal."""
        seq, at, kind, name, subject, step_id, data = row[:7]
        if data is None:
            data = self._value("SELECT data FROM journal WHERE seq = :seq", seq=seq)
        if kind == "run" and (run := self.find(Run, run_id=subject)):
            data = run_message(run, self.input_of(run), name, json.loads(data), at)
        elif kind == "step" and (
            step := self.find(Step, run_id=subject, step_id=step_id)
        ):
            data = step_message(step, name, json.loads(data))
        return message_of(row, data)

    def compose(self, rows: list[tuple[Any, ...]]) -> list[Message]:
        return [self.message(row) for row in rows]

    def groups(self) -> list[ConsumerGroup]:
        return self._rows(ConsumerGroup, "consumer_group ORDER BY name")

    def dead_letters(self, name: str, after: int, limit: int) -> list[Delivery]:
        return self._rows(
            Delivery, "delivery WHERE name = :name AND state = 'dead' AND seq > :after"
            " ORDER BY seq LIMIT :limit", name=name, after=after, limit=limit)

    def messages_at(self, seqs: list[int]) -> list[Message]:
        """Those of rows that are not deleted."""
        sql = f"SELECT {self.ROW} FROM journal WHERE seq = :seq"
        rows = [self._db.execute(sql, {"seq": seq}).fetchone() for seq in seqs]
        return self.compose([row for row in rows if row])

class Transaction(Queries):
    """The verbs of one open transaction: the journal's contents page.

    Beside the rows it keeps notes for the batch's end: the functions that got due runs
    (`touched`), the runs that ended, the new rows of the journal, the consumer groups
    that have to look again (`rung`), and the earliest instant at which something falls
    due (`alarm`).

    New journal rows and new runs gather here until somebody could miss them, then go
    to SQLite many at a time: each statement hands the interpreter's lock to the loop
    and takes it back (measured: a tenth more single events with runs, a quarter more
    in arrays). Whoever adds a verb that reads the two tables flushes first.
    """

    def __init__(self, db: sqlite3.Connection, ids: Ids) -> None:
        super().__init__(db)
        self.ids = ids
        self._triggered: dict[str, list[tuple[Function, set[str]]]] = {}
        self._pushed: dict[str, str] | None = None
        self._carried: set[str] | None = None
        self._missing: set[str] = set()  # workers whose poll broke off
        self._heard: dict[str, set[str]] | None = None  # by event, the tests of waits
        self._gather()

    def begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        self.touched: set[str] = set()
        self.ended: list[str] = []
        self.rows: list[tuple[Any, ...]] = []
        self.rung: set[str] = set()
        self.alarm: float = math.inf
        self._gather()
        self._next_seq: int = super().last_seq + 1

    def _gather(self) -> None:
        self._new_rows: list[tuple[Any, ...]] = []  # of the journal
        self._new_keys: dict[str, Event] = {}  # the events among them that have one
        self._new_runs: dict[str, tuple[Any, ...]] = {}

    def forget(self) -> None:
        """After a rollback: what was remembered may have been read from lost rows."""
        self._triggered.clear()
        self._pushed = self._carried = self._heard = None
        self._gather()

    @property
    def last_seq(self) -> int:
        return self._next_seq - 1

    @property
    def written(self) -> int:
        """How many rows were written so far; grows with each, gathered or not."""
        return self._db.total_changes + len(self._new_rows) + len(self._new_runs)

    def flush(self) -> None:
        """Give what gathered to SQLite. Nothing may be read over its head."""
        rows, runs = self._new_rows, list(self._new_runs.values())
        self.rows += rows
        self._gather()
        gathered = (("journal", JOURNAL_ROW, rows), ("run", RUN_ROW, runs))
        for table, names, new in gathered:
            for i in range(0, len(new), ROWS_AT_ONCE):
                some = new[i : i + ROWS_AT_ONCE]
                values = [value for row in some for value in row]
                self._db.execute(insert(table, names, len(some)), values)

    def find(self, row: type[T], **key: Any) -> T | None:
        known: Any = self._new_keys.get(key.get("idempotency_key", ""))
        if row is Event and known is not None:
            return known  # type: ignore[no-any-return]
        if row is Run and key.get("run_id") in self._new_runs:
            self.flush()
        if self._new_rows and key.get("seq", 0) >= self._new_rows[0][0]:
            self.flush()
        return super().find(row, **key)

    def save(self, row: Function | Worker | Step | Timer | Endpoint | ConsumerGroup
             | Delivery) -> None:
        """A new row, or the same one later; the name and type of a step stay."""
        kind: Any = type(row)
        kept = key = column_names(kind)[0]
        if isinstance(row, Step):
            kept, key = "type", "run_id, step_id"
        elif isinstance(row, Timer):
            kept, key = "event", "kind, function_id, key, event"
            self.alarm = min(self.alarm, row.due_at)
            self.flush()  # the event that it refers to
        elif isinstance(row, Delivery):
            kept, key = "seq", "name, seq"
            if row.state in ("out", "later"):
                self.alarm = min(self.alarm, row.due_at)
        elif isinstance(row, Endpoint):
            self.alarm = min(self.alarm, row.open_until or math.inf)
        elif isinstance(row, Worker):
            self._carried = None
        changes = columns(kind, "{0} = excluded.{0}", kept)
        sql = insert(table_of(kind), column_names(kind))
        self._db.execute(f"{sql} ON CONFLICT ({key}) DO UPDATE SET {changes}",
                         list(columns_of(row).values()))

    def set_meta(self, name: str, value: str) -> None:
        self._db.execute("INSERT INTO meta VALUES (?, ?)", (name, value))

    def append(self, kind: str, verb: str, subject: str, change: Any, now: float,
               step: str | None = None) -> None:
        """Say in the journal what became of a run, step, function or worker; `change`
        is an object, or JSON already."""
        text = change if isinstance(change, str) else dumps(change)
        self._add_row(now, kind, verb, subject, step, text)

    def append_event(self, event: NewEvent, event_id: str | None,
                     now: float) -> Event:
        """Record an event; what goes to a topic has no id but its `seq`."""
        seq = self._add_row(now, event.kind, event.name, event.subject, None,
                            event.data, event_id, event.version, event.source,
                            event.idempotency_key, event.metadata)
        kept = Event(**columns_of(event), event_id=event_id or "", seq=seq, at=now)
        if event.idempotency_key is not None:
            self._new_keys[event.idempotency_key] = kept
        return kept

    def _add_row(self, *row: Any) -> int:
        """Gather a row of the journal, from `at` on; its `seq`."""
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        missing = len(JOURNAL_ROW) - 1 - len(row)
        self._new_rows.append((seq, *row, *[None] * missing))
        return seq

    def save_function(self, function: Function) -> None:
        self._triggered.clear()
        self.endpoints_of_functions().pop(function.function_id, None)
        if function.endpoint:
            self.endpoints_of_functions()[function.function_id] = function.endpoint
            self.touched.add(function.function_id)  # its runs have somewhere to go now
        self.save(function)

    def set_triggers(self, function_id: str, triggers: Iterable[Trigger]) -> None:
        delete = "DELETE FROM function_trigger WHERE function_id = ?"
        self._db.execute(delete, (function_id,))
        for event, expression in {(each.event, each.expression) for each in triggers}:
            self._db.execute("INSERT INTO function_trigger VALUES (?, ?, ?, ?)",
                             (event, function_id, expression, is_wild(event)))

    def set_ticks(self, function_id: str, ticks: list[Timer]) -> None:
        """Its cron triggers; one that it had before keeps its instant."""
        old = {(key, event) for key, event in self._db.execute(
            "SELECT key, event FROM timer WHERE kind = 'tick' AND function_id = ?",
            (function_id,)).fetchall()}
        for key, event in old - {(tick.key, tick.event) for tick in ticks}:
            self.delete_timer(Timer("tick", function_id, key, event, 0.0))
        for tick in ticks:
            if (tick.key, tick.event) not in old:
                self.save(tick)

    def delete_timer(self, timer: Timer) -> None:
        self._db.execute("DELETE FROM timer WHERE (kind, function_id, key, event) ="
                         " (:kind, :function_id, :key, :event)", columns_of(timer))

    def overdue_timers(self, now: float) -> list[Timer]:
        source = "timer WHERE due_at <= :now ORDER BY due_at LIMIT :limit"
        return self._rows(Timer, source, now=now, limit=BEHIND_AT_ONCE)

    def delete_function(self, function_id: str) -> None:
        self._triggered.clear()
        self.endpoints_of_functions().pop(function_id, None)
        self.set_triggers(function_id, ())
        for table in ("timer", "actor", "function"):
            self._db.execute(f"DELETE FROM {table} WHERE function_id = ?",
                             (function_id,))

    def functions_triggered_by(self, name: str) -> list[tuple[Function, set[str]]]:
        """Active functions with a trigger for this name, in the order of ids, each with
        the expressions of those triggers, "" among them if one has none.

        Remembered until a registration changes: every event asks.
        """
        if (known := self._triggered.get(name)) is not None:
            return known
        rows = self._db.execute(
            f"""
            SELECT event, expression, {columns(Function)}
              FROM function_trigger JOIN function USING (function_id)
             WHERE (event = :name OR wild = 1) AND status = 'active'
             ORDER BY function_id
            """, {"name": name}).fetchall()
        found: dict[str, tuple[Function, set[str]]] = {}
        for event, expression, *row in rows:
            if matches(event, name):
                found.setdefault(row[0], (Function(*row), set()))[1].add(expression)
        if len(self._triggered) >= 1_000:
            self._triggered.clear()
        self._triggered[name] = list(found.values())
        return self._triggered[name]

    # --- who takes runs: workers that carry a function, or its endpoint

    def carries(self, function_id: str) -> bool:
        """Whether a connected worker carries a function."""
        if self._carried is None:
            self._carried = set[str]().union(*[
                json.loads(worker.function_ids) for worker in self.connected_workers()
                if worker.worker_id not in self._missing])
        return function_id in self._carried

    def miss(self, worker_id: str, missing: bool) -> None:
        if missing != (worker_id in self._missing):
            self._missing ^= {worker_id}
            self._carried = None

    def endpoints_of_functions(self) -> dict[str, str]:
        """Of the functions that have an endpoint, its URL."""
        if self._pushed is None:
            self._pushed = {function.function_id: function.endpoint
                            for function in self.functions() if function.endpoint}
        return self._pushed

    def functions_at(self, url: str) -> list[str]:
        found = self.endpoints_of_functions().items()
        return [function_id for function_id, endpoint in found if endpoint == url]

    def pushed_runs(self) -> list[Run]:
        """Those whose request was under way, their lease being without an end."""
        return self._rows(Run, "run INDEXED BY run_lease"
                               " WHERE status = 'running' AND lease_until = 9e999")

    def overdue_endpoints(self, now: float) -> list[Endpoint]:
        return self._rows(Endpoint, "endpoint WHERE open_until <= :now", now=now)

    def bring_forward(self, now: float) -> None:
        """None is open for longer than it is meant to be."""
        self._db.execute("UPDATE endpoint SET open_until = min(open_until, ? + open_s)"
                         " WHERE open_until IS NOT NULL", (now,))

    def delete_endpoint(self, url: str) -> None:
        self._db.execute("DELETE FROM endpoint WHERE url = ?", (url,))

    def forget_endpoints(self) -> None:
        """Those that no function has any more."""
        for url in self.endpoints():
            if not self.functions_at(url):
                self.delete_endpoint(url)

    def run_ids_of(self, event_seq: int) -> list[str]:
        if self._new_runs:
            self.flush()
        return super().run_ids_of(event_seq)

    def insert_run(self, run_id: str, function: Function, event: Event, now: float,
                   parent: tuple[str, str] | None, places: dict[str, str]) -> None:
        self.touched.add(function.function_id)
        self._new_runs[run_id] = (
            run_id, function.function_id, function.version, event.seq, event.event_id,
            event.name, function.retry, "waiting_for_capacity", now, now, now,
            *(parent or (None, None)), places.get("actor"), 1 if places else None)
        for kind, value in places.items():
            self._db.execute("INSERT INTO place VALUES (?, ?, ?, ?, 'line', ?)",
                             (run_id, kind, function.function_id, value, now))

    def update_run(self, run: Run) -> None:
        """Everything of a run that can change."""
        if run.status == "waiting_for_capacity":
            self.touched.add(run.function_id)
        elif run.status == "waiting":
            self.alarm = min(self.alarm, run.due_at or math.inf)
        elif run.status in TERMINAL:
            self.ended.append(run.run_id)
        self.alarm = min(self.alarm, run.lease_until or math.inf)
        changes = columns(Run, "{0} = :{0}", "created_at")
        self._db.execute(f"UPDATE run SET {changes} WHERE run_id = :run_id",
                         columns_of(run))

    def renew_leases(self, until: float, acked: bool) -> None:
        self._db.execute("UPDATE run SET lease_until = :until"
                         " WHERE status = 'running' AND acked = :acked"
                         " AND lease_until < 9e999",
                         {"until": until, "acked": acked})

    def due_runs(self, function_id: str, workers: list[str] | None, limit: int
                 ) -> list[Run]:
        """Runs of a function that one of these workers may take, longest due first; or
        its endpoint, to which an actor's last worker does not matter."""
        if self._new_runs:
            self.flush()
        return self._rows(Run, f"""
            run WHERE function_id = :id AND status = 'waiting_for_capacity'
               AND held IS NOT 1
               AND (actor_id IS NULL OR :workers = 'null' OR NOT EXISTS (
                 SELECT 1 FROM {self.BOUND} AND worker_id NOT IN (
                   SELECT value FROM json_each(:workers))))
             ORDER BY due_at, run_id LIMIT :limit""",
            id=function_id, workers=dumps(workers), limit=limit)

    BOUND = """actor JOIN worker USING (worker_id)
                WHERE actor.function_id = run.function_id AND connected = 1
                  AND actor.actor_id = run.actor_id"""

    def worker_of_actor(self, run: Run) -> str | None:
        """Where the runs of its actor go, while that worker is connected."""
        if run.actor_id is None:
            return None
        found: str | None = self._value(
            f"SELECT (SELECT worker_id FROM {self.BOUND}) FROM run WHERE run_id = :id",
            id=run.run_id)
        return found

    def bind_actor(self, run: Run) -> None:
        self._db.execute("INSERT OR REPLACE INTO actor VALUES (?, ?, ?)",
                         (run.function_id, run.actor_id, run.worker_id))

    def delete_actors(self, worker_id: str) -> bool:
        """Let the actors of a worker go to others; whether it had any."""
        gone = self._db.execute("DELETE FROM actor WHERE worker_id = ?", (worker_id,))
        return gone.rowcount > 0

    def events_after(self, name: str, seq: int, limit: int) -> list[Event]:
        self.flush()
        return super().events_after(name, seq, limit)

    # A place is `off` while its run sleeps or waits, in `line`, or taken: `in`, and a
    # gate that was `passed` until it is free again.

    def places_taken(self, function_id: str, kind: str, value: str) -> int:
        return int(self._value(
            """
            SELECT count(*) FROM place WHERE function_id = :id AND kind = :kind
               AND value = :value AND state IN ('in', 'passed')
            """, id=function_id, kind=kind, value=value))

    def first_in_line(self, function_id: str, kind: str, value: str, full: set[str]
                      ) -> list[tuple[float, str]]:
        """Since when, and which run, has waited longest of those not in line for what
        is full; none, or one."""
        return self._db.execute(
            """
            SELECT due_at, run_id FROM place AS first
             WHERE function_id = :id AND kind = :kind AND value = :value
               AND state = 'line' AND NOT EXISTS (
                 SELECT 1 FROM place WHERE run_id = first.run_id AND state = 'line'
                    AND kind || ' ' || value IN (SELECT value FROM json_each(:full)))
             ORDER BY due_at, run_id LIMIT 1
            """, {"id": function_id, "kind": kind, "value": value,
                  "full": dumps(list(full))}).fetchall()

    def lines_of(self, run_id: str) -> list[tuple[str, str]]:
        return self._db.execute("SELECT kind, value FROM place WHERE run_id = ?"
                                " AND state = 'line'", (run_id,)).fetchall()

    def let_in(self, run_id: str, function_id: str) -> None:
        self.flush()
        self.move(run_id, "line", "in", None)
        self._db.execute("UPDATE run SET held = 0 WHERE run_id = ?", (run_id,))
        self.touched.add(function_id)

    def move(self, run_id: str, old: str, new: str, due_at: float | None
             ) -> list[tuple[str, str]]:
        """Change the state of a run's places; who goes off leaves the line as well."""
        return self._db.execute(
            """
            UPDATE place SET state = :new, due_at = coalesce(:due_at, due_at)
             WHERE run_id = :id AND state IN (:old, iif(:new = 'off', 'line', :old))
            RETURNING kind, value
            """, {"id": run_id, "old": old, "new": new, "due_at": due_at}).fetchall()

    def pass_gate(self, run_id: str, free_at: float) -> None:
        self.alarm = min(self.alarm, free_at)
        self._db.execute("UPDATE place SET state = 'passed', due_at = ?"
                         " WHERE run_id = ? AND kind = 'gate'", (free_at, run_id))

    def free_gates(self, now: float) -> list[tuple[str, str, str]]:
        return self._db.execute(
            "DELETE FROM place WHERE state = 'passed' AND due_at <= ?"
            " RETURNING function_id, kind, value", (now,)).fetchall()

    def line_up(self, function_id: str) -> list[tuple[str, str]]:
        """Send the queued runs of a function back to their lines; those lines."""
        self.flush()
        for sql in ("""UPDATE place SET state = 'line'
                        WHERE state = 'in' AND run_id IN (
                         SELECT run_id FROM run WHERE function_id = :id
                            AND status = 'waiting_for_capacity' AND held = 0
                            AND lease_token IS NULL)""",  # else its holder may be back
                    """UPDATE run SET held = 1 WHERE run_id IN (
                         SELECT run_id FROM place WHERE function_id = :id
                            AND state = 'line')"""):
            self._db.execute(sql, {"id": function_id})
        return self._db.execute(
            "SELECT DISTINCT kind, value FROM place WHERE function_id = ?"
            " AND state = 'line'", (function_id,)).fetchall()

    # --- what runs listen for

    def listened_for(self, name: str) -> list[tuple[str, str]]:
        """The names and patterns that an event has and somebody listens for, each with
        a test. Remembered, for every event asks; what nobody asks any more may stay."""
        if self._heard is None:
            self._heard = {}
            sql = "SELECT DISTINCT event, test FROM wait WHERE taken IS NULL"
            for event, test in self._db.execute(sql).fetchall():
                self._heard.setdefault(event, set()).add(test)
            self._wild = {event for event in self._heard if is_wild(event)}
        if not self._heard:
            return []
        fit = [name, *sorted(wild for wild in self._wild if matches(wild, name))]
        return [(each, test) for each in fit
                for test in sorted(self._heard.get(each, ()))]

    def insert_wait(self, run_id: str, step_id: str | None, event: str, test: str,
                    value: str, taken: int | None = None) -> None:
        self.flush()  # the run that it refers to
        self.listened_for(event)
        assert self._heard is not None
        self._heard.setdefault(event, set()).add(test)
        self._wild |= {event} if is_wild(event) else set()
        self._db.execute("INSERT INTO wait VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                         (run_id, step_id, event, test, value, taken))

    def waits(self, event: str, test: str, value: str
              ) -> list[tuple[int, str, str | None]]:
        """Open waits, the oldest first: id, run and step; no step: to cancel."""
        self.flush()
        return self._db.execute(
            "SELECT wait_id, run_id, step_id FROM wait WHERE taken IS NULL AND"
            " event = ? AND test = ? AND value = ? ORDER BY wait_id",
            (event, test, value)).fetchall()

    def take(self, wait_id: int, seq: int) -> None:
        self._db.execute("UPDATE wait SET taken = ? WHERE wait_id = ?", (seq, wait_id))

    def delete_waits(self, run_id: str) -> None:
        if self._heard != {}:  # most journals have none
            self._db.execute("DELETE FROM wait WHERE run_id = ?", (run_id,))

    TIMERS = {"running": ("run_lease", "lease_until"),  # by status: SQLite would take
              "waiting": ("run_timer", "due_at")}  # that index, and sort all sleepers

    def overdue(self, status: RunStatus, now: float) -> list[Run]:
        """Running ones whose lease ended; waiting ones whose retry or sleep is due."""
        index, instant = self.TIMERS[status]
        return self._rows(Run, f"""
            run INDEXED BY {index} WHERE status = '{status}' AND {instant} <= :now
            ORDER BY {instant} LIMIT {BEHIND_AT_ONCE}""", now=now)

    def next_instant(self) -> float:
        """When the next lease ends or the next sleeper is due; infinity for never."""
        return min(self._value(sql) or math.inf for sql in [
            "SELECT min(due_at) FROM timer",
            "SELECT min(due_at) FROM place WHERE state = 'passed'",
            "SELECT min(open_until) FROM endpoint",
            f"SELECT min(due_at) FROM delivery WHERE {self.TIMED}", *[
                f"SELECT min({instant}) FROM run INDEXED BY {index}"
                f" WHERE status = '{status}' AND {instant} IS NOT NULL"
                for status, (index, instant) in self.TIMERS.items()]])

    TIMED = "state IN ('out', 'later')"

    def overdue_deliveries(self, now: float) -> list[Delivery]:
        return self._rows(Delivery, f"delivery WHERE {self.TIMED} AND due_at <= :now"
                          f" ORDER BY due_at LIMIT {BEHIND_AT_ONCE}", now=now)

    def held_by_members(self, name: str) -> Counter[str]:
        return Counter(dict(self._db.execute(
            "SELECT member, count(*) FROM delivery WHERE name = ? AND state = 'out'"
            " GROUP BY 1", (name,)).fetchall()))

    def due_deliveries(self, name: str, limit: int) -> list[Delivery]:
        return self._rows(
            Delivery, "delivery WHERE name = :name AND state = 'due'"
            " ORDER BY due_at, seq LIMIT :limit", name=name, limit=limit)

    def deliveries_to(self, name: str, member: str) -> list[Delivery]:
        return self._rows(
            Delivery, "delivery WHERE name = :name AND state = 'out'"
            " AND member = :member ORDER BY seq", name=name, member=member)

    def recall_deliveries(self) -> None:
        """No member outlived the last process; that is no fault of a message."""
        self._db.execute("UPDATE delivery SET state = 'due' WHERE state = 'out'")

    def renew_deliveries(self, until: float) -> None:
        self._db.execute("UPDATE delivery SET due_at = ? WHERE state = 'out'", (until,))

    def delete_delivery(self, each: Delivery) -> None:
        self._db.execute("DELETE FROM delivery WHERE name = ? AND seq = ?",
                         (each.name, each.seq))

    def delete_group(self, name: str) -> None:
        for table in ("delivery", "consumer_group"):
            self._db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))

    def seqs_of(self, event_id: str) -> list[int]:
        """The row that a subscriber knows by this id."""
        if found := re.fullmatch("seq_([0-9]{1,18})", event_id):
            return [int(found[1])]
        return [event.seq] if (event := self.find(Event, event_id=event_id)) else []

    def children_waited_for(self, run_id: str) -> list[Run]:
        found = [self.find(Run, run_id=step.child_run_id)
                 for step in self.steps(run_id, "pending") if step.child_run_id]
        return [child for child in found if child is not None]

    def next_sequence(self, run_id: str) -> int:
        """One more than the highest sequence of a run's rows; 0 for a new run."""
        sql = "SELECT coalesce(max(sequence) + 1, 0) FROM step WHERE run_id = :id"
        return int(self._value(sql, id=run_id))

    def delete_ended_runs(self, before: float) -> bool:
        """Delete runs that ended before an instant, with their steps; whether any."""
        self.flush()
        params = {"before": before, "id": Ids.first("run", before), "limit": SWEPT}
        some = """(SELECT run_id FROM run
                    WHERE status IN ('completed', 'failed', 'cancelled')
                      AND run_id < :id AND ended_at < :before LIMIT :limit)"""
        for table in ("step", "wait", "place"):
            self._db.execute(f"DELETE FROM {table} WHERE run_id IN {some}", params)
        gone = self._db.execute(f"DELETE FROM run WHERE run_id IN {some}", params)
        return gone.rowcount > 0

    def delete_rows(self, before: float, after: int) -> int | None:
        """Delete old journal rows after a `seq`, but the input of a run that is kept.

        Returns the last `seq` looked at; None where the younger rows begin.
        """
        rows = self._db.execute(
            "SELECT seq, at FROM journal WHERE seq > :after ORDER BY seq LIMIT :limit",
            {"after": after, "limit": SWEPT}).fetchall()
        old = [seq for seq, at in rows if at < before]
        gone = self._column(
            """
            DELETE FROM journal WHERE seq > :after AND seq <= :last AND at < :before
               AND NOT EXISTS (SELECT 1 FROM run WHERE event_seq = journal.seq)
               AND NOT EXISTS (SELECT 1 FROM timer WHERE timer.seq = journal.seq)
            RETURNING seq
            """, after=after, last=old[-1] if old else 0, before=before)
        if gone:
            self._db.execute("UPDATE meta SET value = max(:seq, CAST(value AS INTEGER))"
                             " WHERE name = 'forgotten'", {"seq": max(gone)})
        return rows[-1][0] if rows and rows[-1][1] < before else None

# --- What subscribers are told --------------------------------------------------------

def topic_of(kind: str, name: str, subject: str | None, step_id: str | None) -> str:
    """The topic of a row of the journal; the view `topic` says the same."""
    if kind in ("event", "topic"):
        return f"{kind}s:{name}" if kind == "event" else f"topic:{name}"
    if kind == "step":
        return f"system.run.{subject}.step.{step_id}.{name}"
    return f"system.{kind}.{subject}.{name}"

def message_of(row: tuple[Any, ...], data: Json) -> Message:
    """A message from the columns of the journal: seq, at, kind, name, subject, step."""
    return Message(row[0], row[1], topic_of(*row[2:6]), row[7] or f"seq_{row[0]}", data)

def span(pattern: str, number: int, given: dict[str, Any]) -> str:
    """Which rows to look at for a dotted pattern, as few as an index can tell; `given`
    gets what it has to be compared with, under a name with this number."""
    few = "INDEXED BY journal_of_kind WHERE kind NOT IN ('event', 'run', 'step') AND"
    value = f"value{number}"
    prefix, _, name = pattern.partition(".")
    match pattern.split("."):
        case ["events:" | "topic:", *_] if not is_wild(name):
            test, given[value] = f"kind = '{prefix.strip('s:')}' AND name", name
        case ["system", "run", "*", verb] if not is_wild(verb):
            test, given[value] = "kind = 'run' AND name", verb
        case ["system", "run", run_id, *_] if not is_wild(run_id):
            test, given[value] = "subject", run_id
        case ["events:", *_]:
            return "INDEXED BY journal_events WHERE kind = 'event'"
        case ["topic:", *_]:
            return f"{few} kind = 'topic'"
        case ["system", "function" | "worker" as kind, *_]:
            return f"{few} kind = '{kind}'"
        case _:
            return "WHERE 1"
    return f"WHERE {test} = :{value}"

def run_message(run: Run, data: Json, verb: str, change: dict[str, Any],
                at: float) -> Json:
    """The run object as it was then: what never changes of a run, and `change`."""
    names = ("id=run_id run_id function_id event_id event_name created_at"
             " max_attempts=policy.max_attempts")
    names += " started_at" if verb != "created" else ""
    names += " output" if verb == "completed" else ""
    return join(as_texts(change) | in_camel(members(run, names)) | {
        "input": data, "updatedAt": stamp(at),
        "endedAt": stamp(at) if verb in TERMINAL else None})

def step_message(step: Step, verb: str, change: dict[str, Any]) -> Json:
    """The step object as it was when the row was written."""
    names = "id=step_id step_id run_id name type sequence started_at"
    names += " ended_at duration_ms" if verb in ("completed", "failed") else ""
    names += " output" if verb == "completed" else ""
    own = as_texts(change)
    return join(own | in_camel(members(step, names)) | own)

# --- The file, in one thread ----------------------------------------------------------

OUR_MISTAKES = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError,
                sqlite3.InterfaceError, sqlite3.NotSupportedError)

@dataclass(slots=True, eq=False)
class Wish:
    """One rule that somebody wants carried out, and how it went."""
    rule: Callable[..., Any]
    args: tuple[Any, ...]
    size: int = KIB  # bytes that it may hold in memory, roughly
    result: Any = None
    error: BaseException | None = None
    future: Future | None = None

class JournalFile:
    """The SQLite file, used from one thread at a time.

    `execute(batch, now)` runs rules in an open transaction, `commit()` makes them last;
    both raise sqlite3.Error when the disk will not. Raises StartError if the file is
    not ours, of a newer version, or of another environment.
    """

    def __init__(self, path: Path, ids: Ids, environment: str = "default",
                 cache_mb: int = 16, now: float = 0.0,
                 offers: Offers | None = None) -> None:
        self.path, self.offers = path, offers or Offers(Limits())
        self._db = connect(path, cache_mb)
        try:
            version = check_owner(self._db, path)
            prepare_to_write(self._db, path)
            for number in range(version, len(MIGRATIONS)):  # each in one transaction
                self._db.executescript(
                    f"BEGIN IMMEDIATE; {MIGRATIONS[number]};"
                    f"PRAGMA application_id = {APPLICATION_ID};"
                    f"PRAGMA user_version = {number + 1}; COMMIT;")
            self.tx = Transaction(self._db, ids)
            self._christen(environment, now)
        except BaseException:
            self._db.close()
            raise

    def _christen(self, environment: str, now: float) -> None:
        served = self.tx.meta("environment")
        if served is None:
            self._db.execute("BEGIN IMMEDIATE")
            self.tx.set_meta("environment", environment)
            self.tx.set_meta("journal_id", self.tx.ids.new("jrn", now))
            self.tx.set_meta("created_at", to_rfc3339(now))
            self._db.execute("COMMIT")
        elif served != environment:
            raise StartError(
                f"{self.path} belongs to the environment {served!r}, not "
                f"{environment!r}: start with --env {served}, or name another file "
                "(--db)")

    def execute(self, batch: list[Wish], now: float) -> None:
        """Run each rule of a batch in one transaction, left open for `commit`.

        A rule that raises before it wrote fails alone. One that had written makes the
        batch start over, each rule behind a savepoint: a second try, still one commit.
        """
        self.tx.begin()
        if not self._execute_together(batch, now):
            self.rollback()
            self.tx.begin()
            self._execute_apart(batch, now)
        self.offers.hand_out(self.tx, now)
        self.tx.flush()

    def _execute_together(self, batch: list[Wish], now: float) -> bool:
        for wish in batch:
            before = self.tx.written
            self._carry_out(wish, now)
            if wish.error is not None and self.tx.written != before:
                return False
        try:
            self.tx.flush()
        except OUR_MISTAKES:  # whose it is shows when each is alone
            return False
        return True

    def _execute_apart(self, batch: list[Wish], now: float) -> None:
        for wish in batch:
            self._db.execute("SAVEPOINT wish")
            ended, rows = len(self.tx.ended), len(self.tx.rows)
            self._carry_out(wish, now, self.tx.flush)
            if wish.error is not None:
                self._db.execute("ROLLBACK TO wish")
                self.tx.forget()
                del self.tx.ended[ended:], self.tx.rows[rows:]
            self._db.execute("RELEASE wish")

    def _carry_out(self, wish: Wish, now: float,
                   then: Callable[[], None] = lambda: None) -> None:
        wish.result = wish.error = None
        try:
            wish.result = wish.rule(self.tx, *wish.args, now)
            then()
        except Exception as error:
            if isinstance(error, sqlite3.Error) and not isinstance(error, OUR_MISTAKES):
                raise  # the disk's trouble is everybody's
            wish.error = error

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        if self._db.in_transaction:  # SQLite may have rolled back by itself
            self._db.execute("ROLLBACK")
        self.tx.forget()
        self.offers.rolled_back()

    def checkpoint(self, mode: Literal["PASSIVE", "TRUNCATE"]) -> bool:
        """Move the log into the file; False if a reader is in the way of TRUNCATE."""
        row = self._attempt(f"PRAGMA wal_checkpoint({mode})")
        return row is None or not row[0]

    def takes_writes(self) -> bool:
        """Whether a write is possible just now, by one that changes nothing."""
        return self._attempt(f"PRAGMA user_version = {len(MIGRATIONS)}") is not None

    def _attempt(self, sql: str) -> tuple[Any, ...] | None:
        """A statement's row; None if the disk is full or another program in the way."""
        self._db.execute("PRAGMA busy_timeout = 0")
        try:
            return self._db.execute(sql).fetchone() or ()
        except sqlite3.OperationalError as error:
            if trouble(error, self.path) is None:
                raise  # a disk that fails is not a disk that is full or in use
            return None
        finally:
            self._db.execute(f"PRAGMA busy_timeout = {FOREIGN_LOCK_S * 1000}")

    def close(self) -> None:
        """Roll back what is open; the last connection folds the log into the file."""
        self._db.close()

def connect(path: Path, cache_mb: int, read_only: bool = False) -> sqlite3.Connection:
    """A connection with autocommit: BEGIN and COMMIT are written out."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        wanted = ".".join(map(str, OLDEST_SQLITE))
        raise StartError(f"SQLite {wanted} or newer is needed, this Python has "
                         f"{sqlite3.sqlite_version}: use a newer Python")
    uri = f"{path.as_uri()}?mode={'ro' if read_only else 'rwc'}"
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(uri, timeout=FOREIGN_LOCK_S, isolation_level=None,
                             uri=True, check_same_thread=False, cached_statements=256)
        db.execute(f"PRAGMA cache_size = {-cache_mb * KIB}")
        return db
    except sqlite3.Error as error:
        if db is not None:
            db.close()
        raise StartError(f"cannot open {path}: {error}") from None

def check_owner(db: sqlite3.Connection, path: Path) -> int:
    """The file's version. Before anything is changed: it may be somebody else's."""
    (owner,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if (owner, bool(tables)) not in ((0, False), (APPLICATION_ID, True)):
        raise StartError(f"{path} is not an ironflow journal: name another file (--db)")
    if version > len(MIGRATIONS):
        raise StartError(
            f"{path} was written by a newer ironflow (its version {version}, this one "
            f"reads up to {len(MIGRATIONS)}): start it with the newer program")
    return int(version)

def prepare_to_write(db: sqlite3.Connection, path: Path) -> None:
    """Each of these buys something. Raises StartError if the log cannot be had."""
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":  # readers and the writer would block each other
        raise StartError(f"{path}: SQLite cannot use its write-ahead log here (it "
                         f"answers {mode!r}): put the file on a local disk")
    db.execute("PRAGMA synchronous = FULL")  # a commit outlives a power cut
    db.execute("PRAGMA fullfsync = ON")  # macOS: flush the disk's own cache too ...
    db.execute("PRAGMA checkpoint_fullfsync = ON")  # ... also when folding the log in
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA wal_autocheckpoint = 0")  # done by the writer, after the answers

def trouble(error: BaseException, path: Path) -> IronflowError | None:
    """What callers hear when a batch failed as a whole; None if all is lost."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary result code
    if code == sqlite3.SQLITE_FULL:
        return DiskFull(f"the disk of {path} is full: make room, then try again")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable(f"another program has held the write lock of {path} for "
                           f"{FOREIGN_LOCK_S} s: end its transaction, then try again")
    return None

def backup(db: Path, target: Path) -> None:
    """A copy of a journal, consistent also while a server writes to it.

    It holds what was acknowledged before, and has its name once it is whole. Raises
    StartError, a sentence for a person.
    """
    if target.exists():
        raise StartError(f"{target} exists: name a file that does not")
    if not db.exists():
        raise StartError(f"{db} does not exist: name the server's file with --db")
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        with contextlib.closing(connect(db.resolve(), 16, read_only=True)) as source, \
             contextlib.closing(connect(part.resolve(), 16)) as copy:
            check_owner(source, db)
            source.backup(copy)  # in one read: a later commit would start it over
        part.rename(target)
    except (OSError, sqlite3.Error) as error:
        raise StartError(f"cannot back up {db} to {target}: {error}") from None
    finally:
        part.unlink(missing_ok=True)

# --- The writer thread ----------------------------------------------------------------

def lock(path: Path) -> int:
    """One server per file: an exclusive lock on a sibling that is never deleted."""
    try:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartError(f"cannot write {path}.lock: {error.strerror}") from None
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise StartError(f"another ironflow serves {path}: stop it first, or name "
                         "another file (--db)") from None
    return fd

class Journal:
    """The file behind a writer thread: the API's only way to the disk.

    `await write(rule, *args)` returns what `rule(tx, *args, now)` returned, after the
    commit; it raises what the rule raised, Overloaded if the queue is full, DiskFull
    or Unavailable if the commit failed: then whether it happened is unknown.
    Cancelling the wait does not take the wish back. `await read(query, *args)`, on a
    connection of its own, sees every write that was answered before.
    """

    def __init__(self, path: Path, *, clock: Clock, ids: Ids, offers: Offers,
                 environment: str = "default", cache_mb: int = 16,
                 on_alarm: Callable[[float], None],
                 on_commit: Callable[[list[tuple[Any, ...]], set[str]], None],
                 on_failure: Callable[[BaseException], None]) -> None:
        self.path = path = path.resolve()
        self.last_trouble: str | None = None
        self._clock, self._on_alarm, self._on_failure = clock, on_alarm, on_failure
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._way_in = threading.Lock()  # to the readers
        self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, lock(path))
            self._file = JournalFile(path, ids, environment, cache_mb, clock.wall(),
                                     offers)
            opened.callback(self._file.close)
            for _ in range(READERS):
                self._readers.put(reader := connect(path, cache_mb, read_only=True))
                opened.callback(reader.close)
            self.journal_id = self._file.tx.meta("journal_id") or ""
            self._opened = opened.pop_all()
        self._gathered: list[Wish] = []
        self._queue: queue.SimpleQueue[list[Wish]] = queue.SimpleQueue()
        self._queued_bytes, self._open = 0, True
        self._unfolded = 0  # bytes written since the last checkpoint, roughly
        self._warn_at = -math.inf  # the next time that a long log is worth a word
        self._ends: WeakValueDictionary[str, Future] = WeakValueDictionary()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="ironflow reader")
        self._thread = threading.Thread(target=self._work, name="ironflow writer")
        self._thread.start()

    async def write(self, rule: Callable[..., T], *args: Any, size: int = KIB) -> T:
        if not self._open:
            raise Unavailable("the server is stopping: try again when it is back")
        if self._queued_bytes + size > QUEUE_BYTES and self._queued_bytes:
            raise Overloaded("too much is waiting to be written: try again in a moment")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queued_bytes += size
        if not self._gathered:  # what this turn of the loop brings goes over at once:
            self._loop.call_soon(self._hand_over)  # one wake-up, and a larger commit
        self._gathered.append(Wish(rule, args, size, future=future))
        if len(self._gathered) >= BATCH_RULES or size >= BATCH_BYTES:
            self._hand_over()
        return await future

    def _hand_over(self) -> None:
        gathered, self._gathered = self._gathered, []
        self._queue.put(gathered)

    async def read(self, query: Callable[..., T], *args: Any) -> T:
        return await self._loop.run_in_executor(self._pool, self._read, query, *args)

    def _read(self, query: Callable[..., T], *args: Any) -> T:
        with self._way_in:
            db = self._readers.get()
        try:
            db.execute("BEGIN")  # one moment of the journal, however many statements
            return query(Queries(db), *args)
        except sqlite3.OperationalError as error:
            raise Unavailable(f"{self.path} cannot be read: {error}") from error
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
            self._readers.put(db)

    def end_of(self, run_id: str) -> Future:
        """Done by the commit that ends the run; forgotten with the last who waits."""
        return self._ends.setdefault(run_id, self._loop.create_future())

    def _work(self) -> None:
        """The writer thread: take what is there, commit once, answer all, again."""
        batch: list[Wish] = []
        try:
            while self._open or not self._queue.empty():
                if batch := self._next_batch():
                    self._commit(batch)
                    self._fold_log()
        except BaseException as error:  # whatever it is: nobody may wait for us now
            log.critical("the journal %s cannot be written any more: %s", self.path,
                         error)
            self._loop.call_soon_threadsafe(self._fail, error, batch)

    def _next_batch(self) -> list[Wish]:
        """All that is in the queue, within bounds; nothing at times."""
        try:
            chores = self._unfolded or self.last_trouble
            batch = self._queue.get(timeout=IDLE_S if chores else None)
        except queue.Empty:  # idle: the log's pages go to the file, now or later
            self._unfolded = 0 if self._file.checkpoint("TRUNCATE") else 1
            self._see_whether_it_is_over()
            return []
        while (not self._queue.empty() and len(batch) < BATCH_RULES
               and sum(wish.size for wish in batch) < BATCH_BYTES):
            batch += self._queue.get()
        return batch

    def _commit(self, batch: list[Wish]) -> None:
        file, tx, failure = self._file, self._file.tx, None
        before = tx.written
        try:
            file.execute(batch, self._clock.wall())
            file.commit()
        except Exception as error:
            file.rollback()
            if (failure := trouble(error, self.path)) is None:
                raise
            log.error("%s", failure)
        if failure or tx.written != before:
            self.last_trouble = str(failure) if failure else None
            written = (tx.written - before) * KIB
            self._unfolded += written + sum(wish.size for wish in batch)
        else:  # a batch that wrote nothing tells nothing of the disk
            self._see_whether_it_is_over()
        alarm, ended = (math.inf, []) if failure else (tx.alarm, tx.ended)
        news = None if failure else (tx.rows, tx.rung)
        self._loop.call_soon_threadsafe(
            self._answer, batch, file.offers.committed(), alarm, ended, news, failure)

    def _see_whether_it_is_over(self) -> None:
        """By a write of our own: callers may wait until /ready says so."""
        if self.last_trouble and self._file.takes_writes():
            self.last_trouble, self._unfolded = None, self._unfolded or 1

    def _fold_log(self) -> None:
        """Move the log into the file from time to time, after the answers went out."""
        if self._unfolded < FOLD_BYTES:
            return
        self._unfolded = 1
        size, now = os.stat(f"{self.path}-wal").st_size, self._clock.steady()
        if size <= WAL_BYTES:
            self._file.checkpoint("PASSIVE")
        elif not self._truncate() and now >= self._warn_at:
            self._warn_at = now + 60
            log.warning("%s-wal has %d MiB and cannot be emptied while another program "
                        "reads %s: end its transaction", self.path, size // MIB,
                        self.path.name)

    def _truncate(self) -> bool:
        """Empty the log while no read of ours is in the way: the next ones wait."""
        with self._way_in:
            idle = [self._readers.get() for _ in range(READERS)]
            try:
                return self._file.checkpoint("TRUNCATE")
            finally:
                for db in idle:
                    self._readers.put(db)

    def _answer(self, batch: list[Wish], filled: list[Offer], alarm: float,
                ended: list[str], news: Any, failure: Exception | None) -> None:
        """On the loop, once per batch: everybody hears how it went."""
        for wish in batch:
            self._queued_bytes -= wish.size
            settle_future(wish.future, failure or wish.error or wish.result)
        for offer in filled:
            offer.answer(offer.error or offer.jobs)
        for run_id in ended:
            settle_future(self._ends.pop(run_id, None), None)
        if news:  # when the answers are on their way
            self._loop.call_soon(self._on_commit, *news)
        if alarm < math.inf:
            self._on_alarm(alarm)

    def _fail(self, error: BaseException, batch: list[Wish]) -> None:
        """The writer is gone: fail those who wait, then the process."""
        self._open = False
        gone = Unavailable(f"{self.path} cannot be written any more: the server stops")
        while not self._queue.empty():
            batch += self._queue.get()
        for wish in batch:
            settle_future(wish.future, gone)
        self._on_failure(error)

    async def close(self) -> None:
        """Commit what is queued, fold the log into the file, let go of the lock."""
        self._hand_over()
        self._open = False  # the thread ends when it has seen this and an empty queue:
        self._queue.put([])  # let it look, should it wait
        await asyncio.to_thread(self._thread.join)
        self._pool.shutdown()
        self._opened.close()

def settle_future(future: Future | None, got: Any) -> None:
    """Give who waits what came; an exception is raised there. Nobody waits: nothing."""
    if future is None or future.done():
        return
    if isinstance(got, BaseException):
        future.set_exception(got)
    else:
        future.set_result(got)

# ======================================================================================
# 9. The way out: the stream
# ======================================================================================
# Whatever is committed goes, in the order of `seq`, to those who watch it. What many
# watch is looked up once, written once for each form that they want it in, and each
# connection gets what a commit brought it in one piece.
#
# The journal is the buffer. Who joins with a wish for what was, or reads slowly, has
# slices of it read until it is up with the newest row, and only then is told live. So a
# slow reader costs a place in the journal, and no memory.

SUBSCRIPTIONS = 1_000  # of one connection
PATTERNS = 100  # of one subscription
MAX_REPLAY = 1_000
REPLAY_ROWS = 200_000  # looked at for a replay, where no index tells them apart
ROOM_BYTES = 256 * KIB  # unsent, of one connection
PARTS = ("run", "step")  # rows of these kinds hold a part of what is told
COMPOSED_BYTES = 8 * MIB  # of rows that wait for the rest
KEEP_ALIVE_S = 15.0  # between two looks at all connections
PING_S, STALL_S = 30.0, 60.0  # silent until it is asked; without progress until it ends
GOODBYE_S = 2.0  # for the other side to close as well
FRAME_BYTES = 64 * KIB  # of what a client says on a WebSocket
BAD_FRAMES = 100

Row: TypeAlias = tuple[Any, ...]  # of the journal: see JOURNAL_ROW
Form: TypeAlias = tuple[Any, ...]  # how a message is written: a function, its arguments

class Batch:
    """Messages of one commit or one slice, and their bytes in each form."""

    __slots__ = ("_written", "messages", "seq")

    def __init__(self, messages: list[Message], seq: int) -> None:
        self.messages, self.seq = messages, seq  # up to there it has all
        self._written: dict[Form, bytes] = {}

    def after(self, seq: int) -> Batch:
        if not self.messages or self.messages[0].seq > seq:
            return self
        return Batch([each for each in self.messages if each.seq > seq], self.seq)

    def written(self, form: Form) -> bytes:
        if (found := self._written.get(form)) is None:
            write, *how = form
            found = b"".join([write(message, *how) for message in self.messages])
            self._written[form] = found
        return found

class Sink:
    """Where the messages of a subscription go."""

    __slots__ = ()

    def has_room(self) -> bool:
        """Whether it takes more; if not, `drained` returns when it does again."""
        return True

    async def drained(self) -> None: ...

    def send(self, subscription: Subscription, batch: Batch) -> None: ...

    def skipped(self, subscription: Subscription, count: int) -> None:
        """So many messages were dropped, for there was no room."""

    def fail(self, subscription: Subscription | Member, error: IronflowError) -> None:
        """It cannot go on: what comes next is not there any more."""

@dataclass(slots=True, eq=False)
class Subscription:
    """One who watches. `seq` is the last row that it need not be told of any more.

    Live, it hears of each commit. Otherwise slices of the journal are read for it:
    between `begin` and `take` it keeps what commits bring `meanwhile`, so that nothing
    is missing where the two meet, and what is in both is told once.
    """

    interest: Interest
    sink: Sink
    seq: int
    live: bool  # False: `fall_behind` has to be called once
    form: Form = ()
    drops: bool = False  # skip what there is no room for
    exact: bool = True  # False: rows that retention deleted are not missed
    over: bool = False
    skipped: int = 0
    meanwhile: list[Batch] | None = None
    fall_behind: Callable[[Subscription], None] = lambda _: None

    def tell(self, batch: Batch) -> None:
        """What a commit brought."""
        if not self.live:
            if self.meanwhile is not None:
                self.meanwhile.append(batch)
            return
        if not (batch := batch.after(self.seq)).messages:
            return
        if self.sink.has_room():
            self.pass_on(batch)
        elif self.drops:
            self.seq, self.skipped = batch.seq, self.skipped + len(batch.messages)
        else:
            self.lag(batch.messages[0].seq - 1)

    def lag(self, seq: int) -> None:
        """From now on it has to be read for; of what was up to `seq` it has all."""
        self.live, self.seq = False, max(self.seq, seq)
        self.fall_behind(self)

    def pass_on(self, batch: Batch) -> None:
        self.seq = batch.seq
        if self.skipped:
            self.sink.skipped(self, self.skipped)
            self.skipped = 0
        if batch.messages:
            self.sink.send(self, batch)

    def begin(self) -> int:
        """After which row to read a slice for it."""
        self.meanwhile = []
        return self.seq

    def take(self, found: Slice) -> None:
        """The slice; after the last one it is live."""
        meanwhile, self.meanwhile = self.meanwhile, None
        self.pass_on(Batch(found.messages, found.seq))
        if found.ended and meanwhile is not None:  # nothing was missed
            self.live = True
            for batch in meanwhile:
                self.tell(batch)

class Stream:
    """All subscriptions; whom to tell of a row."""

    def __init__(self, seq: int) -> None:
        self.seq = seq  # of the newest row that was announced ...
        self.told = seq  # ... and of the newest message that was told
        self._index = Index[Interest]()
        self._watchers: dict[Interest, dict[Subscription, bool]] = {}

    def add(self, subscription: Subscription) -> None:
        interest = subscription.interest
        if interest not in self._watchers:
            self._watchers[interest] = {}
            for pattern in interest.patterns:
                self._index.add(pattern, interest)
        self._watchers[interest][subscription] = True

    def remove(self, subscription: Subscription) -> None:
        watchers = self._watchers.get(interest := subscription.interest, {})
        if watchers.pop(subscription, False) and not watchers:
            del self._watchers[interest]
            for pattern in interest.patterns:
                self._index.remove(pattern, interest)

    def announce(self, rows: list[Row]) -> list[tuple[Row, Iterable[Interest]]]:
        """Of new rows of the journal those that somebody watches, and who does."""
        self.seq = rows[-1][0] if rows else self.seq
        if not self._index:
            return []
        found = [(row, self._index.find(dotted(topic_of(*row[2:6])))) for row in rows
                 if row[9] != "invoke"]
        return [(row, interests) for row, interests in found if interests]

    def tell(self, found: Iterable[tuple[Message, Iterable[Interest]]]) -> None:
        """Tell who watches, in the order of `seq`."""
        told: dict[Interest, list[Message]] = {}
        for message, interests in found:
            self.told = message.seq
            for interest in interests:
                if passes(interest.filter, message):
                    told.setdefault(interest, []).append(message)
        for interest, messages in told.items():
            batch = Batch(messages, messages[-1].seq)
            for subscription in list(self._watchers.get(interest, ())):
                subscription.tell(batch)

    def interrupt(self) -> None:
        """Some messages cannot be told live: who watches has to read them."""
        for watchers in self._watchers.values():
            for each in watchers:
                if each.live:
                    each.lag(self.told)
                else:
                    each.meanwhile = None

class Watch:
    """The stream's desk, where it waits: for reads of the journal, sockets, time."""

    def __init__(self, journal: Journal, clock: Clock, seq: int) -> None:
        self.journal, self.clock, self.stream = journal, clock, Stream(seq)
        self.outlets: dict[Outlet, bool] = {}
        self.groups: dict[str, Group] = {}  # those that have members here
        self._full: list[Outlet] = []  # have something to write in this turn
        self._backlog: list[tuple[Row, Iterable[Interest]]] = []
        self._backlog_bytes, self._composing = 0, False
        self._tasks: dict[Any, asyncio.Task[Any]] = {}  # by what they are for
        self._ids, self.closing = count(1), False
        self.resumed: Future = asyncio.get_running_loop().create_future()
        self._read_for: Callable[[Subscription], None] = (
            lambda each: self.begin(each, self._catch_up(each)))

    def new_id(self) -> str:
        return str(next(self._ids))

    def begin(self, purpose: Any, deed: Coroutine[Any, Any, Any]) -> None:
        """Have it done in the background, unless it is being done for that already."""
        old = self._tasks.get(purpose)
        if old is not None and not old.done():
            deed.close()
            return
        self._tasks[purpose] = task = asyncio.create_task(deed)
        task.add_done_callback(lambda task: self._ended(purpose, task))

    def _ended(self, purpose: Any, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(purpose) is task:
            del self._tasks[purpose]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, IronflowError):
            log.warning("a subscription: %s", error)
        elif error is not None:
            log.error("a subscription failed", exc_info=error)

    def announce(self, rows: list[Row], rung: set[str]) -> None:
        """What a commit brought. Rows of runs and steps hold what changed; the rest is
        read, and whatever comes after them waits for that."""
        found = self.stream.announce(rows)
        for name in rung & self.groups.keys():
            self.groups[name].again.set()
        if not self._composing and not any(row[2] in PARTS for row, _ in found):
            self.stream.tell((message_of(row, row[6]), who) for row, who in found)
            return
        self._backlog += found
        self._backlog_bytes += sum(len(row[6]) for row, _ in found)
        self._composing = True
        if self._backlog_bytes > COMPOSED_BYTES:
            self._give_up()
        self.begin(Stream, self._compose())

    async def _compose(self) -> None:
        try:
            while self._backlog:
                found, self._backlog, self._backlog_bytes = self._backlog, [], 0
                messages = await self.journal.read(
                    Queries.compose, [row for row, _ in found])
                self.stream.tell(zip(messages, [who for _, who in found], strict=True))
        except Exception:
            self._give_up()
            raise
        finally:
            self._composing = False

    def _give_up(self) -> None:
        """What waits is not told live: who watches will read it when that can be."""
        self._backlog, self._backlog_bytes = [], 0
        self.stream.interrupt()

    async def subscribe(self, wanted: Wanted, outlet: Outlet, name: str, form: Form
                        ) -> tuple[Subscription | Member, bool]:
        """What is wanted, begun; whether its replay is short. Raises IronflowError.

        Without a wish for what was, nothing is waited for: it hears of the next commit.
        """
        if wanted.group:
            return await self.join(wanted, outlet, name, form), False
        start, cut = await self.start_of(wanted)
        seq = self.stream.seq if start is None else start
        begun = Subscription(wanted.interest, outlet, seq, start is None, form,
                             wanted.drops)
        outlet.subscriptions[name] = begun
        self.follow(begun)
        return begun, cut

    def follow(self, subscription: Subscription) -> None:
        self.stream.add(subscription)
        subscription.fall_behind = self._read_for
        if not subscription.live:
            subscription.fall_behind(subscription)

    def leave(self, subscription: Subscription | Member) -> None:
        if isinstance(subscription, Member):
            subscription.group.part(subscription)
            return
        subscription.over = True  # what is read for it ends by itself
        self.stream.remove(subscription)

    async def join(self, wanted: Wanted, outlet: Outlet, name: str, form: Form
                   ) -> Member:
        """Another member of a group. Raises InvalidInput, as `join_group`."""
        asked = ConsumerGroup(
            wanted.group, wanted.pattern, wanted.interest.filter,
            ack_mode="manual" if wanted.manual else "auto",
            position=-1 if wanted.since is None else wanted.since)
        await asyncio.shield(self.resumed)  # what the last process dealt is due again
        if wanted.since is not None:
            await self.journal.read(Queries.check_since, wanted.since)
        found = await self.journal.write(join_group, asked)
        if outlet.over:
            raise Unavailable("this connection is closing")
        group = self.groups.get(wanted.group)
        if group is None or group.id != found.group_id:
            group = self.groups[wanted.group] = Group(self, found)
            self.follow(group.subscription)
        member = Member(group, outlet, name, form, wanted.manual, self.new_id())
        outlet.subscriptions[name] = group.members[member.id] = member
        group.again.set()
        self.begin(group, group.deal())
        return member

    async def _catch_up(self, subscription: Subscription) -> None:
        """Read for a subscription until it is live."""
        while not subscription.live:
            await subscription.sink.drained()
            if subscription.over:
                return
            seq = subscription.begin()
            try:
                subscription.take(await self.journal.read(
                    Queries.messages, subscription.interest, seq, subscription.exact))
            except OutOfRange as error:
                subscription.sink.fail(subscription, error)
                return
            except Unavailable:  # the log has it
                await asyncio.sleep(RETRY_S)

    async def start_of(self, wanted: Wanted) -> tuple[int | None, bool]:
        """After which row a subscription begins, None for now; whether its replay is
        short, because older rows were not looked at. Raises OutOfRange."""
        read, count, interest = self.journal.read, wanted.replay, wanted.interest
        if wanted.since is not None:
            await read(Queries.check_since, wanted.since)
        if wanted.since is not None or not count:
            return wanted.since, False
        start, before = self.stream.seq, self.stream.seq + 1
        for _ in range(REPLAY_ROWS // LOOKED_AT):
            seqs, end = await read(Queries.selected_before, interest, before)
            if some := seqs[:count]:
                start, count = some[-1] - 1, count - len(some)
            if not count or end is None:
                return start, False
            before = end
        return start, True

    def will_write(self, outlet: Outlet) -> None:
        if not self._full:
            asyncio.get_running_loop().call_soon(self._write)
        self._full.append(outlet)

    def _write(self) -> None:
        full, self._full = self._full, []
        for outlet in full:
            outlet.flush()

    async def keep(self) -> None:
        """Until cancelled: look at all connections now and then."""
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            for outlet in list(self.outlets):
                outlet.look(self.clock.steady())

    def place(self) -> int:
        """Up to which row who is live was told, or 0 while that is not certain."""
        return 0 if self._composing else self.stream.seq

    async def close(self) -> None:
        """Say goodbye to everybody."""
        self.closing = True
        for outlet in list(self.outlets):
            outlet.end(Unavailable("the server is stopping: try again in a moment"))
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=GOODBYE_S)

@dataclass(frozen=True, slots=True)
class Wanted:
    """A subscription as it is asked for."""
    pattern: str
    interest: Interest
    replay: int = 0
    since: int | None = None
    group: str = ""
    namespace: str = "default"
    manual: bool = False
    drops: bool = False
    metadata: bool = False

def read_wanted(api: Api, patterns: list[str], body: Fields) -> Wanted:
    """What a subscriber asks for. Raises InvalidPattern, InvalidFilter, InvalidInput.

    It is SubscribeOptions on the wire, the query of an event stream (JS and Go 0.29).
    """
    forms = [each for pattern in patterns for each in spread(check_pattern(pattern))]
    if test := body.text("filter"):
        try:
            compiled(test)
        except InvalidInput as error:
            raise InvalidFilter(f"filter {error.message}") from None
    if group := body.text("consumerGroup", "group"):
        check_group_name(group)
    since = body.get("startAfterSequence", "since")
    return Wanted(
        " ".join(patterns), interest(tuple(dict.fromkeys(forms)), test),
        min(body.whole("replay"), MAX_REPLAY),
        None if since is None else body.whole("startAfterSequence", "since"),
        group, namespace_of(api, body),
        read_word(body, "ack_mode", "ackMode", "ack") == "manual",
        read_word(body, "backpressure_mode", "backpressure") == "drop",
        body.flag("includeMetadata"))

def namespace_of(api: Api, body: Fields) -> str:
    """The one that is served. Raises InvalidInput for another."""
    if (named := body.text("namespace")) not in ("", "default", api.environment):
        raise InvalidInput(f"namespace {named[:80]!r} is not served here, but "
                           f"{api.environment!r}")
    return named or "default"

interest = lru_cache(maxsize=1024)(Interest)  # a thousand watchers share one

# --- One connection -------------------------------------------------------------------

class Outlet(Sink):
    """A connection, and what it is told. Each door has its own words for that."""

    __slots__ = ("_moved", "_moved_at", "_parts", "_put", "_unsent", "_wire", "begun",
                 "over", "request", "subscriptions", "watch")

    def __init__(self, watch: Watch, request: web.BaseRequest) -> None:
        self.watch, self.request, self._wire = watch, request, request.transport
        self.subscriptions: dict[str, Subscription | Member] = {}
        self.begun = self.over = False  # its head was sent; nothing may be sent now
        self._parts: list[bytes] = []
        self._unsent = self._put = self._moved = 0  # bytes
        self._moved_at = watch.clock.steady()
        watch.outlets[self] = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def begin(self) -> None:
        """From now on bytes may go out; what gathered before goes first."""
        self.begun = True
        self.flush()

    def put(self, data: bytes) -> None:
        """To be sent, in one write with whatever else this turn of the loop brings."""
        if not self._parts:
            self.watch.will_write(self)
        self._parts.append(data)
        self._unsent += len(data)

    def flush(self) -> None:
        if self.begun and self._parts:
            data, self._parts = b"".join(self._parts), []
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._wire is not None and not self.over:
            self._wire.write(data)
            self._put += len(data)
            self._unsent = self._wire.get_write_buffer_size()

    def has_room(self) -> bool:
        if self._unsent > ROOM_BYTES and not self._parts and self._wire is not None:
            self._unsent = self._wire.get_write_buffer_size()
        return self._unsent <= ROOM_BYTES

    async def drained(self) -> None:
        self.flush()
        with contextlib.suppress(ConnectionError):  # then `leave` comes
            await self.request.writer.drain()

    def send(self, subscription: Subscription, batch: Batch) -> None:
        data = batch.written(subscription.form)
        if self._parts or not self.begun or len(self.subscriptions) > 1:
            self.put(data)
        else:  # a commit brings it no more
            self._write(data)

    def confirm(self, member: Member, seqs: list[int]) -> None:
        """These went to a member that does not ack: find out whether it has them. Here
        there is no way to: what was written counts."""
        member.done(seqs)

    def look(self, now: float) -> None:
        """Now and then: see whether the other side is there, and that it reads."""
        self.flush()
        unsent = self._wire.get_write_buffer_size() if self._wire is not None else 0
        for each in self.subscriptions.values() if self.has_room() else ():
            if isinstance(each, Subscription) and each.skipped:
                each.pass_on(Batch([], each.seq))  # says what it missed
        if not unsent or self._put - unsent != self._moved:
            self._moved, self._moved_at = self._put - unsent, now
        elif now - self._moved_at >= STALL_S:
            self.end(Unavailable(f"you have read nothing for {STALL_S:.0f} s: connect "
                                 "again, and go on where you are"), 1013)
            return
        self.keep_alive(now)

    def keep_alive(self, now: float) -> None: ...

    def end(self, error: IronflowError, code: int = 1001) -> None:
        """Say why, and close."""

    def leave(self) -> None:
        """The connection is gone, or on its way."""
        self.over = True
        self.watch.outlets.pop(self, None)
        for subscription in self.subscriptions.values():
            self.watch.leave(subscription)
        self.subscriptions.clear()

def name_of(wanted: Wanted, taken: Container[str]) -> str:
    """An id that is the same after a reconnect: the SDKs keep the old one (JS 0.29)."""
    names = (hashed(wanted.pattern, wanted.namespace, wanted.group, ordinal)
             for ordinal in count())
    return next(name for name in names if name not in taken)

@lru_cache(maxsize=1024)
def hashed(*parts: object) -> str:
    digest = hashlib.sha1("\0".join(map(str, parts)).encode(), usedforsecurity=False)
    return f"sub_{digest.hexdigest()[:16]}"

def about(message: Message) -> dict[str, Json | None]:
    return {"topic": dumps(message.topic), "data": message.data,
            "eventId": dumps(message.event_id)}

# --- Consumer groups ------------------------------------------------------------------

@dataclass(slots=True, eq=False)
class Member:
    """A subscription that shares the messages of a group with others."""
    group: Group
    outlet: Outlet
    name: str  # the subscription's id
    form: Form
    manual: bool  # it acks; else we find out
    id: str

    def done(self, seqs: list[int]) -> None:
        self.group.write(acked, seqs, "ack", 0.0)

class Group(Sink):
    """The members of a consumer group that are connected here, and what waits for them.

    It is the sink of one subscription, that of the group, from the group's position on;
    the rule `deal` decides who gets what, and is on disk before anybody is told.
    """

    def __init__(self, watch: Watch, row: ConsumerGroup) -> None:
        self.watch, self.name, self.id = watch, row.name, row.group_id
        self._most = min(row.max_inflight, LOOKED_AT)  # in memory
        self.members: dict[str, Member] = {}
        self._turn = 0
        self.again = asyncio.Event()  # there may be something to deal
        self._roomy = asyncio.Event()
        self._ready: deque[Message] = deque()
        self.subscription = Subscription(
            Interest(tuple(spread(row.pattern)), row.filter), self, row.position,
            live=False, exact=False)

    def has_room(self) -> bool:
        return len(self._ready) < self._most

    async def drained(self) -> None:
        while self.members and not self.has_room():
            self._roomy.clear()
            await self._roomy.wait()

    def send(self, subscription: Subscription, batch: Batch) -> None:
        self._ready.extend(batch.messages)
        self.again.set()

    def write(self, rule: Callable[..., Any], *args: Any) -> None:
        """Have a rule carried out, in the background; should that fail, what it was to
        say is found out when its time is over."""
        self.watch.begin(object(), self.watch.journal.write(rule, self.name, *args))

    def part(self, member: Member) -> None:
        if self.members.pop(member.id, None) is not None:
            if not self.watch.closing:  # what we end is no fault of a message
                self.write(member_left, member.id)
            self.again.set()

    async def deal(self) -> None:
        """As long as there are members."""
        write = self.watch.journal.write
        while self.members:
            self.again.clear()
            able = [each.id for each in self.members.values() if each.outlet.has_room()]
            self._turn = (self._turn + 1) % (len(able) or 1)
            able = able[self._turn:] + able[: self._turn]  # in turn, if all have as few
            seqs = [each.seq for each in islice(self._ready, self._most)]
            dealt, patience_s = list[Delivery](), None
            try:
                if able:
                    dealt, position = await write(deal, self.name, self.id, seqs, able)
                    await self._hand_out(dealt, position)
            except NotFound:
                gone = GroupDeleted(f"consumer group {self.name!r} was deleted")
                for member in [*self.members.values()]:
                    member.outlet.fail(member, gone)
            except (DiskFull, Unavailable):  # the log has it
                able = []
            if len(able) < len(self.members):  # who has no room is asked again
                patience_s = RETRY_S
            if not dealt:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await self.again.wait()
        self._roomy.set()
        self.watch.leave(self.subscription)
        if self.watch.groups.get(self.name) is self:
            del self.watch.groups[self.name]

    async def _hand_out(self, dealt: list[Delivery], position: int) -> None:
        """To each member what it was dealt, oldest first."""
        known: dict[int, Message] = {}
        while self._ready and self._ready[0].seq <= position:
            message = self._ready.popleft()
            known[message.seq] = message
        self._roomy.set()
        if old := [each.seq for each in dealt if each.seq not in known]:
            found = await self.watch.journal.read(Queries.messages_at, old)
            known |= {message.seq: message for message in found}
        if gone := [each.seq for each in dealt if each.seq not in known]:
            self.write(acked, gone, "term", 0.0)
        for name, some in groupby(sorted(dealt, key=attrgetter("member", "seq")),
                                  attrgetter("member")):
            told = [each for each in some if each.seq in known]
            if (member := self.members.get(name)) is None:
                self.write(member_left, name)  # while this was written
                continue
            for each in told:
                write, *how = member.form
                member.outlet.put(write(known[each.seq], *how, each.misses + 1))
            if not member.manual:
                member.outlet.confirm(member, [each.seq for each in told])

# --- The door /ws ---------------------------------------------------------------------

async def get_ws(api: Api, request: web.BaseRequest) -> web.WebSocketResponse:
    """GET /ws: subscribe, unsubscribe, ack, as many as one connection likes."""
    socket = web.WebSocketResponse(compress=False, autoping=False,
                                   max_msg_size=FRAME_BYTES + 1, timeout=GOODBYE_S)
    if not socket.can_prepare(request):
        raise InvalidInput("this door speaks WebSocket: connect with ws://, or use GET"
                           " /api/v1/stream")
    with Socket(api, request, socket) as outlet:
        await socket.prepare(request)
        for name in ("_parser", "_request_parser"):  # aiohttp has no use for it now, and
            if hasattr(request.protocol, name):  # an eighth of a quiet watcher's memory
                setattr(request.protocol, name, None)
        outlet.begin()
        async for frame in socket:
            if frame.type is WSMsgType.PING:
                await socket.pong(frame.data)
            else:
                await outlet.hear(frame)
        if outlet.goodbye:  # else aiohttp 3.9 might close with 1000 meanwhile
            await socket.close(**outlet.goodbye)
    return socket

class Socket(Outlet):
    """A WebSocket. Facts: the clients of the public SDKs (JS 0.29)."""

    __slots__ = ("_api", "_bad", "_heard_at", "_pings", "_socket", "goodbye")

    def __init__(self, api: Api, request: web.BaseRequest,
                 socket: web.WebSocketResponse) -> None:
        super().__init__(api.watch, request)
        self._api, self._socket, self._bad = api, socket, 0
        self._heard_at = self._moved_at
        self.goodbye: Mapping[str, Any] = NOTHING
        self._pings: dict[str, tuple[Member, list[int]]] | None = None

    async def hear(self, heard: WSMessage) -> None:
        """What a client says. Whatever is wrong with it is answered."""
        self._heard_at = self.watch.clock.steady()
        if heard.type is WSMsgType.PONG and self._pings:
            number = bytes(heard.data).decode(errors="replace")
            member, seqs = self._pings.pop(number, (None, []))
            if member is not None:
                member.done(seqs)
        elif heard.type is WSMsgType.BINARY:
            self._refuse("binary frames mean nothing here: send text")
        if heard.type is not WSMsgType.TEXT:
            return
        try:
            body = Fields(parse_json(heard.data.encode()), "message")
            match body.text("type"):
                case "subscribe":
                    await self._subscribe(body.inner("subscription"))
                case "unsubscribe":
                    self._unsubscribe(body.text("subscriptionId"))
                case "ack":
                    self._ack(body)
                case word:
                    raise InvalidInput(f"type is {word[:40]!r}: send subscribe, "
                                       "unsubscribe or ack")
        except IronflowError as error:
            self._refuse(error.message)

    def _refuse(self, why: str) -> None:
        self.say(type="error", code="INVALID_MESSAGE", message=why)
        self._bad += 1
        if self._bad >= BAD_FRAMES:
            self.end(InvalidInput(f"{BAD_FRAMES} messages could not be read"), 1008)

    async def _subscribe(self, asked: Fields) -> None:
        pattern = asked.text("pattern")
        try:
            if len(self.subscriptions) >= SUBSCRIPTIONS:
                raise TooMany(f"this connection has {SUBSCRIPTIONS} subscriptions: end"
                              " some, or open another connection")
            wanted = read_wanted(self._api, [pattern], asked.inner("options"))
            name = name_of(wanted, self.subscriptions)
            form = (as_frame, name, wanted.metadata)
            begun, cut = await self.watch.subscribe(wanted, self, name, form)
        except IronflowError as error:
            self.say(type="subscription_result", results=[{
                "pattern": pattern, "status": "error", "code": error.word,
                "message": error.message}])
            return
        found = {"pattern": pattern, "status": "ok", "subscriptionId": name}
        self.say(type="subscription_result", results=[
            found | ({} if isinstance(begun, Member) else {"sequence": begun.seq})])
        if cut:
            self._complain(begun, "REPLAY_CUT", CUT, True)

    def _unsubscribe(self, name: str) -> None:
        if (subscription := self.subscriptions.pop(name, None)) is not None:
            self.watch.leave(subscription)

    def _ack(self, body: Fields) -> None:
        """Of a message of a group; without its subscription's id, any of them may be
        meant. What is not a group's needs no ack."""
        name, ack = body.text("subscriptionId"), read_ack(body)
        for key, member in self.subscriptions.items():
            if isinstance(member, Member) and name in ("", key):
                member.group.write(acked_event, *ack)

    def confirm(self, member: Member, seqs: list[int]) -> None:
        """By a ping behind them: who answers it has read what came before."""
        self._pings = self._pings or {}
        self._pings[number := self.watch.new_id()] = (member, seqs)
        self.put(frame(number, PING))

    def say(self, **message: Any) -> None:
        self.put(frame(dumps(message)))

    def _complain(self, subscription: Subscription | Member, code: str, message: str,
                  goes_on: bool) -> None:
        self.say(type="subscription_error", subscriptionId=subscription.form[1],
                 code=code, message=message, retrying=goes_on)

    def skipped(self, subscription: Subscription, count: int) -> None:
        self._complain(subscription, "MESSAGES_DROPPED", DROPPED.format(count), True)

    def fail(self, subscription: Subscription | Member, error: IronflowError) -> None:
        self._complain(subscription, error.word, error.message, False)
        self._unsubscribe(subscription.form[1])

    def _write(self, data: bytes) -> None:
        self.over = self.over or self._socket.closed  # no frame follows that of the end
        super()._write(data)

    def keep_alive(self, now: float) -> None:
        silent_s = now - self._heard_at
        if silent_s > PING_S + STALL_S and self._wire is not None:
            self._wire.abort()
        elif silent_s > PING_S and not self._unsent:
            self.put(frame("", PING))

    def end(self, error: IronflowError, code: int = 1001) -> None:
        self.flush()
        self.leave()
        self.goodbye = {"code": code, "message": error.message.encode()[:120]}
        self.watch.begin(self, self._close())

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._socket.close(**self.goodbye)
        except (TimeoutError, ConnectionError):
            log.debug("a WebSocket did not say goodbye")
        finally:
            if self._wire is not None:
                self._wire.abort()  # what it never read

TEXT, PING = 1, 9  # opcodes
NOTHING: Mapping[str, Any] = {}

def frame(text: Json, opcode: int = TEXT) -> bytes:
    """A WebSocket frame as servers send it: whole, without a mask."""
    data = text.encode()
    if (size := len(data)) < 126:
        return bytes([0x80 | opcode, size]) + data
    if size < 65_536:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + data
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + data

def as_frame(message: Message, name: str, metadata: bool, attempt: int = 1) -> bytes:
    meta = {"timestamp": stamp(message.at), "sequence": str(message.seq)}
    return frame(join({"type": '"event"', "subscriptionId": dumps(name)}
                      | about(message) | {"meta": join(meta) if metadata else None}))

CUT = (f"older messages may be missing: {REPLAY_ROWS} rows were looked at for the "
       "replay, ask for a narrower pattern")

DROPPED = "{} messages were dropped, for they were not read fast enough"

# --- The doors that answer and never end ----------------------------------------------

class Body(Outlet):
    """The body of an answer, to which more and more is added."""

    __slots__ = ("chunked", "ended")

    def __init__(self, watch: Watch, request: web.BaseRequest) -> None:
        super().__init__(watch, request)
        self.ended: Future = asyncio.get_running_loop().create_future()
        self.chunked = request.version >= HttpVersion11  # before: until it closes

    def end_in(self, seconds: float, error: IronflowError) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, self.end, error)
        self.ended.add_done_callback(lambda _: timer.cancel())

    def add(self, text: str) -> None:
        self.put(chunk(text.encode(), self.chunked))

    def end(self, error: IronflowError, code: int = 1001) -> None:
        self.last_word(error)
        self.flush()
        self.leave()
        if code != 1001 and self._wire is not None:
            self._wire.abort()  # what it never read

    def leave(self) -> None:
        super().leave()
        settle_future(self.ended, None)

    def last_word(self, error: IronflowError) -> None: ...

    def fail(self, subscription: Subscription | Member, error: IronflowError) -> None:
        self.end(error)

def chunk(data: bytes, chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if chunked else data

def as_chunk(message: Message, chunked: bool, write: Callable[..., bytes], *how: Any
             ) -> bytes:
    return chunk(write(message, *how), chunked)

async def flow(api: Api, request: web.BaseRequest, body: Body, headers: dict[str, str]
               ) -> web.StreamResponse:
    """Answer with what `body` is told, until somebody has had enough."""
    response = web.StreamResponse(headers={
        **headers, **cors(request), "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no"})
    api.let_go(request)
    await response.prepare(request)
    body.begin()
    await body.ended
    return response

async def get_stream(api: Api, request: web.BaseRequest) -> web.StreamResponse:
    """GET /api/v1/stream?pattern=P: server-sent events; `Last-Event-ID` resumes.

    More than one `pattern` is their union, in one order, each message once.
    """
    asked, patterns = dict(request.query), request.query.getall("pattern", [])
    if not 0 < len(patterns) <= PATTERNS:
        raise InvalidInput(f"{len(patterns)} patterns: name what to watch, in up to "
                           f"{PATTERNS}, as in /api/v1/stream?pattern=events:>")
    if last := request.headers.get("Last-Event-ID"):
        asked |= {"since": last, "startAfterSequence": "", "replay": ""}
    since = asked.get("since") or asked.get("startAfterSequence")
    if since and asked.get("replay"):
        raise InvalidInput("since and replay: send one of them")
    asks = Fields({name: text for name, text in asked.items() if text})
    wanted = read_wanted(api, patterns, asks)
    with EventSource(api.watch, request) as body:
        begun, cut = await api.watch.subscribe(
            wanted, body, "", (as_chunk, body.chunked, as_event))
        if isinstance(begun, Subscription):
            body.add(f"id: {begun.seq}\n\n")
        if cut:
            body.complain("REPLAY_CUT", CUT)
        return await flow(api, request, body, EVENT_STREAM)

class EventSource(Body):
    """Server-sent events (HTML standard). An `id` alone moves the place from where a
    client goes on, and is not an event."""

    __slots__ = ()

    def keep_alive(self, now: float) -> None:
        told, place = self.watch.place(), ""
        for each in self.subscriptions.values():
            if isinstance(each, Subscription) and each.live and not each.skipped:
                place = f"id: {max(told, each.seq)}\n" if told else ""
        self.add(f": keep-alive\n{place}\n")

    def complain(self, code: str, message: str) -> None:
        data = dumps({"code": code, "message": message})
        self.add(f"event: ironflow.error\ndata: {data}\n\n")

    def skipped(self, subscription: Subscription, count: int) -> None:
        self.complain("MESSAGES_DROPPED", DROPPED.format(count))

    def last_word(self, error: IronflowError) -> None:
        if not isinstance(error, Unavailable):  # then it comes back by itself
            self.complain(error.word, error.message)

def as_event(message: Message, attempt: int = 1) -> bytes:
    topic = message.topic.replace("\r", " ").replace("\n", " ")
    data = join(about(message) | {"sequence": str(message.seq),
                                  "timestamp": stamp(message.at)})
    return f"id: {message.seq}\nevent: {topic}\ndata: {data}\n\n".encode()

EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}
CONNECT_STREAM = {"Content-Type": "application/connect+json"}
MESSAGE, END = 0, 2  # flags

async def post_subscribe(api: Api, request: web.BaseRequest) -> web.StreamResponse:
    """PubSubService/Subscribe {pattern, options}: Connect's server streaming."""
    async def read(asks: Fields) -> Wanted:
        return read_wanted(api, [asks.text("pattern")], asks.inner("options"))

    return await stream_envelopes(api, request, read)

async def stream_envelopes(
    api: Api, request: web.BaseRequest, read: Callable[[Fields], Awaitable[Wanted]]
) -> web.StreamResponse:
    if request.content_type != CONNECT_STREAM["Content-Type"]:
        raise InvalidInput("this call answers with a stream: send application/"
                           "connect+json, or use GET /api/v1/stream")
    with Envelopes(api.watch, request) as body:
        try:
            wanted = await read(await read_envelope(api, request))
            name = name_of(wanted, ())
            await api.watch.subscribe(wanted, body, name, (
                as_chunk, body.chunked, as_envelope, name, wanted.namespace))
        except IronflowError as error:
            return web.Response(body=last_envelope(error), headers=CONNECT_STREAM)
        late = DeadlineExceeded("the time that you gave this call is over")
        deadline_ms = request.headers.get("Connect-Timeout-Ms", "")
        if re.fullmatch("[0-9]{1,10}", deadline_ms):
            body.end_in(int(deadline_ms) / 1000, late)
        return await flow(api, request, body, CONNECT_STREAM)

async def read_envelope(api: Api, request: web.BaseRequest) -> Fields:
    """The one message of a streaming call: flags, length, JSON."""
    data = await api.read_body(request)
    if len(data) < 5 or data[0] or len(data) != 5 + int.from_bytes(data[1:5], "big"):
        raise InvalidInput("body is not one envelope of JSON: send a zero byte, the "
                           "length in four, and the message, not compressed")
    return Fields(parse_json(data[5:]) if len(data) > 5 else {})

class Envelopes(Body):
    """Connect's server streaming. It has no words for a pause or a gap (JS 0.29)."""

    __slots__ = ()

    def skipped(self, subscription: Subscription, count: int) -> None:
        log.warning("a subscriber: %s", DROPPED.format(count))

    def last_word(self, error: IronflowError) -> None:
        self.put(chunk(last_envelope(error), self.chunked))

def envelope(flags: int, text: Json) -> bytes:
    data = text.encode()
    return struct.pack("!BI", flags, len(data)) + data

def last_envelope(error: IronflowError) -> bytes:
    found = {"code": error.code, "message": error.message}
    return envelope(END, _to_text.encode({"error": found}))

def as_envelope(message: Message, name: str, namespace: str, attempt: int = 1
                ) -> bytes:
    whole = about(message)
    if not message.data.startswith("{"):
        whole["dataValue"] = whole.pop("data")
    metadata = {"timestamp": stamp(message.at), "source": '"api"',
                "namespace": dumps(namespace)}
    return envelope(MESSAGE, join(whole | {
        "subscriptionId": dumps(name), "metadata": join(metadata),
        "sequence": f'"{message.seq}"', "deliveryAttempt": str(attempt)}))

# --- The doors of consumer groups -----------------------------------------------------
# PubSubService/CreateConsumerGroup and so on; the two of dead letters are REST.

async def asked_of_group(api: Api, request: web.BaseRequest) -> Fields:
    namespace_of(api, asks := await asked(api, request))
    return asks

async def create_consumer_group(api: Api, request: web.BaseRequest) -> web.Response:
    asks = await asked_of_group(api, request)
    interest = read_wanted(api, [asks.text("pattern")], Fields({
        "filter": asks.text("filterExpr")}))
    new = ConsumerGroup(check_group_name(asks.text("name")), asks.text("pattern"),
                        interest.interest.filter, **read_group(asks))
    return answer(group_to_connect(api, await api.journal.write(create_group, new)))

def read_group(asks: Fields) -> dict[str, Any]:
    """What of a group can be set, and is."""
    metadata = asks.inner("metadata").all
    words = {"ack_mode": read_word(asks, "ack_mode", "ackMode"),
             "backpressure": read_word(asks, "backpressure_mode", "backpressure"),
             "max_inflight": asks.whole("maxInflight", high=MAX_INT32),
             "metadata": dumps(metadata) if metadata else ""}
    numbers = {name: asks.whole(camel(name), high=MAX_INT32) for name in (
        "max_redeliveries", "redeliver_delay_ms") if asks.get(camel(name)) is not None}
    return {name: value for name, value in words.items() if value} | numbers

def check_group_name(name: str) -> str:
    if not 0 < len(name) <= 255 or CONTROL.search(name):
        raise InvalidInput("consumer group: send a name of up to 255 characters, none "
                           "of control")
    return name

def group_to_connect(api: Api, group: ConsumerGroup) -> Json:
    here = api.watch.groups.get(group.name)
    found = members(group, "id=group_id name pattern filter_expr=filter max_inflight"
                           " max_redeliveries redeliver_delay_ms metadata created_at"
                           " updated_at")
    return join(in_camel(found) | as_texts({
        "namespace": "default", "status": "CONSUMER_GROUP_STATUS_ACTIVE",
        "ackMode": f"ACK_MODE_{group.ack_mode.upper()}",
        "backpressure": f"BACKPRESSURE_MODE_{group.backpressure.upper()}",
        "memberCount": len(here.members) if here else 0}))

async def get_consumer_group(api: Api, request: web.BaseRequest) -> web.Response:
    name = (await asked_of_group(api, request)).text("name")
    group = await api.journal.read(known, ConsumerGroup, name)
    return answer(group_to_connect(api, group))

async def list_consumer_groups(api: Api, request: web.BaseRequest) -> web.Response:
    asks = await asked_of_group(api, request)
    status = read_word(asks, "consumer_group_status", "status")
    found = await api.journal.read(Queries.groups) if status in ("", "active") else []
    rest = [each for each in found if each.name > asks.text("cursor")]
    page = rest[: asks.whole("limit", high=1000) or 1000]
    more = page[-1].name if len(page) < len(rest) else ""
    return answer(join(as_texts({"nextCursor": more, "totalCount": len(found)}) | {
        "groups": listed(group_to_connect(api, each) for each in page)}))

async def update_consumer_group(api: Api, request: web.BaseRequest) -> web.Response:
    """UpdateConsumerGroup {group, updateMask}: all but what it watches."""
    asks = await asked_of_group(api, request)
    given, mask = asks.inner("group"), asks.get("updateMask") or {}
    names = mask.split(",") if isinstance(mask, str) else (
        Fields(mask, "updateMask").items("paths"))
    group = await api.journal.read(known, ConsumerGroup, given.text("name"))
    wanted = (given.text("pattern") or group.pattern,
              given.text("filterExpr") or group.filter)
    if wanted != (group.pattern, group.filter):
        raise InvalidInput("what a group watches cannot change: create another one")
    changes = {name: value for name, value in read_group(given).items()
               if not names or {name, camel(name)} & set(map(str, names))}
    return answer(group_to_connect(api, await api.journal.write(
        update_group, group.name, changes)))

async def delete_consumer_group(api: Api, request: web.BaseRequest) -> web.Response:
    asks = await asked_of_group(api, request)
    await api.journal.write(delete_group, asks.text("name"))
    return answer("{}")

async def ack_event(api: Api, request: web.BaseRequest) -> web.Response:
    """AckEvent {groupName, eventId, ackType, redeliverDelayMs}; again: as the first."""
    asks = await asked_of_group(api, request)
    await api.journal.write(acked_event, asks.text("groupName"), *read_ack(asks))
    return answer("{}")

def read_ack(body: Fields) -> tuple[str, str, float | None]:
    """Which event, ack, nak or term, and after how many seconds it may come again."""
    if not body.text("eventId"):
        raise InvalidInput(f"{body.where}eventId is empty: name the event that you ack")
    names = ("redeliverDelayMs", "redeliverDelay")
    delay_ms = body.whole(*names, default=-1, high=MAX_INT32)
    return (body.text("eventId"), read_word(body, "ack_type", "ackType") or "ack",
            delay_ms / 1000 if delay_ms >= 0 else None)

async def join_consumer_group(api: Api, request: web.BaseRequest) -> web.StreamResponse:
    """JoinConsumerGroup {groupName}: as Subscribe, to the group's pattern."""
    async def read(asks: Fields) -> Wanted:
        group = await api.journal.read(known, ConsumerGroup, asks.text("groupName"))
        return replace(
            read_wanted(api, [group.pattern], Fields({"filter": group.filter})),
            group=group.name, manual=group.ack_mode == "manual")

    return await stream_envelopes(api, request, read)

async def list_dead(api: Api, request: web.BaseRequest) -> web.Response:
    """GET /api/v1/consumer-groups/{name}/dead: messages given up, oldest first."""
    asks = await asked_of_group(api, request)
    name, limit = asks.text("name"), min(asks.whole("limit") or 50, 1000)
    await api.journal.read(known, ConsumerGroup, name)
    dead = await api.journal.read(
        Queries.dead_letters, name, asks.whole("cursor"), limit + 1)
    page = {each.seq: each for each in dead[:limit]}
    rows = [about(message) | {
        "event_id": dumps(message.event_id), "eventId": None,
        "sequence": str(message.seq), "timestamp": stamp(message.at),
        "attempts": str(page[message.seq].misses),
        "dead_at": stamp(page[message.seq].due_at)}
        for message in await api.journal.read(Queries.messages_at, list(page))]
    more = f'"{max(page)}"' if len(dead) > limit else None
    return answer(join({"dead": listed(map(join, rows)), "count": str(len(rows)),
                        "next_cursor": more}))

async def replay_dead(api: Api, request: web.BaseRequest) -> web.Response:
    """POST .../replay {event_ids}: deal them out again; all of them, if none is named.
    """
    asks = await asked_of_group(api, request)
    event_ids = asks.items("eventIds")
    count = await api.journal.write(
        revive, asks.text("name"), [str(each) for each in event_ids] or None)
    return answer(dumps({"replayed": count}))

# ======================================================================================
# 10. The way out: pull
# ======================================================================================
# A worker registers, then asks for jobs and is kept waiting until there are some: a
# held poll. It acks a job, does it, reports its steps on the way and its end. The order
# of calls and the bodies are those of the SDKs' workers. Whatever a worker may be told
# twice, or never hears because it died, is the engine's to decide; here are sockets.

@dataclass(slots=True, eq=False)
class PullDesk:
    """The held polls of all workers, and when each worker was last heard of.

    Last-seen lives in memory: only a change of state (connected, disconnected) is
    written, so that idle workers cost no disk.
    """

    journal: Journal
    offers: Offers
    limits: Limits
    clock: Clock
    seen: dict[str, tuple[float, float]] = field(default_factory=dict)  # steady, wall
    in_hand: Counter[str] = field(default_factory=Counter)  # jobs, as far as we know
    freed: dict[str, Future] = field(default_factory=dict)
    chores: set[asyncio.Task[Any]] = field(default_factory=set)
    closing: Future = field(default_factory=asyncio.Future)

    def remember(self, worker_id: str) -> None:
        """It spoke; or at start, when it has the usual time to be heard of again."""
        self.seen[worker_id] = (self.clock.steady(), self.clock.wall())

    async def heard_of(self, worker_id: str) -> None:
        """A worker spoke. Raises NotFound if it never registered."""
        if worker_id not in self.seen:
            await self.journal.write(note_worker, worker_id, True)
        self.remember(worker_id)

    async def miss_the_silent(self) -> None:
        """Say in the journal who was not heard of for 90 s."""
        horizon = self.clock.steady() - WORKER_LIVE_S
        for worker_id in [w for w, seen in self.seen.items() if seen[0] < horizon]:
            await self.journal.write(note_worker, worker_id, False)
            del self.seen[worker_id]
            del self.in_hand[worker_id]

    async def wait_for_jobs(self, worker_id: str, slots: int, wait_s: float,
                            acked: bool) -> list[Job]:
        """Lease up to `slots` due runs to a worker, waiting `wait_s` for the first.

        An empty list means that nothing came in time. Cancelling while waiting loses
        nothing: the offer is withdrawn, and if it was taken already, the runs are given
        back. Raises NotFound for a worker that never registered.
        """
        waiting: asyncio.Future[list[Job]] = asyncio.Future()
        offer = Offer(worker_id, slots, lambda got: settle_future(waiting, got), acked)
        self.offers.add(offer)
        try:
            # nothing to write; but every batch ends with a look at the offers
            await self.journal.write(lambda tx, now: None)
            await self.first_of(waiting, wait_s)
            if self.offers.withdraw(offer):
                return []
            return await asyncio.shield(waiting)  # taken: its commit is under way
        except BaseException as error:
            if not self.offers.withdraw(offer):
                await self.give_back(await waiting, sent=False)
            if isinstance(error, asyncio.CancelledError):  # the client hung up
                await self.see_whether_it_left(worker_id)
            raise

    async def see_whether_it_left(self, worker_id: str) -> None:
        """A worker that restarts has another id: let the actors of the old one move."""
        seen = self.seen.get(worker_id)
        await asyncio.wait({self.closing}, timeout=GONE_AFTER_S)
        if self.seen.get(worker_id) == seen and not self.closing.done():
            with contextlib.suppress(DiskFull, Unavailable):  # then after 90 s
                await self.journal.write(hung_up, worker_id)

    async def spare_a_slot(self, worker_id: str, slots: int) -> int:
        """How many jobs to give a worker of JS or Go that has `slots` free.

        They sleep for a second once all slots are taken, though a job may end in a
        millisecond; so the last slot is left free until a job ends, or for a second.
        """
        if slots == 1 and self.in_hand[worker_id]:
            self.freed[worker_id] = asyncio.Future()
            await asyncio.wait({self.freed[worker_id]}, timeout=LAST_SLOT_S)
        return max(1, slots - 1)

    def job_ended(self, worker_id: str) -> None:
        self.in_hand[worker_id] -= self.in_hand[worker_id] > 0
        settle_future(self.freed.pop(worker_id, None), None)

    async def first_of(self, waiting: Future, wait_s: float) -> None:
        """Until the answer, the end of the wait, or the end of the server."""
        await asyncio.wait({waiting, self.closing}, timeout=wait_s,
                           return_when=asyncio.FIRST_COMPLETED)

    async def give_back(self, jobs: list[Job], sent: bool) -> None:
        for job in jobs:
            await self.journal.write(give_back, job.run.run_id, job.run.fence, sent,
                                     self.limits)

    def look_after(self, jobs: list[Job], transport: asyncio.Transport | None) -> None:
        """Count jobs that were sent; a moment later, see whether their client is there.

        A process that was killed takes its sockets along at once, and acks come within
        milliseconds. Not sooner than a second, for some clients close the connection
        of a poll and ack on another.
        """
        self.in_hand[jobs[0].run.worker_id or ""] += len(jobs)

        def look() -> None:
            gone = transport is None or transport.is_closing()
            if gone and not self.closing.done():
                chore = asyncio.create_task(self.give_back(jobs, sent=True))
                self.chores.add(chore)
                chore.add_done_callback(self.chores.discard)

        asyncio.get_running_loop().call_later(GONE_AFTER_S, look)

    async def close(self) -> None:
        """Answer every held poll now, with nothing, and finish what is under way."""
        settle_future(self.closing, None)
        if self.chores:
            await asyncio.wait(self.chores, timeout=STOP_S)

def worker_of(request: web.BaseRequest) -> str:
    """The worker's id, client-made: in every path, and taken as it is."""
    worker_id: str = request[GIVEN]["worker_id"]
    if len(worker_id) > 255 or CONTROL.search(worker_id):
        raise InvalidInput("worker id: send up to 255 characters, none of control")
    return worker_id

async def post_worker(api: Api, request: web.BaseRequest) -> web.Response:
    """Register a worker, again as often as it likes; the newest word counts."""
    body = Fields(await api.read_json(request))
    worker_id, function_ids = worker_of(request), body.items("functionIds")
    if not all(isinstance(function_id, str) for function_id in function_ids):
        raise InvalidInput("function_ids: send a list of strings")
    await api.journal.write(register_worker, Worker(
        worker_id, body.text("hostname"), dumps(list(dict.fromkeys(function_ids))),
        body.whole("maxConcurrentJobs", default=10, high=1_000_000),
        dumps(body.inner("labels").all), dumps(body.inner("version").all),
        connected=1, registered_at=api.clock.wall()))
    await api.desk.heard_of(worker_id)
    return answer('{"status":"registered"}')

async def post_heartbeat(api: Api, request: web.BaseRequest) -> web.Response:
    """Renew the leases of the jobs that are listed: Python drops one to let it end."""
    body, worker_id = Fields(await api.read_json(request)), worker_of(request)
    await api.desk.heard_of(worker_id)
    if job_ids := [job.text("jobId") for job in body.objects("jobs")]:
        await api.journal.write(heartbeat, worker_id, job_ids, api.limits)
    return answer('{"status":"ok"}')

async def poll_jobs(api: Api, request: web.BaseRequest) -> web.Response:
    """GET .../jobs?available=N[&wait=S][&acked=true]: N jobs at most, or 204 for none.

    Held up to `wait` seconds, at most 25; JS and Go do not say `wait` and are held for
    10, for they would sleep a second after a 204 (JS 0.29). Our own client says
    `acked`: it takes the answer for its ack, which saves a commit before each start.
    """
    wanted = Fields(request.query)
    desk, worker_id = api.desk, worker_of(request)
    await desk.heard_of(worker_id)
    slots = wanted.whole("available", default=1, high=10_000)
    if slots and "wait" not in request.query:
        slots = await desk.spare_a_slot(worker_id, slots)
    wait_s = min(wanted.whole("wait", default=POLL_HOLD_S), MAX_POLL_HOLD_S)
    acked = request.query.get("acked") == "true"
    jobs = await desk.wait_for_jobs(worker_id, slots, wait_s, acked) if slots else []
    if jobs:
        desk.look_after(jobs, request.transport)
        return answer(join({"jobs": listed(map(job_to_json, jobs))}))
    held = {"Ironflow-Poll-Wait": str(wait_s)} if slots and wait_s else {}
    return web.Response(status=204, headers=held)

def job_to_json(job: Job) -> Json:
    """An assignment, by the strictest SDK's rules: absent, never null (Python 0.53)."""
    steps = [join(members(step, "step_id name status error")
                  | {"output": step.output or "null"}) for step in job.steps]
    context = dumps({"secrets": job.secrets}) if job.secrets else None
    return join(members(job.run, "job_id run_id function_id attempt lease_token"
                                 " execution_seq=fence lease_expires_at=lease_until"
                                 " max_attempts=policy.max_attempts"
                                 " on_exhausted=policy.on_exhausted actor_id") | {
        "event": join(members(job.event, EVENT)), "completed_steps": listed(steps),
        "step_sequence_base": str(job.next_sequence), "context": context})

async def put_ack(api: Api, request: web.BaseRequest) -> web.Response:
    said = read_report(Fields(await api.read_json(request)), "ack")
    await api.journal.write(report, request[GIVEN]["job_id"], said, api.limits)
    return answer('{"status":"ok"}')

async def put_update(api: Api, request: web.BaseRequest) -> web.Response:
    """Progress, or the end of a run's execution: completed, failed, yielded."""
    job_id, body = request[GIVEN]["job_id"], b""
    try:
        body = await api.read_body(request)
        said = read_report(Fields(parse_json(body)))
    except (InvalidInput, TooLarge) as wrong:
        said = last_word(job_id, status_in(body, wrong), wrong)
    if said.status != "progress":
        api.desk.job_ended(request[GIVEN]["worker_id"])
    await take_report(api, job_id, said, len(body))
    return answer('{"status":"ok"}')

async def take_report(api: Api, job_id: str, said: Report, size: int) -> None:
    said = await looked_back(api.journal, run_and_fence(job_id)[0], said)
    await api.journal.write(report, job_id, said, api.limits, size=size)

async def looked_back(journal: Journal, run_id: str, said: Report) -> Report:
    if any(wish.kind == "wait_for_event" for wish in said.yields):
        return await journal.read(look_back, run_id, said)
    return said

def last_word(job_id: str, status: Any, wrong: IronflowError) -> Report:
    """What to make of a final report that cannot be kept: the run fails, and says why.

    Refused, it would be dropped by the SDKs, and the run would go round from worker to
    worker. Raises `wrong` for all that is not final: a worker can live with that.
    """
    _, fence = run_and_fence(job_id)
    if fence is None or status not in ("completed", "failed", "yielded"):
        raise wrong
    log.warning("the report on %s cannot be kept: %s", job_id, wrong.message)
    return Report("failed", fence, None, error={
        "message": f"the report cannot be kept: {wrong.message}",
        "code": "INVALID_REPORT"})

def status_in(body: bytes, wrong: IronflowError) -> Any:
    """The status of an unreadable report, for whose JSON a laxer reader may do."""
    if isinstance(wrong, TooLarge):
        return "failed"
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        return json.loads(body.decode(errors="replace")).get("status")
    return None

async def put_updates(api: Api, request: web.BaseRequest) -> web.Response:
    """PUT .../jobs: many updates in one request, each judged alone, in order.

    Ours, for our own client: {"updates": [{"job_id", "status", ...}]}, where `status`
    may also be `ack`. The answer's `results` hold a status and a body for each.
    """
    body = Fields(await api.read_json(request))
    updates = body.objects("updates", UPDATES_PER_REQUEST)
    size = (request.content_length or KIB) // max(1, len(updates))
    results = await asyncio.gather(*[take_update(api, item, size) for item in updates])
    return answer(join({"results": listed(results)}))

async def take_update(api: Api, item: Fields, size: int) -> Json:
    try:
        job_id = item.text("jobId")
        try:
            said = read_report(item)
        except InvalidInput as wrong:
            said = last_word(job_id, item.get("status"), wrong)
        await take_report(api, job_id, said, size)
    except IronflowError as error:
        return join({"status": str(error.status), "body": dumps(error_body(error))})
    return '{"status":200,"body":{"status":"ok"}}'

def read_report(body: Fields, status: str | None = None) -> Report:
    """A worker's word on a job, as all three SDKs send it. Raises InvalidInput."""
    said: Any = status or body.text("status")
    known = ("ack", "progress", "completed", "failed", "yielded")
    if said not in known:
        raise InvalidInput(f"status is {said[:40]!r}: send one of {', '.join(known)}")
    steps = body.objects("steps")
    if said == "progress" and len(steps) > STEPS_PER_REPORT:
        raise InvalidInput(f"{len(steps)} steps in one report: send up to "
                           f"{STEPS_PER_REPORT}")
    return Report(
        said, body.whole("executionSeq", default=-1), body.text("leaseToken"),
        list(map(read_step, steps)), body.whole("stepOffset"),
        output=dumps(body.get("output", "result")),
        error=read_error(body.get("error")) if said == "failed" else {},
        yields=[] if said != "yielded" else list(map(
            read_yield, [body.inner("yield"), *body.objects("yields")])),
    )

def read_step(body: Fields) -> ReportedStep:
    """A finished step. Go leaves out the times, JS the output of undefined."""
    status: Any = body.text("status", default="completed")
    step_id, failed = body.text("id"), status == "failed"
    if not step_id or CONTROL.search(step_id):
        raise InvalidInput("a step's id is empty or holds a control character")
    if status not in ("completed", "failed"):
        raise InvalidInput(f"step {step_id[:80]!r}: status {status[:40]!r} is not "
                           "completed or failed")
    return ReportedStep(
        step_id, body.text("name") or step_id, body.text("type") or "invoke", status,
        output=None if failed else dumps(body.get("output")),
        error=dumps(read_error(body.get("error"))) if failed else None,
        duration_ms=round(min(max(body.number("durationMs") or 0, 0), 2**53)),
        compensation_for=body.text("compensationFor") or None,
        started_at=body.instant("startedAt"), ended_at=body.instant("endedAt"),
    )

def read_error(value: Any) -> dict[str, Any]:
    """An error as reported: an object, a bare sentence, or nothing."""
    said = Fields(value if isinstance(value, dict) else {"message": value}, "error")
    message, after = said.all.get("message"), said.number("retryAfterMs")
    message = message if isinstance(message, str) else "unknown error"
    always = {"message": message[:MAX_ERROR_TEXT],
              "retryable": said.all.get("retryable") is True}
    error = {name: value for name, value in said.all.items()
             if name not in ("retryAfterMs", "retry_after_ms")
             and (name != "code" or isinstance(value, str))} | always
    if len(dumps(error)) > 4 * MAX_ERROR_TEXT:  # a stack like that helps nobody
        error = always
    return error if after is None else error | {"retry_after_ms": max(0.0, after)}

def read_yield(body: Fields) -> Yield:
    """Why the worker let go. Our own client says in `yields` what else is blocked."""
    kind, step_id = body.text("type"), body.text("stepId")
    if not kind or not step_id:
        raise InvalidInput("yield.type and yield.step_id: send both")
    about = body.inner("eventFilter")
    target = about.text("event") or body.text("functionId")
    until, value, timeout_s = body.instant("until"), about.get("matchValue"), 0.0
    if kind == "sleep" and until is None:
        raise InvalidInput("yield.until is missing: a sleep says when it ends")
    if kind == "wait_for_event":
        try:
            timeout_s = duration_s(about.text("timeout") or "7d")
        except ValueError as error:
            raise InvalidInput(f"yield.event_filter.timeout: {error}") from None
    elif kind == "invoke_function":
        timeout_s = (body.whole("invokeTimeoutMs") or DEFAULT_WAIT_MS) / 1000
    if kind in YIELDS[1:] and not check_trigger(target):
        raise InvalidInput(f"yield: {kind} names its event or its function")
    shown = about.all.get("payload") if kind == "wait_for_event" else body.get("input")
    return Yield(
        kind, step_id, body.text("stepName") or step_name(step_id), until or 0.0,
        timeout_s, target, about.text("match"),
        None if value is None else dumps(value),
        None if shown is None else dumps(shown))

def step_name(step_id: str) -> str:
    """The name inside `{scope}:{name}:{index}`, for people; ids stay opaque."""
    parts = re.split(r"(?<!\\):", step_id)
    name = parts[-2] if len(parts) >= 3 else step_id
    return name.replace("\\:", ":").replace("\\\\", "\\")

# ======================================================================================
# 11. The way out: push
# ======================================================================================
# A run whose function has an endpoint goes out as a signed request, and the answer is
# its report: what was done, and how it ended or what it waits for. Whatever happens
# before such an answer was read is a failure of transport: tried again by the
# function's policy, and counted by the endpoint's breaker.
# Facts of the wire: the public SDKs, Python 0.53 and JS 0.29.

PUSH_CONNECT_S = 10.0
KEEP_S = 4.0  # an unused connection: Node and uvicorn close theirs after five
REDIRECTS = 5
KEPT_OF_ERRORS = 64 * KIB  # of the body of an answer other than 200
HINTS = {401: "start both sides with the same IRONFLOW_SIGNING_KEY",
         404: "is this where it is served, and is the function among those served?",
         405: "is this where it is served?", 413: "raise its limit of bodies"}

class PushFailed(Exception):
    """A request that brought no outcome: a code, what happened, when to try again."""

    def __init__(self, code: str, message: str, after_ms: float | None = None) -> None:
        super().__init__(code, message)
        self.after_ms = after_ms

ENDPOINT = re.compile(r"(?=[!-~]{1,2048}\Z)(?i:https?)://[^/?#@\\]+([/?][^#\\]*)?")
NUMERIC = re.compile(r"(^|\.)([0-9]+|0[xX][0-9a-fA-F]*)\.?$")
# Link-local addresses are where clouds answer with the machine's own credentials; so
# are these, which are not link-local. Multicast and 0.0.0.0 are nobody's.
METADATA = {"fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"}
NAT64 = ipaddress.ip_network("64:ff9b::/96")

@dataclass(frozen=True, slots=True)
class Reach:
    """Where the server may be made to post: anywhere but to link-local and metadata
    addresses; and if hosts or networks are named, only there."""

    hosts: tuple[str, ...] = ()
    networks: tuple[Any, ...] = ()

    @staticmethod
    def read(patterns: Iterable[str]) -> Reach:
        """Of host patterns and networks. Raises StartError."""
        hosts, networks = [], []
        for pattern in patterns:
            try:
                networks.append(ipaddress.ip_network(pattern.strip("[]"), strict=False))
            except ValueError:
                if not re.fullmatch(r"[A-Za-z0-9*.-]+", pattern):
                    raise StartError(f"{pattern[:80]!r} is neither a host pattern, such"
                                     " as *.example.com, nor a network") from None
                hosts.append(pattern.lower())
        return Reach(tuple(hosts), tuple(networks))

    def check(self, url: str) -> None:
        """Raises InvalidInput for what is no URL, or may not be posted to; of a name
        its addresses are judged when there is a connection to be made."""
        address = ""
        try:
            parts = URL(url, encoded=True)
            host = parts.raw_host if parts.port and ENDPOINT.fullmatch(url) else None
            if host and (":" in host or NUMERIC.search(host)):
                address = str(ipaddress.ip_address(host))  # in no other spelling
        except ValueError:
            host = None
        if not host:
            raise InvalidInput(
                f"{url[:80]!r} is no URL to post to: send one such as "
                "https://example.com/ironflow, up to 2,048 characters of ASCII, without"
                " a user, a password or a fragment")
        if not self.permits(host, address):
            raise InvalidInput(off_limits(host))

    def permits(self, host: str, address: str) -> bool:
        """Whether a connection may be made to a host's address ("": not known yet)."""
        forms, name = forms_of(address), host.lower().rstrip(".")
        if any(ip.is_link_local or ip.is_multicast or ip.is_unspecified
               or str(ip) in METADATA for ip in forms):
            return False
        if any(fnmatchcase(name, pattern) for pattern in self.hosts):
            return True
        if not self.networks:
            return not self.hosts
        return not forms or any(ip in each for ip in forms for each in self.networks)

def forms_of(address: str) -> list[Any]:
    """An address, and the IPv4 address that it carries in one of three ways."""
    ip = ipaddress.ip_address(address) if address else None
    if not isinstance(ip, ipaddress.IPv6Address):
        return [ip] if ip else []
    nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
    return [form for form in (ip, ip.ipv4_mapped, ip.sixtofour, nat64) if form]

def off_limits(where: str) -> str:
    return (f"{where[:80]} is off limits: link-local and metadata addresses are, and "
            "what --push-allow leaves out, if it is given")

class Resolver(AbstractResolver):
    """The addresses of a name, those that may be reached. In threads of its own: a name
    server that does not answer holds up endpoints alone."""

    def __init__(self, reach: Reach, getaddrinfo: Callable[..., Any]) -> None:
        self._reach, self._getaddrinfo = reach, getaddrinfo
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="ironflow resolver")

    async def resolve(self, host: str, port: int = 0,
                      family: socket.AddressFamily = socket.AF_UNSPEC) -> list[Any]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._pool, partial(self._getaddrinfo, host, port, family,
                                socket.SOCK_STREAM))
        fine = [{"hostname": host, "host": where[0], "port": port, "family": kind,
                 "proto": proto, "flags": socket.AI_NUMERICHOST}
                for kind, _, proto, _, where in found
                if self._reach.permits(host, where[0])]
        if not fine:
            address = found[0][4][0] if found else "no address"
            raise PushFailed("ENDPOINT_REFUSED", off_limits(f"{host} ({address})"))
        return fine

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

class Line(ResponseHandler):
    """A connection; one that floods us with answers (1xx may be many) is cut off."""

    def feed_data(self, *answer: Any) -> None:
        super().feed_data(*answer)
        if len(self._buffer) > 20 and self.transport is not None:
            self.transport.abort()

class Connector(aiohttp.TCPConnector):
    """The pool of connections; one on which somebody spoke unasked is not used again:
    that would be taken for the next answer."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        # aiohttp has no public place for this; should it go, a test sees the flood
        make: Any = partial(Line, loop=asyncio.get_running_loop())
        self._factory = make

    async def connect(self, *asked: Any, **more: Any) -> Any:
        while True:
            line = await super().connect(*asked, **more)
            if line.protocol is None or not line.protocol.should_close:
                return line
            line.close()

class Poster:
    """HTTP to endpoints: one pool of connections, and nothing but what is permitted."""

    def __init__(self, reach: Reach, limit: int, getaddrinfo: Callable[..., Any]
                 ) -> None:
        self._reach, self._limit, self._getaddrinfo = reach, limit, getaddrinfo
        self._in_flight = 0  # bytes of answers in memory

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()

        async def note(session: Any, context: Any, params: Any) -> None:
            context.trace_request_ctx.append("new")

        trace.on_connection_create_start.append(note)
        return aiohttp.ClientSession(
            connector=Connector(
                limit=0, keepalive_timeout=KEEP_S,
                resolver=Resolver(self._reach, self._getaddrinfo)),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=PUSH_CONNECT_S),
            headers={"User-Agent": f"ironflow/{__version__}"}, trace_configs=[trace],
            cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)

    async def close(self) -> None:
        if "_session" in vars(self):
            await self._session.close()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]
                   ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the answer. Raises PushFailed."""
        for _ in range(REDIRECTS + 1):
            try:
                self._reach.check(url)
                async with await self._send(url, body, headers) as reply:
                    if not 300 <= reply.status < 400:
                        return reply.status, reply.headers, await self._read(reply)
                    url = next_hop(url, reply.status, reply.headers.get("Location", ""))
            except InvalidInput as error:
                raise PushFailed("ENDPOINT_REFUSED", error.message) from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise PushFailed("ENDPOINT_UNREACHABLE", in_words(error)) from error
        raise PushFailed("ENDPOINT_REDIRECT", (
            f"it was redirected more than {REDIRECTS} times: register its address"))

    async def _send(self, url: str, body: bytes, headers: Mapping[str, str]
                    ) -> aiohttp.ClientResponse:
        """A kept connection may have been closed on the other side: then on another."""
        while True:
            made = list[str]()
            try:
                return await self._session.post(
                    URL(url, encoded=True), data=body, headers=headers,
                    allow_redirects=False, trace_request_ctx=made)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if made:
                    raise

    async def _read(self, reply: aiohttp.ClientResponse) -> bytes:
        """Its body, within the limits; of an error only the beginning."""
        if (coding := reply.headers.get("Content-Encoding", "identity")) != "identity":
            raise PushFailed("ENDPOINT_ANSWER", (
                f"its answer comes as {coding[:40]!r}, which was not asked for: send "
                "it as it is"))
        parts, size = list[bytes](), 0
        try:
            async for part in reply.content.iter_any():
                size, self._in_flight = size + len(part), self._in_flight + len(part)
                parts.append(part)
                if reply.status != 200 and size > KEPT_OF_ERRORS:
                    break
                if size > self._limit:
                    raise PushFailed("ENDPOINT_TOO_LARGE", (
                        f"its answer is larger than the limit of {self._limit} bytes: "
                        "send less, or start the server with a larger "
                        "--max-body-bytes"))
                if self._in_flight > BODIES_IN_FLIGHT:
                    raise PushFailed("ENDPOINT_TOO_LARGE",
                                     "too many large answers came at once")
        finally:
            self._in_flight -= size
        return b"".join(parts)

def next_hop(url: str, status: int, location: str) -> str:
    """Where a redirect leads. Raises PushFailed for one that is not followed."""
    target = urljoin(url, location)
    if status not in (307, 308) or not location:
        raise PushFailed("ENDPOINT_REDIRECT", (
            f"it answered {status} with the location {shown(location)[:200]!r}: only "
            "307 and 308 keep method and body; register that address"))
    if url.lower().startswith("https:") and not target.lower().startswith("https:"):
        raise PushFailed("ENDPOINT_REDIRECT", (
            f"it redirects to {shown(target)}, which is not encrypted: register the "
            "https address that it means, often only with another slash at its end"))
    return target

def in_words(error: Exception) -> str:
    """Why there was no answer."""
    if isinstance(error, aiohttp.ClientSSLError):
        why = getattr(error, "os_error", None) or getattr(
            error, "certificate_error", error)
        return f"TLS failed ({why}): is its certificate right, is it https at all?"
    if isinstance(error, aiohttp.ClientConnectorError):
        number, why = error.os_error.errno or 0, error.os_error.strerror
        if number > 0:  # for a name that is not known it is not the system's
            why = os.strerror(number)
        return f"no connection ({why or error}): is it running, is the address right?"
    if isinstance(error, aiohttp.ServerTimeoutError):
        return (f"no connection within {PUSH_CONNECT_S:g} s: is it running, does a "
                "firewall stand between?")
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError
                  | aiohttp.ClientOSError):
        return "the connection broke before its answer was whole: see its log"
    if isinstance(error, aiohttp.ClientResponseError):  # whose str() tells the URL
        said = " ".join(error.message.split())[:200]
        return f"what it sent is no HTTP ({said}): is the address right?"
    return f"there is no such host ({type(error).__name__}): is the address right?"

class PushDesk:
    """The requests under way: a task for each, from the lease to the commit."""

    def __init__(self, journal: Journal, offers: Offers, limits: Limits, clock: Clock,
                 reach: Reach, post: Callable[..., Awaitable[tuple[int, Any, bytes]]],
                 timeout_s: float, signing_key: str) -> None:
        self._journal, self._offers, self._limits = journal, offers, limits
        self._clock, self.reach, self._post = clock, reach, post
        self._timeout_s, self.signing_key = timeout_s, signing_key
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def begin(self, jobs: list[Job]) -> None:
        """Push a job that was leased to a slot."""
        for job in jobs if not self._closing else ():  # at the next start
            ended = self._journal.end_of(job.run.run_id)
            task = asyncio.create_task(self._carry(job, ended))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Send no more; what is not answered soon goes out again at the next start."""
        self._closing = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_S)
            await asyncio.gather(*map(end_task, late))

    async def _carry(self, job: Job, ended: Future) -> None:
        """Ask, until there is an answer or the run is over; then write the answer down,
        however long the disk refuses."""
        asking = asyncio.create_task(self._ask(job))
        try:
            await asyncio.wait({asking, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_task(asking)
            self._offers.freed(job.function.endpoint if job.function else "")
        said, reached, size = ((None, False, 0) if asking.cancelled()
                               else asking.result())
        while True:
            try:
                if said is not None:
                    said = await looked_back(self._journal, job.run.run_id, said)
                return await self._journal.write(push_ended, job, said, reached,
                                                 self._limits, size=size)
            except (DiskFull, Unavailable):
                pass  # the log has it already
            except Exception:  # a mistake of ours: no run may hang by it
                log.exception("what became of the push of %s", job.run.run_id)
                said = Report("failed", job.run.fence, job.run.lease_token, error={
                    "message": "internal error: see the log", "code": "INTERNAL"})
            await asyncio.sleep(RETRY_S)

    async def _ask(self, job: Job) -> tuple[Report, bool, int]:
        """What the endpoint says; whether it was reached; the size of that."""
        assert job.function is not None
        url, run = job.function.endpoint, job.run
        limit_s = job.function.asks["timeoutMs"] / 1000 or self._timeout_s
        try:
            async with asyncio.timeout(limit_s):
                large = size_of(job.event) + sum(
                    len(step.output or "") for step in job.steps) > PARSED_IN_THREAD
                body = await asyncio.to_thread(push_body, job) if large else (
                    push_body(job))
                status, headers, answer = await self._post(url, body, {
                    "Content-Type": "application/json", "Accept-Encoding": "identity",
                    "X-Ironflow-Run-ID": run.run_id,
                    "X-Ironflow-Attempt": str(run.attempt),
                    "Idempotency-Key": f"{run.run_id}:{run.fence}",
                    **self._signature(body)})
            if status != 200:
                raise status_failure(status, headers, answer)
            return await read_outcome(answer, run), True, len(answer)
        except TimeoutError:
            why = PushFailed("ENDPOINT_TIMEOUT", (
                f"no whole answer within {limit_s:g} s: answer sooner, or register a "
                "longer timeoutMs (without one, --push-timeout counts)"))
        except PushFailed as failed:
            why = failed
        except Exception:
            log.exception("push of %s to %s", run.run_id, shown(url))
            why = PushFailed("ENDPOINT_FAILED", "internal error: see the server's log")
        code, message = why.args
        told = {"code": code, "message": f"POST {shown(url)}: {message}",
                 "retryable": True, "retry_after_ms": why.after_ms}
        return Report("failed", run.fence, run.lease_token, error=told), False, KIB

    def _signature(self, body: bytes) -> dict[str, str]:
        """One value that all SDKs take: JS reads the first part, Python and Go the
        others (JS 0.29, Python 0.53)."""
        if not self.signing_key:
            return {}
        key, at = self.signing_key.encode(), str(int(self._clock.wall()))
        whole, dated = (hmac.digest(key, text, "sha256").hex()
                        for text in (body, f"{at}.".encode() + body))
        return {"X-Ironflow-Signature": f"sha256={whole},t={at},v1={dated}"}

def push_body(job: Job) -> bytes:
    """A job as endpoints read it: absent, never null (JS 0.29, Python 0.53)."""
    return as_javascript(join(members(
        job.run, "run_id function_id attempt max_attempts=policy.max_attempts"
        " on_exhausted=policy.on_exhausted actor_id") | {
            "event": join(members(job.event, EVENT)),
            "steps": listed(map(step_to_push, job.steps)),
            "secrets": dumps(job.secrets) if job.secrets else None})).encode()

def step_to_push(step: Step) -> Json:
    found = members(step, "id=step_id name status") | {"output": step.output or "null"}
    if step.error is not None:  # of a failed call: JSON in a string
        about = json.loads(step.error)
        whose = {"function_id": step.name, "child_run_id": "", "cause": "it failed"}
        found["error"] = dumps(dumps(whose | about))
    return join(found)

UNLIKE_JAVASCRIPT = re.compile(r'[\[:,]-?[0-9]+[.eE]|[{,]"[0-9]{1,10}":')

def as_javascript(text: Json) -> Json:
    """JSON as JavaScript would write it again: some of its endpoints check a signature
    against that. Integers beyond 2^53 stay whole, though JavaScript would round them.
    """
    return rewritten(json.loads(text)) if UNLIKE_JAVASCRIPT.search(text) else text

def rewritten(value: Any) -> Json:
    if isinstance(value, list):
        return listed(map(rewritten, value))
    if isinstance(value, dict):  # array indexes come first, in their order
        names = sorted(value, key=lambda name: (
            int(name) if re.fullmatch("0|[1-9][0-9]{0,9}", name)
            and int(name) < 2**32 - 1 else 2**32))
        return join({dumps(name)[1:-1]: rewritten(value[name]) for name in names})
    if isinstance(value, float):
        size = abs(value)
        if size == 0 or 1e-6 <= size < 1e21:
            return re.sub(r"\.0$", "", f"{Decimal(repr(value or 0)):f}")
        return re.sub("e([+-])0*", r"e\1", repr(value))
    return dumps(value)

async def read_outcome(answer: bytes, run: Run) -> Report:
    """How an endpoint says that an execution ended; one that cannot be kept fails the
    run, as a worker's would. Raises PushFailed."""
    try:
        value = (parse_json(answer) if len(answer) <= PARSED_IN_THREAD
                 else await asyncio.to_thread(parse_json, answer))
        said = read_report(Fields(value, "answer"))
        if said.status in ("ack", "progress"):
            raise InvalidInput(f"answer.status is {said.status!r}")
    except InvalidInput as wrong:
        try:
            said = last_word(run.job_id, status_in(answer, wrong), wrong)
        except InvalidInput:
            raise PushFailed("ENDPOINT_ANSWER", (
                f"its answer is no outcome ({wrong.message}): answer 200 with an object"
                " whose status is completed, yielded or failed")) from None
    return replace(said, fence=run.fence, lease_token=run.lease_token)

def status_failure(status: int, headers: Mapping[str, str], answer: bytes
                   ) -> PushFailed:
    """What an answer other than 200 says: its own code and message, if it has them."""
    code, message = "ENDPOINT_STATUS", ""
    with contextlib.suppress(InvalidInput):
        error = Fields(parse_json(answer)).inner("error")
        message, word = error.text("message")[:KEPT_OF_ERRORS], error.text("code")
        code = word if re.fullmatch("[A-Z][A-Z0-9_]{0,79}", word) else code
    message = message or answer[:200].decode(errors="replace").strip()
    said = f"it answered {status}" + (f": {message}" if message else "")
    after = headers.get("Retry-After", "") if status in (429, 503) else ""
    after_ms = float(after) * 1000 if re.fullmatch("[0-9]{1,9}", after) else None
    return PushFailed(code, f"{said}; {HINTS.get(status, 'see its log')}", after_ms)

# ======================================================================================
# 12. The server
# ======================================================================================
# Everything put together, and nothing decided. What starts last stops first: the doors
# close, held polls are answered, the queue is committed, the log folded into the file.

CLOCK_CHECK_S = 30.0  # how long a step of the wall clock can go unnoticed
SECRETS_CHECK_S = 1.0  # between two looks at their file
CLOCK_STEP_S = 1.0  # less than this is drift
RETRY_S = 1.0  # between two tries of the timers to write
SWEEP_EVERY_S, SWEEP_PAUSE_S = 3600.0, 0.05  # between sweeps; between parts of one
CALLERS = 1024  # that may knock at once: a thousand watchers after a restart
STOP_S = 10.0  # how long requests in progress may take when stopping

class Secrets:
    """What `--secrets-file` holds: a JSON object of texts, or lines NAME=VALUE.

    Read anew when the file changes; one that cannot be read leaves what was there.
    Values go into assignments, and nowhere else. Raises StartError.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self._values = path, dict[str, str]()
        self._seen: Any = None  # what the file looked like, when it was read
        self.readings = 0
        self._read()

    def of(self, names: list[str]) -> dict[str, str]:
        """The values of those that are there."""
        if names:
            self.refresh()
        values = self._values
        return {name: values[name] for name in names if name in values}

    def missing(self, function: Function) -> list[str]:
        found = self.of(names := function.asks.get("secrets", []))
        return [name for name in names if name not in found]

    def refresh(self) -> None:
        try:
            self._read()
        except StartError as error:
            log.error("%s; the secrets read before stay", error)

    def _read(self) -> None:
        if (path := self.path) is None:
            return
        seen, self._seen = self._seen, str(path)
        try:
            about = path.stat()
            self._seen = (about.st_mode, about.st_ino, about.st_size, about.st_mtime_ns,
                          about.st_ctime_ns)
            if seen == self._seen:
                return
            text = private_text(path)
            if text.lstrip().startswith("{"):
                found = Fields(parse_json(text.encode())).all
            else:
                lines = filter(None, map(str.strip, text.splitlines()))
                found = dict(line.split("=", 1) for line in lines if line[0] != "#")
            if not all(isinstance(value, str) for value in found.values()):
                raise ValueError
        except OSError as error:
            if seen == self._seen:
                return  # it was not there before either
            raise StartError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, IronflowError):  # which may quote a secret
            raise StartError(f"{path} is neither a JSON object of texts nor lines "
                             "NAME=VALUE") from None
        self._values, self.readings = dict(found), self.readings + 1

def private_text(path: Path) -> str:
    """What a file says that nobody else may read. Raises OSError, StartError."""
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise StartError(f"{path} can be read by others: chmod 600 {path}")
    return path.read_text()

class Timekeeper:
    """One task that sleeps until the next lease ends or the next sleeper is due."""

    def __init__(self, desk: PullDesk, push_slots: int, resumed: Future) -> None:
        self._desk, self._clock, self._push_slots = desk, desk.clock, push_slots
        self._resumed = resumed
        self._next_at = math.inf
        self._rung = asyncio.Event()

    def ring(self, instant: float) -> None:
        """A commit set something due at `instant`: wake earlier if need be."""
        if instant < self._next_at:
            self._next_at = instant
            self._rung.set()

    async def keep(self) -> None:
        """Until cancelled. An error here ends the server: nothing would ever be due."""
        clock, secrets = self._clock, self._desk.offers.secrets
        readings = secrets.readings
        await self._turn(resume)
        settle_future(self._resumed, None)
        self._desk.offers.open_slots(self._push_slots)
        await self._turn(keep_leases)
        wall, steady = clock.wall(), clock.steady()
        while True:
            self._rung.clear()
            patience_s = SECRETS_CHECK_S if secrets.path else CLOCK_CHECK_S
            delay_s = min(max(self._next_at - clock.wall(), 0.0), patience_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._rung.wait()
            step_s = (clock.wall() - wall) - (clock.steady() - steady)
            wall, steady = clock.wall(), clock.steady()
            if abs(step_s) > CLOCK_STEP_S:
                log.warning("the machine's clock was set by %+.1f s: leases start anew",
                            step_s)
                await self._turn(keep_leases)
            secrets.refresh()
            if secrets.readings != readings:
                readings = secrets.readings
                self._desk.offers.look_anew, self._next_at = True, wall
            with contextlib.suppress(DiskFull, Unavailable):  # again in half a minute
                await self._desk.miss_the_silent()
            if self._next_at <= wall:
                await self._turn(turn_clock)

    async def _turn(self, rule: Callable[..., float]) -> None:
        """Have a rule of time carried out, however long the disk refuses.

        A commit of the same batch may ring while the rule's answer is on its way.
        """
        while True:
            self._next_at = math.inf
            with contextlib.suppress(DiskFull, Unavailable):  # the log has it already
                due_at = await self._desk.journal.write(rule, self._desk.limits)
                return self.ring(due_at)
            await asyncio.sleep(RETRY_S)

async def sweep(journal: Journal, retain_s: float | None) -> None:
    """Delete what is too old, a little at a time, so that no caller waits for it."""
    while retain_s is not None:
        after: int | None = 0
        with contextlib.suppress(DiskFull, Unavailable):  # again with the next sweep
            while after is not None:
                after = await journal.write(forget_old, retain_s, after)
                await asyncio.sleep(SWEEP_PAUSE_S)
        await asyncio.sleep(min(SWEEP_EVERY_S, retain_s / 10))

@dataclass(kw_only=True)
class Server:
    """ironflow inside your own program, or behind `python ironflow.py`.

        async with ironflow.Server(db="orders.db", port=0) as server:
            print(server.url)

    Raises StartError, a sentence for a person. `failed` is done when the disk failed
    for good; whoever owns the server then stops it.
    """

    db: str | Path = "ironflow.db"
    host: str | None = None  # None: both loopback addresses
    port: int = 9123  # 0: a free one
    environment: str = "default"
    api_key: str | None = None
    dev: bool = False  # no key, any address, any origin
    allow_hosts: Iterable[str] = ()
    cors_origins: Iterable[str] = ()
    cache_mb: int = 16
    retain_s: float | None = None  # delete what is older; None: keep everything
    secrets_file: Path | None = None
    push_timeout_s: float = 600.0  # for functions that do not say timeoutMs
    push_concurrency: int = 100  # requests at once, to all endpoints
    push_allow: Iterable[str] = ()  # host patterns and networks; none: see `Reach`
    signing_key: str | None = field(default=None, repr=False)
    limits: Limits = Limits()
    resolve: Callable[..., Any] = socket.getaddrinfo  # names of endpoints
    clock: Clock = field(default_factory=Clock)
    ids: Ids = field(default_factory=Ids)
    url: str = field(default="", init=False)  # set by `start`

    async def start(self) -> Self:
        """Open the journal, listen. `url` is set when this returns."""
        guard = Guard(None if self.dev else self.api_key or None, self.dev,
                      frozenset(map(host_name, self.allow_hosts)),
                      frozenset(origin.rstrip("/") for origin in self.cors_origins))
        async with contextlib.AsyncExitStack() as stack:
            sockets = listen(self.host, self.port, guard)
            for sock in sockets:
                stack.callback(sock.close)
            offers = Offers(self.limits, Secrets(self.secrets_file),
                            push=lambda jobs: pushes.begin(jobs))
            self.failed: Future = asyncio.get_running_loop().create_future()
            journal = Journal(
                Path(self.db), clock=self.clock, ids=self.ids, offers=offers,
                environment=self.environment, cache_mb=self.cache_mb,
                on_alarm=lambda instant: timekeeper.ring(instant),
                on_commit=lambda rows, rung: watch.announce(rows, rung),
                on_failure=lambda error: settle_future(self.failed, [error]))
            stack.push_async_callback(journal.close)
            desk = PullDesk(journal, offers, self.limits, self.clock)
            reach = Reach.read(self.push_allow)
            poster = Poster(reach, self.limits.body_bytes, self.resolve)
            pushes = PushDesk(journal, offers, self.limits, self.clock, reach,
                              poster.post, self.push_timeout_s, self.signing_key or "")
            stack.push_async_callback(poster.close)
            stack.push_async_callback(pushes.close)
            for worker in await journal.read(Queries.connected_workers):
                desk.remember(worker.worker_id)
            newest = await journal.read(lambda queries: queries.last_seq)
            watch = Watch(journal, self.clock, newest)
            timekeeper = Timekeeper(desk, self.push_concurrency, watch.resumed)
            for loop in timekeeper.keep(), sweep(journal, self.retain_s), watch.keep():
                task = asyncio.create_task(loop)
                task.add_done_callback(self._time_stopped)
                stack.push_async_callback(end_task, task)
            api = Api(journal, desk, pushes, watch, guard, self.limits,
                      self.environment, self.clock, Doors(doors()), self.clock.wall())
            await self._open_doors(stack, sockets, api)
            stack.push_async_callback(watch.close)
            stack.push_async_callback(desk.close)
            stack.callback(offers.open_slots, 0)
            self._running = stack.pop_all()
        return self

    async def _open_doors(self, stack: contextlib.AsyncExitStack,
                          sockets: list[socket.socket], api: Api) -> None:
        http_log = logging.getLogger("ironflow.http")
        http_log.addFilter(is_our_mistake)
        http = web.Server(api.gate, access_log=None, handler_cancellation=True,
                          logger=http_log)
        runner = web.ServerRunner(http, handle_signals=False, shutdown_timeout=STOP_S)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        for sock in sockets:
            await web.SockSite(runner, sock, backlog=CALLERS).start()
        host, port = sockets[0].getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _time_stopped(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("timers stopped", exc_info=error)
            settle_future(self.failed, [error])

    async def stop(self, *_: object) -> None:
        """Answer who waits, take no more, commit what is queued, close the file."""
        await self._running.aclose()

    __aenter__, __aexit__ = start, stop

def is_our_mistake(record: logging.LogRecord) -> bool:
    """Whether to log it: a port scanner's broken HTTP, answered 400, is not ours."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, web.RequestPayloadError))

async def end_task(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})

def listen(host: str | None, port: int, guard: Guard) -> list[socket.socket]:
    """Bound sockets: the host's, or without one both loopback addresses on one port."""
    if host is not None:
        if guard.api_key is None and not guard.dev and not is_loopback(host):
            raise StartError(f"--host {host} would serve the network without a key: "
                             "set IRONFLOW_API_KEY, or leave out --host to serve "
                             "loopback only (or use --dev where nobody else is)")
        return [bind(host, port)]
    first = bind("127.0.0.1", port)
    try:
        return [first, bind("::1", first.getsockname()[1])]
    except StartError as error:
        if getattr(error.__cause__, "errno", None) != EADDRINUSE:
            return [first]  # a machine without IPv6
        first.close()
        if port != 0:
            raise  # the number is taken on ::1
        return listen(host, port, guard)

def bind(host: str, port: int) -> socket.socket:
    try:  # SO_REUSEADDR where it is harmless, and IPv6 without IPv4: by create_server
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=CALLERS)
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]
        raise StartError(
            f"cannot listen on {host} port {port}: {why}; stop who has it, or choose "
            "another with --port (0 takes a free one)") from error

# ======================================================================================
# 13. The command line
# ======================================================================================
# `serve` is the server. The other commands are its clients, over HTTP like any other:
# each is a row in `commands`, its arguments are names in `arguments`, and its handler
# makes two moves, ask and show. Data goes to stdout, all else to stderr; times are UTC.

HOME = "http://localhost:9123"
LOCAL = ("serve", "version", "backup")  # the others take --server and --json as well
Deed: TypeAlias = "Callable[[argparse.Namespace], int | None]"  # None: status 0

def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status. Without one: `serve`."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in ("-s", "--server"):  # said before the command: a habit
        words = [*words[2:], *words[:2]]
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["serve", *words]
    if (name := " ".join(words[:2])) in commands():
        words = [name, *words[2:]]
    try:
        asked = parser().parse_args(words)
        status: int = asked.do(asked) or 0
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return status
    except (IronflowError, StartError) as error:
        tell(str(error))
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head -1` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if by SIGPIPE, which Windows does not have

def commands() -> dict[str, tuple[Deed, str, str, str]]:
    """Every command: its handler, its purpose, an example, its arguments."""
    an_id = "06f5x0m2k7n8q1r3s4t6"
    return {
        "serve": (serve, "run the server (the default)", "--db orders.db",
                  "--host --port --db --env --log-level --lease-seconds --dev"
                  " --cors-origin --allow-host --cache-mb --retain --secrets-file"
                  " --push-timeout --push-concurrency --push-allow --signing-key-file"
                  " --max-event-bytes --max-step-bytes --max-body-bytes --max-steps"
                  " --max-lost-leases"),
        "version": (lambda _: print(__version__), "print the version", "", ""),
        "backup": (copy_journal, "copy the journal, also of a running server",
                   "copy.db --db orders.db", "target --db"),
        "emit": (emit, "hand in an event; prints its id and the ids of its runs",
                 """order.placed --data '{"total": 5}' --wait""",
                 "name --data --data-file --metadata --version --idempotency-key --wait"
                 " --timeout"),
        "subscribe": (print_stream, "print what is committed, as it is, until Ctrl-C",
                      "'system.run.>' 'events:order.*' --replay 10",
                      "patterns --replay --since/ --filter --metadata/"),
        "run list": (show_rows, "list runs, newest first", "--status failed",
                     "--status --function --limit"),
        "run get": (show_run, "show a run and its steps", f"run_{an_id}", "id"),
        "run cancel": (cancel_it, "end a run", f"run_{an_id} --reason 'ordered twice'",
                       "id --reason"),
        "event list": (show_rows, "list events, newest first", "--since 1h",
                       "--name --source --search --since --until --limit"),
        "event get": (show_row, "show an event", f"evt_{an_id}", "id"),
        "function list": (show_rows, "list functions, and how many workers carry each",
                          "", "--limit"),
        "function get": (show_row, "show a function", "process-order", "id"),
        "worker list": (show_rows, "list the workers that are connected", "", ""),
    }

def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="ironflow.py",
        description="Turn events into durable work. One file, one journal.",
        epilog="example: python ironflow.py --db orders.db --port 9123")
    group, known = top.add_subparsers(metavar="COMMAND", required=True), arguments()
    for name, (do, purpose, example, names) in commands().items():
        made = group.add_parser(
            name, help=purpose, description=purpose,
            epilog=f"example: python ironflow.py {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter)
        made.set_defaults(do=do, rows=f"{name.split()[0]}s")
        apart = name in ("emit", "subscribe")
        either = made.add_mutually_exclusive_group() if apart else made
        for each in names.split() + ["-s/--server", "--json"] * (name not in LOCAL):
            one = each.startswith(("--data", "--replay", "--since/"))
            place = either if one else made
            place.add_argument(*filter(None, each.split("/")), **known[each])
    group.choices["serve"].description = (
        "environment: IRONFLOW_API_KEY (every request then needs it), IRONFLOW_ENV,\n"
        "IRONFLOW_SIGNING_KEY (of requests to endpoints), IRONFLOW_LEASE_SECONDS,\n"
        "LOG_LEVEL; a flag beats a variable")
    return top

def arguments() -> dict[str, dict[str, Any]]:
    env, most, size = os.environ.get, Limits(), within(1, 2**53)
    a_time = "a time such as 2026-01-01T00:00:00Z, or how long ago, 1h30m"
    return {
        "id": arg("as a list shows it"),
        "name": arg("of the event"),
        "target": arg("the copy", Path, metavar="FILE"),
        "patterns": arg("such as system.run.>, events:order.* or topic:shop.news",
                        nargs="+", metavar="PATTERN"),
        "--replay": arg("begin with the newest so many", within(0, 1000), metavar="N"),
        "--since/": arg("begin behind this sequence", within(0, 2**63 - 1), dest="seq",
                        metavar="SEQ"),
        "--filter": arg("only those for which this is true (CEL)", metavar="EXPR"),
        "--metadata/": arg("show sequence and event id too", bool, dest="metadata"),
        "-s/--server": arg("its key comes from IRONFLOW_API_KEY", server_url,
                           env("IRONFLOW_SERVER_URL") or HOME, f"a URL such as {HOME}"),
        "--json": arg("print the server's JSON", bool),
        "--data": arg("JSON", lambda text: parse_json(text.encode()), {}),
        "--data-file": arg("JSON; - is stdin", json_of, dest="data", metavar="FILE"),
        "--metadata": arg("KEY=VALUE, as often as you like", pair, [], "KEY=VALUE"),
        "--version": arg("of the data's shape", within(1, MAX_INT32)),
        "--idempotency-key": arg("default: a new one", metavar="KEY"),
        "--wait": arg("until its runs end; 1 if one fails", bool),
        "--timeout": arg("of --wait, such as 1h30m", duration_s, "60s"),
        "--status": arg(choices=sorted(NEXT)),
        "--function": arg("its id", dest="function_id"),
        "--reason": arg("kept with the run"),
        "--limit": arg("how many", within(1, MAX_INT32), 50),
        "--name": arg("a part of it"),
        "--source": arg("where they came from, such as api"),
        "--search": arg("a part of the data"),
        "--since": arg("a time with its offset, or how long ago", moment, None, a_time),
        "--until": arg("the same", moment, None, a_time),
        "--host": arg("address to listen on; without it both loopback addresses"),
        "--port": arg("0 takes a free one", within(0, 65_535), 9123),
        "--db": arg("the journal", Path, "ironflow.db"),
        "--env": arg("environment to serve", str, env("IRONFLOW_ENV") or "default"),
        "--log-level": arg("what goes to stderr: debug, info, warning or error",
                           lambda text: logging.Logger("", text.upper()).level,
                           env("LOG_LEVEL") or "info", "one of these"),
        "--lease-seconds": arg(
            "how long a silent worker keeps a run; the SDKs' workers speak every 30 s, "
            "so 60 or more is wise", within(0.1, 86_400 * 365, float),
            env("IRONFLOW_LEASE_SECONDS") or most.lease_s),
        "--dev": arg("no key, any address or origin: only where nobody else is", bool),
        "--cors-origin": arg("origin of a web page that may call", str, []),
        "--allow-host": arg("a Host name to answer beside the loopback ones", str, []),
        "--cache-mb": arg("SQLite's page cache", size, 16),
        "--retain": arg("delete what is older, such as 30d; else keep all", duration_s),
        "--secrets-file": arg("JSON object or lines NAME=VALUE; mode 600", Path),
        "--push-timeout": arg("of a request to an endpoint, such as 10m",
                              push_timeout_s, "600"),
        "--push-concurrency": arg("requests to endpoints at once", size, 100),
        "--push-allow": arg("only there: a host, such as *.example.com, or a network",
                            lambda text: Reach.read([text]) and text, []),
        "--signing-key-file": arg("of requests to endpoints; mode 600", signing_key),
        "--max-event-bytes": arg("its name, data and metadata", size, most.event_bytes),
        "--max-step-bytes": arg("its output, or its run's", size, most.step_bytes),
        "--max-body-bytes": arg("of one request", size, most.body_bytes),
        "--max-steps": arg("of one run", size, most.steps),
        "--max-lost-leases": arg("workers lost in a row, without a new step, before a "
                                 "run is paused", size, most.lost_leases),
    }

def arg(what: str = "", read: Callable[[str], Any] = str, default: Any = None,
        wanted: str = "", **more: Any) -> dict[str, Any]:
    """For argparse: what `read` refuses is a bad call that names the argument."""
    def told(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, OverflowError, OSError, IronflowError,
                StartError) as error:
            flaw = f"{text[:80]}: give {wanted}" if wanted else str(error)
            raise argparse.ArgumentTypeError(flaw.removeprefix("body is ")) from None

    if read is bool:
        return {"help": what, "action": "store_true", **more}
    if default == []:  # may be said many times
        more["action"] = "append"
    shown = f"{what} (default: %(default)s)" if default else what
    return {"help": shown, "type": told, "default": default, **more}

def within(low: float, high: float, kind: Callable[[str], float] = int
           ) -> Callable[[str], Any]:
    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (number := kind(text)) <= high:
                return number
        raise ValueError(f"{text[:80]}: give {low} to {high}")
    return read

def push_timeout_s(text: str) -> float:
    text = text if text[-1:].isalpha() else f"{text}s"
    return float(within(0.001, 86_400, duration_s)(text))

def signing_key(name: str) -> str:
    """The key in a file. Raises as `private_text`: it must not start without one."""
    if (key := private_text(Path(name)).rstrip("\r\n")).strip():
        return key
    raise ValueError(f"{name} is empty: write the key into it")

def server_url(text: str) -> SplitResult:
    url = urlsplit(text)
    fine = re.fullmatch(r"https?://[!-~]+", text) and not re.search(r"[@?#\\]", text)
    if not fine or not url.hostname or url.port == 0:
        raise ValueError
    return url

def json_of(name: str) -> Any:
    return parse_json(sys.stdin.buffer.read() if name == "-"
                      else Path(name).read_bytes())

def pair(text: str) -> list[str]:
    key, value = text.split("=", 1)
    return [key, value]

def moment(text: str) -> str:
    """RFC 3339, of a time with an offset or of a duration until now."""
    with contextlib.suppress(ValueError):
        return to_rfc3339(Clock().wall() - duration_s(text))
    return to_rfc3339(from_rfc3339(text))

def serve(asked: argparse.Namespace) -> int:
    """Until SIGTERM or SIGINT. 0: a clean stop; 1: the disk failed; 2: cannot start."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s",
                        level=asked.log_level, stream=sys.stderr)
    api_key = os.environ.get("IRONFLOW_API_KEY")
    if asked.dev:
        log.warning("--dev: anyone who reaches this port may do anything%s",
                    "; IRONFLOW_API_KEY is ignored" if api_key else "")
    limits = Limits(lease_s=asked.lease_seconds, **{
        name: getattr(asked, f"max_{name}") for name in column_names(Limits)[:-1]})
    server = Server(
        db=asked.db, host=asked.host, port=asked.port, environment=asked.env,
        api_key=api_key, dev=asked.dev, allow_hosts=asked.allow_host,
        cors_origins=asked.cors_origin, cache_mb=asked.cache_mb, retain_s=asked.retain,
        secrets_file=asked.secrets_file, push_timeout_s=asked.push_timeout,
        push_concurrency=asked.push_concurrency, push_allow=asked.push_allow,
        signing_key=asked.signing_key_file or os.environ.get("IRONFLOW_SIGNING_KEY"),
        limits=limits)
    try:  # the extra `speed`
        from uvloop import new_event_loop as factory
    except ModuleNotFoundError:
        factory = asyncio.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(serve_until_stopped(server))
    except StartError as error:
        tell(str(error))
        return 2

async def serve_until_stopped(server: Server) -> int:
    """Until the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stop: Future = loop.create_future()

    def first(number: int, frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        loop.call_soon_threadsafe(settle_future, stop, None)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, first)
    async with server:
        print(f"ironflow is ready on {server.url}, journal {server.db}", flush=True)
        await asyncio.wait({stop, server.failed}, return_when=asyncio.FIRST_COMPLETED)
        return 1 if server.failed.done() else 0

# --- Ask ------------------------------------------------------------------------------

COLUMNS = {
    "runs": "id status function_id event_name created_at",
    "events": "id name timestamp source data",
    "functions": "id status execution_mode workers triggers updated_at",
    "workers": "id hostname active_jobs max_concurrent last_heartbeat function_ids",
    "steps": "name status attempt started_at duration_ms result",
    "results": "run_id function_id status duration_ms result",
}

def ask(asked: argparse.Namespace, method: str, path: str, body: Any = None,
        wait_s: float = 30.0, holds: str = "", **query: Any) -> dict[str, Any]:
    """What the server answers. Raises IronflowError with a sentence to show.

    `holds` is a member without which the answer is not an ironflow server's. A lost
    connection and a 503 are tried again: all that is asked here may be asked twice, for
    an event carries a key.
    """
    delays_s = [0.9, 0.3, 0.1]
    while True:
        try:
            data = None if body is None else _to_text.encode(body).encode()
            with contextlib.closing(dial(asked, wait_s)) as line:
                reply = send(line, asked, method, path, data, query)
                answer = _from_text.decode(reply.read().decode())
            if reply.status < 300 and holds in {"", *answer}:
                return {**answer}
            status, trouble = reply.status, str(answer["message"])
        except (OSError, http.client.HTTPException) as error:
            status = 0 if isinstance(error, TimeoutError) else 503
            trouble = unreachable(asked, error)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            status, trouble = 0, f"cannot understand {asked.server.geturl()}: {error}"
        if status != 503 or not delays_s:
            raise IronflowError(trouble)
        time.sleep(delays_s.pop())

def dial(asked: argparse.Namespace, wait_s: float) -> http.client.HTTPConnection:
    tls = asked.server.scheme == "https"
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    return kind(asked.server.netloc, timeout=wait_s)

def send(line: http.client.HTTPConnection, asked: argparse.Namespace, method: str,
         path: str, data: bytes | None, query: dict[str, Any]
         ) -> http.client.HTTPResponse:
    env = os.environ.get
    headers = {"X-Ironflow-Environment": env("IRONFLOW_ENV", ""), "Authorization":
               f"Bearer {' '.join(env('IRONFLOW_API_KEY', '').split())}"}
    named = path.replace("{id}", quote(getattr(asked, "id", ""), safe=""))
    query = {name: value for name, value in query.items() if value is not None}
    line.request(method, f"{asked.server.path.rstrip('/')}{named}?"
                 f"{urlencode(query, doseq=True)}", data, headers)
    return line.getresponse()

def unreachable(asked: argparse.Namespace, error: Exception) -> str:
    why = getattr(error, "strerror", None) or error
    return (f"cannot reach {asked.server.geturl()} ({why}); is it running? `python "
            "ironflow.py` starts one")

def print_stream(asked: argparse.Namespace) -> None:
    """Print messages, in the colour of their status, until Ctrl-C: no failure."""
    names = ["topic", "data", *["eventId", "sequence", "timestamp"] * asked.metadata]
    columns, width = f"timestamp {'sequence id ' * asked.metadata}topic data", 0
    with contextlib.suppress(KeyboardInterrupt):
        for row in follow(asked):
            data, status = row["data"], ""
            topic = re.sub(r"(run_\w+)\.step\.\1:", r"\1.step.", row["topic"])
            if isinstance(data, dict) and topic.startswith("system."):
                status = str(data.get("status"))
                data = {name: data[name] for name in data if name not in SAID}
            width = max(width, min(len(topic), 60))
            cells = row | {"topic": topic.ljust(width), "data": data,
                           "id": row["eventId"].ljust(24)}
            show(asked, {name: row[name] for name in names},
                 [paint(table([cells], columns)[1], COLOURS.get(status, 0))])
            sys.stdout.flush()

def follow(asked: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """The stream's messages, each once: where it breaks off it is taken up again.

    Raises IronflowError for a refusal, and if the server is not there to begin with.
    """
    query = {"pattern": asked.patterns, "filter": asked.filter, "since": asked.seq,
             "replay": asked.replay}
    away: bool | None = None  # None: it was never there
    while True:
        try:
            with contextlib.closing(dial(asked, 60)) as line:
                reply = send(line, asked, "GET", "/api/v1/stream", None, query)
                if reply.status != 200:
                    why = str(_from_text.decode(reply.read().decode())["message"])
                    raise (IronflowError if away is None or reply.status < 500
                           else OSError)(why)
                for fields in blocks(reply):
                    message = _from_text.decode(fields.get("data", "{}"))
                    if fields.get("event") == "ironflow.error":
                        tell(message["message"])  # if that was all, it says so again
                        continue
                    away = False
                    query |= {"since": fields.get("id", query["since"]), "replay": None}
                    if message:
                        yield message
                raise OSError("the stream ended")
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            if away is None:
                raise IronflowError(unreachable(asked, error)) from None
            if not away:
                tell(f"{unreachable(asked, error)}; waiting for it")
            away = True
        time.sleep(0.5)

def blocks(lines: Iterable[bytes]) -> Iterable[dict[str, str]]:
    """Server-sent events, as their fields. One that breaks off midway is none."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode().rstrip("\r\n").partition(": ")
        if name:
            fields[name] = value
        elif not value:  # but a comment has one
            yield fields
            fields = {}

def show_rows(asked: argparse.Namespace) -> None:
    what, columns = asked.rows, COLUMNS[asked.rows]
    query = {name: value for name, value in vars(asked).items()
             if name not in ("do", "rows", "server", "json") and value is not None}
    page = ask(asked, "GET", f"/api/v1/{what}", holds=what, **query)
    rows = page[what]
    while page.get("next_cursor") and len(rows) < asked.limit:  # a short page
        query |= {"cursor": page["next_cursor"], "limit": asked.limit - len(rows)}
        page = ask(asked, "GET", f"/api/v1/{what}", holds=what, **query)
        rows += page[what]
    show(asked, page | {what: rows, "count": len(rows)}, table(rows, columns))
    if not asked.json and (not rows or page.get("next_cursor")):
        tell(f"there are more {what}: see --limit" if rows else f"no {what}")

def show_row(asked: argparse.Namespace) -> None:
    row = ask(asked, "GET", f"/api/v1/{asked.rows}/{{id}}")
    show(asked, row, sheet(row))

def show_run(asked: argparse.Namespace) -> None:
    run = ask(asked, "GET", "/api/v1/runs/{id}", holds="status")
    steps = ask(asked, "GET", "/api/v1/runs/{id}/steps", holds="steps")["steps"]
    below = table(steps, COLUMNS["steps"])
    show(asked, run | {"steps": steps}, [*sheet(run), *([""] if below else []), *below])

def cancel_it(asked: argparse.Namespace) -> None:
    run = ask(asked, "POST", "/api/v1/runs/{id}/cancel", reason=asked.reason or "")
    show(asked, run, sheet(run, "id status"))

def emit(asked: argparse.Namespace) -> int:
    """Hand in an event under a key; with --wait, show how each of its runs ended."""
    event = {"name": asked.name, "event": asked.name, "data": asked.data,
             "version": asked.version, "metadata": dict(asked.metadata) or None,
             "idempotencyKey": asked.idempotency_key or secrets.token_hex(10)}
    if not asked.wait:
        answer = ask(asked, "POST", "/api/v1/events", event, holds="run_ids")
        show(asked, answer, [*map(tame, [answer["event_id"], *answer["run_ids"]])])
        return 0
    deadline, late = time.monotonic() + min(asked.timeout, 1e6), True
    while late:  # a server that stops answers early: the next one is asked
        left_ms = round(1000 * (deadline - time.monotonic()))
        answer = ask(asked, "POST", f"{CONNECT}IronflowService/TriggerSync",
                     event | {"timeoutMs": max(left_ms, 1)}, left_ms / 1000 + 30,
                     holds="results")
        late = left_ms > 0 and any(run["waitTimedOut"] for run in answer["results"])
        time.sleep(0.1 * late)
    runs = [{snake(k): v for k, v in run.items()} for run in answer["results"]]
    show(asked, answer, [tame(answer["eventId"]), *table(runs, COLUMNS["results"])])
    if any(run["wait_timed_out"] for run in runs):
        tell("not all of its runs ended in time")
    return int(any(run["status"] != "completed" for run in runs))

def copy_journal(asked: argparse.Namespace) -> None:
    backup(asked.db, asked.target)
    print(tame(f"{asked.target} is a copy of {asked.db}"))

# --- Show -----------------------------------------------------------------------------
# What a server says is a stranger's text: `tame` keeps it from steering the terminal.

UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
COLOURS = {"completed": 32, "failed": 31, "cancelled": 33, "paused": 33, "running": 36}
RESULTS = ("output", "output_value", "error", "sleep_until", "wait_event_name",
           "child_run_id")
SAID = ("id", "runId", "stepId")  # by the topic of a message
TIMES = "timestamp|.*_(at|heartbeat)"

def tell(sentence: str) -> None:
    print(f"ironflow.py: {tame(sentence)}", file=sys.stderr)

def tame(text: str) -> str:
    """Control characters escaped as in JSON, so that JSON text still says the same."""
    return UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], text)

def show(asked: argparse.Namespace, answer: dict[str, Any], lines: list[str]) -> None:
    """Lines for people, or the server's JSON, in whatever encoding stdout has."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in [tame(_to_text.encode(answer))] if asked.json else lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))

def sheet(row: dict[str, Any], names: str = "") -> list[str]:
    """What a row holds, a line each; what is unset is left out."""
    cells = {label(name): cell(row, name) for name in names.split() or ["id", *row]}
    width = max(map(len, cells))
    return [f"{name:{width}}  {paint(text)}" for name, text in cells.items() if text]

def label(name: str) -> str:
    return tame(re.sub("_(at|ms)$", "", name).replace("_", " "))

def table(rows: list[Any], columns: str) -> list[str]:
    """A header and a line for each row; no lines without rows."""
    names = columns.split()
    grid = [[cell(row, name) for name in names] for row in rows]
    grid.insert(0, [label(name).upper() for name in names])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    room = shutil.get_terminal_size().columns - 2 * len(names) + 2
    for whole, floor in ((f"id|topic|status|{TIMES}", 8), ("id|status", 8), ("id", 4),
                         ("", 1)):
        cap = room if sys.stdout.isatty() else 0
        while sum(widths) > room and cap > floor:
            cap -= 1
            widths = [width if re.fullmatch(whole, name) else min(width, cap)
                      for name, width in zip(names, widths, strict=True)]
    head, *lines = [
        "  ".join(paint(text.ljust(width) if len(text) <= width else
                        text[: width - 1] + "…")
                  for text, width in zip(row, widths, strict=True)).rstrip()
        for row in grid]
    return [paint(head, 1), *lines] if rows else []

def paint(text: str, colour: int = 0) -> str:
    """A status in its colour, on a terminal whose owner wants it (no-color.org)."""
    colour = colour or COLOURS.get(text.rstrip(), 0)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    wanted = colour and not plain and sys.stdout.isatty()
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted else text

def cell(row: dict[str, Any], name: str) -> str:
    """A member of a row as people read it; JSON where it has no form of its own."""
    value = row.get(name)
    if name == "result":
        value = next((row[way] for way in RESULTS if way in row), None)
    if value is None:
        return ""
    if name.endswith("_ms"):
        text = f"{value / 1000:.3g}s" if value >= 1000 else f"{value}ms"
        return text if value < 60_000 else str(timedelta(seconds=value // 1000))
    if re.fullmatch(TIMES, name):
        return tame(str(value)[:19].replace("T", " ") + "Z")
    if name in ("triggers", "function_ids"):
        value = ", ".join(each if isinstance(each, str) else " ".join(each.values())
                          for each in value)
    return tame(value if isinstance(value, str) else _to_text.encode(value))

if __name__ == "__main__":
    sys.exit(main())
