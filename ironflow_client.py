# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""ironflow_client.py: emit events, run durable functions. MIT, the ironflow.py authors.

    from ironflow_client import Client, Worker, function

    @function(id="ship-order", triggers=[{"event": "order.placed"}])
    async def ship_order(ctx):
        paid = await ctx.step.run("charge", lambda: charge(ctx.event.data["total"]))
        await ctx.step.sleep("let it be packed", "2h")
        return await ctx.step.run("ship", lambda: ship(paid["id"]))

    Worker(functions=[ship_order]).run()

and, anywhere else, `Client().emit("order.placed", {"total": 99.99})`, or the same call
awaited, of an `AsyncClient`. `run_inline(ship_order, {"total": 99.99})` is a unit test.

The life of one job, and who carries it:

    1. `Link._poll` waits at the server; the answer is a leased run, a `Job`
    2. `Worker._begin` takes it in hand: the heartbeats of `Link._beat` list it now
    3. `Execution.play` calls the handler: on the loop, or a plain one in a thread
    4. `Step.run` looks whether the journal has this step's result; if so, that is it
    5. if not, it calls the step's function, and `Execution.record` hands the result in
    6. `Link._report` sends what all jobs have to say; the step returns when the server
       has it on disk
    7. meanwhile `Link._beat` says, from a thread of its own, which jobs are held
    8. a sleep, a wait or a child (`Step._leave`) ends the execution; the run leaves
       this process and comes back as another job: the handler runs again from its
       first line, and each step that the journal knows returns what it returned before
    9. if the handler fails for good, `Execution._undo` calls what it has registered
   10. `Execution.settle` reports the end until the server answers, however long

What holds: a step whose result the server has accepted never runs again. The step in
hand when a process dies does, so a step should bear that. What stands between steps
runs on every replay, so whatever touches the world belongs in a step.

Names and shapes are those of the public Python SDK, so that a program moves between
the two by changing an import. `serve`, `serve_wsgi` and `handle` put functions behind a
URL instead, to which the server posts runs. `AsyncClient.subscribe` watches the stream.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import hmac
import http.client
import inspect
import json
import logging
import math
import os
import platform
import random
import re
import secrets
import signal
import socket
import threading
import weakref
from collections import Counter, abc, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from time import monotonic, sleep
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload
from urllib.parse import quote, urlencode, urlsplit

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Context", "Duration", "Emitted", "Event",
           "EventRow", "Function", "InvokeError", "IronflowError", "NonRetryableError",
           "NotJSON", "Patterns", "RetryAfterError", "Row", "Run", "RunInfo", "Step",
           "StepError", "StepRow", "StepTimeoutError", "StreamEvent", "Subscription",
           "Worker", "WorkerAuthError", "function", "handle", "register", "run_inline",
           "serve", "serve_wsgi"]

T = TypeVar("T")
Work = Callable[[], Any]
log = logging.getLogger("ironflow")

LATE_S = 5.0                # past its hold, an answer to a poll is an old one
POLL_WAIT_S = 20.0          # how long a poll asks to be held (the SDKs: at most 20)
ANSWER_S = 30.0             # longest wait for an answer, a held poll's included
CONNECT_S = 5.0             # longest wait for a connection
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 2.0   # low, so that a restart is hardly felt
FAREWELL_S = 2.0            # what cancelled handlers get for their `finally` blocks
THREADS = 64                # of a worker's async handlers, or an AsyncClient, at once
MAX_UPDATES = 500           # updates in a request, and steps in an update
MAX_REQUEST = 12 << 20      # bytes of either; the door takes 16 MiB
MAX_EVENTS = 1000           # events in a request
MAX_WAIT_MS = 2**31 - 1     # that the server waits for runs at a time; 0 means 30 s
MAX_DEPTH = 190             # nesting of a value; the server takes 200, reports included
MAX_ERROR_TEXT = 8000       # characters of an error's message that are reported
MAX_PUSH = 64 << 20         # bytes of a request to an endpoint
REPLAY_S = 300              # how far the time of its signature may be from ours
READ_AHEAD = 1 << 20        # characters of events that wait for a slow subscriber
SILENCE_S = 75.0            # a stream that lives says something every 15 or 30 s

# ======================================================================================
# 1. Words
# ======================================================================================
# Clock and chance come from the first functions below. Durations and instants have one
# reader each. JSON is checked where it is made, and not first by the server.

Duration = timedelta | int | float | str
"""Seconds, a timedelta, or text like "500ms", "1h30m", "1.5d"; units ms s m h d w."""

UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

def now() -> datetime:
    return datetime.now(UTC)

def backoff() -> Iterator[float]:
    """Seconds to wait before each further try: about 0.1, 0.2, 0.4 ... 2, 2, 2, spread,
    so that a thousand workers do not return at once."""
    delay = RETRY_FIRST_S
    while True:
        yield random.uniform(delay / 2, delay)
        delay = min(delay * 2, RETRY_MAX_S)

def check(fine: object, sentence: str) -> None:
    if not fine:
        raise ValueError(sentence)

def seconds(value: Duration, field: str) -> float:
    """A duration in seconds. Raises ValueError, naming `field`, for anything else."""
    result = math.nan
    if isinstance(value, timedelta):
        result = value.total_seconds()
    elif isinstance(value, str):
        if re.fullmatch(r"([0-9]+(\.[0-9]+)?(ms|[smhdw]))+", value):
            parts = re.findall(r"([0-9.]+)(ms|[smhdw])", value)
            result = sum(float(number) * UNITS[unit] for number, unit in parts)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        result = value
    check(0 <= result <= 365_000 * UNITS["d"],                      # NaN fails as well
          f"{field} must be a duration, such as 30 (seconds), '500ms', '1h30m', '7d' "
          f"or a timedelta, not negative and not over 1000 years; not {value!r}")
    return float(result)

def instant(value: datetime | str, field: str) -> datetime:
    """A point in time, from an aware datetime or RFC 3339 text. Raises ValueError, also
    for a time without an offset, which is another instant on each machine."""
    with contextlib.suppress(ValueError, AttributeError):
        when = datetime.fromisoformat(value) if isinstance(value, str) else value
        if when.utcoffset() is not None:
            return when
    raise ValueError(f"{field} must be an aware datetime or RFC 3339 text with an "
                     f"offset, such as '2026-01-31T08:00:00Z'; not {value!r}")

def rfc3339(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="microseconds")[:-6] + "Z"

encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False,
                          separators=(",", ":")).encode

def json_copy(value: Any, what: str, path: tuple[str | int, ...] = ()) -> Any:
    """The value as it would come back from JSON: tuples are lists, subclasses plain. A
    step returns this copy, so that a first run and a replay see the same. Raises
    NotJSON, which says where and why, for what json.dumps would bend silently (keys
    that are no text, NaN) or the server refuses (integers beyond 64 bits, lone
    surrogates, NUL in keys, deep nesting)."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        if value.isascii() or not re.search("[\ud800-\udfff]", value):
            return str.__str__(value)
        flaw = "text with a lone surrogate, which UTF-8 cannot carry"
    elif isinstance(value, int):
        if -(2**63) <= value < 2**64:
            return int(value)
        flaw = "an integer beyond 64 bits; send it as text"
    elif isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        flaw = f"{value} has no spelling in JSON"
    elif not isinstance(value, (list, tuple, dict)):
        flaw = f"{value!r:.60} is a {type(value).__name__}"
    elif len(path) == MAX_DEPTH:
        flaw = f"nested deeper than {MAX_DEPTH}, or in a circle"
    elif not isinstance(value, dict):
        return [json_copy(item, what, (*path, i)) for i, item in enumerate(value)]
    elif odd := [key for key in value if not isinstance(key, str) or "\0" in key]:
        flaw = f"the key {odd[0]!r} is no text, or contains NUL"
    else:
        return {json_copy(key, what, path): json_copy(item, what, (*path, key))
                for key, item in value.items()}
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    raise NotJSON(f"{what} is not JSON{where and ' at '}{where}: {flaw}")

@dataclass(frozen=True, slots=True)
class Event:
    """What started the run: `ctx.event`. `data` is any JSON, `timestamp` is aware."""

    id: str
    name: str
    data: Any
    timestamp: datetime
    version: int = 1
    metadata: dict[str, Any] | None = None
    source: str | None = None
    idempotency_key: str | None = None

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Event:
        known = {name: body[name] for name in cls.__slots__ if name in body}
        if "idempotencyKey" in body:        # as outputs of waits spell it
            known["idempotency_key"] = body["idempotencyKey"]
        return cls(**known | {"timestamp": instant(body["timestamp"], "timestamp")})

@dataclass(frozen=True, slots=True)
class RunInfo:
    """`ctx.run`. `attempt` counts from 1; a replay after a sleep is no new attempt."""

    id: str
    function_id: str
    attempt: int
    max_attempts: int = 0               # 0 and "": the server did not say
    on_exhausted: str = ""
    actor_id: str | None = None         # the value of the function's actor_key

class Secrets(dict[str, str]):
    """`ctx.secrets`: name to value. Printed, it shows the names alone."""

    def __missing__(self, name: str) -> str:
        raise KeyError(f"{name!r} is no declared secret: @function(secrets=[{name!r}])")

    def __repr__(self) -> str:
        return f"<Secrets {sorted(self)}>"

class Job:
    """A leased run, as a poll brings it. Raises KeyError, TypeError, ValueError or
    AttributeError for what is none."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.fence = {name: body[name] for name in      # what reports carry
                      ("job_id", "run_id", "execution_seq", "lease_token")}
        self.run = RunInfo(body["run_id"], body["function_id"], body["attempt"],
                           body.get("max_attempts", 0), body.get("on_exhausted", ""),
                           body.get("actor_id"))
        self.event = Event.from_json(body["event"])
        self.secrets = Secrets((body.get("context") or {}).get("secrets") or {})
        self.completed: dict[str, Any] = {}     # step id to output, for replays
        self.failed: dict[str, Any] = {}        # step id to error, of children
        for row in body["completed_steps"]:
            if (status := row.get("status", "completed")) == "completed":
                self.completed[row["step_id"]] = row["output"]
            elif status == "failed":
                self.failed[row["step_id"]] = row.get("error") or {}
        self.sequence_base = body.get("step_sequence_base", 0)
        self.received_at = now()

class Row(dict[str, Any]):
    """One answer of the server: a dict as it came, so that a step may return it; its
    members are attributes too. What the server leaves out while it is unset is None."""

    def __getattr__(self, name: str) -> Any:
        if name in self or name in UNSET.split():
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}: {sorted(self)}")

UNSET = """input output error event_name worker_id started_at ended_at actor_id name
    parent_run_id parent_step_id duration_ms compensation_for child_run_id metadata
    wait_event_name wait_timeout source idempotency_key run_id"""

class Run(Row):
    """A run as REST has it; times are RFC 3339 text, `status` is lower case."""

class StepRow(Row):
    """A recorded step as REST has it; `step_id` is the SDKs', `id` the row's."""

class EventRow(Row):
    """An event as REST has it; `run_id` is the run that emitted it."""

class Emitted(Row):
    """What an accepted event became. `results` is there after emit_sync: run_id,
    function_id, status, output, error, duration_ms and wait_timed_out of each run."""

    event_id: str
    run_ids: list[str]                  # the runs that it started, perhaps none
    results: list[Run]

# ======================================================================================
# 2. Errors
# ======================================================================================
# IronflowError is what this module raises, and what a handler may raise to be precise.
# Any other exception in it is as good. Bad arguments are ValueError or TypeError.

class IronflowError(Exception):
    """The server refused, could not be reached, or a step failed. `code` is its word or
    one of ours, `status` the HTTP status or 0, `retry_after` seconds or None."""

    def __init__(self, message: str, status_code: int = 0, code: str = "",
                 retryable: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message, self.code = message, code
        self.status = self.status_code = status_code
        self.retryable, self.retry_after = retryable, retry_after

class NonRetryableError(IronflowError):
    """Raise it in a handler or a step to fail the run for good."""

    def __init__(self, message: str, code: str = "NON_RETRYABLE") -> None:
        super().__init__(message, code=code)

class NotJSON(NonRetryableError):
    """A value that should travel as JSON cannot; the message says where and why."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "SERIALIZATION_ERROR")

class RetryAfterError(IronflowError):
    """Raise it to be tried again after a duration, at most the function's max_delay."""

    def __init__(self, message: str, retry_after: Duration,
                 code: str = "RETRY_AFTER") -> None:
        super().__init__(message, 0, code, True, seconds(retry_after, "retry_after"))

class StepError(IronflowError):
    """The function of a step raised `__cause__`. A handler may catch it and go on; else
    the attempt fails, and is retried unless that was a NonRetryableError."""

    def __init__(self, message: str, *, step_id: str, retryable: bool,
                 retry_after: float | None = None) -> None:
        super().__init__(message, 0, "STEP_FAILED", retryable, retry_after)
        self.step_id = step_id

class StepTimeoutError(IronflowError):
    """A step took longer than its timeout. Retryable."""

    def __init__(self, name: str, seconds: float) -> None:
        message = f"step {name!r} timed out after {seconds:g}s"
        super().__init__(message, 0, "STEP_TIMEOUT", True)

class InvokeError(NonRetryableError):
    """An invoked function gave no output. `code`: INVOKE_FAILED, INVOKE_CANCELLED,
    INVOKE_NOT_FOUND, or INVOKE_TIMEOUT: it goes on. Uncaught it is not retried."""

    def __init__(self, function_id: str, cause: str = "",
                 child_run_id: str | None = None, status: str = "failed",
                 **_: object) -> None:
        how = {"failed": "failed", "cancelled": "was cancelled",
               "not_found": "could not be started"}.get(status)
        told = [f"function {function_id!r} {how or 'did not end in time'}",
                child_run_id and f" ({child_run_id})", cause and f": {cause}"]
        super().__init__("".join(filter(None, told)),
                         f"INVOKE_{status.upper() if how else 'TIMEOUT'}")
        self.function_id, self.cause = function_id, cause
        self.run_id = self.child_run_id = child_run_id or None

class WorkerAuthError(IronflowError):
    """The server refuses the worker's key (401, 403); a worker that hears it stops."""

class _Unwind(BaseException):
    """Leaves a handler whose execution is over: it waits, or the job is not ours now.
    No Exception, so that `except Exception` lets it pass; to swallow it is no use."""

def is_retryable(error: BaseException) -> bool:
    """Everything is, but a NonRetryableError and a step that failed with one."""
    if isinstance(error, StepError):
        return error.retryable
    return not isinstance(error, NonRetryableError)

def decisive(error: BaseException) -> BaseException:
    """Of a group, as TaskGroup raises it, the member that decides: one for good."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    return min((decisive(member) for member in error.exceptions),
               key=lambda leaf: (is_retryable(leaf), isinstance(leaf, _Unwind)))

def failure(error: BaseException) -> dict[str, Any]:
    """The `error` member of a failed report."""
    error = decisive(error)
    body = {"message": message_of(error), "code": "ERROR",
            "retryable": is_retryable(error)}
    if isinstance(error, IronflowError):
        body["code"] = sound_text(error.code) or "ERROR"
        if error.retry_after is not None and body["retryable"]:
            body["retry_after_ms"] = round(error.retry_after * 1000)
    return body

def message_of(error: BaseException) -> str:
    return sound_text(str(error)) or type(error).__name__

def sound_text(text: str) -> str:
    """Text of any origin, short and clean enough for a report."""
    return text[:MAX_ERROR_TEXT].encode("utf-8", "replace").decode()

# ======================================================================================
# 3. The wire
# ======================================================================================
# One keep-alive HTTP/1.1 connection. We write the request ourselves, head and body in
# one send: http.client, which reads the answer, would send them apart, and the server
# wake up twice. Nothing here follows redirects or asks proxies.

class Address:
    """Where the server is, and the header lines that every request to it carries.
    Arguments beat the environment. Raises ValueError for what is no http URL."""

    def __init__(self, server_url: str | None, api_key: str | None) -> None:
        env = os.environ.get
        url = server_url or env("IRONFLOW_SERVER_URL") or "http://localhost:9123"
        key = api_key or env("IRONFLOW_API_KEY")
        parts = urlsplit(url)
        check(parts.scheme in ("http", "https") and parts.hostname
              and not parts.username and not parts.query,
              f"server_url must be like http://host:9123, not {url!r}")
        headers = {"Host": parts.netloc, "Accept": "application/json",
                   "User-Agent": f"ironflow_client.py/{__version__}",
                   "X-Ironflow-SDK": f"python/{__version__}",
                   "Authorization": key and f"Bearer {key}",
                   "X-Ironflow-Environment": env("IRONFLOW_ENV")}
        lines = [f"{name}: {value}" for name, value in headers.items() if value]
        for line in lines:
            check(line.isascii() and line.isprintable(), f"no header: {line[:20]!r}...")
        self.url, self.head = url.rstrip("/"), "\r\n".join([*lines, ""])
        self.tls, self.host = parts.scheme == "https", parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        self.base = quote(parts.path.rstrip("/"))       # what is before /api

NO_HEADERS = http.client.HTTPMessage()
RUN_ID: ContextVar[str | None] = ContextVar("ironflow_run", default=None)

class Reply:
    """An answer: HTTP status, JSON body (None when there is none), headers."""

    def __init__(self, status: int, body: Any = None,
                 headers: http.client.HTTPMessage = NO_HEADERS) -> None:
        self.status, self.body, self.headers = status, body, headers
        self.ok = 200 <= status < 300
        # Says something about the moment, and nothing about the request:
        self.transient = status in (408, 429) or (status >= 500 and status != 501)
        text = headers.get("Retry-After", "")
        self.retry_after = float(text) if re.fullmatch("[0-9]{1,6}", text) else 0.0

    def error(self, doing: str) -> IronflowError:
        """The refusal as an exception. Reads all spellings of 1.4 and 4.7."""
        body = self.body if isinstance(self.body, dict) else {}
        code, shout = str(body.get("code", "")), str(body.get("error", ""))
        if re.fullmatch(r"[A-Z][A-Z0-9_]+", shout):
            code = shout
        message = body.get("message") or shout or f"HTTP status {self.status}"
        return IronflowError(f"{doing}: {message}", self.status, code,
                             bool(body.get("retryable", self.transient)),
                             self.retry_after or None)

def said(error: OSError) -> str:
    """What an OSError says, without its number."""
    return error.strerror or str(error) or type(error).__name__

class Connection:
    """One connection to the server, opened when needed, kept for the next request. One
    thread uses it at a time; `close` from another ends the request in the air."""

    def __init__(self, address: Address) -> None:
        self._address, self._owner = address, os.getpid()
        self._socket: socket.socket | None = None
        self.closed = False

    def request(self, method: str, path: str, body: Callable[[], bytes] | None,
                timeout: float) -> Reply:
        """Send one request, read its answer; `timeout` (s) bounds each wait for bytes.
        If a kept connection is closed the request is sent again, perhaps for the second
        time: all here bear that. Raises OSError when there is no sound answer."""
        content = None if body is None else body()
        if self._owner != os.getpid():      # a fork: the other one goes on using it
            self.drop()
            self._owner = os.getpid()
        if self._socket is not None:
            with contextlib.suppress(ConnectionError):
                return self._exchange(method, path, content, timeout)
        return self._exchange(method, path, content, timeout)

    def close(self) -> None:
        """Wake whoever waits here for an answer, and who then frees the socket."""
        self.closed = True
        if (waiting := self._socket) is not None:
            with contextlib.suppress(OSError):          # it has ended by itself
                # Not SSLSocket.shutdown, which takes TLS away from under the reader.
                socket.socket.shutdown(waiting, socket.SHUT_RDWR)

    def drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    __del__ = drop                          # so that `Client().emit(...)` is enough

    def _exchange(self, method: str, path: str, body: bytes | None,
                  timeout: float) -> Reply:
        head = f"{method} {self._address.base}{path} HTTP/1.1\r\n{self._address.head}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if (run_id := RUN_ID.get()) is not None:
            head += f"X-Ironflow-Run-ID: {run_id}\r\n"
        try:
            if self._socket is None and not self.closed:
                self._socket = self._connect(min(timeout, CONNECT_S))
            if self._socket is None or self.closed:
                raise ConnectionAbortedError("closed")
            self._socket.settimeout(timeout)
            self._socket.sendall(f"{head}\r\n".encode("ascii") + (body or b""))
            with http.client.HTTPResponse(self._socket, method=method) as response:
                response.begin()
                content = response.read()
            if response.will_close:
                self.drop()
            return Reply(response.status, _body(response.status, content),
                         response.headers)
        except BaseException as error:
            self.drop()                     # whatever else comes on it would be misread
            if isinstance(error, http.client.HTTPException):
                raise ConnectionError(f"a broken answer: {error!r}") from error
            raise

    def _connect(self, timeout: float) -> socket.socket:
        address = self._address
        plain = socket.create_connection((address.host, address.port), timeout)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not address.tls:
            return plain
        import ssl  # only here: it is slow to import

        context = ssl.create_default_context()
        return context.wrap_socket(plain, server_hostname=address.host)

def _body(status: int, content: bytes) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError:
        if status >= 300:                   # the page of a proxy
            return {"message": content[:200].decode("utf-8", "replace")}
        raise OSError("the answer is no JSON; is this an ironflow server?") from None

# ======================================================================================
# 4. The calls, and the two clients
# ======================================================================================
# A call is written once, as a coroutine, and a listing as an async generator. All they
# wait for are their client's `_exchange` and `_pause`: AsyncClient awaits there, Client
# blocks, so that one `send` runs the coroutine to its end (plain handlers do the same,
# 6). Every call bears being sent twice: it reads, says what should be, or has a key.

P = ParamSpec("P")
SyncT = TypeVar("SyncT", covariant=True)
AsyncT = TypeVar("AsyncT", covariant=True)
RowT = TypeVar("RowT", bound=Row)
When = datetime | str | None
RPC, PUBSUB = "/ironflow.v1.IronflowService/", "/ironflow.v1.PubSubService/"
COUNTS = {"message_count", "lag", "first_seq", "last_seq"}      # text in Connect JSON

class Call(Protocol[P, SyncT, AsyncT]):
    """A call, as type checkers see it: what it returns depends on the client."""

    @overload
    def __get__(self, client: Client, owner: Any) -> Callable[P, SyncT]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: Any) -> Callable[P, AsyncT]: ...

@overload
def call(describe: Callable[Concatenate[Any, P], abc.Coroutine[Any, Any, T]]
         ) -> Call[P, T, abc.Coroutine[Any, Any, T]]: ...
@overload
def call(describe: Callable[Concatenate[Any, P], abc.AsyncIterator[T]]
         ) -> Call[P, Iterator[T], abc.AsyncIterator[T]]: ...
def call(describe: Any) -> Any:
    """Make a coroutine or async generator function a method of both clients."""
    @functools.wraps(describe)
    def perform(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._play(describe(self, *args, **kwargs))

    return perform

def played(steps: Any) -> Any:
    """What a coroutine that never suspends returns."""
    try:
        steps.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a coroutine that must not suspend did")

def keyed(what: str, key: str | None, **members: Any) -> dict[str, Any]:
    """A body in JSON, with the idempotency key or else a new one. Raises NotJSON."""
    members["idempotency_key"] = key or f"once-{secrets.token_hex(10)}"
    return dict(json_copy(members, what))

def new_event(name: str, data: Any = None, version: int = 1,
              metadata: Mapping[str, Any] | None = None,
              idempotency_key: str | None = None) -> dict[str, Any]:
    """An event as the server takes it. Raises ValueError or NotJSON."""
    check(isinstance(name, str) and name, f"an event's name must be text, not {name!r}")
    more = {} if metadata is None else {"metadata": dict(metadata)}
    return keyed(f"event {name!r}", idempotency_key, name=name, data=data,
                 version=version, **more)

def rest(*parts: str, **query: Any) -> str:
    """A path of the REST API. What is None in the query is left out."""
    given = {name: one for name, one in query.items() if one is not None}
    for name in given.keys() & {"since", "until"}:
        given[name] = rfc3339(instant(given[name], name))
    path = "/".join(quote(part, safe="") for part in parts)
    return f"/api/v1/{path}?{urlencode(given)}".rstrip("?")

def snake(body: Mapping[str, Any]) -> dict[str, Any]:
    """A Connect answer with the names and numbers that REST would have."""
    row = {re.sub("[A-Z]", r"_\g<0>", name).lower(): one for name, one in body.items()}
    return row | {name: int(row[name]) for name in COUNTS & row.keys()}

class Calls:
    """The API. What blocks in Client is awaited in AsyncClient; `for` is `async for`.
    A call is repeated, for at most `timeout` (a duration), while the server cannot be
    reached or answers 408, 429 or 503. Then, and for every other refusal, it raises
    IronflowError. Inside a handler, calls tell the server which run they belong to."""

    _exchange: Any                      # how a client waits for an answer,
    _pause: Any                         # and between two tries

    def __init__(self, server_url: str | None = None, api_key: str | None = None,
                 timeout: Duration = 30) -> None:
        self._idle: list[Connection] = []   # append and pop are atomic: no lock
        self._address = Address(server_url, api_key)
        self._timeout = seconds(timeout, "timeout")
        self._subscriptions = weakref.WeakSet[Subscription]()

    @call
    async def close(self) -> None:
        """Close the connections that are idle, and end the subscriptions. The next call
        would open a new one."""
        for each in [*self._subscriptions]:
            await each.unsubscribe()
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().drop()

    # -- events ------------------------------------------------------------------------
    @call
    async def emit(self, name: str, data: Any = None, *, version: int = 1,
                   metadata: Mapping[str, Any] | None = None,
                   idempotency_key: str | None = None) -> Emitted:
        """Record one event; returns `event_id`, and `run_ids` of the runs it started,
        when that is on the server's disk. A repeat with the same key and name returns
        the first result. Without a key two calls are two events, two tries are one."""
        event = new_event(name, data, version, metadata, idempotency_key)
        return Emitted(await self._send("POST", rest("events"), event))

    @call
    async def emit_many(self, events: Iterable[Mapping[str, Any]]) -> list[Emitted]:
        """Record many events, mappings of emit's arguments. A thousand go in a request,
        all or nothing; an error leaves the thousands before it recorded."""
        ready = [new_event(**event) for event in events]
        done: list[Emitted] = []
        for at in range(0, len(ready), MAX_EVENTS):
            part = ready[at:at + MAX_EVENTS]
            answer = await self._send("POST", rest("events"), part)
            done += map(Emitted, answer["events"])
        return done

    @call
    async def emit_sync(self, name: str, data: Any = None, *, timeout: Duration = 30,
                        version: int = 1, metadata: Mapping[str, Any] | None = None,
                        idempotency_key: str | None = None) -> Emitted:
        """Emit, wait until all runs that it started have ended, say in `results` what
        became of each. A run that failed, or is not done in time, raises nothing."""
        event = new_event(name, data, version, metadata, idempotency_key)
        event["event"] = event.pop("name")
        event_id, runs = await self._wait_for_runs("TriggerSync", event, timeout)
        return Emitted(event_id=event_id, results=runs,
                       run_ids=[run.run_id for run in runs])

    @call
    async def get_event(self, event_id: str) -> EventRow:
        return EventRow(await self._send("GET", rest("events", event_id)))

    @call
    async def events(self, *, name: str | None = None, source: str | None = None,
                     names: str | Iterable[str] = (), since: When = None,
                     until: When = None, search: str | None = None,
                     ) -> abc.AsyncIterator[EventRow]:
        """Iterate over all events that match, newest first, none that come meanwhile;
        `name` is a part of the name, `names` are whole ones."""
        some = names if isinstance(names, str) else ",".join(names)
        async for row in self._pages("events", name=name, names=some or None,
                                     source=source, since=since, until=until,
                                     search=search):
            yield EventRow(row)

    @call
    async def event_names(self) -> list[Row]:
        """Each `name` among the newest 50,000 events, and its `count`."""
        return await self._list(Row, "names", rest("events", "names"))

    @call
    async def publish(self, topic: str, data: Any = None, *,
                      idempotency_key: str | None = None) -> Row:
        """Record a message for the topic's subscribers; it starts no function. Returns
        `event_id`, `sequence`, and `duplicate`: whether the key was known."""
        body = keyed(f"topic {topic!r}", idempotency_key, topic=topic, data=data)
        return Row(await self._send("POST", rest("publish"), body))

    @call
    async def topics(self) -> list[Row]:
        """name, message_count, consumer_count, first_message_at, last_message_at."""
        answer = await self._send("POST", f"{PUBSUB}ListTopics", {})
        return [Row(snake(row)) for row in answer["topics"]]

    @call
    async def topic_stats(self, topic: str) -> Row:
        """name, message_count, consumer_count, lag, first_seq, last_seq."""
        answer = await self._send("POST", f"{PUBSUB}GetTopicStats", {"topic": topic})
        return Row(snake(answer))

    # -- functions and runs ------------------------------------------------------------
    @call
    async def invoke(self, function_id: str, data: Any = None, *,
                     timeout: Duration = 30, idempotency_key: str | None = None) -> Any:
        """The output of one function, run whatever its triggers are. Or InvokeError."""
        body = keyed(f"the input of {function_id!r}", idempotency_key,
                     function_id=function_id, data=data)
        _, (run,) = await self._wait_for_runs("InvokeFunctionSync", body, timeout)
        if run.status == "completed":
            return run.output
        cause = (run.error or {}).get("message", "")
        raise InvokeError(function_id, cause, run.run_id, run.status)

    @call
    async def invoke_async(self, function_id: str, data: Any = None, *,
                           idempotency_key: str | None = None) -> Row:
        """Start one function; returns `run_id` and `event_id` once they are on disk."""
        body = keyed(f"the input of {function_id!r}", idempotency_key,
                     function_id=function_id, data=data)
        return Row(snake(await self._send("POST", f"{RPC}InvokeFunction", body)))

    @call
    async def get_run(self, run_id: str) -> Run:
        return Run(await self._send("GET", rest("runs", run_id)))

    @call
    async def list_runs(self, /, function_id: str | None = None,
                        status: str | None = None, limit: int | None = None,
                        **filters: Any) -> list[Run]:
        """One page of runs, newest first, 50 unless `limit` says otherwise. Further
        filters: offset, event_id, search, since, until."""
        return await self._list(Run, "runs", rest(
            "runs", function_id=function_id, status=status, limit=limit, **filters))

    @call
    async def runs(self, *, function_id: str | None = None, status: str | None = None,
                   event_id: str | None = None, since: When = None, until: When = None,
                   search: str | None = None) -> abc.AsyncIterator[Run]:
        """Iterate over all runs that match, newest first, fetched page by page."""
        async for row in self._pages("runs", function_id=function_id, status=status,
                                     event_id=event_id, since=since, until=until,
                                     search=search):
            yield Run(row)

    @call
    async def run_steps(self, run_id: str) -> list[StepRow]:
        """The recorded steps of a run, in the order of their sequence."""
        return await self._list(StepRow, "steps", rest("runs", run_id, "steps"))

    @call
    async def cancel_run(self, run_id: str, reason: str | None = None) -> Run:
        """Cancel a run that has not ended; its worker hears it at its next report."""
        body = {} if reason is None else {"reason": reason}
        return Run(await self._send("POST", rest("runs", run_id, "cancel"), body))

    @call
    async def register(self, functions: Sequence[Function], *,
                       endpoint_url: str) -> list[Row]:
        """Have the runs of these functions posted to an endpoint (see `serve`). Returns
        each as the server has it, with `created` and `warnings`, which are logged."""
        rows = []
        for each in by_id(functions, "pull").values():
            body = each.registration | {"preferredMode": "EXECUTION_MODE_PUSH",
                                        "endpointUrl": endpoint_url}
            answer = await self._send("POST", f"{RPC}RegisterFunction", body)
            for warning in answer.get("warnings", ()):
                log.warning("%s", warning)
            rows.append(Row(snake(answer.pop("function")) | {"warnings": []} | answer))
        return rows

    @call
    async def get_function(self, function_id: str) -> Row:
        return Row(await self._send("GET", rest("functions", function_id)))

    @call
    async def list_functions(self) -> list[Row]:
        return await self._list(Row, "functions", rest("functions"))

    @call
    async def set_function_status(self, function_id: str, status: str) -> Row:
        """active, paused or archived: only an active function starts runs."""
        path = rest("functions", function_id, "status")
        return Row(await self._send("POST", path, {"status": status}))

    @call
    async def delete_function(self, function_id: str) -> None:
        await self._send("DELETE", rest("functions", function_id))

    @call
    async def list_workers(self) -> list[Row]:
        return await self._list(Row, "workers", rest("workers"))

    @call
    async def info(self) -> Row:
        """version, started_at, function_count, active_runs, connected_workers."""
        return Row(snake(await self._send("POST", f"{RPC}Info", {})))

    @call
    async def health(self) -> Row:
        return Row(await self._send("GET", "/health"))

    # -- asking ------------------------------------------------------------------------
    async def _list(self, kind: type[RowT], member: str, path: str) -> list[RowT]:
        return [kind(row) for row in (await self._send("GET", path))[member]]

    async def _pages(self, what: str, **query: Any) -> abc.AsyncIterator[Any]:
        """The rows of all pages. One that is empty and names a next is not the last."""
        while query.get("cursor") != "":
            page = await self._send("GET", rest(what, limit=200, **query))
            for row in page[what]:
                yield row
            query["cursor"] = page["next_cursor"]

    async def _wait_for_runs(self, method: str, body: Any, timeout: Duration
                             ) -> tuple[Any, list[Run]]:
        """The event's id, and what became of its runs, also if the server restarts."""
        until = monotonic() + seconds(timeout, "timeout")

        def for_the_rest() -> dict[str, Any]:
            left_ms = math.ceil((until - monotonic()) * 1000)
            return {**body, "timeout_ms": min(max(left_ms, 1), MAX_WAIT_MS)}

        path = RPC + method
        while True:
            answer = await self._send("POST", path, for_the_rest, until + LATE_S)
            results = answer["results"] if "results" in answer else [answer["result"]]
            runs = [Run(snake(result)) for result in results]
            if monotonic() >= until or not any(run.wait_timed_out for run in runs):
                return answer.get("eventId"), runs
            await self._pause(RETRY_FIRST_S)

    async def _send(self, method: str, path: str, body: Any = None,
                    deadline: float | None = None) -> Any:
        """The JSON of the answer; a `body` that is callable is called for each try."""
        def content() -> bytes:
            return encode(body() if callable(body) else body).encode()

        make = None if body is None else content
        deadline = deadline or monotonic() + self._timeout
        for delay in backoff():
            left = max(deadline - monotonic(), 0.001)
            try:
                reply: Reply = await self._exchange(method, path, make, left)
            except OSError as error:
                trouble = IronflowError(
                    f"cannot reach the ironflow server at {self._address.url} "
                    f"({said(error)}); is it running? `python ironflow.py` starts one, "
                    "IRONFLOW_SERVER_URL says where it is", 0, "unavailable", True)
                trouble.__cause__ = error
            else:
                if reply.ok:
                    return reply.body
                trouble = reply.error(f"{method} {path.partition('?')[0]}")
                if reply.status not in (408, 429, 503):
                    raise trouble
                delay = max(delay, reply.retry_after)
            if monotonic() + delay >= deadline:
                raise trouble
            await self._pause(delay)
        raise AssertionError("backoff() never ends")

    @contextlib.contextmanager
    def _line(self) -> Iterator[Connection]:
        """A connection for one request. Hangs up when that fails or is cancelled."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = Connection(self._address)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)

class Client(Calls, contextlib.AbstractContextManager["Client"]):
    """The API, blocking. Safe to share between threads; a context manager."""

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _play(self, work: Any) -> Any:
        return self._iterate(work) if inspect.isasyncgen(work) else played(work)

    def _iterate(self, work: abc.AsyncIterator[T]) -> Iterator[T]:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield played(anext(work))

    async def _exchange(self, *request: Any) -> Reply:
        with self._line() as line:
            return line.request(*request)

    async def _pause(self, delay: float) -> None:
        sleep(delay)  # noqa: ASYNC251

class AsyncClient(Calls, contextlib.AbstractAsyncContextManager["AsyncClient"]):
    """The API for programs with an event loop; an async context manager. Loops may use
    it one after the other. Each exchange blocks a thread, at most 64 at a time.
    Cancelling a call closes its connection, and the thread ends."""

    _loop: asyncio.AbstractEventLoop | None = None      # that of `_gate`
    _pause = staticmethod(asyncio.sleep)
    _play = staticmethod(lambda work: work)

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _exchange(self, *request: Any) -> Reply:
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._loop, self._gate = loop, asyncio.Semaphore(THREADS)
        async with asyncio.timeout(request[-1]), self._gate:
            with self._line() as line:
                return await in_thread(lambda: line.request(*request), "a call")

    def subscribe(
        self, pattern: str, *, replay: int = 0, since: int | None = None,
        filter: str | None = None, group: str | None = None, ack: str = "auto",
        on_event: Hearer[StreamEvent] | None = None,
        on_error: Hearer[Exception] | None = None,
    ) -> Subscription:
        """Watch what is committed: `async for event in client.subscribe("order.>")`.
        Each event comes once, in order, whatever happens to connection and server. An
        `async with` block begins when the server has subscribed us.
        - `replay`: the newest so many first; `since`: all after that sequence.
        - `filter`: only those for which it is true (CEL), such as "data.total > 9".
        - `group`: its members share the events. One comes again, perhaps to another, if
          it is not acked within 30 s: at least once. `ack`: "auto", when the next event
          is asked for or on_event has returned (if it raised: nak), or "manual".
        - `on_event`: called with one event after the other, async or not. What it
          raises goes to `on_error`, or the log, and the next event comes.
        A refusal (of key, pattern, `since` ...) is raised where events are awaited, or
        goes to on_error, and ends it."""
        check(ack in ("auto", "manual"), f"ack must be 'auto' or 'manual', not {ack!r}")
        check(not replay or since is None, "replay and since exclude each other")
        feed = Feed(self, pattern, group, ack == "manual", {
            "replay": replay or None, "startAfterSequence": since, "filter": filter,
            "consumerGroup": group, "ackMode": group and "manual"})
        subscription = Subscription(feed, on_event, on_error)
        self._subscriptions.add(subscription)
        return subscription

# ======================================================================================
# 5. Functions
# ======================================================================================
# A function is a handler and what the server must know of it, all checked where it is
# written down: a mistake should not wait for a registration, elsewhere, at night.

Handler = Callable[[Any], Any]
Fields = Mapping[str, Any] | None
FIELDS = {                              # of options that are dicts; "!": must be there
    "triggers": "event expression cron", "cancel_on": "event! match",
    "retry": "max_attempts initial_delay backoff_factor max_delay on_exhausted",
    "concurrency": "limit! key", "throttle": "limit! period! key",
    "debounce": "period! key max_wait",
    "circuit_breaker": "failure_threshold open_duration max_open_duration"}

class Function:
    """A handler and its registration. Call it with a context to test the handler."""

    def __init__(self, handler: Handler, registration: dict[str, Any],
                 mode: str | None, step_timeout: float | None) -> None:
        functools.update_wrapper(self, handler)
        self.handler, self.mode, self.step_timeout = handler, mode, step_timeout
        self.id: str = registration["id"]
        self.registration = registration    # the body of RegisterFunction without mode
        self.is_async = (inspect.iscoroutinefunction(handler)
                         or inspect.iscoroutinefunction(type(handler).__call__))

    def __call__(self, ctx: Any) -> Any:
        return self.handler(ctx)

    def __repr__(self) -> str:
        return f"<Function {self.id!r}>"

def function(
    *, id: str, triggers: Sequence[Mapping[str, str]] = (), mode: str | None = None,
    retry: Fields = None, timeout: Duration | None = None,
    step_timeout: Duration | None = None, recording: bool | None = None,
    name: str | None = None, description: str | None = None, metadata: Fields = None,
    concurrency: Fields = None, actor_key: str | None = None, throttle: Fields = None,
    debounce: Fields = None, cancel_on: Sequence[Mapping[str, str]] | None = None,
    circuit_breaker: Fields = None, secrets: Sequence[str] | None = None,
) -> Callable[[Handler], Function]:
    """Make a handler, an `async def` or `def` of one argument, a durable function.
    - `triggers`: what starts it, `[{"event": "order.placed"}]`, also patterns such as
      `order.*` and `order.>`; with an `expression` (CEL), which then has to be true;
      `[{"cron": "0 8 * * mon-fri"}]`, in UTC. Without any it runs only when invoked.
    - `retry`: any of max_attempts (the first included), initial_delay, backoff_factor,
      max_delay, on_exhausted ("fail" or "pause"). Else 3, 1 s, 2, 5 min, "fail".
    - `timeout`: of one call of a push endpoint; pull runs have none.
    - `step_timeout`: for each undo, and each step.run that gives none itself.
    - `concurrency`, {limit, key}: so many runs at once, of each value at the path `key`
      in the event's data. `actor_key`, a path: one at once, on the same worker.
    - `throttle`, {limit, period, key}: so many starts in a period; the others wait.
    - `debounce`, {period, key, max_wait}: one run, for the last event before a silence.
    - `cancel_on`, [{event, match}]: cancels runs whose own event is equal at `match`.
    - `circuit_breaker`, {failure_threshold, open_duration, max_open_duration}: so many
      posts in a row that fail shut its endpoint off. Else 5, 1 min, at most 10 min.
    - `secrets`: names of values that the server keeps, for `ctx.secrets`.
    - `mode`: "pull" or "push"; when unset, a Worker registers pull.
    Delays, periods and timeouts are durations. Raises ValueError that names function
    and field. What the server does not support it refuses itself, at registration."""
    at = f"@function(id={id!r})"
    check(isinstance(id, str) and re.fullmatch(r"[^*>\s\x00-\x1f\x7f]+", id)
          and "" not in id.split("."),
          f"{at}: id must be text without blanks, '*', '>' or empty dot segments")
    check(mode in (None, "pull", "push"), f"{at}: mode must be 'pull' or 'push'")
    check(isinstance(actor_key, str | None), f"{at}: actor_key must be text")
    check(not isinstance(secrets, str) and all(isinstance(one, str) for one in
          secrets or ()), f"{at}: secrets must be a list of names")
    fields = {
        "id": id, "name": name or id, "description": description,
        "timeoutMs": None if timeout is None else _ms(timeout, f"{at}: timeout"),
        "metadata": None if metadata is None else dict(metadata),
        "actorKey": actor_key, "secrets": secrets, "recording": recording,
        "triggers": [_wire("triggers", one, at) for one in triggers],
        "cancelOn": cancel_on and [_wire("cancel_on", one, at) for one in cancel_on],
        **{_camel(option): None if value is None else _wire(option, value, at)
           for option, value in (("retry", retry), ("concurrency", concurrency),
                                 ("throttle", throttle), ("debounce", debounce),
                                 ("circuit_breaker", circuit_breaker))}}
    given = {key: value for key, value in fields.items() if value is not None}
    registration = json_copy(given, at)
    limit = None if step_timeout is None else seconds(
        step_timeout, f"{at}: step_timeout")

    def decorate(handler: Handler) -> Function:
        try:
            inspect.signature(handler).bind(None)
        except TypeError as error:
            raise ValueError(f"{at}: a handler takes one argument, ctx") from error
        return Function(handler, registration, mode, limit)

    return decorate

def by_id(functions: Sequence[Function], wrong: str) -> dict[str, Function]:
    """Functions by their ids; none may have the mode that is wrong here."""
    for item in functions:
        if not isinstance(item, Function):
            raise TypeError(f"functions: {item!r} was not made by @function")
        check(item.mode != wrong, f"functions: {item.id!r} has mode {wrong!r}")
    found = {item.id: item for item in functions}
    check(functions and len(found) == len(functions),
          "functions must not be empty, and no id may be in it twice")
    return found

def _wire(option: str, given: Mapping[str, Any], at: str) -> dict[str, Any]:
    """An option's fields, checked, as the server spells them."""
    known, wire = FIELDS[option].replace("!", "").split(), {}
    needed = re.findall(r"(\w+)!", FIELDS[option])
    check(isinstance(given, Mapping) and all(one in given for one in needed)
          and (option != "triggers" or given.keys() & {"event", "cron"}),
          f"{at}: {option} must have {' and '.join(needed) or 'event or cron'}, not be "
          f"{given!r}")
    for name, value in given.items():
        where = f"{at}: {option}[{name!r}]"
        check(name in known, f"{where} is none of {', '.join(known)}")
        spelled = _camel(name)
        if re.search("delay|period|wait|duration", name):
            value = _ms(value, where, {"period": 1000, "open_duration": 1}.get(name, 0))
            spelled += "Ms"
        elif name in ("max_attempts", "backoff_factor", "limit", "failure_threshold"):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            check(number and 1 <= value < math.inf, f"{where} must be a number from 1")
            check(name == "backoff_factor" or value == int(value),
                  f"{where} must be a whole number")
        else:
            check(isinstance(value, str) and value, f"{where} must be text")
            check(name != "on_exhausted" or value in ("fail", "pause"),
                  f"{where} must be 'fail' or 'pause'")
        wire[spelled] = value
    return wire

def _camel(name: str) -> str:
    return re.sub("_(.)", lambda found: found[1].upper(), name)

def _ms(value: Duration, field: str, least: int = 0) -> int:
    milliseconds = round(seconds(value, field) * 1000)
    check(milliseconds >= least, f"{field} must be {least} ms or more, not {value!r}")
    return milliseconds

# ======================================================================================
# 6. Steps
# ======================================================================================
# What a handler writes with. One core serves both kinds of handler: coroutines that
# await nothing but their host, which in an async handler really waits. In a plain one
# it blocks its thread, so that one `send` runs the coroutine to its end. A step's id is
# counted when the step is called, not when it is awaited: with asyncio.gather the ids
# follow the order in the text, whatever the loop does.

_STEP: ContextVar[str | None] = ContextVar("ironflow_step", default=None)

@dataclass(frozen=True, slots=True)
class Context:
    """The handler's one argument."""

    event: Event
    run: RunInfo
    step: Step
    logger: logging.LoggerAdapter[logging.Logger]
    secrets: Mapping[str, str]

@dataclass(slots=True, eq=False)
class Step:
    """The durable steps of one execution, `ctx.step`, or of one branch of it.

    In an async handler every call but `compensate` must be awaited; in a plain one it
    blocks and returns the value. Names are free text and may repeat: the uses of each
    name are counted."""

    _execution: Execution
    _host: Host
    _scope: str                         # what the ids of its steps begin with
    _parent: Step | None = None
    _stopped: bool = False              # a branch beside it failed: begin nothing more
    _blocks: list[dict[str, Any]] = field(default_factory=list)     # what it waits for
    _undos: list[Any] = field(default_factory=list)     # (name, fn); a list: a branch's

    def run(self, name: str, fn: Work, *, timeout: Duration | None = None) -> Any:
        """The result of `fn()`, sync or async, called once per run and remembered: what
        JSON makes of it, when the server has that on disk (see `checkpoint_interval`).

        A sync `fn` runs in a thread of its own, in a plain handler in the handler's. It
        cannot be interrupted: over its timeout the step of an async handler fails at
        once, and what the thread returns is dropped; that of a plain one after `fn`.

        Raises StepError from what `fn` raised, StepTimeoutError, NotJSON for an output
        that is none, NonRetryableError for a step inside another's function."""
        limit = self._host.step_timeout if timeout is None else seconds(
            timeout, f"step {name!r}: timeout")
        return self._play(name, lambda step_id: self._call(step_id, name, fn, limit))

    def sleep(self, name: str, duration: Duration) -> Any:
        """Suspend the run, which then costs no worker. The handler ends here, and is
        replayed when the time is over."""
        length = timedelta(seconds=seconds(duration, f"step {name!r}: duration"))
        return self.sleep_until(name, now() + length)

    def sleep_until(self, name: str, when: datetime | str) -> Any:
        """Suspend the run until an aware datetime, or RFC 3339 text; a time in the past
        is no error, for a retry may come late."""
        until = rfc3339(instant(when, f"step {name!r}: when"))
        return self._leave(name, "sleep", until=until)

    def wait_for_event(self, name: str, *, event: str, match: str | None = None,
                       match_value: Any = None, payload: Any = None,
                       timeout: Duration = "7d") -> Any:
        """Suspend the run until there is such an event; returns the Event.
        `match` is a path: the event must have there what the run's own event has, or
        `match_value`. Or it is a condition: `status == "paid"`, or CEL. An answer that
        came before the question is found. `payload` is for whoever shows the wait. Over
        its timeout the server fails the run: the handler never hears."""
        check(isinstance(event, str) and event, f"step {name!r}: event must be a name")
        limit = _ms(timeout, f"step {name!r}: timeout", 1)
        wanted = {"event": event, "match": match, "match_value": match_value,
                  "payload": payload, "timeout": f"{limit}ms"}
        return self._leave(name, "wait_for_event", Event.from_json, event_filter={
            key: value for key, value in wanted.items() if value is not None})

    def invoke(self, function_id: str | Function, input: Any = None, *,
               timeout: Duration = 30) -> Any:
        """Run another function as a child; returns its output. Raises InvokeError:
        uncaught that fails the run for good. A child over its `timeout` goes on."""
        name = function_id if isinstance(function_id, str) else function_id.id
        limit = _ms(timeout, f"invoke {name!r}: timeout", 1)
        return self._leave(name, "invoke_function", function_id=name, input=input,
                           invoke_timeout_ms=limit)

    def invoke_async(self, function_id: str | Function, input: Any = None) -> Any:
        """Start another function; returns its `run_id` when that is on disk."""
        name = function_id if isinstance(function_id, str) else function_id.id
        return self._leave(name, "invoke_function_async", Row, function_id=name,
                           input=input)

    def publish(self, topic: str, data: Any = None, *,
                idempotency_key: str | None = None) -> Any:
        """Record a message for the topic's subscribers, once, as a step; the result has
        `event_id` and `sequence`. The key is by default made of the step's id."""
        check(isinstance(topic, str) and topic, f"a topic must be text, not {topic!r}")
        body, name = json_copy(data, f"topic {topic!r}"), f"publish:{topic}"

        def send(step_id: str) -> Any:
            key = idempotency_key or f"step-{sha256(step_id.encode()).hexdigest()}"
            return self._call(step_id, name, lambda: self._execution.publish(
                topic, body, key), self._host.step_timeout)

        return self._play(name, send, lambda output: Row(snake(output)))

    def compensate(self, step_name: str, fn: Work) -> None:
        """Register the undo of a step, for when the run fails for good: not retryable,
        or in the last attempt when `on_exhausted` is "fail". Undos are called newest
        first (the last branch's first), each a recorded step. One that raises is told
        in the run's error, and the others go on. A run that is cancelled, or that the
        server fails (a wait over its timeout), undoes nothing."""
        check(isinstance(step_name, str) and step_name and callable(fn),
              f"compensate takes a step's name and a function, not {step_name!r}")
        self._undos.append((step_name, fn))

    def parallel(self, name: str, branches: Sequence[Handler], *,
                 concurrency: int | None = None, on_error: str = "fail_fast") -> Any:
        """Call each branch with steps of its own, at the same time; list of results.
        At most `concurrency` branches are under way, those included that sleep or wait;
        in a plain handler each has a thread, and 64 are the most. The run lets go when
        each branch has ended or waits, and comes back when any may go on.

        With "fail_fast" a branch that raises keeps the others from beginning steps;
        when those in flight have ended its error is raised, of several the first
        branch's. With "collect" all go on, and errors stand in the places of results.
        Groups under way at the same time need different names."""
        check(on_error in ("fail_fast", "collect"),
              f"group {name!r}: on_error must be 'fail_fast' or 'collect'")
        stem = self._execution.stem(self._scope, name)
        steps = [Step(self._execution, self._host, f"{stem}:{i}", self)
                 for i in range(len(branches))]
        self._undos += [step._undos for step in steps]
        return self._host.play(self._branches(stem, branches, steps, concurrency or 0,
                                              on_error == "fail_fast"))

    def map(self, name: str, items: Iterable[Any], fn: Callable[[Any, Step, int], Any],
            *, concurrency: int | None = None, on_error: str = "fail_fast") -> Any:
        """`fn(item, step, index)` for each item, as the branches of `parallel`."""
        branches = [lambda step, item=item, index=index: fn(item, step, index)
                    for index, item in enumerate(items)]
        return self.parallel(name, branches, concurrency=concurrency, on_error=on_error)

    def _play(self, name: str, work: Callable[[str], Any],
              read: Callable[[Any], Any] = lambda output: output) -> Any:
        """What the journal has for the next step of this name, or else its work."""
        async def play() -> Any:
            with self._execution.step(self, step_id, name) as known:
                return read(known[0] if known else await work(step_id))

        step_id = self._execution.new_step_id(self._scope, name)
        return self._host.play(play())

    def _leave(self, name: str, kind: str, read: Callable[[Any], Any] = lambda it: it,
               **what: Any) -> Any:
        """Let go of the run until the server knows the output of this step."""
        async def leave(step_id: str) -> None:
            self._blocks.append({"type": kind, "step_id": step_id, "step_name": name,
                                 **json_copy(what, f"step {name!r}")})
            raise _Unwind

        return self._play(name, leave, read)

    async def _branches(self, stem: str, branches: Sequence[Handler], steps: list[Step],
                        limit: int, fail_fast: bool) -> list[Any]:
        execution, rest = self._execution, iter(range(len(steps)))
        results: list[Any] = [None] * len(steps)
        failed: dict[int, BaseException] = {}
        unwound: list[int] = []

        async def play_some() -> None:
            """One branch after the other. One that waits keeps its place at a limit."""
            for i in rest:
                step = steps[i]
                # What an earlier attempt completed must register its undo again.
                if step._stopped and not execution.knows(step._scope):
                    continue
                try:
                    results[i] = await called(branches[i], step)
                except (Exception, BaseExceptionGroup, _Unwind) as error:
                    if step._blocks or isinstance(decisive(error), _Unwind):
                        unwound.append(i)
                    else:
                        results[i] = failed[i] = error
                        for one in steps:
                            one._stopped = fail_fast
                if step._blocks and limit > 0:
                    break

        if stem in execution.groups:        # the steps of both would share their ids
            raise NonRetryableError(f"a group {stem!r} is under way already; give each "
                                    "of the two its own name", "TWO_GROUPS")
        execution.groups.add(stem)
        most = min(len(steps), self._host.most, limit if limit > 0 else len(steps))
        try:
            await self._host.together([play_some() for _ in range(most)])
        finally:
            execution.groups.remove(stem)
        if failed and fail_fast:
            raise failed[min(failed)]
        self._blocks += [block for step in steps for block in step._blocks]
        if unwound or self._blocks:
            raise _Unwind
        return results

    def _may_begin(self) -> bool:
        """Not while this waits for the server, or when a branch beside it failed."""
        above = self._parent is None or self._parent._may_begin()
        return above and not (self._stopped or self._blocks)

    async def _call(self, step_id: str, name: str, fn: Work, timeout: float | None,
                    **undo: str) -> Any:
        """Call the step's function; returns its output once that is recorded."""
        execution = self._execution
        fn = execution.stand_ins.get(step_id, execution.stand_ins.get(name, fn))
        row = {"id": step_id, "name": name, "type": "compensate" if undo else "invoke"}
        begun = now()
        _STEP.set(name)
        try:
            value = await self._host.call(name, fn, timeout)
            output = None if undo else json_copy(value, f"step {name!r}: its output")
        except (Exception, SystemExit) as raised:
            error = decisive(raised)
            message, retryable = message_of(error), is_retryable(error)
            execution.keep(ended(begun, **row, **undo, status="failed", error={
                "message": message, "retryable": retryable}))
            if isinstance(raised, (NotJSON, StepTimeoutError)):
                raise
            after = error.retry_after if isinstance(error, IronflowError) else None
            raise StepError(message, step_id=step_id, retryable=retryable,
                            retry_after=after) from raised
        finally:
            _STEP.set(None)
        await execution.record(
            ended(begun, **row, **undo, status="completed", output=output), self._host)
        return output

def ended(begun: datetime, **row: Any) -> str:
    """The row of a step that has just ended, as text, which no handler can change."""
    at = now()
    took_ms = max(0, round((at - begun).total_seconds() * 1000))
    return encode({**row, "started_at": rfc3339(begun), "ended_at": rfc3339(at),
                   "duration_ms": took_ms})

async def called(fn: Callable[[Any], Any], argument: Any) -> Any:
    """What a handler or a branch returns. It may not end the process, or the loop."""
    try:
        value = fn(argument)
        return await value if inspect.isawaitable(value) else value
    except SystemExit as error:
        raise RuntimeError(f"sys.exit({error}) was called") from error

@dataclass(frozen=True)
class Host:
    """How a handler waits. This one is for async handlers, and waits on the loop."""

    loop: asyncio.AbstractEventLoop
    threads: asyncio.Semaphore          # bounds how many steps have one at a time
    step_timeout: float | None
    most = 2**31                        # branches at a time
    play = staticmethod(lambda steps: steps)

    async def call(self, name: str, fn: Work, timeout: float | None) -> Any:
        if inspect.iscoroutinefunction(fn):
            return await within(timeout, name, fn())
        async with self.threads:
            value = await within(timeout, name, in_thread(fn, f"step {name}"))
        if inspect.isawaitable(value):      # lambda: some_async_function(1)
            return await within(timeout, name, value)
        return value

    async def wait(self, future: Future[T]) -> T:
        return await asyncio.wrap_future(future)

    async def together(self, works: Iterable[abc.Coroutine[Any, Any, None]]) -> None:
        await asyncio.gather(*works)

class PlainHost(Host):
    """For plain handlers: blocks their thread, so that no coroutine here suspends."""

    play = staticmethod(played)
    most = THREADS

    async def call(self, name: str, fn: Work, timeout: float | None) -> Any:
        started = monotonic()
        value = fn()
        if inspect.isawaitable(value):
            work = within(timeout, name, value)
            return asyncio.run_coroutine_threadsafe(work, self.loop).result()
        if timeout is not None and monotonic() - started > timeout:
            raise StepTimeoutError(name, timeout)
        return value

    async def wait(self, future: Future[T]) -> T:
        return future.result()

    async def together(self, works: Iterable[abc.Coroutine[Any, Any, None]]) -> None:
        threads = [in_thread(functools.partial(played, one), "branch") for one in works]
        work = super().together(threads)
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

async def within(timeout: float | None, name: str, work: Any) -> Any:
    """Await the work of a step. A TimeoutError of its own is not taken for ours."""
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await work
    except TimeoutError:
        if timeout is None or not limit.expired():
            raise
        raise StepTimeoutError(name, timeout) from None

def from_thread(loop: asyncio.AbstractEventLoop, call: Callable[..., object],
                *args: Any) -> None:
    with contextlib.suppress(RuntimeError):         # the loop is closed, nobody is left
        loop.call_soon_threadsafe(call, *args)

async def in_thread(fn: Callable[[], T], name: str) -> T:
    """What `fn` returns or raises, from a daemon thread of its own: user code may fill
    asyncio's default executor, and its threads hold up the end of the process. The
    outcome travels as a value, for a Future refuses some exceptions (StopIteration).
    Cancelling ends the waiting; the thread works on."""
    outcome: Future[tuple[bool, Any]] = Future()
    outcome.set_running_or_notify_cancel()

    def body() -> None:
        try:
            outcome.set_result((True, fn()))
        except BaseException as error:
            outcome.set_result((False, error))

    threading.Thread(target=copy_context().run, args=(body,), name=name,
                     daemon=True).start()
    fine, value = await asyncio.wrap_future(outcome)
    if not fine:
        raise value
    return value  # type: ignore[no-any-return]

# ======================================================================================
# 7. An execution
# ======================================================================================
# One lease on one run: what the journal knew when it began, what was added since, and
# how it ends. `lost` says that the run is not ours any more; `fate` how it ends because
# the server refused a step. A handler that goes on after either meets _Unwind at its
# next step; what it returns is ignored.
#
# It ends only after the steps in flight have ended too: a branch may be at work while
# another one fails. To report at once would let another process start its step again.
#
# Several threads touch it: the handler's, the loop's, and the link's, which brings the
# server's verdicts. Its lock is never held while anything else is called.

class Execution:
    """A job in hand. `send` takes an update as JSON text and promises the answer; None:
    `rows` and `end` are for whoever plays it. `stand_ins`, by step id or name, are
    called instead of a step's function."""

    def __init__(self, job: Job, send: Any, publish: Any, checkpoint_s: float = 0,
                 stand_ins: Mapping[str, Work] | None = None) -> None:
        self.job, self.stand_ins, self.publish = job, stand_ins or {}, publish
        self.name = f"run {job.run.id} attempt {job.run.attempt}"
        self.lost = self._settling = False
        self.fate: dict[str, Any] | None = None
        self.cancel: Callable[[], None] = lambda: None  # how to wake an async handler
        self.rows: list[str] = []           # of ended steps, not sent yet
        self.end: dict[str, Any] = {}
        self._sequence = job.sequence_base  # of the first of them
        self._send, self._checkpoint_s, self._timed = send, checkpoint_s, False
        self._lock, self._timer = threading.Lock(), threading.Lock()
        self._uses: Counter[str] = Counter()
        self.groups: set[str] = set()       # under way
        self._in_air: list[Future[Reply]] = []
        self._open = 0                      # steps in flight
        self._quiet: Future[None] | None = None         # set once the handler has ended
        self._undoing = f"{job.run.id}:compensate::0"   # see _undo
        self.failure: dict[str, Any] | None = job.completed.get(self._undoing)

    def stem(self, scope: str, name: str) -> str:
        """A step's id but for its number, byte for byte as in all SDKs (6)."""
        check(isinstance(name, str) and name and "\0" not in name,
              f"a step's name must be text, and not empty, not {name!r}")
        json_copy(name, f"the name of step {name!r}")
        head, colon, rest = name.partition(":")
        if colon and head in ("compensate", "publish"):     # this colon stays as it is
            scope, name = f"{scope}:{head}", rest
        return f"{scope}:" + name.replace("\\", "\\\\").replace(":", "\\:")

    def new_step_id(self, scope: str, name: str) -> str:
        """The id of the next use of `name`."""
        stem = self.stem(scope, name)
        with self._lock:
            self._uses[stem] += 1
            return f"{stem}:{self._uses[stem] - 1}"

    def knows(self, scope: str) -> bool:
        return any(step_id.startswith(f"{scope}:") for step_id in self.job.completed)

    @contextlib.contextmanager
    def step(self, step: Step, step_id: str, name: str) -> Iterator[list[Any]]:
        """Surrounds a step; gives its output, in a list, if the journal has it. Raises
        for one inside another's `fn`, a failed child, a new step of a run being undone.
        """
        if (outer := _STEP.get()) is not None:
            raise NonRetryableError(
                f"step {name!r} is called inside the function of step {outer!r}, and a "
                "replay would skip both; call it from the handler", "NESTED_STEP")
        known = [self.job.completed[step_id]] if step_id in self.job.completed else []
        with self._lock:
            over = self.lost or self.fate or self._quiet
            if over or not (known or step._may_begin()):
                raise _Unwind
            self._open += 1
        try:
            if step_id in self.job.failed:
                raise InvokeError(**{"function_id": name} | self.job.failed[step_id])
            if self.failure and not known:
                raise StepError(self.failure["message"], step_id=step_id,
                                retryable=False)
            yield known
        finally:
            with self._lock:
                self._open -= 1
                if self._quiet is not None and not self._open:
                    self._quiet.set_result(None)

    def keep(self, row: str) -> None:
        """Keep a row for the next update; that of a failed step can wait for it."""
        with self._lock:
            self.rows.append(row)

    async def record(self, row: str, host: Host, now: bool = False) -> None:
        """Hand in a completed step; with checkpoint_interval=0, wait for the yes."""
        self.keep(row)
        if self._send and (now or not self._checkpoint_s):
            await host.wait(self.flush())
        elif self._send and not self._timed:
            self._timed = True
            later = threading.Timer(self._checkpoint_s, self._flush_in_time)
            later.daemon = True
            later.start()
        if self.lost or self.fate:
            raise _Unwind

    def _flush_in_time(self) -> None:
        with self._timer:                   # `settle` waits for it: rows before the end
            if self.rows and not self._settling:
                self.flush()

    async def play(self, functions: Mapping[str, Function],
                   threads: asyncio.Semaphore) -> None:
        """Run the handler, and report how it ended."""
        function_id, loop = self.job.run.function_id, asyncio.get_running_loop()
        function = functions.get(function_id) or Function(
            no_such_function, {"id": function_id}, None, None)
        kind = Host if function.is_async else PlainHost
        host = kind(loop, threads, function.step_timeout)
        life = self._live(function, Step(self, host, self.job.run.id))
        if function.is_async:
            running = asyncio.create_task(life)
            self.cancel = lambda: from_thread(loop, running.cancel)
        else:
            running = asyncio.create_task(in_thread(lambda: played(life), self.name))
        end: dict[str, Any] = {}            # of no account: it is lost, or has a fate
        try:
            end = await running
        except (asyncio.CancelledError, _Unwind):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise                       # not the handler alone: this job is
        await self.settle(end)

    async def _live(self, function: Function, step: Step) -> dict[str, Any]:
        """The report of the handler, or of its undos. Raises _Unwind if it has none."""
        run, output, error = self.job.run, None, self.failure
        RUN_ID.set(run.id)
        _STEP.set(None)
        ctx = Context(self.job.event, run, step, RunLogger(log, {"run": self.name}),
                      self.job.secrets)
        try:
            output = json_copy(await called(function, ctx),
                               f"the output of {function.id!r}")
        except (Exception, BaseExceptionGroup, asyncio.CancelledError, _Unwind) as why:
            task = asyncio.current_task() if function.is_async else None
            if task and task.cancelling() and isinstance(why, asyncio.CancelledError):
                raise                       # this process ends: undo nothing
            if not (self.lost or self.fate or step._blocks or error):
                cause = why.__cause__ if isinstance(why, StepError) else why
                log.warning("%s failed: %s", self.name, why, exc_info=cause)
                error = failure(why)
        if self.lost or self.fate:
            raise _Unwind
        if step._blocks:
            first, *more = step._blocks
            return {"status": "yielded", "yield": first, "yields": more}
        if error is None:
            return {"status": "completed", "output": output}
        last = run.on_exhausted == "fail" and 0 < run.max_attempts <= run.attempt
        if last or not error["retryable"]:
            error = await self._undo(step, error)
        return {"status": "failed", "error": error}

    async def _undo(self, step: Step, error: dict[str, Any]) -> dict[str, Any]:
        """Call the undos, newest first; returns the error, with what was not undone.
        Recorded first is that the run fails, and how: after a crash in the middle no
        step is tried again, for its undo may have run."""
        await step._host.wait(self.hush())
        undos = newest_first(step._undos)
        if undos and self.failure is None:
            row = ended(now(), id=self._undoing, name="compensate:", type="compensate",
                        status="completed", compensation_for="", output=error)
            await self.record(row, step._host, True)
        for name, fn in undos:
            what = f"compensate:{name}"
            step_id = self.new_step_id(self.job.run.id, what)
            if step_id not in self.job.completed:
                try:
                    await step._call(step_id, what, fn, step._host.step_timeout,
                                     compensation_for=name)
                except IronflowError as trouble:
                    text = f"{error['message']}; {name!r} is not undone: {trouble}"
                    error = {**error, "message": sound_text(text)}
        return error

    def flush(self) -> Future[Reply]:
        """Send the rows that wait, as progress; the answer to the last of them."""
        while True:
            self._timed = False
            sent = self._send(self, self._with_rows({"status": "progress"}))
            with self._lock:
                self._in_air = [*(one for one in self._in_air if not one.done()), sent]
            if not self.rows:
                return sent  # type: ignore[no-any-return]

    async def settle(self, fields: dict[str, Any]) -> None:
        """Report the end, once all steps have ended; returns when the server has it.
        What it refuses to keep (413: a large output) fails the run with its words."""
        await asyncio.wrap_future(self.hush())
        self.end = fields
        if self._send is None:
            return
        with self._timer:
            self._settling = True
        if len(self.rows) > portion(self.rows):
            self.flush()
        for progress in self._in_air:       # after the report it would be refused
            await asyncio.wrap_future(progress)
        for _ in range(2):
            if not self.lost:
                report = self._with_rows(self.fate or fields)
                if (await asyncio.wrap_future(self._send(self, report))).ok:
                    return

    def hush(self) -> Future[None]:
        """Let no more steps begin; the future is there when the last one has ended."""
        with self._lock:
            if self._quiet is None:
                self._quiet = Future()
                self._quiet.set_running_or_notify_cancel()  # nobody else may set it
                if not self._open:
                    self._quiet.set_result(None)
            return self._quiet

    def judge(self, reply: Reply) -> None:
        """Hear the answer to an update, before its sender does. 409: another lease, or
        a cancel, has the run now. Any other refusal would come again: the run fails."""
        if reply.ok or self.lost:
            return
        error = reply.error("the server refuses the report")
        if reply.status == 409 or reply is WORKER_STOPPED:
            log.warning("%s is abandoned: %s", self.name, error.message)
            self.lost = True
        else:
            log.error("%s: %s", self.name, error.message)
            self.fate = {"status": "failed",
                         "error": failure(NonRetryableError(error.message, error.code))}
        self.cancel()

    def _with_rows(self, fields: dict[str, Any]) -> str:
        """An update with the rows that wait, as many as fit: text put into text."""
        with self._lock:
            count = portion(self.rows)
            rows, self.rows = self.rows[:count], self.rows[count:]
            first, self._sequence = self._sequence, self._sequence + count
        return (f'{self.text(fields)[:-1]},"steps":[{",".join(rows)}],'
                f'"step_offset":{first}}}')

    def text(self, fields: dict[str, Any]) -> str:
        return encode({**self.job.fence, **fields})

def newest_first(undos: list[Any]) -> list[tuple[str, Work]]:
    return [each for one in reversed(undos)
            for each in (newest_first(one) if isinstance(one, list) else [one])]

def no_such_function(ctx: Context) -> None:
    raise NonRetryableError(f"this worker has no function {ctx.run.function_id!r}",
                            "FUNCTION_NOT_FOUND")

class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """`ctx.logger`: puts run and attempt before each line."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"[{(self.extra or {})['run']}] {msg}", kwargs

def portion(texts: Sequence[str]) -> int:
    """How many of these fit into one request: at most 500, and 12 MB; at least one."""
    size = 0
    for count, text in enumerate(texts[:MAX_UPDATES]):
        size += len(text) if text.isascii() else len(text.encode())
        if count and size > MAX_REQUEST:
            return count
    return min(len(texts), MAX_UPDATES)

# ======================================================================================
# 8. The link
# ======================================================================================
# What a worker says to its server and hears from it: three threads, a connection each,
# one to poll, one to beat, one to report. They are no tasks, so that a handler that
# holds the loop or the processor for an hour does not cost the worker its leases.
#
# The reporter is a group commit: what jobs have to say while one request is on the wire
# goes together in the next. Each thread asks until it is answered: a server that is
# gone for an hour costs an hour, and one line in the log when it goes and comes.

REGISTER = ("/RegisterFunction", "/register")
WORKER_STOPPED = Reply(499, {"code": "canceled", "message": "the worker has stopped"})
Update = tuple["Execution", str, Future[Reply]]     # whose, what, and the answer to it

class _Closed(Exception):
    """This thread's connection was closed, for the worker stops."""

class Link:
    """Keeps `functions` registered, brings jobs to `begin`, and carries their reports;
    `failed` hears of what ends the worker: a refused key, a refused registration."""

    def __init__(self, address: Address, registration: dict[str, Any],
                 functions: Sequence[Function], begin: Callable[[Job, bool], None],
                 failed: Callable[[BaseException], None], heartbeat_s: float) -> None:
        self._url, self._heartbeat_s = address.url, heartbeat_s
        self._registration, self._functions = registration, functions
        self._begin, self._failed = begin, failed
        self._path = rest("workers", registration["worker_id"])
        self._slots: int = registration["max_concurrent_jobs"]
        self._wires = {role: Connection(address) for role in ("poll", "beat", "report")}
        self._registering = threading.Lock()
        self._registered = 0                # how often we did
        self.first_word: Future[None] = Future()    # registered, or it has to wait
        guard = threading.RLock()           # of all that follows
        self._changed = threading.Condition(guard)
        self._queued = threading.Condition(guard)   # wakes the reporter alone
        self._held: list[Execution] = []
        self._queue: list[Update] = []
        self._lost_at: float | None = None  # since when the server is not there
        self._returns = 0                   # how often it came back

    def open(self) -> dict[str, asyncio.Task[None]]:
        """Start the threads; each task ends with its thread."""
        loops = {"poll": self._poll, "beat": self._beat, "report": self._report}
        return {role: asyncio.create_task(in_thread(
                    functools.partial(self._guard, self._wires[role], loop), role))
                for role, loop in loops.items()}

    def close(self, *roles: str) -> None:
        """Let threads end, and wake them. A job on its way comes back by its lease."""
        with self._changed:
            for role in roles:
                self._wires[role].close()
            if "report" in roles:
                for execution in self._held:
                    execution.judge(WORKER_STOPPED)
            self._changed.notify_all()
            self._queued.notify()

    def hold(self, execution: Execution) -> None:
        with self._changed:
            self._held.append(execution)

    def release(self, execution: Execution) -> None:
        with self._changed:
            self._held.remove(execution)
            self._changed.notify_all()

    def send(self, execution: Execution, text: str) -> Future[Reply]:
        """Queue an update; the future gives the server's answer, or WORKER_STOPPED."""
        answer: Future[Reply] = Future()
        answer.set_running_or_notify_cancel()       # nobody can withdraw a report
        with self._changed:
            self._queue.append((execution, text, answer))
            self._queued.notify()
            if self._wires["report"].closed:
                self._give_up()
        return answer

    def _guard(self, wire: Connection, loop: Callable[[Connection], None]) -> None:
        try:
            loop(wire)
        except _Closed:
            pass
        except BaseException as error:
            self._failed(error)
        finally:
            wire.close()
            wire.drop()
            with self._changed:
                self._first_word_is_out()
                if wire is self._wires["report"]:
                    self._give_up()

    def _poll(self, wire: Connection) -> None:
        self._register(wire, 0)
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: wire.closed or len(self._held) < self._slots)
                free = self._slots - len(self._held)
            wait = f"wait={POLL_WAIT_S:.0f}&acked=true"
            asked_at = monotonic()
            reply = self._ask(wire, "GET", f"{self._path}/jobs?available={free}&{wait}")
            late = monotonic() - asked_at > POLL_WAIT_S + LATE_S
            bodies = reply.body["jobs"] if reply.body else []
            for body in bodies:
                try:
                    job = Job(body)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    log.error("no job, its lease will end: %r in %.300r", error, body)
                else:
                    self._begin(job, late)
            if not bodies and "Ironflow-Poll-Wait" not in reply.headers:
                self._pause(wire, 1)        # the server does not hold polls

    def _beat(self, wire: Connection) -> None:
        """Heartbeats. An abandoned job is not listed: its lease is not ours."""
        def body() -> bytes:
            with self._changed:
                held = [execution.job for execution in self._held if not execution.lost]
            jobs = [{"job_id": job.fence["job_id"],
                     "started_at": rfc3339(job.received_at)} for job in held]
            return encode({"worker_id": self._registration["worker_id"],
                           "active_jobs": len(jobs), "jobs": jobs}).encode()

        while True:
            self._pause(wire, self._heartbeat_s)
            if self._registered:
                self._ask(wire, "POST", f"{self._path}/heartbeat", body)

    def _report(self, wire: Connection) -> None:
        while True:
            unanswered = batch = self._next_batch(wire)
            try:
                unanswered = self._deliver(wire, batch)
            finally:                        # also for _give_up, if we are leaving
                left = [update for update in unanswered if not update[2].done()]
                with self._changed:
                    self._queue[:0] = left
            if left:
                self._pause(wire, RETRY_MAX_S)

    def _deliver(self, wire: Connection, batch: list[Update]) -> list[Update]:
        """Send a batch and hand out the answers; returns what must be sent again."""
        body = f'{{"updates":[{",".join(text for _, text, _ in batch)}]}}'
        reply = self._ask(wire, "PUT", f"{self._path}/jobs", body.encode, True)
        if not reply.ok and len(batch) > 1:     # one spoils it for all: send each alone
            return [left for one in batch for left in self._deliver(wire, [one])]
        answers = [Reply(one["status"], one.get("body"))
                   for one in reply.body["results"]] if reply.ok else [reply]
        pairs = list(zip(batch, answers, strict=True))
        for (execution, _, promise), answer in pairs:
            if not answer.transient:
                execution.judge(answer)
                promise.set_result(answer)
        return [update for update, answer in pairs if answer.transient]

    def _next_batch(self, wire: Connection) -> list[Update]:
        """Wait for updates; returns the oldest, as many as one request may carry."""
        with self._changed:
            self._queued.wait_for(lambda: self._queue or wire.closed)
            if wire.closed:
                raise _Closed
            count = portion([text for _, text, _ in self._queue[:MAX_UPDATES]])
            batch, self._queue = self._queue[:count], self._queue[count:]
            return batch

    def _give_up(self) -> None:
        while self._queue:
            execution, _, promise = self._queue.pop()
            execution.judge(WORKER_STOPPED)
            promise.set_result(WORKER_STOPPED)

    def _ask(self, wire: Connection, method: str, path: str,
             body: Callable[[], bytes] | None = None, refusable: bool = False) -> Reply:
        """The server's answer, however long it takes; `body` is made for each try.
        Raises _Closed, WorkerAuthError, and a refusal unless it is `refusable`."""
        doing = f"{method} {self._url}{path.partition('?')[0]}"
        for delay in backoff():
            registered = self._registered
            try:
                reply = wire.request(method, path, body, ANSWER_S)
            except OSError as error:
                if wire.closed:
                    raise _Closed from None
                self._heard(said(error))
            else:
                refusal = reply.error(doing)
                if reply.status in (401, 403):
                    raise WorkerAuthError(f"{refusal} (is IRONFLOW_API_KEY right?)",
                                          reply.status, refusal.code)
                self._heard(str(refusal) if reply.transient else None)
                if reply.transient:
                    delay = max(delay, reply.retry_after)
                elif reply.status == 404 and not path.endswith(REGISTER):
                    self._register(wire, registered)
                elif reply.ok or refusable:
                    return reply
                else:
                    raise refusal
            self._pause(wire, delay)
        raise AssertionError("backoff() never ends")

    def _register(self, wire: Connection, seen: int) -> None:
        """Register functions and worker, unless it was done since `seen`."""
        with self._registering:
            if self._registered != seen:
                return
            for function in self._functions:
                body = function.registration | {"preferredMode": "EXECUTION_MODE_PULL"}
                self._ask(wire, "POST", f"{RPC}RegisterFunction", encode(body).encode)
            self._ask(wire, "POST", f"{self._path}/register",
                      encode(self._registration).encode)
            self._registered += 1
            log.info("%s is registered at %s with %s", self._registration["worker_id"],
                     self._url, ", ".join(function.id for function in self._functions))
            with self._changed:
                self._first_word_is_out()

    def _pause(self, wire: Connection, delay: float) -> None:
        """Wait; less if the server comes back or the connection is closed."""
        with self._changed:
            seen = self._returns
            self._changed.wait_for(lambda: wire.closed or self._returns != seen, delay)
            if wire.closed:
                raise _Closed

    def _first_word_is_out(self) -> None:
        if not self.first_word.done():
            self.first_word.set_result(None)

    def _heard(self, trouble: str | None) -> None:
        """Note whether the server answers; the log hears when that changes."""
        with self._changed:
            if trouble is not None and self._lost_at is None:
                self._lost_at = monotonic()
                self._first_word_is_out()
                log.warning("no answer from %s (%s); trying until it is back",
                            self._url, trouble)
            elif trouble is None and self._lost_at is not None:
                away, self._lost_at = monotonic() - self._lost_at, None
                self._returns += 1
                self._changed.notify_all()
                log.warning("%s is back after %.1f s", self._url, away)

# ======================================================================================
# 9. The worker
# ======================================================================================
# Runs handlers. The link brings jobs; here each becomes a task that lives from the ack
# to the report. `start` owns the link's threads and these tasks, and ends after them.

class Worker:
    """Runs `functions` for a server, at most `max_concurrent_jobs` at a time.
    - `server_url`, `api_key`: else IRONFLOW_SERVER_URL, IRONFLOW_API_KEY, localhost.
    - `heartbeat_interval`: well below the server's lease, which is 90 s.
    - `checkpoint_interval`: with 0 a step's result is sent when it ends, and the
      handler goes on after the server's yes: only the step in hand can run twice. With
      more, results follow up to so much later, in fewer requests, and may run again.
    - `drain_timeout`: how long running jobs may go on when the worker is to end.
    Intervals and timeouts are durations. A server that is not there is waited for as
    long as it takes. Raises ValueError or TypeError for bad arguments, naming them."""

    def __init__(self, functions: Sequence[Function], server_url: str | None = None,
                 api_key: str | None = None, worker_id: str | None = None, *,
                 max_concurrent_jobs: int = 10, heartbeat_interval: Duration = 30,
                 checkpoint_interval: Duration = 0, drain_timeout: Duration = 60,
                 labels: Mapping[str, str] | None = None) -> None:
        self._functions = by_id(functions, "push")
        check(isinstance(max_concurrent_jobs, int) and max_concurrent_jobs >= 1,
              "max_concurrent_jobs must be an integer from 1")
        self.worker_id = worker_id or f"worker-{secrets.token_hex(10)}"
        self._client = Client(server_url, api_key)
        self._publish = functools.partial(published, self._client)
        self._heartbeat_s = seconds(heartbeat_interval, "heartbeat_interval")
        check(self._heartbeat_s, "heartbeat_interval must be more than 0")
        self._checkpoint_s = seconds(checkpoint_interval, "checkpoint_interval")
        self._drain_s = seconds(drain_timeout, "drain_timeout")
        runtime = f"python-{platform.python_version()}"
        self._registration = {
            "worker_id": self.worker_id, "hostname": socket.gethostname(),
            "function_ids": list(self._functions),
            "max_concurrent_jobs": max_concurrent_jobs,
            "labels": json_copy(dict(labels or {}), "labels"),
            "version": {"sdk": __version__, "runtime": runtime}}
        self._running, self._process = False, os.getpid()
        self._in_thread: InThread | None = None

    def run(self) -> None:
        """Work until SIGTERM or SIGINT, then let running jobs end; a second one stops
        at once. Call it from the main thread. Sets up logging (IRONFLOW_LOG_LEVEL, else
        INFO) if nothing has. Raises what `start` raises."""
        level = os.environ.get("IRONFLOW_LOG_LEVEL", "INFO").upper()
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
        try:
            asyncio.run(self._run())
        except KeyboardInterrupt:
            log.warning("stopped at once; running jobs come back when their leases end")

    async def _run(self) -> None:
        signals: list[int] = []

        def on_signal(number: int, frame: object) -> None:
            signals.append(number)
            if len(signals) > 1:
                raise KeyboardInterrupt     # also into a handler that holds the loop
            log.warning("%s: running jobs may end", signal.Signals(number).name)
            from_thread(self._loop, self._leave.set)

        working = asyncio.create_task(self.start())
        await asyncio.sleep(0)              # it has begun, and can be told to leave
        before = {number: signal.signal(number, on_signal)
                  for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            await working
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def start(self) -> None:
        """Work until `drain` or `stop` is called; to cancel it is to stop. Raises
        WorkerAuthError for a refused key, IronflowError for a refused function."""
        if self._process != os.getpid():    # forked: a worker of its own, by its name
            self._running, self._process = False, os.getpid()
            self.worker_id = f"{self.worker_id}-{self._process}"
            self._registration["worker_id"] = self.worker_id
        if self._running:
            raise RuntimeError("this worker is running already")
        self._running = True
        self._loop = asyncio.get_running_loop()
        self._leave, self._hurry, self._over = (asyncio.Event() for _ in range(3))
        self._patience_s = self._drain_s
        self._fatal: BaseException | None = None
        self._step_threads = asyncio.Semaphore(THREADS)
        self._jobs: set[asyncio.Task[None]] = set()
        self._link = Link(
            self._client._address, self._registration, list(self._functions.values()),
            self._begin, lambda error: from_thread(self._loop, self._fail, error),
            self._heartbeat_s)
        threads = self._link.open()
        try:
            await self._leave.wait()
            await self._let_jobs_end(threads["poll"])
        finally:
            self._link.close("poll", "beat", "report")
            for job in self._jobs:
                job.cancel()
            ending = [*threads.values(), *self._jobs]
            _, left = await asyncio.wait(ending, timeout=FAREWELL_S)
            if left:
                log.warning("%d threads or handlers, still busy, are left", len(left))
            self._running = False
            self._over.set()
        if self._fatal is not None:
            raise self._fatal

    async def drain(self, timeout: Duration | None = None) -> None:
        """Take no more jobs; returns when the running ones have ended and are reported.
        After `timeout` (else `drain_timeout`) async handlers are cancelled, plain ones
        end at their next step; their runs go on elsewhere when the leases end."""
        if self._running:
            if timeout is not None:
                self._patience_s = seconds(timeout, "timeout")
            self._leave.set()
            await self._over.wait()

    async def stop(self) -> None:
        """Stop now: drain without patience."""
        if self._running:
            self._hurry.set()
            await self.drain()

    async def __aenter__(self) -> Self:
        """Work beside the caller, such as the lifespan of an app. If a server is there,
        we are registered by now; raises what it refused, as `start` does."""
        beside = asyncio.create_task(self.start(), name="ironflow worker")
        try:
            await asyncio.sleep(0)          # it has begun: there is a link
            await asyncio.shield(asyncio.wrap_future(self._link.first_word))
            if beside.done() or self._fatal is not None:
                await beside
        except asyncio.CancelledError:
            beside.cancel()
            raise
        self._beside = beside
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Drain. Raises what ended the worker before, if anything did."""
        await self.drain()
        await self._beside

    def start_in_thread(self) -> InThread:
        """Work in a thread, for WSGI apps and scripts, until `stop` is called on what
        this returns, its `with` ends, or the main thread does. If a server is there, we
        are registered by now; raises what it refused. Once more, it returns the same.

        Each process that calls it has a worker. A fork takes no thread along: a child
        has none until it calls this itself, and then one with a name of its own."""
        with STARTING:
            beside = self._in_thread
            if beside is None or not beside.is_alive():
                beside = self._in_thread = InThread(self)
        beside.started.result()
        return beside

    async def _let_jobs_end(self, poll: asyncio.Task[None]) -> None:
        """Wait for the jobs in hand, those included that the last poll just brought."""
        async def all_ended() -> None:
            await asyncio.wait([poll])
            while self._jobs:
                await asyncio.wait(self._jobs)

        self._link.close("poll")
        waits = [asyncio.create_task(one) for one in (self._hurry.wait(), all_ended())]
        await asyncio.wait(waits, timeout=self._patience_s,
                           return_when=asyncio.FIRST_COMPLETED)
        for one in waits:
            one.cancel()

    def _fail(self, error: BaseException) -> None:
        log.error("the worker stops: %s", error)
        self._fatal = self._fatal or error
        self._hurry.set()
        self._leave.set()

    def _begin(self, job: Job, late: bool) -> None:
        """Take a job in hand, from the polling thread. A poll's answer counts as ack,
        but for a late one (we were suspended) an ack is sent, and its yes awaited."""
        execution = Execution(job, self._link.send, self._publish, self._checkpoint_s)
        self._link.hold(execution)
        ack = late and self._link.send(execution, execution.text({"status": "ack"}))
        from_thread(self._loop, self._spawn, execution, ack)

    def _spawn(self, execution: Execution, ack: Any) -> None:
        task = self._loop.create_task(self._work(execution, ack))
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _work(self, execution: Execution, ack: Any) -> None:
        """One job from start to report. Without a yes to an ack it is not ours."""
        try:
            if not ack or (await asyncio.wrap_future(ack)).ok:
                await execution.play(self._functions, self._step_threads)
        except Exception as error:          # a mistake of ours
            log.exception("%s: the worker failed", execution.name)
            self._fail(error)
        finally:
            self._link.release(execution)

def published(client: Client, topic: str, data: Any, key: str) -> dict[str, Any]:
    sent = client.publish(topic, data, idempotency_key=key)
    return {"eventId": sent.event_id, "sequence": sent.sequence}

STARTING = threading.Lock()

class InThread(threading.Thread, contextlib.AbstractContextManager["InThread"]):
    """A worker in a thread of its own, as `Worker.start_in_thread` starts it."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(name="ironflow worker", daemon=True)
        self.worker, self.started = worker, Future[None]()
        self.start()
        # At exit, but before executors are closed and new threads refused, if we can.
        getattr(threading, "_register_atexit", atexit.register)(self.stop)

    def run(self) -> None:
        try:
            asyncio.run(self._work())
        except BaseException as error:
            if not self.started.done():     # else `Worker._fail` has logged it
                self.started.set_exception(error)

    async def _work(self) -> None:
        self.loop = asyncio.get_running_loop()
        async with self.worker:
            self.started.set_result(None)
            await self.worker._over.wait()

    def stop(self, timeout: Duration | None = None) -> None:
        """Take no more jobs; returns when the running ones have ended, or soon after
        `timeout` (else `drain_timeout`), as `Worker.drain` does."""
        limit = self.worker._drain_s if timeout is None else seconds(timeout, "timeout")
        if self.is_alive() and self.started.done():     # not so in a forked process
            from_thread(self.loop, lambda: self.loop.create_task(
                self.worker.drain(limit)))
            self.join(limit + 2 * FAREWELL_S)
            if self.is_alive():             # a handler does not let go of the loop
                log.warning("the worker's thread, still busy, is left")

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

# ======================================================================================
# 10. Push
# ======================================================================================
# Here it is the server that calls: it posts a run, and the answer is what became of it.
# No lease, no reports: what an execution would report is kept, and is the answer. If
# that is lost, or this process dies, the server posts the run again as it knows it. One
# core judges a request; `handle`, `serve` and `serve_wsgi` only carry bytes to it.

Answer = tuple[int, dict[str, str], bytes]      # status, headers, body
HUNG_UP = Reply(409, {"message": "the server has hung up"})

class Endpoint:
    """Functions behind a URL."""

    def __init__(self, functions: Sequence[Function], signing_key: str | None,
                 server_url: str | None, api_key: str | None) -> None:
        self._functions = by_id(functions, "pull")
        check(signing_key != "", "signing_key must not be empty")
        self._key = signing_key or os.environ.get("IRONFLOW_SIGNING_KEY")
        self._publish = functools.partial(published, Client(server_url, api_key))

    async def answer(self, method: str, signature: str | None, body: bytes) -> Answer:
        """Do what is asked. Cancelling it lets go of the run."""
        try:
            job = self._asked(method, signature or "", body)
            status, text = 200, await self._outcome(job)
        except Exception as error:
            if not isinstance(error, IronflowError):    # a mistake of ours
                log.exception("a push could not be answered")
                error = IronflowError("see the log here", 500, "INTERNAL_ERROR")
            status, text = error.status, encode({
                "error": {"code": error.code, "message": error.message}})
        return status, {"Content-Type": "application/json", "Allow": "POST",
                        "Content-Length": str(len(text.encode()))}, text.encode()

    def _asked(self, method: str, signature: str, body: bytes) -> Job:
        """The job that a request brings. Raises IronflowError for one that is none."""
        expect(method == "POST", 405, "METHOD_NOT_ALLOWED",
               f"an ironflow server posts runs to this place; it has no {method}")
        expect(len(body) <= MAX_PUSH, 413, "BODY_TOO_LARGE",
               f"the body has over {MAX_PUSH} bytes; let steps return less")
        if self._key is not None:
            verify(signature, self._key, body)
        try:
            job = pushed(json.loads(body))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as why:
            what, code = "run", "VALIDATION_ERROR"
            if isinstance(why, (UnicodeError, json.JSONDecodeError)):
                what, code = "JSON", "INVALID_JSON"
            raise IronflowError(f"the body is no {what}: {why}", 400, code) from None
        expect(job.run.function_id in self._functions, 404, "FUNCTION_NOT_FOUND",
               f"no function {job.run.function_id!r} is here, but "
               f"{', '.join(self._functions)}; register it for its own endpoint")
        return job

    async def _outcome(self, job: Job) -> str:
        execution = Execution(job, None, self._publish)
        try:
            await execution.play(self._functions, asyncio.Semaphore(THREADS))
        except asyncio.CancelledError:
            execution.judge(HUNG_UP)        # a plain handler ends at its next step
            raise
        end = execution.end
        if "output" in end:
            end["result"] = end.pop("output")
        return f'{encode(end)[:-1]},"steps":[{",".join(execution.rows)}]}}'

def expect(fine: object, status: int, code: str, sentence: str) -> None:
    if not fine:
        raise IronflowError(sentence, status, code)

def verify(signature: str, key: str, body: bytes) -> None:
    """Check that the header's `t` and one of its `v1` sign this body, now."""
    parts = [part.strip().partition("=") for part in signature.split(",")]
    at = {name: value for name, _, value in parts}.get("t", "")
    given = [value.encode() for name, _, value in parts if name == "v1"]
    expect(given, 401, "SIGNATURE_MISSING", "X-Ironflow-Signature has no v1=; start "
           "the server with the IRONFLOW_SIGNING_KEY of this endpoint")
    right = hmac.new(key.encode(), f"{at}.".encode() + body, sha256).hexdigest()
    same = sum(hmac.compare_digest(right.encode(), one) for one in given)
    expect(same and at.isdecimal(), 401, "SIGNATURE_INVALID", "the signature is wrong; "
           "have both sides the same key, and is the body as it came?")
    expect(abs(now().timestamp() - int(at)) <= REPLAY_S, 401, "SIGNATURE_INVALID",
           f"signed over {REPLAY_S} s from now; an old request, or a clock that is off")

def pushed(body: Any) -> Job:
    """The job of a posted run. Raises for what is none, as Job does."""
    check(isinstance(body, dict), "it is not an object")
    body = {"steps": [], **body}
    for name, kind in {"run_id": str, "function_id": str, "attempt": int,
                       "event": dict, "steps": list}.items():
        check(type(body.get(name)) is kind and (body[name] or kind is list),
              f"{name} must be a {kind.__name__}, and not {body.get(name)!r:.60}")
    for name in ("id", "name", "data", "timestamp"):
        check(name in body["event"], f"its event has no {name}")
    rows = [{**row, "step_id": row["id"], "output": row.get("output"),
             "status": row["status"].replace("timed_out", "failed"),
             "error": child_error(row)} for row in body["steps"]]
    return Job(body | {"completed_steps": rows, "context": body, "job_id": "",
                       "execution_seq": 0, "lease_token": ""})

def child_error(row: dict[str, Any]) -> dict[str, Any]:
    """What InvokeError takes, of a child that failed: it comes as text that is JSON."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return {"status": row["status"], **json.loads(row["error"])}
    return {"status": row["status"], "cause": str(row.get("error") or "")}

def alone(work: abc.Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop of its own, in a thread of its own: wherever we are."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, asyncio.run, work).result()

def handle(functions: Sequence[Function], *, method: str, path: str = "/",
           headers: Mapping[str, str], body: bytes | str,
           signing_key: str | None = None, server_url: str | None = None,
           api_key: str | None = None) -> Answer:
    """Answer one post of a server: status, headers, body. For any framework, or none
    (AWS Lambda). Blocks until the handler ends, sleeps or waits; any path will do.
    - `signing_key`, else IRONFLOW_SIGNING_KEY: only what is signed with it is answered,
      for 300 s. Without any, whoever can reach the endpoint can run its functions.
    - `body`: the very bytes that came, for they were signed.
    - `server_url`, `api_key`: for `ctx.step.publish`, as of a Client."""
    endpoint = Endpoint(functions, signing_key, server_url, api_key)
    known = {name.lower(): value for name, value in dict(headers).items()}
    content = body.encode() if isinstance(body, str) else bytes(body)
    return alone(endpoint.answer(
        method.upper(), known.get("x-ironflow-signature"), content))

def serve(functions: Sequence[Function], *, signing_key: str | None = None,
          server_url: str | None = None, api_key: str | None = None
          ) -> Callable[[Any, Any, Any], abc.Coroutine[Any, Any, None]]:
    """An ASGI app that answers as `handle` does, to be mounted or run alone. Async
    handlers share its loop, plain ones have threads. When the server hangs up, async
    handlers are cancelled, plain ones end at their next step."""
    endpoint = Endpoint(functions, signing_key, server_url, api_key)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        check(scope["type"] == "http", f"ironflow serves http, not {scope['type']}")
        body, more = bytearray(), True
        while more and len(body) <= MAX_PUSH:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        signature = dict(scope["headers"]).get(b"x-ironflow-signature", b"")
        answering = asyncio.create_task(endpoint.answer(
            scope["method"], signature.decode("latin-1"), bytes(body)))
        leaving = asyncio.create_task(receive())
        try:
            await asyncio.wait([answering, leaving], return_when="FIRST_COMPLETED")
            if answering.done() or leaving.result()["type"] != "http.disconnect":
                status, headers, content = await answering
                lines = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
                await send({"type": "http.response.start", "status": status,
                            "headers": lines})
                await send({"type": "http.response.body", "body": content})
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.wait([answering, leaving])

    return app

def serve_wsgi(functions: Sequence[Function], *, signing_key: str | None = None,
               server_url: str | None = None, api_key: str | None = None
               ) -> Callable[[dict[str, Any], Any], list[bytes]]:
    """A WSGI app that answers as `handle` does, to be mounted or run alone."""
    endpoint = Endpoint(functions, signing_key, server_url, api_key)

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        length = environ.get("CONTENT_LENGTH") or ""
        if not length.isdecimal():          # in chunks, if the gateway knows their end
            length = MAX_PUSH + 1 if environ.get("wsgi.input_terminated") else 0
        body = environ["wsgi.input"].read(min(int(length), MAX_PUSH + 1))
        status, headers, content = alone(endpoint.answer(
            environ["REQUEST_METHOD"], environ.get("HTTP_X_IRONFLOW_SIGNATURE"), body))
        start_response(f"{status} {http.client.responses[status]}", [*headers.items()])
        return [content]

    return app

def register(functions: Sequence[Function], *, endpoint_url: str,
             server_url: str | None = None, api_key: str | None = None) -> list[Row]:
    """`Client.register`: have the runs of these functions posted to an endpoint."""
    with Client(server_url, api_key) as client:
        return client.register(functions, endpoint_url=endpoint_url)

# ======================================================================================
# 11. Subscriptions
# ======================================================================================
# Each has a connection, and a task that reads it a little ahead of the caller and no
# further: the rest waits in the server's journal. When the connection breaks, the next
# one is asked for what comes after the last event that we have. Not so for a group: it
# knows itself what is open, and gives it to whoever is there.

Hearer = Callable[[T], Any]             # a function, async or not
NOTICES = ("REPLAY_CUT", "MESSAGES_DROPPED")    # after these the stream goes on
BROKEN = (OSError, EOFError, ValueError, LookupError, asyncio.LimitOverrunError)

class Patterns:
    """Patterns for `subscribe`; `*` is one segment of a topic, `>` all that follow."""

    all_runs = staticmethod(lambda: "system.run.>")
    run = staticmethod(lambda run_id: f"system.run.{run_id}.>")
    run_lifecycle = staticmethod(lambda run_id: f"system.run.{run_id}.*")
    run_steps = staticmethod(lambda run_id: f"system.run.{run_id}.step.>")
    all_functions = staticmethod(lambda: "system.function.>")
    function = staticmethod(lambda function_id: f"system.function.{function_id}.>")
    user_event = staticmethod(lambda event_name: f"events:{event_name}")
    all_user_events = staticmethod(lambda: "events:>")
    all_secrets = staticmethod(lambda: "system.secret.*")
    secret = staticmethod(lambda name: f"system.secret.{name}.*")
    secret_action = staticmethod(lambda action: f"system.secret.*.{action}")
    topic = staticmethod(lambda topic_pattern: f"topic:{topic_pattern}")
    all_topics = staticmethod(lambda: "topic:>")

@dataclass(frozen=True, slots=True)
class StreamEvent:
    """An event, a topic's message or a change of state, as a subscriber sees it;
    `topic` has its prefix, `sequence` is its place among all that was committed."""

    topic: str
    data: Any
    event_id: str
    sequence: int
    timestamp: datetime
    _feed: Feed | None = field(default=None, repr=False, compare=False)

    async def ack(self) -> None:
        """It is done: the group is not given it again."""
        await self._say("ack")

    async def nak(self, delay: Duration | None = None) -> None:
        """It is not: the group is given it again, after `delay` or its own delay."""
        await self._say("nak", delay)

    async def term(self) -> None:
        """It cannot be done: the group is not given it again."""
        await self._say("term")

    async def _say(self, word: str, delay: Duration | None = None) -> None:
        if self._feed is not None:          # else it is of no group: nothing to say
            check(self._feed.manual, f"{word} needs subscribe(..., ack='manual')")
            await self._feed.answer(self.event_id, word, delay)

class Subscription(abc.AsyncIterator[StreamEvent]):
    """What `subscribe` returns: an async iterator and context manager, or the handle of
    an `on_event`. Cancelling `anext` loses nothing; one that is forgotten ends."""

    def __init__(self, feed: Feed, on_event: Hearer[StreamEvent] | None,
                 on_error: Hearer[Exception] | None) -> None:
        self._feed, self._tasks = feed, {feed.task}
        self._last: StreamEvent | None = None
        if on_event is None:
            loop = asyncio.get_running_loop()
            weakref.finalize(self, from_thread, loop, feed.task.cancel)
        else:
            on_error = on_error or functools.partial(log.error, "a subscription: %s")
            self._tasks.add(asyncio.create_task(self._hand_out(on_event, on_error)))

    async def __anext__(self) -> StreamEvent:
        await self._done("ack")
        self._last = await self._feed.next()
        return self._last

    async def _done(self, word: str) -> None:
        if self._feed.auto and self._last is not None:
            await self._feed.answer(self._last.event_id, word)
        self._last = None

    async def __aenter__(self) -> Self:
        await self._feed.until(lambda: self._feed.live)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.unsubscribe()

    async def unsubscribe(self) -> None:
        """End it, and an `on_event` that is at work, unless that is who calls this."""
        tasks = {each for each in self._tasks if not each.done()}
        tasks -= {asyncio.current_task()}
        for each in tasks:
            each.cancel()
        if tasks:
            await asyncio.wait(tasks)

    aclose = unsubscribe

    async def _hand_out(self, on_event: Hearer[StreamEvent],
                        on_error: Hearer[Exception]) -> None:
        try:
            async for event in self:
                try:
                    await called(on_event, event)
                except Exception as error:
                    await self._done("nak")
                    await called(on_error, error)
        except Exception as error:
            await called(on_error, error)

class Feed:
    """What the server sends for one subscription, over one connection after another."""

    def __init__(self, client: AsyncClient, pattern: str, group: str | None,
                 manual: bool, options: dict[str, Any]) -> None:
        self._client, self._address = client, client._address
        self._pattern, self._group, self._options = pattern, group, options
        self.manual, self.auto = manual, bool(group) and not manual
        self._cursor = -1                   # the sequence up to which we have all
        self._ahead = deque[tuple[int, StreamEvent]]()      # with its size
        self._size = 0
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._socket: Any = None            # if it is a WebSocket
        self._delays = backoff()
        self.live = False
        self.task = asyncio.create_task(self._run(), name=f"subscribe {pattern}")
        self.task.add_done_callback(lambda _: self._news.set())

    async def until(self, look: Callable[[], Any]) -> None:
        """Wait for it. Raises a refusal, or StopAsyncIteration if this was closed."""
        while self.task.cancelled() or not look():
            if self.task.cancelled():
                raise StopAsyncIteration
            if self.task.done():
                self.task.result()          # raises
            self._news.clear()
            await self._news.wait()

    async def next(self) -> StreamEvent:
        await self.until(lambda: self._ahead)
        size, event = self._ahead.popleft()
        self._size -= size
        self._room.set()
        return event

    async def answer(self, event_id: str, word: str, delay: Duration | None = None
                     ) -> None:
        """Say what became of a group's event, late if need be. If the server does not
        hear it, it gives the event out again."""
        body: dict[str, Any] = {"type": "ack", "groupName": self._group,
                                "eventId": event_id, "ackType": word}
        if delay is not None:
            body["redeliverDelay"] = _ms(delay, "delay")
        try:
            if self._socket is not None:
                await self._socket.send_json(body)
            else:
                await self._client._send("POST", f"{PUBSUB}AckEvent", body)
        except (IronflowError, ConnectionError) as error:
            if not getattr(error, "retryable", True):
                raise

    async def _run(self) -> None:
        """Listen, again and again; ends with what a further try would not mend."""
        lost = False
        while True:
            try:
                await self._listen()
            except (IronflowError, *BROKEN) as error:
                if not getattr(error, "retryable", True):
                    raise
                if self.live or not lost:   # the first of this outage
                    log.warning("%s: no stream from %s (%r); trying until it is back",
                                self._pattern, self._address.url, error)
            self.live, lost = False, True
            if self._group:                 # the server gives to others what we have
                self._ahead.clear()
                self._size = 0
            await asyncio.sleep(next(self._delays))

    async def _listen(self) -> None:
        """By WebSocket; or by plain HTTP, if there is no aiohttp or the upgrade is
        refused: by a proxy that knows none, or by the server, which says why there."""
        try:
            import aiohttp  # only here: all else works without
        except ImportError:
            return await self._server_sent()
        try:
            await self._websocket(aiohttp)
        except aiohttp.WSServerHandshakeError:
            await self._server_sent()
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error

    async def _websocket(self, aiohttp: Any) -> None:
        headers = dict(line.split(": ", 1) for line in self._address.head.splitlines())
        async with aiohttp.ClientSession() as session:
            async with asyncio.timeout(ANSWER_S):
                socket = await session.ws_connect(
                    f"{self._address.url}/ws", headers=headers, max_msg_size=0)
            try:
                options = self._wanted() | {"includeMetadata": True}
                await socket.send_json({"type": "subscribe", "subscription": {
                    "pattern": self._pattern, "options": options}})
                self._socket = socket
                while (frame := await socket.receive(SILENCE_S)).type.name == "TEXT":
                    await self._hear(json.loads(frame.data), len(frame.data))
                raise ConnectionError(f"closed with {socket.close_code}")
            finally:
                self._socket = None
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(socket.close(), FAREWELL_S)

    async def _hear(self, told: dict[str, Any], size: int) -> None:
        if told["type"] == "event":
            return await self._take(told | told["meta"], size)
        told = told.get("results", [told])[0]
        if told.get("status") != "ok":
            return self._complain(told)
        self._subscribed(told.get("sequence", -1))

    async def _server_sent(self) -> None:
        address = self._address
        query = urlencode({"pattern": self._pattern, **self._wanted()})
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=address.tls or None)
        try:
            writer.write(f"GET {address.base}/api/v1/stream?{query} HTTP/1.0\r\n"
                         f"{address.head}\r\n".encode())      # 1.0: not in chunks
            async with asyncio.timeout(ANSWER_S):
                head = await reader.readuntil(b"\r\n\r\n")
                if (status := int(head.split()[1])) != 200:
                    answer = _body(status, await reader.read())
                    raise Reply(status, answer).error(f"subscribe {self._pattern!r}")
            if self._group:                 # its stream begins with an event
                self._subscribed(-1)
            await self._read(reader)
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Server-sent events. One without data says what we have."""
        rest, fields = b"", dict[str, str]()
        while True:
            async with asyncio.timeout(SILENCE_S):
                part = await reader.read(1 << 16)
            if not part:
                raise ConnectionError("the stream ended")
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                name, _, value = line.decode().rstrip("\r").partition(": ")
                if name or value:           # value alone: a comment
                    fields[name] = value
                    continue
                if (text := fields.get("data")) is None:
                    self._subscribed(int(fields.get("id", -1)))
                elif fields.get("event") == "ironflow.error":
                    self._complain(json.loads(text))
                else:
                    await self._take(json.loads(text), len(text))
                fields = {}

    def _wanted(self) -> dict[str, Any]:
        """The options now, by the protocol's names, which both doors know."""
        if self._cursor >= 0:
            self._options |= {"startAfterSequence": self._cursor, "replay": None}
        return {name: one for name, one in self._options.items() if one is not None}

    def _complain(self, told: Mapping[str, Any]) -> None:
        """Log what the server says besides. Raises what ends the subscription."""
        code, sentence = told["code"], f"subscribe {self._pattern!r}: {told['message']}"
        if code in NOTICES or (self.live and told.get("type") == "error"):
            return log.warning("%s", sentence)
        word = re.sub("^invalid_.*", "invalid_argument", code.lower())
        raise IronflowError(sentence, 0, word, word == "internal_error")

    def _subscribed(self, sequence: int) -> None:
        """The server lets us in, and says from where on we shall be told."""
        self._cursor = max(self._cursor, sequence)
        self.live = True
        self._news.set()

    async def _take(self, row: Mapping[str, Any], size: int) -> None:
        """Keep an event for the caller; wait for him if that makes too many."""
        sequence = int(row["sequence"])
        if not self._group:
            self._cursor = sequence
        event = StreamEvent(row["topic"], row.get("data"), row["eventId"], sequence,
                            instant(row["timestamp"], "timestamp"),
                            self if self._group else None)
        self._delays = backoff()
        self._ahead.append((size + 500, event))     # with the objects, by and large
        self._size += size + 500
        self._news.set()
        while self._size > READ_AHEAD:
            self._room.clear()
            await self._room.wait()

# ======================================================================================
# 12. Without a server
# ======================================================================================
# An execution as a worker has it; but its updates end in a dict, and its answer is yes.

def run_inline(function: Function, event: Any = None, *,
               steps: Mapping[str, Any] | None = None,
               events: Mapping[str, Any] | None = None,
               functions: Sequence[Function] = (),
               secrets: Mapping[str, str] | None = None, attempts: int = 1) -> Run:
    """Run a function here and now, without a server; for unit tests and lessons.
    - `event`: an Event; its name; a mapping with `name` and `data`; anything else is
      data, as if the function was invoked with it.
    - `steps`: results of steps, by name or id, or functions to be called instead of
      theirs, which may raise; of a child, by its id: that is given the child's input.
    - `events`: what waits get, by the wait's or the event's name: an event, data, or a
      list of those, in order. A wait without one fails the run, with WAIT_TIMEOUT.
    - `functions`: children that are really run, inline, with the same arguments.
    - `secrets`: `ctx.secrets`.
    - `attempts`: how often the handler may fail; nobody waits between two attempts.
    Returns status (completed or failed), output, error, attempt, and in `steps` the
    recorded StepRows. Sleeps are recorded and skipped, messages recorded and not sent.
    The run's id is "run_inline". Blocks; may be called where an event loop runs."""
    if isinstance(event, str):
        event = {"name": event, "data": None}
    given = {"steps": steps or {}, "events": events or {}, "functions": functions,
             "secrets": secrets or {}, "attempts": attempts}
    return alone(Inline(function, given).play(inline_event(event, function.id)))

class Inline:
    """What a server is to a worker, for one `run_inline`."""

    def __init__(self, function: Function, given: dict[str, Any]) -> None:
        self.function, self.given = function, given
        self.stand_ins = {key: one if callable(one) else (lambda *_, one=one: one)
                          for key, one in given["steps"].items()}
        self.mail = {name: list(one) if isinstance(one, list) else [one]
                     for name, one in given["events"].items()}
        self.kept, self.attempt = dict[str, StepRow](), 1

    async def play(self, event: dict[str, Any]) -> Run:
        threads, most = asyncio.Semaphore(THREADS), self.given["attempts"]
        while True:
            known = [row for row in self.kept.values() if row.status == "completed"
                     or row.step_type == "invoke_function"]
            execution = Execution(Job({
                "run_id": "run_inline", "function_id": self.function.id, "event": event,
                "job_id": "", "execution_seq": 1, "lease_token": "",
                "max_attempts": most, "on_exhausted": "fail", "attempt": self.attempt,
                "completed_steps": known, "context": {"secrets": self.given["secrets"]},
            }), None, self.publish, 0, self.stand_ins)
            await execution.play({self.function.id: self.function}, threads)
            for text in execution.rows:
                self.keep(json.loads(text))
            end = execution.end
            blocks = [end["yield"], *end["yields"]] if "yield" in end else []
            for row in [await self.answer(block) for block in blocks]:
                self.keep(row)
                if row["status"] == "timed_out":
                    end = {"status": "failed", "error": row["error"]}
            error = end.get("error")
            if error and error.pop("retryable") and self.attempt < most:
                self.attempt += 1
            elif end["status"] != "yielded":
                return Run(id="run_inline", function_id=self.function.id, error=error,
                           status=end["status"], output=end.get("output"),
                           attempt=self.attempt, steps=list(self.kept.values()))

    def keep(self, row: dict[str, Any]) -> None:
        old = self.kept.get(row["id"], {"sequence": len(self.kept)})
        self.kept[row["id"]] = StepRow(
            row, step_id=row["id"], step_type=row["type"], run_id="run_inline",
            sequence=old["sequence"], attempt=self.attempt, output=row.get("output"))

    def publish(self, topic: str, data: Any, key: str) -> dict[str, Any]:
        return {"eventId": "evt_inline", "sequence": len(self.kept)}

    async def answer(self, block: dict[str, Any]) -> dict[str, Any]:
        """The row that a server would have, sooner or later, for such a yield."""
        kind, name = block["type"].removesuffix("_async"), block["step_name"]
        row = {"id": block["step_id"], "name": name, "type": kind}
        output, error = None, dict[str, Any]()
        if kind == "wait_for_event":
            wanted = block["event_filter"]["event"]
            if queue := self.mail.get(name) or self.mail.get(wanted):
                output = inline_event(queue.pop(0), wanted)
            else:
                return row | {"status": "timed_out", "error": {
                    "message": f"step {name!r} was given no event {wanted!r}",
                    "code": "WAIT_TIMEOUT", "retryable": False}}
        elif kind == "invoke_function":
            try:
                output = await self.invoke(row["id"], name, block["input"])
            except Exception as raised:
                missing = getattr(raised, "code", "") == "INVOKE_NOT_FOUND"
                error = {"cause": message_of(raised),
                         "status": "not_found" if missing else "failed"}
        if kind != block["type"]:           # nobody waits for what becomes of it
            output, error = {"run_id": "run_inline"}, {}
        return row | {"status": "failed" if error else "completed", "output": output,
                      "error": error or None, "sleep_until": block.get("until")}

    async def invoke(self, step_id: str, child: str, input: Any) -> Any:
        """The output of a child. Raises what its stand-in raises, or RuntimeError."""
        stand_in = self.stand_ins.get(step_id, self.stand_ins.get(child))
        if stand_in is not None:
            return json_copy(await called(stand_in, input), f"the output of {child!r}")
        function = {one.id: one for one in self.given["functions"]}.get(child)
        if function is None:
            raise InvokeError(child, status="not_found")
        event = {"name": child, "data": input}
        run = await in_thread(lambda: run_inline(function, event, **self.given), child)
        if run.status != "completed":
            raise RuntimeError(run.error["message"])
        return run.output

def inline_event(event: Any, name: str) -> dict[str, Any]:
    """An event, or data, as the event of that name that a server would keep."""
    body = {"name": name, "data": event}
    if isinstance(event, Event):
        body = {key: one for key, one in asdict(event).items() if one is not None}
        body["timestamp"] = rfc3339(event.timestamp)
    elif isinstance(event, Mapping) and event.keys() >= body.keys():
        body = dict(event)
    about = {"id": "evt_inline", "timestamp": rfc3339(now())}
    return dict(json_copy(about | body, "the event"))
