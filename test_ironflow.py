"""What ironflow.py promises, as sentences. Each test says one; it runs against a real
server process on a real port with a real SQLite file, and nothing of ours is mocked.

    python -m pytest                                   all of it

Kill tests prove that a crash of the process loses nothing; they cannot cut the power.
"""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import copy
import gzip
import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import ironflow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
DEADLINE_S = 60.0  # for what takes milliseconds: only a hang or a loss is that slow
T = TypeVar("T")


# ======================================================================================
# A real server, and how to talk to it
# ======================================================================================


class RunningServer:
    """`python ironflow.py` as a process of its own, on a free port, with its own file.

    `start` again after `kill` or `stop` serves the same file on the same port.
    """

    def __init__(self, db: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.db = db
        self.port = 0
        self.flags = flags
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("IRONFLOW_")}
        self.env |= env or {}
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What the server wrote to stderr, over all its lives."""
        return self.db.with_suffix(".log").read_text()

    def start(self) -> RunningServer:
        command = [sys.executable, str(HERE / "ironflow.py"), "--port", str(self.port)]
        command += ["--db", str(self.db), *self.flags]
        with self.db.with_suffix(".log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=self.env
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, f"no ready line but {line!r}; stderr: {self.log}"
        self.port = int(found[1])
        return self

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        status = process.wait(DEADLINE_S)
        assert process.stdout is not None
        process.stdout.close()
        return status

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """One request: the status and what the JSON of the answer holds.

        A body of bytes goes out as it is, anything else as JSON.
        """
        connection = self.connection()
        with contextlib.closing(connection):
            payload = body if isinstance(body, bytes | None) else json.dumps(body)
            connection.request(method, path, payload, headers or {})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None

    def yes(self, method: str, path: str, body: Any = None) -> Any:
        """The answer to a request that has to succeed."""
        status, answer = self.call(method, path, body)
        assert status in (200, 204), f"{method} {path}: {status} {answer}"
        return answer

    def rpc(self, method: str, body: Any) -> Any:
        return self.yes("POST", f"/ironflow.v1.IronflowService/{method}", body)

    def rows(self, sql: str, *params: Any) -> list[Any]:
        """What the file holds, read as a curious user would: with sqlite3."""
        with contextlib.closing(sqlite3.connect(self.db, timeout=DEADLINE_S)) as db:
            return db.execute(sql, params).fetchall()

    # A worker's side of the wire, by hand

    def register(self, function_id: str = "f", event: str = "order.placed", **config: Any) -> Any:
        body = {"id": function_id, "triggers": [{"event": event}], "preferredMode": "pull"}
        return self.rpc("RegisterFunction", body | config)

    def join(self, worker_id: str = "w", *function_ids: str) -> None:
        path = f"/api/v1/workers/{worker_id}/register"
        self.yes("POST", path, {"function_ids": list(function_ids) or ["f"]})

    def emit(self, name: str = "order.placed", data: Any = None, **more: Any) -> Any:
        return self.yes("POST", "/api/v1/events", {"name": name, "data": data or {}} | more)

    def poll(self, worker_id: str = "w", available: int = 1, wait: int = 20) -> list[Any]:
        path = f"/api/v1/workers/{worker_id}/jobs?available={available}&wait={wait}"
        answer = self.yes("GET", path)
        return answer["jobs"] if answer else []

    def job(self, worker_id: str = "w") -> Any:
        """The one job that has to come."""
        (job,) = self.poll(worker_id)
        return job

    def tell(self, job: Any, status: str, worker_id: str = "w", **more: Any) -> tuple[int, Any]:
        """Report on a job; `status` may be `ack`."""
        path = f"/api/v1/workers/{worker_id}/jobs/{job['job_id']}"
        fence = {"execution_seq": job["execution_seq"], "lease_token": job["lease_token"]}
        if status == "ack":
            return self.call("PUT", f"{path}/ack", {"run_id": job["run_id"]} | fence)
        return self.call("PUT", path, {"status": status} | fence | more)

    def run(self, run_id: str) -> Any:
        return self.yes("GET", f"/api/v1/runs/{run_id}")

    def steps(self, run_id: str) -> list[Any]:
        return self.yes("GET", f"/api/v1/runs/{run_id}/steps")["steps"]

    def run_becomes(self, run_id: str, *statuses: str) -> Any:
        """The run, once its status is one of those."""
        return eventually(lambda: (run := self.run(run_id))["status"] in statuses and run)


def eventually(look: Callable[[], T | bool | None]) -> T:
    """What `look` returns once it is true. Awaits a state, never a length of time."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        found = look()
        if found:
            return found  # type: ignore[return-value]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@contextlib.contextmanager
def serve(
    folder: Path, *flags: str, env: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    """A server on a journal of its own in `folder`; stopped, and seen to stop cleanly."""
    server = RunningServer(folder / "journal.db", *flags, env=env).start()
    try:
        yield server
    except BaseException:
        server.kill()
        print(server.log)
        raise
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serve(tmp_path) as running:
        yield running


def step(job: Any, name: str, output: Any = None, index: int = 0, **more: Any) -> dict[str, Any]:
    """A finished step, as an SDK reports it."""
    row = {"id": f"{job['run_id']}:{name}:{index}", "name": name, "type": "invoke"}
    return row | {"status": "completed", "output": output} | more


# ======================================================================================
# Start and stop
# ======================================================================================


def refusal(db: Path, *flags: str, prelude: str = "pass", **env: str) -> str:
    """What a server that cannot start says on stderr; it ends with exit status 2.

    `prelude` runs in the same process before ironflow.py does.
    """
    program = (f"import runpy, sys; {prelude}; sys.argv = sys.argv[1:];"
               "runpy.run_path(sys.argv[0], run_name='__main__')")
    command = [sys.executable, "-c", program, str(HERE / "ironflow.py"), "--port", "0"]
    done = subprocess.run(
        [*command, "--db", str(db), *flags], env=RunningServer(db, env=env).env,
        capture_output=True, text=True, timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@contextlib.contextmanager
def held_poll(
    server: RunningServer, worker_id: str = "w"
) -> Iterator[http.client.HTTPConnection]:
    """A poll that the server has in its hands and did not answer yet."""

    def last_seen() -> str:
        workers = server.yes("GET", "/api/v1/workers")["workers"]
        return str(next(w["last_heartbeat"] for w in workers if w["id"] == worker_id))

    before = last_seen()
    eventually(lambda: ironflow.to_rfc3339(time.time()) > before)
    with contextlib.closing(server.connection()) as poll:
        poll.request("GET", f"/api/v1/workers/{worker_id}/jobs?available=1&wait=25")
        eventually(lambda: last_seen() > before)
        yield poll


@pytest.mark.parametrize("command", [[], ["serve"]], ids=["", "serve"])
def test_the_ready_line_names_address_and_file(tmp_path: Path, command: list[str]) -> None:
    db = str(tmp_path / "my.db")
    program = [sys.executable, str(HERE / "ironflow.py"), *command, "--port", "0", "--db", db]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
        assert process.stdout.read() == ""  # it is the only one
    assert re.search(r" http://127\.0\.0\.1:[1-9]\d+\b", line)
    assert db in line


def test_both_loopback_addresses_answer_on_one_port(shared: RunningServer) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with urllib.request.urlopen(f"http://[::1]:{shared.port}/health") as answer:
        assert json.load(answer)["status"] == "ok"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_held_polls_and_ends_with_0(
    server: RunningServer, number: int
) -> None:
    server.join()
    with held_poll(server) as poll:
        assert server.process is not None
        server.process.send_signal(number)
        assert poll.getresponse().status == 204
    assert server.process.wait(DEADLINE_S) == 0


def test_a_clean_stop_leaves_one_file_with_everything_in_it(server: RunningServer) -> None:
    event = server.emit()
    assert server.stop() == 0
    log = Path(f"{server.db}-wal")
    assert not log.exists() or log.stat().st_size == 0
    alone = sqlite3.connect(f"{server.db.as_uri()}?immutable=1", uri=True)  # sees no log
    with contextlib.closing(alone) as db:
        assert db.execute("SELECT event_id FROM journal").fetchall() == [(event["id"],)]


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    server = RunningServer(tmp_path / "journal.db").start()
    server.join()
    process = server.process
    assert process is not None
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address) as half, held_poll(server) as poll:
        half.sendall(b"POST /api/v1/events HTTP/1.1\r\nHost: localhost\r\n")
        half.sendall(b"Content-Length: 99\r\n\r\n{")  # the rest never comes
        process.send_signal(signal.SIGTERM)
        assert poll.getresponse().status == 204
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == -signal.SIGTERM
    server.kill()


def test_a_second_server_on_the_same_file_is_refused(shared: RunningServer) -> None:
    assert "another ironflow serves" in refusal(shared.db)


def test_a_file_of_a_newer_ironflow_is_refused(server: RunningServer) -> None:
    server.stop()
    with contextlib.closing(sqlite3.connect(server.db)) as db:
        db.execute(f"PRAGMA user_version = {len(ironflow.MIGRATIONS) + 1}")
    assert "newer ironflow" in refusal(server.db)


def test_a_file_of_another_program_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.db"
    with contextlib.closing(sqlite3.connect(theirs)) as db:
        db.execute("CREATE TABLE photo (name TEXT)")
    before = theirs.read_bytes()
    assert "not an ironflow journal" in refusal(theirs)
    assert theirs.read_bytes() == before


def test_a_file_keeps_the_environment_it_was_made_for(tmp_path: Path) -> None:
    with serve(tmp_path, "--env", "blue"):
        pass
    assert "--env blue" in refusal(tmp_path / "journal.db", "--env", "green")


@pytest.mark.parametrize(("flags", "env", "word"), [
    ("--db {tmp}/notes.txt", {}, "notes.txt"),
    ("--db {tmp}/missing/x.db", {}, "missing"),
    ("--db {tmp}", {}, "cannot open"),
    ("--host 0.0.0.0", {}, "IRONFLOW_API_KEY"),
    ("--host ::", {}, "IRONFLOW_API_KEY"),
    ("--host nobody.invalid --dev", {}, "nobody.invalid"),
    ("--port {taken}", {}, "{taken}"),
    ("--port 65536", {}, "65536"),
    ("--port=-1", {}, "-1"),
    ("--lease-seconds 0", {}, "--lease-seconds"),
    ("--lease-seconds nan", {}, "--lease-seconds"),
    ("--max-steps 0", {}, "--max-steps"),
    ("", {"IRONFLOW_LEASE_SECONDS": "soon"}, "soon"),
    ("", {"LOG_LEVEL": "noisy"}, "noisy"),
])
def test_what_it_cannot_start_with_is_a_sentence(
    shared: RunningServer, tmp_path: Path, flags: str, env: dict[str, str], word: str
) -> None:
    (tmp_path / "notes.txt").write_text("no database, " * 100)
    names = {"tmp": tmp_path, "taken": shared.port}
    said = refusal(tmp_path / "j.db", *flags.format(**names).split(), **env)
    assert word.format(**names) in said.splitlines()[-1]


@pytest.mark.parametrize(("prelude", "words"), [
    ("sys.modules['aiohttp'] = None", ["pip install aiohttp", "uv run"]),
    ("import sqlite3; sqlite3.sqlite_version_info = (3, 36, 0)", ["SQLite 3.37"]),
])
def test_what_this_python_lacks_is_said_in_one_sentence(
    tmp_path: Path, prelude: str, words: list[str]
) -> None:
    said = refusal(tmp_path / "j.db", prelude=prelude)
    assert len(said.splitlines()) == 1
    assert all(word in said for word in words)


@pytest.mark.parametrize(("flags", "served"), [([], "blue"), (["--env", "red"], "red")])
def test_a_flag_beats_a_variable(tmp_path: Path, flags: list[str], served: str) -> None:
    with serve(tmp_path, *flags, env={"IRONFLOW_ENV": "blue"}) as server:
        for name in "blue", "red":
            found, _ = server.call("GET", "/health", None, {"X-Ironflow-Environment": name})
            assert found == (200 if name == served else 400)


def test_the_script_header_asks_for_what_setup_cfg_asks_for() -> None:
    source = (HERE / "ironflow.py").read_text()
    header = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", source)
    assert header
    script = tomllib.loads(header[1].replace("# ", ""))
    setup = configparser.ConfigParser()
    setup.read(HERE / "setup.cfg")
    assert script["dependencies"] == setup["options"]["install_requires"].split()
    assert script["requires-python"] == setup["options"]["python_requires"]


def test_a_program_can_start_a_server_inside_itself(tmp_path: Path) -> None:
    def health(url: str) -> Any:
        with urllib.request.urlopen(f"{url}/health") as answer:
            return json.load(answer)["status"]

    async def program() -> str:
        async with ironflow.Server(db=tmp_path / "orders.db", port=0) as server:
            assert await asyncio.to_thread(health, server.url) == "ok"
            return server.url

    url = asyncio.run(program())
    with pytest.raises(OSError, match="refused"):
        health(url)


# ======================================================================================
# Who may ask
# ======================================================================================

FLAGS = """
    --lease-seconds 3600 --allow-host box.lan --cors-origin https://app.example
    --max-event-bytes 100000 --max-step-bytes 100000 --max-body-bytes 2000000 --max-steps 20
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that do not mind company: each uses names of its own."""
    with serve(tmp_path_factory.mktemp("shared"), *FLAGS.split()) as running:
        running.join("w", "nothing")
        yield running


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    env = {"IRONFLOW_API_KEY": "ifkey_1"}
    with serve(tmp_path_factory.mktemp("keyed"), env=env) as running:
        yield running


def ask(
    server: RunningServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Status, headers in lower case and JSON of an answer; `A_b=` is the header `A-b`."""
    with contextlib.closing(server.connection()) as line:
        line.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = line.getresponse()
        found = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, found, json.loads(answer.read() or b"null")


def code(answer: tuple[int, Any]) -> tuple[int, Any]:
    return answer[0], answer[1].get("code")


INVALID = (400, "invalid_argument")
UNKNOWN = (404, "not_found")
GOOD_HOSTS = ["localhost", "LocalHost:9123", "app.localhost", "127.0.0.1:80", "127.9.9.9",
              "[::1]:9123", "box.lan:9123"]
BAD_HOSTS = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7",
             "lan", "", "[::1", "\xff\xfe"]


@pytest.mark.parametrize("host", [*GOOD_HOSTS, *BAD_HOSTS])
def test_without_a_key_only_known_hosts_are_served(shared: RunningServer, host: str) -> None:
    for method, path in ("GET", "/health"), ("GET", "/nowhere"), ("OPTIONS", "/health"):
        status, _, body = ask(shared, method, path, Host=host)
        assert (status == 403) == (host in BAD_HOSTS)
        assert status != 403 or body["code"] == "permission_denied"


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://127.0.0.1",
                                    "http://[::1]:5173", "https://app.example"])
def test_known_origins_may_call(shared: RunningServer, origin: str) -> None:
    status, headers, _ = ask(shared, "GET", "/health", Origin=origin)
    assert (status, headers["access-control-allow-origin"]) == (200, origin)


@pytest.mark.parametrize("origin", ["null", "file://", "localhost", "http://app.example",
                                    "https://app.example.evil.example", "https://evil.example"])
def test_without_a_key_other_origins_may_not_call(shared: RunningServer, origin: str) -> None:
    status, headers, _ = ask(shared, "GET", "/health", Origin=origin)
    assert status == 403
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/ironflow.v1.X/Y", "/api/v1/events"])
def test_a_preflight_is_answered_on_every_path(shared: RunningServer, path: str) -> None:
    status, headers, _ = ask(shared, "OPTIONS", path, Origin="http://localhost:3000")
    assert (status, headers["access-control-allow-origin"]) == (204, "http://localhost:3000")
    assert "PATCH" in headers["access-control-allow-methods"]
    assert "X-Ironflow-Environment-ID" in headers["access-control-allow-headers"]
    assert "Ironflow-Poll-Wait" in headers["access-control-expose-headers"]


def test_errors_carry_cors_headers_too(shared: RunningServer) -> None:
    status, headers, _ = ask(shared, "POST", "/api/v1/events", b"{", Origin="http://localhost")
    assert (status, headers["access-control-allow-origin"]) == (400, "http://localhost")


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer ", "Bearer ifkey_2", "Bearer ifkey_11",
                                 "Basic ifkey_1", "ifkey_1", "Bearer \xff", None])
def test_with_a_key_nobody_else_is_served(keyed: RunningServer, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": key}
    for path in "/api/v1/runs", "/nowhere":
        answer = keyed.call("GET", path, headers=headers)
        assert code(answer) == (401, "unauthenticated")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_a_key_any_host_and_origin_are_served(keyed: RunningServer, scheme: str) -> None:
    who = {"Host": "box.example", "Origin": "https://any.example"}
    who["Authorization"] = f"{scheme} ifkey_1"
    status, headers, _ = ask(keyed, "GET", "/api/v1/runs", None, **who)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://any.example")


@pytest.mark.parametrize("path", ["/health", "/ready", "/api/v1/capabilities"])
def test_public_paths_need_no_key(keyed: RunningServer, path: str) -> None:
    keyed.yes("GET", path)


def test_dev_ignores_a_key_and_says_so_loudly(tmp_path: Path) -> None:
    with serve(tmp_path, "--dev", env={"IRONFLOW_API_KEY": "k"}) as server:
        status, headers, _ = ask(server, "GET", "/api/v1/runs", Host="box", Origin="https://a.b")
        assert (status, headers["access-control-allow-origin"]) == (200, "https://a.b")
        assert re.search("WARNING.*--dev.*IRONFLOW_API_KEY is ignored", server.log)


def test_any_address_can_be_bound_with_a_key_or_for_dev() -> None:
    for guard in ironflow.Guard(api_key="k"), ironflow.Guard(dev=True):
        (bound,) = ironflow.listen("0.0.0.0", 0, guard)
        bound.close()


@pytest.mark.parametrize("header", ["X-Ironflow-Environment", "X-Ironflow-Environment-ID"])
@pytest.mark.parametrize("name", ["default", "", "other", "\xff"])
def test_another_environment_is_refused_with_a_sentence(
    shared: RunningServer, header: str, name: str
) -> None:
    status, body = shared.call("GET", "/api/v1/runs", headers={header: name})
    assert status == (200 if name in ("default", "") else 400)
    assert status == 200 or ("'default'" in body["message"] and "--env" in body["message"])


# ======================================================================================
# Doors
# ======================================================================================

RPC = "/ironflow.v1.IronflowService/"
NUMBERS = count()


def new_name() -> str:
    """A name that no other test uses: of an event, a function, a worker."""
    return f"name-{next(NUMBERS)}"


def test_health_says_ok(shared: RunningServer) -> None:
    health = shared.yes("GET", "/health")
    assert (health["status"], health["version"]) == ("ok", ironflow.__version__)
    assert ironflow.from_rfc3339(health["timestamp"]) > 0


def test_ready_names_the_journal(shared: RunningServer) -> None:
    journal_id = shared.rows("SELECT value FROM meta WHERE name = 'journal_id'")[0][0]
    ready = {"status": "ready", "issues": [], "warnings": [], "journal": journal_id}
    assert shared.yes("GET", "/ready") == ready


def test_capabilities_list_only_what_is_built(
    shared: RunningServer, keyed: RunningServer
) -> None:
    for server, needs_key in (shared, False), (keyed, True):
        found = server.yes("GET", "/api/v1/capabilities")
        assert (found["transports"], found["features"]) == (["connectrpc"], [])
        assert found["auth_required"] is needs_key


@pytest.mark.parametrize(("door", "answer"), [
    ("GET /nowhere", UNKNOWN),
    ("GET /api/v1/nowhere", UNKNOWN),
    ("POST /api/v1/steps/patch", UNKNOWN),
    ("DELETE /api/v1/events", (405, "unimplemented")),
    ("POST /health", (405, "unimplemented")),
    ("POST /ironflow.v1.IronflowService/PauseRun", (501, "unimplemented")),
    ("POST /ironflow.v1.PubSubService/Subscribe", (501, "unimplemented")),
])
def test_a_door_that_is_not_there_answers_in_json(
    shared: RunningServer, door: str, answer: Any
) -> None:
    method, path = door.split()
    status, body = shared.call(method, path)
    assert code((status, body)) == answer
    assert path in body["message"]


def test_errors_have_two_shapes(shared: RunningServer) -> None:
    _, body = shared.call("POST", f"{RPC}GetRun", {"id": "run_x"})
    assert body == {"code": "not_found", "message": body["message"]}
    _, rest = shared.call("GET", "/api/v1/runs/run_x")
    assert rest == body | {"error": body["message"]}


@pytest.mark.parametrize("kind", ["application/proto", "application/connect+proto"])
def test_binary_protobuf_is_told_where_to_send_json(shared: RunningServer, kind: str) -> None:
    status, _, body = ask(shared, "POST", f"{RPC}Emit", b"\x0a\x01a", Content_Type=kind)
    assert code((status, body)) == (501, "unimplemented")
    assert "POST /api/v1/events" in body["message"]


# ======================================================================================
# Events
# ======================================================================================


def stored(server: RunningServer) -> int:
    """Rows that came of requests; those of timers do not count."""
    sql = "SELECT count(*) FROM journal WHERE kind <> 'worker' AND name <> 'updated'"
    return int(server.rows(sql)[0][0])


def test_an_event_is_on_disk_before_the_caller_hears_yes(server: RunningServer) -> None:
    event = server.emit(data={"total": 99.99})
    server.kill()
    found = server.rows("SELECT event_id, data FROM journal WHERE kind = 'event'")
    assert found == [(event["id"], '{"total":99.99}')]


def test_an_event_is_answered_under_every_spelling(shared: RunningServer) -> None:
    shared.register(name := new_name(), name)
    found = shared.emit(name)
    event_id, (run_id,) = found["event_id"], found["run_ids"]
    assert re.fullmatch("evt_[0-9a-z]{20}", event_id)
    assert re.fullmatch("run_[0-9a-z]{20}", run_id)
    assert found == {"event_id": event_id, "id": event_id, "run_ids": [run_id],
                     "eventId": event_id, "runIds": [run_id]}


@pytest.mark.parametrize("path", [f"{RPC}Trigger", f"{RPC}Emit",
                                  "/ironflow.v1.PubSubService/Emit"])
def test_connect_doors_take_events_too(shared: RunningServer, path: str) -> None:
    shared.register(name := new_name(), name)
    found = shared.yes("POST", path, {"event": name, "data": {"a": 1}, "namespace": "default"})
    assert sorted(found) == ["eventId", "runIds"]
    assert shared.run(found["runIds"][0])["input"] == {"a": 1}


def test_an_event_that_starts_nothing_has_no_runs(shared: RunningServer) -> None:
    assert shared.emit(new_name())["run_ids"] == []


def test_trigger_with_a_functions_id_starts_that_function(shared: RunningServer) -> None:
    shared.register(name := new_name(), event=f"other.{name}")
    run_ids = shared.rpc("Trigger", {"event": name, "data": {}})["runIds"]
    assert [shared.run(run_id)["function_id"] for run_id in run_ids] == [name]
    assert shared.rpc("Emit", {"event": name, "data": {}})["runIds"] == []


def test_an_array_is_answered_in_order(shared: RunningServer) -> None:
    shared.register(name := new_name(), name)
    events = [{"name": name, "data": i} for i in range(20)]
    found = shared.yes("POST", "/api/v1/events", events)["events"]
    assert [shared.run(event["run_ids"][0])["input"] for event in found] == [*range(20)]


@pytest.mark.parametrize("bad", [5, None, [], {}, {"name": ""}, {"name": "a.*"}, {"name": 7}])
def test_one_bad_event_of_an_array_refuses_all_and_is_named(
    shared: RunningServer, bad: Any
) -> None:
    before = stored(shared)
    answer = shared.call("POST", "/api/v1/events", [{"name": "a"}, {"name": "b"}, bad])
    assert code(answer) == INVALID
    assert "events[2]" in answer[1]["message"]
    assert stored(shared) == before


@pytest.mark.parametrize(("size", "kept"), [(0, 0), (1000, 1000), (1001, 0)])
def test_an_array_holds_up_to_a_thousand(shared: RunningServer, size: int, kept: int) -> None:
    before = stored(shared)
    status, body = shared.call("POST", "/api/v1/events", [{"name": "many"}] * size)
    assert len(body["events"]) == size if status == 200 else "1000" in body["message"]
    assert stored(shared) - before == kept


@pytest.mark.parametrize("data", [None, True, 0, -1.5, 2**53 + 1, "", "\u20ac \U0001f600 \0",
                                  [1, None], {}, {"a": {"b": []}}])
def test_data_is_any_json_and_comes_back_as_it_was(shared: RunningServer, data: Any) -> None:
    for member in "data", "dataValue", "data_value":
        event = shared.yes("POST", "/api/v1/events", {"name": "any", member: data})
        assert shared.yes("GET", f"/api/v1/events/{event['id']}")["data"] == data


def test_an_event_is_read_back_whole(shared: RunningServer) -> None:
    said = {"name": "whole", "data": {"a": 1}, "version": 3, "metadata": {"by": [1]}}
    body = said | {"idempotencyKey": (key := new_name())}
    _, event = shared.call("POST", "/api/v1/events", body, {"X-Ironflow-Run-ID": "run_0"})
    found = shared.yes("GET", f"/api/v1/events/{event['id']}")
    at = found.pop("timestamp")
    assert found.pop("created_at") == at
    assert re.fullmatch(r"\d{4}-.*T.*\.\d{3}Z", at)
    assert found == said | {"id": event["id"], "idempotency_key": key, "source": "api",
                            "processed": True, "run_id": "run_0"}


def test_what_an_event_does_not_have_is_absent(shared: RunningServer) -> None:
    event = shared.yes("POST", "/api/v1/events", {"name": "bare"})
    found = shared.yes("GET", f"/api/v1/events/{event['id']}")
    assert not {"metadata", "idempotency_key", "run_id"} & found.keys()
    assert (found["version"], found["data"]) == (1, {})


@pytest.mark.parametrize("spelling", ["idempotencyKey", "idempotency_key"])
def test_a_repeat_gets_the_first_answer_and_leaves_no_trace(
    shared: RunningServer, spelling: str
) -> None:
    shared.register(name := new_name(), name)
    key = {spelling: name}
    first = shared.emit(name, **key)
    before = stored(shared)
    assert shared.emit(name, {"other": 1}, **key) == first
    array = [{"name": name} | key]
    assert shared.yes("POST", "/api/v1/events", array) == {"events": [first]}
    assert shared.rpc("Trigger", {"event": name} | key)["runIds"] == first["runIds"]
    assert stored(shared) == before


def test_a_key_that_belongs_to_another_name_is_a_conflict(shared: RunningServer) -> None:
    shared.emit("first.owner", idempotency_key=(key := new_name()))
    before = stored(shared)
    body = {"name": "x", "idempotency_key": key}
    for path, sent in ("/api/v1/events", body), ("/api/v1/events", [body]):
        answer = shared.call("POST", path, sent)
        assert code(answer) == (409, "already_exists")
        assert "first.owner" in answer[1]["message"]
    assert stored(shared) == before


def test_a_key_twice_in_one_array_is_one_event(shared: RunningServer) -> None:
    event = {"name": "twin", "idempotency_key": new_name()}
    one, other = shared.yes("POST", "/api/v1/events", [event, event])["events"]
    assert one == other


def test_a_key_for_two_names_in_one_array_is_a_conflict(shared: RunningServer) -> None:
    before, key = stored(shared), new_name()
    pair = [{"name": name, "idempotency_key": key} for name in ("one", "two")]
    answer = shared.call("POST", "/api/v1/events", pair)
    assert code(answer) == (409, "already_exists")
    assert "events[1]" in answer[1]["message"]
    assert "one" in answer[1]["message"]
    assert stored(shared) == before


@pytest.mark.parametrize("name", ["order.placed", "webhook/stripe.charge", "A b", "...",
                                  "a..b", "a*", "x>y", "é", "n" * 500])
def test_event_names_are_free_text(shared: RunningServer, name: str) -> None:
    shared.emit(name)


@pytest.mark.parametrize("name", ["", "*", ">", "a.*", "*.", "a.*.b", "a.>", "a\n", "\0",
                                  "a\x7f", "\x85"])
def test_event_names_that_could_confuse_are_refused(shared: RunningServer, name: str) -> None:
    for path, member in ("/api/v1/events", "name"), (f"{RPC}Trigger", "event"):
        assert code(shared.call("POST", path, {member: name})) == INVALID


# ======================================================================================
# Functions
# ======================================================================================


def register(server: RunningServer, **body: Any) -> tuple[int, Any]:
    return server.call("POST", f"{RPC}RegisterFunction", {"id": new_name()} | body)


@pytest.mark.parametrize(("trigger", "started_by", "not_by"), [
    ("order.placed", "order.placed", "order order.placed.x Order.placed"),
    ("order.*", "order.placed order.", "order order.placed.x orders.a"),
    ("*.placed", "order.placed", "placed a.b.placed"),
    ("a.*.c", "a.b.c", "a.c a.b.b.c"),
    ("order.>", "order.placed order.placed.x", "order x.order.placed"),
    ("*.>", "a.b a.b.c", "a"),
    (">", "a a.b.c", ""),
    ("*", "a", "a.b"),
])
def test_a_trigger_is_a_name_or_a_pattern(trigger: str, started_by: str, not_by: str) -> None:
    assert ironflow.check_trigger(trigger) == trigger
    assert all(ironflow.matches(trigger, name) for name in started_by.split())
    assert not any(ironflow.matches(trigger, name) for name in not_by.split())


@pytest.mark.parametrize("trigger", ["ord*", "a.b>", "a.>.b", ">.>", "a.**", "a\n", ""])
def test_a_trigger_that_could_not_match_is_refused(shared: RunningServer, trigger: str) -> None:
    triggers = [{"event": "fine"}, {"event": trigger}]
    assert code(register(shared, triggers=triggers)) == INVALID


def test_a_function_starts_once_however_many_triggers_match(shared: RunningServer) -> None:
    name = new_name()
    triggers = [{"event": f"{name}.{tail}"} for tail in ("a", "*", ">")]
    for function_id in f"{name}-x", f"{name}-y":
        shared.rpc("RegisterFunction", {"id": function_id, "triggers": triggers})
    run_ids = shared.emit(f"{name}.a")["run_ids"]
    started = [shared.run(run_id)["function_id"] for run_id in run_ids]
    assert started == [f"{name}-x", f"{name}-y"]


@pytest.mark.parametrize("function_id", ["f", "a.b", "svc/f-1_2", "é", "f" * 300])
def test_a_function_id_is_plain(shared: RunningServer, function_id: str) -> None:
    assert register(shared, id=function_id)[1]["function"]["id"] == function_id


@pytest.mark.parametrize("bad", ["", "a b", "a*", ">", "a..b", ".a", "a.", "a\t", "a\x7f"])
def test_a_function_id_that_is_no_name_is_refused(shared: RunningServer, bad: str) -> None:
    assert code(register(shared, id=bad)) == INVALID


def test_a_registration_is_answered_with_the_function(shared: RunningServer) -> None:
    _, found = register(
        shared, id=(name := new_name()), timeout_ms=9, mode="pull", unheard_of=1,
        triggers=[{"event": "a.b", "cron": "", "expression": ""}], changeReason="why",
        retry={"max_attempts": 5, "backoffFactor": 1.5}, metadata={"__ironflow_code_hash": "x"},
    )
    function = found["function"]
    assert found["created"] is True
    assert function["createdAt"] == function["updatedAt"]
    assert function["retry"] == {"maxAttempts": 5, "initialDelayMs": 1000, "backoffFactor": 1.5,
                                 "maxDelayMs": 300000, "onExhausted": "fail"}
    expected = {"id": name, "name": name, "triggers": [{"event": "a.b"}], "timeoutMs": 9,
                "preferredMode": "EXECUTION_MODE_PULL", "status": "FUNCTION_STATUS_ACTIVE",
                "version": 1, "metadata": {"__ironflow_code_hash": "x"}}
    assert function | expected == function


def test_registering_the_same_again_writes_nothing(shared: RunningServer) -> None:
    first = shared.register(name := new_name())
    before = stored(shared)
    assert shared.register(name) == {"function": first["function"], "created": False}
    assert stored(shared) == before


def test_a_changed_registration_is_a_new_version(shared: RunningServer) -> None:
    shared.register(name := new_name(), event=f"{name}.old")
    found = shared.register(name, event=f"{name}.new")
    assert (found["function"]["version"], found["created"]) == (2, False)
    assert shared.emit(f"{name}.old")["run_ids"] == []
    (run_id,) = shared.emit(f"{name}.new")["run_ids"]
    assert shared.run(run_id)["function_version"] == 2


@pytest.mark.parametrize(("member", "value"), [
    ("concurrency", {"limit": 1}),
    ("debounce", {"period_ms": 1000}),
    ("throttle", {"limit": 1, "periodMs": 1}),
    ("cancelOn", [{"event": "a"}]), ("cancel_on", [{"event": "a", "match": "b"}]),
    ("actorKey", "data.id"), ("actor_key", "data.id"),
    ("circuitBreaker", {"failureThreshold": 1}), ("circuit_breaker", {"openDurationMs": 1}),
    ("secrets", ["s"]),
    ("endpointUrl", "http://localhost/x"), ("endpoint_url", "http://localhost/x"),
    ("triggers", [{"event": "a", "cron": "* * * * *"}]),
    ("triggers", [{"cron": "* * * * *"}]),
    ("triggers", [{"event": "a", "expression": "data.total > 1000"}]),
])
def test_what_is_not_built_is_refused_by_name(
    shared: RunningServer, member: str, value: Any
) -> None:
    name = [*value[0]][-1] if member == "triggers" else ironflow.camel(member)
    answer = register(shared, **{member: value})
    assert code(answer) == INVALID
    assert f"{name} is not supported by this server yet" in answer[1]["message"]


EMPTY: dict[str, Any] = {
    "concurrency": {"limit": 0, "key": ""}, "debounce": None, "secrets": [], "cancelOn": [],
    "throttle": {"limit": 0, "periodMs": 0}, "circuitBreaker": {}, "actorKey": "", "mode": "",
    "endpointUrl": "", "metadata": None, "timeout_ms": 0, "recording": False, "triggers": None,
    "description": "", "retry": {"maxAttempts": 0, "initialDelayMs": 0, "backoffFactor": 0},
}


def test_empty_members_as_go_sends_them_are_no_wish(shared: RunningServer) -> None:
    _, plain = register(shared, id=(name := new_name()))
    _, empty = register(shared, id=name, **EMPTY)
    assert empty == plain | {"created": False}


@pytest.mark.parametrize(("spelling", "mode"), [
    ("EXECUTION_MODE_PULL", "pull"), ("EXECUTION_MODE_PUSH", "push"), ("pull", "pull"),
    ("push", "push"), ("", "pull"), ("EXECUTION_MODE_UNSPECIFIED", "pull"),
])
def test_modes_in_every_spelling(shared: RunningServer, spelling: str, mode: str) -> None:
    shared.register(name := new_name(), preferredMode=spelling)
    (row,) = shared.yes("GET", f"/api/v1/functions?name={name}")["functions"]
    assert (row["preferred_mode"], row["execution_mode"]) == (mode, mode)


def test_functions_are_listed_with_who_carries_them(shared: RunningServer) -> None:
    shared.register(one := new_name())
    shared.register(two := new_name(), retry={"maxAttempts": 7})
    shared.join(new_name(), two)
    listed = shared.yes("GET", "/api/v1/functions")
    assert listed["count"] == listed["total_count"] == len(listed["functions"])
    rows = {row["id"]: row for row in listed["functions"]}
    assert (rows[one]["workers"], rows[two]["workers"]) == (0, 1)
    assert (rows[two]["retry_attempts"], rows[two]["slug"], rows[two]["status"]) == (
        7, two, "active")


def test_functions_are_listed_by_pages(shared: RunningServer) -> None:
    names = sorted(f"page.{i}.{new_name()}" for i in range(3))
    for name in names:
        shared.register(name)
    page = shared.yes("GET", "/api/v1/functions?name=page.&limit=2&offset=1")
    assert [row["id"] for row in page["functions"]] == names[1:]
    assert (page["count"], page["total_count"]) == (2, 3)


def test_workers_are_listed_with_what_they_said(shared: RunningServer) -> None:
    said = {"function_ids": ["f"], "hostname": "h", "labels": {"zone": "a"},
            "version": {"sdk": "0.29.0", "runtime": "node-v22.1.0"}}
    path = f"/api/v1/workers/{(name := new_name())}/register"
    shared.yes("POST", path, said | {"max_concurrent_jobs": 4})
    listed = shared.yes("GET", "/api/v1/workers")
    assert listed["count"] == len(listed["workers"])
    row = next(row for row in listed["workers"] if row["id"] == name)
    assert row.pop("registered_at") <= row.pop("last_heartbeat")
    assert row == said | {"id": name, "max_concurrent": 4, "active_jobs": 0,
                          "transport": "polling"}


# ======================================================================================
# Runs, as callers see them
# ======================================================================================


def has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(v is None or has_null(v) for v in value.values())
    return isinstance(value, list) and any(map(has_null, value))


@pytest.fixture(scope="module")
def life(shared: RunningServer) -> dict[str, str]:
    """Three runs of one function: completed with two steps, failed, and still queued."""
    name = new_name()
    shared.register(name, name)
    shared.join(name, name)
    done, failed, queued = (shared.emit(name, d)["run_ids"][0] for d in ({"a": 1}, [1], 3))
    job = shared.job(name)
    steps = [step(job, "one", {"x": 1}, duration_ms=12, started_at="2026-01-01T00:00:00Z"),
             step(job, "two", [2])]
    assert shared.tell(job, "completed", name, output="text", steps=steps)[0] == 200
    error = {"message": "no", "code": "NO", "retryable": False}
    assert shared.tell(shared.job(name), "failed", name, error=error)[0] == 200
    return {"name": name, "done": done, "failed": failed, "queued": queued}


RUN = {"status": "completed", "attempt": 1, "input": {"a": 1}, "output": "text"}


def test_a_run_in_rest_form(shared: RunningServer, life: dict[str, str]) -> None:
    run = shared.run(life["done"])
    for instant in "created_at", "updated_at", "started_at", "ended_at":
        ironflow.from_rfc3339(run.pop(instant))
    assert run.pop("event_id").startswith("evt_")
    assert run == RUN | {
        "id": life["done"], "function_id": life["name"], "event_name": life["name"],
        "worker_id": life["name"], "max_attempts": 3, "function_version": 1,
        "execution_mode": "pull"}


def test_a_run_in_connect_form(shared: RunningServer, life: dict[str, str]) -> None:
    run = shared.rpc("GetRun", {"id": life["done"]})
    for instant in "createdAt", "updatedAt", "startedAt", "endedAt":
        ironflow.from_rfc3339(run.pop(instant))
    assert run.pop("eventId").startswith("evt_")
    assert run == RUN | {
        "id": life["done"], "functionId": life["name"], "eventName": life["name"],
        "workerId": life["name"], "maxAttempts": 3, "functionVersion": 1,
        "executionMode": "EXECUTION_MODE_PULL", "outputValue": "text"}


def test_what_a_run_does_not_have_yet_is_absent(
    shared: RunningServer, life: dict[str, str]
) -> None:
    run = shared.rpc("GetRun", {"id": life["queued"]})
    assert (run["status"], run["input"], run["inputValue"]) == ("waiting_for_capacity", 3, 3)
    assert not {"output", "error", "startedAt", "endedAt", "workerId"} & run.keys()
    assert not has_null(run)


def test_a_failed_run_says_why(shared: RunningServer, life: dict[str, str]) -> None:
    run = shared.run(life["failed"])
    assert (run["status"], run["error"]) == ("failed", {"message": "no", "code": "NO"})


@pytest.mark.parametrize(("agent", "word"), [
    ("node", "completed"), ("Mozilla/5.0", "completed"), ("", "completed"),
    ("Go-http-client/1.1", "RUN_STATUS_COMPLETED"),
])
def test_go_reads_enum_names_and_everybody_else_words(
    shared: RunningServer, life: dict[str, str], agent: str, word: str
) -> None:
    asked, headers = {"function_id": life["name"], "id": life["done"]}, {"User-Agent": agent}
    _, run = shared.call("POST", f"{RPC}GetRun", asked, headers)
    _, listed = shared.call("POST", f"{RPC}ListRuns", asked, headers)
    assert run["status"] == listed["runs"][-1]["status"] == word


def test_steps_in_rest_form(shared: RunningServer, life: dict[str, str]) -> None:
    body = shared.yes("GET", f"/api/v1/runs/{life['done']}/steps")
    one, two = body["steps"]
    assert body["count"] == 2
    assert not has_null(body)
    assert {"id", "run_id", "created_at", "updated_at", "ended_at"} < one.keys()
    expected = {"step_id": f"{life['done']}:one:0", "name": "one", "step_type": "invoke",
                "sequence": 0, "status": "completed", "attempt": 1, "output": {"x": 1},
                "duration_ms": 12, "started_at": "2026-01-01T00:00:00.000Z"}
    assert one | expected == one
    assert (two["sequence"], two["output"]) == (1, [2])


def test_steps_in_connect_form(shared: RunningServer, life: dict[str, str]) -> None:
    one, two = shared.rpc("GetRunSteps", {"run_id": life["done"]})["steps"]
    expected = {"stepId": f"{life['done']}:one:0", "runId": life["done"], "name": "one",
                "stepType": "STEP_TYPE_INVOKE", "status": "STEP_STATUS_COMPLETED",
                "sequence": 0, "attempt": 1, "output": {"x": 1}, "durationMs": 12}
    assert one | expected == one
    assert not has_null(one)
    assert two["outputValue"] == [2]
    assert "output" not in two


def test_runs_are_listed_newest_first_by_pages(
    shared: RunningServer, life: dict[str, str]
) -> None:
    newest_first = [life["queued"], life["failed"], life["done"]]
    asked: dict[str, Any] = {"function_id": life["name"], "limit": 2}
    first = shared.rpc("ListRuns", asked)
    second = shared.rpc("ListRuns", asked | {"cursor": first["nextCursor"]})
    assert [run["id"] for run in first["runs"] + second["runs"]] == newest_first
    assert (second["nextCursor"], second["totalCount"]) == ("", 3)
    page = shared.yes("GET", f"/api/v1/runs?function_id={life['name']}&limit=1&offset=1")
    assert [run["id"] for run in page["runs"]] == newest_first[1:2]
    assert (page["count"], page["total_count"]) == (1, 3)


@pytest.mark.parametrize("status", ["failed", "FAILED", "RUN_STATUS_FAILED", 4])
def test_runs_are_listed_by_status_in_any_spelling(
    shared: RunningServer, life: dict[str, str], status: Any
) -> None:
    listed = shared.rpc("ListRuns", {"function_id": life["name"], "status": status})
    assert [run["id"] for run in listed["runs"]] == [life["failed"]]


@pytest.mark.parametrize(("query", "found"), [
    ("status=failed", "failed"),
    ("status=unheard-of", "queued failed done"),
    ("status=pending", "queued failed done"),
    ("since=2999-01-01T00:00:00Z", ""),
    ("until=2999-01-01T00:00:00Z", "queued failed done"),
    ("until=2000-01-01T00:00:00Z", ""),
    ("search={done}", "done"),
    ("search={name}", "queued failed done"),
    ("search=nowhere", ""),
    ("event_id=evt_none", ""),
    ("event_id={event_id}", "done"),
])
def test_runs_are_listed_by_filters(
    shared: RunningServer, life: dict[str, str], query: str, found: str
) -> None:
    known = life | {"event_id": shared.run(life["done"])["event_id"]}
    path = f"/api/v1/runs?function_id={life['name']}&{query.format(**known)}"
    ids = [run["id"] for run in shared.yes("GET", path)["runs"]]
    assert ids == [life[name] for name in found.split()]


@pytest.mark.parametrize("door", ["rpc", "rest", "rest without a body"])
def test_a_live_run_can_be_cancelled(shared: RunningServer, door: str) -> None:
    shared.register(name := new_name(), name)
    (run_id,) = shared.emit(name)["run_ids"]
    if door == "rpc":
        run = shared.rpc("CancelRun", {"id": run_id, "reason": "why not"})
    else:
        body = {"reason": "why not"} if door == "rest" else None
        run = shared.yes("POST", f"/api/v1/runs/{run_id}/cancel", body)
    assert (run["status"], run["error"]["code"]) == ("cancelled", "CANCELLED")
    assert ("why not" in run["error"]["message"]) == (door != "rest without a body")


def test_cancelling_twice_changes_nothing(shared: RunningServer) -> None:
    shared.register(name := new_name(), name)
    (run_id,) = shared.emit(name)["run_ids"]
    first = shared.rpc("CancelRun", {"id": run_id, "reason": "a"})
    before = stored(shared)
    assert shared.rpc("CancelRun", {"id": run_id, "reason": "b"}) == first
    assert stored(shared) == before


@pytest.mark.parametrize("which", ["done", "failed"])
def test_a_run_that_is_over_cannot_be_cancelled(
    shared: RunningServer, life: dict[str, str], which: str
) -> None:
    answer = shared.call("POST", f"{RPC}CancelRun", {"id": life[which]})
    assert code(answer) == (400, "failed_precondition")


@pytest.mark.parametrize("unknown", ["run_x", "run_0000000000000000000a", "%00", "a%2Fb", "%ff"])
@pytest.mark.parametrize("door", ["GET /api/v1/runs/{}", "GET /api/v1/runs/{}/steps",
                                  "POST /api/v1/runs/{}/cancel", "GET /api/v1/events/{}"])
def test_an_unknown_id_is_not_found(shared: RunningServer, door: str, unknown: str) -> None:
    method, path = door.format(unknown).split()
    assert code(shared.call(method, path)) == UNKNOWN


@pytest.mark.parametrize("method", ["GetRun", "GetRunSteps", "CancelRun"])
@pytest.mark.parametrize("body", [{"id": "run_x"}, {"id": "\0"}, {}, b""])
def test_an_unknown_id_is_not_found_by_rpc(
    shared: RunningServer, method: str, body: Any
) -> None:
    assert code(shared.call("POST", RPC + method, body)) == UNKNOWN


# ======================================================================================
# Bad input: the protocol's answer, nothing stored, nobody harmed
# ======================================================================================

WRITING_DOORS = [
    door.format(worker_id="w", job_id="job_x_1", run_id="run_x")
    for door in ironflow.doors()
    if door.startswith("P") and not door.endswith(("/Health", "/GetCapabilities"))
]
NO_JSON = {
    "half": b'{"name":"a"',
    "two": b"{} {}",
    "single quotes": b"{'name':'a'}",
    "a trailing comma": b'{"name":"a",}',
    "NaN": b'{"name":"a","data":NaN}',
    "Infinity": b'{"name":"a","data":[-Infinity]}',
    "1e999": b'{"name":"a","data":1e999}',
    "-1.5E+400": b'{"name":"a","data":-1.5E+400}',
    "400 digits.0": b'{"name":"a","data":' + b"9" * 400 + b".0}",
    "65 bits": b'{"name":"a","data":18446744073709551616}',
    "minus 65 bits": b'{"name":"a","data":-9223372036854775809}',
    "5,000 digits": b'{"name":"a","data":' + b"7" * 5000 + b"}",
    "a lone surrogate": rb'{"name":"a","data":"\ud800"}',
    "a low surrogate": rb'{"name":"a","data":["x\udfffx"]}',
    "swapped surrogates": rb'{"name":"a","data":"\ude00\ud83d"}',
    "a surrogate in a key": rb'{"name":"a","data":{"\ud800":1}}',
    "a surrogate as UTF-8": b'{"name":"a","data":"\xed\xa0\x80"}',
    "NUL in a key": rb'{"name":"a","data":{"a\u0000b":1}}',
    "a raw control character": b'{"name":"a\x01"}',
    "Latin-1": '{"name":"é"}'.encode("latin-1"),
    "UTF-16": '{"name":"a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"name":"a"}',
    "201 levels": b'{"name":"a","data":' + b"[" * 200 + b"1" + b"]" * 200 + b"}",
    "201 empty levels": b'{"name":"a","data":' + b"[" * 200 + b"]" * 200 + b"}",
    "100,000 levels": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000,
    "all bytes": bytes(range(256)),
}
FINE_JSON = {
    "200 levels": b"[" * 200 + b"]" * 200,
    "64 bits": b"[18446744073709551615,-9223372036854775808]",
    "NUL in a value": rb'"\u0000"',
    "a pair": rb'"\ud83d\ude00"',
    "an escaped backslash": rb'"\\ud800"',
    "the largest double": b"1.7976931348623157e308",
    "1e-999": b"1e-999",
    "5,000 decimals": b"0." + b"3" * 5000,
    "minus zero": b"[-0,-0.0]",
    "a key twice": b'{"a":1,"a":2}',
}


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_no_door_takes_what_is_no_json(shared: RunningServer, text: bytes) -> None:
    before = stored(shared)
    for door in WRITING_DOORS:
        method, path = door.split()
        assert code(shared.call(method, path, text)) == INVALID, door
    assert stored(shared) == before


@pytest.mark.parametrize("text", FINE_JSON.values(), ids=FINE_JSON)
def test_unusual_json_is_still_json(text: bytes) -> None:
    assert ironflow.parse_json(text) == json.loads(text)


def verdict(text: bytes, with_orjson: bool) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if not with_orjson:  # with it: where it is installed, as in CI's second round
            patch.setattr("ironflow.orjson", None)
        try:
            return repr(ironflow.parse_json(text))
        except ironflow.InvalidInput as error:
            return f"refused: {error.message}"


TEXTS = NO_JSON | FINE_JSON


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_verdict_is_the_same_without_orjson(text: bytes) -> None:
    assert verdict(text, True) == verdict(text, False)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
scalars |= st.sampled_from([2**63, 2**64, -(2**63) - 1, 1e308, "\ud800", "\0", "run_x"])
json_ish = st.recursive(scalars, lambda inside: st.lists(inside) | st.dictionaries(
    st.text(), inside), max_leaves=12)
json_bytes = json_ish.map(lambda value: json.dumps(value).encode()) | st.binary()
json_bytes |= st.text().map(lambda text: text.encode("utf-8", "replace"))
number = rb'[\[{]?"?-?[0-9]{1,25}(\.[0-9]+)?([eE][+-]?[0-9]{1,4})?"?[\]}]?'
json_bytes |= st.from_regex(number, fullmatch=True)


@settings(max_examples=300, deadline=None)
@given(json_bytes)
def test_the_verdict_on_any_bytes_is_the_same_without_orjson(text: bytes) -> None:
    assert verdict(text, True) == verdict(text, False)


# A good body for each door, and what its members must not be. A member's path may lead
# into lists; an empty one is the body itself.

TEXT = [5, True, [], {}]
COUNT = ["x", 1.5, -1, True, [], {}, 2**60]
OBJECT = [5, "x", True, [1]]
LIST = [5, "x", True, {"a": 1}]
ITEM = [5, "x", None, [], True]
INSTANT = [5, "soon", "2026-01-01", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z", [], True,
           "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"]
WORKER = "/api/v1/workers/w"
STEP = {"id": "s", "name": "n", "type": "invoke", "status": "completed"}
UPDATE: dict[str, Any] = {"execution_seq": 1, "lease_token": "lt", "steps": [STEP]}
SLEEP = {"type": "sleep", "step_id": "s", "until": "2026-01-01T00:00:00Z"}
WRONG: list[tuple[str, Any, dict[str, list[Any]]]] = [
    ("POST /api/v1/events", {"name": "a", "data": {}}, {
        "": [5, "x", None, True], "name": [*TEXT, None], "metadata": OBJECT, "version": COUNT,
        "idempotency_key": [*TEXT, "k" * 256, "é" * 128, "a\0"],
    }),
    (f"POST {RPC}Trigger", {"event": "a", "data": {}}, {
        "": ITEM, "event": [*TEXT, None], "metadata": OBJECT, "version": COUNT,
        "idempotencyKey": TEXT,
    }),
    (f"POST {RPC}RegisterFunction", {"id": "wrong", "triggers": [{"event": "a"}], "retry": {}}, {
        "": ITEM, "id": [*TEXT, None], "name": TEXT, "description": TEXT, "triggers": LIST,
        "triggers.0": ITEM, "triggers.0.event": [*TEXT, None], "retry": OBJECT,
        "retry.maxAttempts": COUNT, "retry.initialDelayMs": COUNT, "retry.maxDelayMs": COUNT,
        "retry.backoffFactor": ["x", -1, 1e300, [], {}, True], "timeoutMs": COUNT,
        "retry.onExhausted": [*TEXT, "explode"], "recording": [5, "x", [], {}],
        "metadata": OBJECT, "preferredMode": ["sideways", 3, 9, [1], {"a": 1}, 1.5],
    }),
    (f"POST {RPC}GetRun", {"id": "run_x"}, {"": ITEM, "id": TEXT}),
    (f"POST {RPC}GetRunSteps", {"id": "run_x"}, {"run_id": TEXT}),
    (f"POST {RPC}CancelRun", {"id": "run_x"}, {"id": TEXT, "reason": TEXT}),
    ("POST /api/v1/runs/run_x/cancel", {"reason": "r"}, {"": ITEM, "reason": TEXT}),
    (f"POST {RPC}ListRuns", {"limit": 1}, {
        "": ITEM, "limit": [*COUNT, 1001], "offset": COUNT, "cursor": TEXT, "search": TEXT,
        "function_id": TEXT, "event_id": TEXT, "since": INSTANT, "until": INSTANT,
    }),
    (f"PUT {WORKER}/register", {"function_ids": ["f"]}, {
        "": ITEM, "function_ids": LIST, "function_ids.0": [5, None, []], "hostname": TEXT,
        "max_concurrent_jobs": COUNT, "labels": OBJECT, "version": OBJECT,
    }),
    (f"POST {WORKER}/heartbeat", {"jobs": [{"job_id": "j"}]}, {
        "": ITEM, "jobs": LIST, "jobs.0": ITEM, "jobs.0.job_id": TEXT,
    }),
    (f"PUT {WORKER}/jobs/j/ack", {"execution_seq": 1, "lease_token": "lt"}, {
        "": ITEM, "execution_seq": COUNT, "lease_token": TEXT,
    }),
    (f"PUT {WORKER}/jobs/j", UPDATE | {"status": "progress"}, {
        "": ITEM, "status": [*TEXT, None, "done"], "execution_seq": COUNT, "lease_token": TEXT,
        "step_offset": COUNT, "steps": LIST, "steps.0": ITEM, "steps.0.name": TEXT,
        "steps.0.id": [*TEXT, None, "", "a\n"], "steps.0.status": [*TEXT, "sleeping"],
        "steps.0.type": TEXT, "steps.0.duration_ms": ["x", True, [], {}],
        "steps.0.compensation_for": TEXT, "steps.0.started_at": INSTANT,
        "steps.0.ended_at": INSTANT,
    }),
    (f"PUT {WORKER}/jobs/j", UPDATE | {"status": "yielded", "yield": SLEEP}, {
        "yield": [*OBJECT, None], "yield.type": [*TEXT, None], "yield.step_id": [*TEXT, None],
        "yield.until": [*INSTANT, None],
    }),
    (f"PUT {WORKER}/jobs/j", UPDATE | {"status": "failed", "error": {"message": "m"}}, {
        "error.retry_after_ms": ["x", True, [], {}],
    }),
    (f"PUT {WORKER}/jobs", {"updates": [UPDATE | {"status": "progress"}]}, {
        "": ITEM, "updates": LIST, "updates.0": ITEM,
    }),
]


def with_member(good: Any, member: str, value: Any) -> Any:
    """A copy of a body in which one member, named by a dotted path, is another."""
    if not member:
        return value
    body = here = copy.deepcopy(good)
    *way, last = [int(name) if name.isdigit() else name for name in member.split(".")]
    for name in way:
        here = here[name]
    here[last] = value
    return body


@pytest.mark.parametrize(("door", "good", "member", "values"), [
    pytest.param(door, good, member, values, id=f"{door}-{member}")
    for door, good, members in WRONG for member, values in members.items()
])
def test_a_member_of_the_wrong_kind_is_refused(
    shared: RunningServer, door: str, good: Any, member: str, values: list[Any]
) -> None:
    before = stored(shared)
    method, path = door.split()
    for value in values:
        body = json.dumps(with_member(good, member, value)).encode()
        assert code(shared.call(method, path, body)) == INVALID, value
    assert stored(shared) == before


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "limit=1001", "offset=1.5",
                                   "since=soon", "until=2026-01-01", "limit=%FF"])
def test_a_query_of_the_wrong_kind_is_refused(shared: RunningServer, query: str) -> None:
    assert code(shared.call("GET", f"/api/v1/runs?{query}")) == INVALID


def test_an_event_too_large_is_told_the_limit_and_the_flag(shared: RunningServer) -> None:
    before = stored(shared)
    large = {"name": "a", "data": "x" * 100_000}
    for body in large, [{"name": "a"}, large]:
        answer = shared.call("POST", "/api/v1/events", body)
        assert code(answer) == (413, "resource_exhausted")
        words = ("100003", "100000", "--max-event-bytes")
        assert all(word in answer[1]["message"] for word in words)
    assert stored(shared) == before


@pytest.mark.parametrize("kind", ["announced", "chunked", "packed"])
def test_a_body_too_large_is_told_the_limit_and_the_flag(
    shared: RunningServer, kind: str
) -> None:
    large = b'{"name":"a"}' + b" " * 2_000_000
    with contextlib.closing(shared.connection()) as line:
        if kind == "announced":
            line.request("POST", "/api/v1/events", large)
        elif kind == "chunked":
            line.request("POST", "/api/v1/events", iter([large[:9], large[9:]]),
                         {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        else:
            line.request("POST", "/api/v1/events", gzip.compress(large * 20),
                         {"Content-Encoding": "gzip"})
        answer = line.getresponse()
        said = json.loads(answer.read())
    assert code((answer.status, said)) == (413, "resource_exhausted")
    assert "--max-body-bytes" in said["message"]


@pytest.mark.parametrize(("body", "status"), [
    (gzip.compress(b'{"name":"packed"}'), 200),
    (b"no gzip", 400),
    (gzip.compress(b'{"name":"a","data":"bcdefghijk"}')[:-20], 400),
])
def test_packed_bodies_are_unpacked_or_refused(
    shared: RunningServer, body: bytes, status: int
) -> None:
    assert ask(shared, "POST", "/api/v1/events", body, Content_Encoding="gzip")[0] == status


def talk(server: RunningServer, *texts: bytes) -> bytes:
    """What comes back for some bytes, sent when the one before was answered."""
    heard = b""
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as line:
        for text in texts:
            line.sendall(text)
            heard += line.recv(65536)
    return heard


@pytest.mark.parametrize("broken", [
    b"POST /api/v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}",
    b"POST /api/v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n{}",
    b"POST /api/v1/events HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked"
    b"\r\n\r\nzz\r\n{}\r\n",
    b"GET /api/v1/runs/\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /api/v1/runs?limit=\xed\xa0\x80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n",
    b"nonsense\r\n\r\n",
], ids=range(9))
def test_broken_http_is_a_bad_request(shared: RunningServer, broken: bytes) -> None:
    assert talk(shared, broken)[8:13] == b" 400 "


def test_a_body_that_was_cut_off_stores_nothing(server: RunningServer) -> None:
    before = stored(server)
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        line.sendall(b"POST /api/v1/events HTTP/1.1\r\nHost: localhost\r\n")
        line.sendall(b'Content-Length: 99\r\n\r\n{"name":"cut"}')
    assert server.stop() == 0
    assert stored(server) == before


def test_a_client_that_asks_first_is_told_to_go_on(shared: RunningServer) -> None:
    head = b"POST /api/v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n"
    heard = talk(shared, head + b"Expect: 100-continue\r\n\r\n", b'{"name":"asks"}')
    assert heard.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_a_client_behind_a_proxy_names_the_whole_address(shared: RunningServer) -> None:
    request = b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert talk(shared, request).startswith(b"HTTP/1.1 200 ")


def test_good_neighbours_of_bad_requests_are_not_harmed(shared: RunningServer) -> None:
    shared.register(name := new_name(), name)
    shared.emit(name, idempotency_key=name)
    conflict = {"name": "other", "idempotency_key": name}
    bad: list[Any] = [b"{", {"name": "*"}, conflict, [{"name": name}, conflict]]

    def send(i: int) -> int:
        body = bad[i // 2 % len(bad)] if i % 2 else {"name": name, "data": i}
        return shared.call("POST", "/api/v1/events", body)[0]

    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(send, range(200)))
    assert statuses[::2] == [200] * 100
    assert {*statuses[1::2]} == {400, 409}
    listed = shared.yes("GET", f"/api/v1/runs?function_id={name}&limit=1000")["runs"]
    inputs = [run["input"] for run in listed if run["input"] != {}]
    assert sorted(inputs) == [*range(0, 200, 2)]
    assert len(listed) == 101


MEMBERS = sorted({ironflow.snake(member.split(".")[-1]) for _, _, members in WRONG
                  for member in members} | {"data", "output", "retryable", "error", "message"})
bodies = st.recursive(
    scalars | st.sampled_from(["sleep", "completed", "progress", "failed", "yielded", "w"]),
    lambda inside: st.lists(inside, max_size=3)
    | st.dictionaries(st.sampled_from(MEMBERS), inside, max_size=6),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.sampled_from(WRITING_DOORS), bodies.map(json.dumps).map(str.encode) | st.binary())
@example(f"POST {RPC}ListRuns", b'{"status":true}')
@example(f"POST {RPC}ListRuns", b'{"status":[1]}')
def test_no_request_makes_a_500(server: RunningServer, door: str, body: bytes) -> None:
    method, path = door.split()
    assert server.call(method, path, body)[0] in (200, 400, 404, 409)


# ======================================================================================
# What the journal says (protocol 8.7)
# ======================================================================================


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any]]:
    """Topics and data of a run's whole life: a failed step, a retry, a sleep, the end.

    R is the run; C one that was cancelled before it started.
    """
    with serve(tmp_path_factory.mktemp("told")) as server:
        server.register(retry={"initialDelayMs": 1})
        server.join()
        (run_id,) = server.emit(data={"n": 1})["run_ids"]
        job = server.job()
        failed = step(job, "b.c", status="failed", error={"message": "oh"})
        server.tell(job, "progress", steps=[step(job, "a", 1, duration_ms=3), failed])
        server.tell(job, "failed", error={"message": "oh", "retryable": True})
        job = server.job()
        until = ironflow.to_rfc3339(time.time() + 0.05)
        nap = {"type": "sleep", "step_id": f"{run_id}:nap:0", "until": until}
        more: dict[str, Any] = {"yield": nap, "steps": [step(job, "b.c", 2)]}
        server.tell(job, "yielded", **more)
        server.tell(server.job(), "completed", output=[9])
        (cancelled,) = server.emit()["run_ids"]
        server.rpc("CancelRun", {"id": cancelled, "reason": "r"})
        db = sqlite3.connect(f"{server.db.as_uri()}?mode=ro", uri=True)
        with contextlib.closing(db):
            messages = ironflow.Queries(db).messages(0, 1000)
        view = server.rows("SELECT topic FROM topic ORDER BY seq")
        assert view == [(message.topic,) for message in messages]
        return [(m.topic.replace(run_id, "R").replace(cancelled, "C"), json.loads(m.data))
                for m in messages]


def test_the_journal_tells_a_runs_life_in_topics(told: list[tuple[str, Any]]) -> None:
    topics = """
        system.function.f.registered
        system.worker.w.connected
        events:order.placed
        system.run.R.created
        system.run.R.updated
        system.run.R.step.R:a:0.created
        system.run.R.step.R:a:0.completed
        system.run.R.step.R:b.c:0.created
        system.run.R.step.R:b.c:0.failed
        system.run.R.updated
        system.run.R.updated
        system.run.R.updated
        system.run.R.step.R:b.c:0.completed
        system.run.R.step.R:nap:0.created
        system.run.R.updated
        system.run.R.step.R:nap:0.completed
        system.run.R.updated
        system.run.R.updated
        system.run.R.completed
        events:order.placed
        system.run.C.created
        system.run.C.cancelled
    """
    assert [topic for topic, _ in told] == topics.split()


def test_each_change_of_a_run_says_its_status_then(told: list[tuple[str, Any]]) -> None:
    runs = [data for topic, data in told if re.fullmatch(r"system\.run\.R\.\w+", topic)]
    assert [f"{run['status']} {run['attempt']}" for run in runs] == [
        "waiting_for_capacity 1", "running 1", "waiting 2", "waiting_for_capacity 2",
        "running 2", "waiting 2", "waiting_for_capacity 2", "running 2", "completed 2"]


def one_told(told: list[tuple[str, Any]], tail: str) -> dict[str, Any]:
    """A copy of the data of the one message whose topic ends like that."""
    (data,) = [data for topic, data in told if topic.endswith(tail)]
    return dict(data)


def test_a_run_message_holds_the_run(told: list[tuple[str, Any]]) -> None:
    run = one_told(told, "R.completed")
    for name in "createdAt", "updatedAt", "startedAt", "endedAt":
        ironflow.from_rfc3339(run.pop(name))
    assert run.pop("id") == run.pop("runId")
    assert run.pop("eventId").startswith("evt_")
    assert run == {"functionId": "f", "eventName": "order.placed", "maxAttempts": 3,
                   "status": "completed", "attempt": 2, "input": {"n": 1}, "output": [9]}


def test_a_message_of_a_new_run_knows_no_end_yet(told: list[tuple[str, Any]]) -> None:
    unset = {"startedAt", "endedAt", "output", "error", "workerId"}
    assert not unset & one_told(told, "R.created").keys()


def test_a_step_message_holds_the_step(told: list[tuple[str, Any]]) -> None:
    found = one_told(told, "a:0.completed")
    assert found.pop("id") == found.pop("stepId")
    assert found.pop("runId").startswith("run_")
    ironflow.from_rfc3339(found.pop("endedAt"))
    assert found == {"name": "a", "type": "invoke", "status": "completed", "sequence": 0,
                     "attempt": 1, "output": 1, "durationMs": 3}


def test_a_message_says_what_was_true_then(told: list[tuple[str, Any]]) -> None:
    failed, asleep = one_told(told, "b.c:0.failed"), one_told(told, "nap:0.created")
    assert (failed["status"], failed["error"]["message"]) == ("failed", "oh")
    assert "output" not in failed
    assert asleep["status"] == "sleeping"
    assert one_told(told, "C.cancelled")["error"]["code"] == "CANCELLED"


def test_no_message_holds_a_null(told: list[tuple[str, Any]]) -> None:
    assert [topic for topic, data in told if has_null(data)] == [
        "system.run.R.step.R:nap:0.completed"]  # there it is the output of a sleep


# ======================================================================================
# The pull protocol, by hand
# ======================================================================================


class Line(RunningServer):
    """The same server over one connection that stays open, as workers keep it."""

    def __init__(self, server: RunningServer) -> None:
        self.__dict__.update(server.__dict__)
        self.kept = self.connection()

    def __del__(self) -> None:
        self.kept.close()

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        payload = body if isinstance(body, bytes | None) else json.dumps(body)
        self.kept.request(method, path, payload, headers or {})
        answer = self.kept.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else None


class Bench:
    """A function with an event and a worker of the same name, which no other test uses."""

    def __init__(self, server: RunningServer) -> None:
        self.server, self.name = Line(server), new_name()

    def job(self, data: Any = None, **config: Any) -> Any:
        """A job on a new run; with `config` the function is registered anew."""
        self.server.register(self.name, self.name, **config)
        self.server.join(self.name, self.name)
        self.server.emit(self.name, data)
        return self.next_job()

    def next_job(self) -> Any:
        return self.server.job(self.name)

    def tell(self, job: Any, status: str, **more: Any) -> tuple[int, Any]:
        return self.server.tell(job, status, self.name, **more)

    def said(self, job: Any, status: str, **more: Any) -> None:
        """A report that has to be taken."""
        assert self.tell(job, status, **more) == (200, {"status": "ok"})

    def row(self, job: Any, *columns: str) -> Any:
        """What the file holds of a run."""
        sql = f"SELECT {', '.join(columns)} FROM run WHERE run_id = ?"
        (row,) = self.server.rows(sql, job["run_id"])
        return row if len(columns) > 1 else row[0]

    def run(self, job: Any) -> Any:
        return self.server.run(job["run_id"])

    def history(self, job: Any) -> list[Any]:
        """The journal's rows about a run."""
        sql = "SELECT seq, kind, name, step, data FROM journal WHERE subject = ?"
        return self.server.rows(sql, job["run_id"])

    def steps(self, job: Any) -> Any:
        """Name, status, sequence and output of each recorded step."""
        return [(s["name"], s["status"], s["sequence"], s.get("output"))
                for s in self.server.steps(job["run_id"])]  # fmt: skip


@pytest.fixture
def bench(shared: RunningServer) -> Bench:
    return Bench(shared)


def sleep_until(job: Any, instant: float, name: str = "nap") -> dict[str, Any]:
    """The members of a yield to sleep."""
    step_id, until = f"{job['run_id']}:{name}:0", ironflow.to_rfc3339(instant)
    return {"yield": {"type": "sleep", "step_id": step_id, "until": until}}


STALE = {"error": "STALE_EXECUTION", "code": "aborted"}
NOT_RUNNING = {"error": "RUN_NOT_RUNNING", "code": "aborted"}


def refused(answer: tuple[int, Any], error: dict[str, str]) -> bool:
    status, body = answer
    return status == 409 and body == error | {"message": body["message"]}


# --- Workers ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_workers_register_and_beat_by_post_and_by_put(
    shared: RunningServer, method: str
) -> None:
    path = f"/api/v1/workers/{new_name()}"
    body = {"worker_id": "w", "function_ids": ["f"], "labels": None, "version": None}
    assert shared.yes(method, f"{path}/register", body) == {"status": "registered"}
    assert shared.yes(method, f"{path}/heartbeat", {"jobs": []}) == {"status": "ok"}


@pytest.mark.parametrize(("method", "door"), [("GET", "jobs?wait=0"), ("POST", "heartbeat")])
def test_a_worker_never_seen_is_told_404(
    shared: RunningServer, method: str, door: str
) -> None:
    assert code(shared.call(method, f"/api/v1/workers/{new_name()}/{door}", {})) == UNKNOWN


def test_a_worker_is_known_after_a_restart(server: RunningServer) -> None:
    server.join("w")
    server.kill()
    server.start()
    assert server.poll("w", wait=0) == []
    server.yes("PUT", "/api/v1/workers/w/heartbeat", {"jobs": []})


def test_registering_a_worker_again_replaces_what_it_said(bench: Bench) -> None:
    bench.job()
    bench.server.join(bench.name, "another")
    bench.server.emit(bench.name)
    assert bench.server.poll(bench.name, wait=0) == []


@pytest.mark.parametrize("worker_id", ["w%20x", "a%2Fb", "%C3%A9", "w" * 255])
def test_worker_ids_are_the_workers_own(shared: RunningServer, worker_id: str) -> None:
    shared.join(worker_id, "nothing")
    assert shared.poll(worker_id, wait=0) == []


# --- Polls -----------------------------------------------------------------------------


def test_an_assignment_satisfies_the_strictest_sdk(bench: Bench) -> None:
    retry = {"maxAttempts": 4, "onExhausted": "pause"}
    job = bench.job({"a": [None]}, retry=retry)
    event, run_id = job.pop("event"), job["run_id"]
    assert re.fullmatch(r"[A-Za-z0-9_-]+", job.pop("job_id"))
    assert re.fullmatch(r"[A-Za-z0-9_-]+", job.pop("lease_token"))
    assert ironflow.from_rfc3339(job.pop("lease_expires_at")) > time.time() - DEADLINE_S
    assert job == {"run_id": run_id, "function_id": bench.name, "attempt": 1,
                   "completed_steps": [], "execution_seq": 1, "step_sequence_base": 0,
                   "max_attempts": 4, "on_exhausted": "pause"}  # fmt: skip
    assert type(job["attempt"]) is type(job["execution_seq"]) is int
    assert ironflow.from_rfc3339(event.pop("timestamp"))
    assert event.pop("id").startswith("evt_")
    assert event == {"name": bench.name, "data": {"a": [None]}, "version": 1, "source": "api"}


def test_an_assignment_carries_what_the_event_carried(bench: Bench) -> None:
    bench.job()
    bench.server.emit(bench.name, version=7, metadata={"m": 1}, idempotency_key=bench.name)
    event = bench.next_job()["event"]
    assert (event["version"], event["metadata"]) == (7, {"m": 1})
    assert event["idempotency_key"] == bench.name


def test_a_held_poll_is_answered_when_an_event_comes(bench: Bench) -> None:
    bench.job()
    with held_poll(bench.server, bench.name) as poll:
        (run_id,) = bench.server.emit(bench.name)["run_ids"]
        (job,) = json.loads(poll.getresponse().read())["jobs"]
    assert job["run_id"] == run_id


@pytest.mark.parametrize(("query", "held"), [
    ("wait=1", "1"), ("wait=0", None), ("available=0", None),
])
def test_204_says_how_long_the_poll_was_held(
    shared: RunningServer, query: str, held: str | None
) -> None:
    with contextlib.closing(shared.connection()) as line:
        line.request("GET", f"/api/v1/workers/w/jobs?{query}")
        answer = line.getresponse()
        assert (answer.status, answer.read()) == (204, b"")
        assert answer.headers.get("Ironflow-Poll-Wait") == held


def test_a_poll_gets_no_more_than_it_asked_for(bench: Bench) -> None:
    bench.job()
    for _ in range(5):
        bench.server.emit(bench.name)
    assert [len(bench.server.poll(bench.name, 3, wait=0)) for _ in range(3)] == [3, 2, 0]


def test_the_longest_due_is_handed_out_first(bench: Bench) -> None:
    bench.said(bench.job(), "completed")
    run_ids = [bench.server.emit(bench.name)["run_ids"][0] for _ in range(6)]
    jobs = [job for slots in (2, 1, 9) for job in bench.server.poll(bench.name, slots)]
    assert [job["run_id"] for job in jobs] == run_ids


def test_a_worker_gets_runs_of_its_own_functions_alone(shared: RunningServer) -> None:
    one, other = Bench(shared), Bench(shared)
    one.job()
    other.job()
    shared.emit(other.name)
    assert one.server.poll(one.name, wait=0) == []
    assert len(other.server.poll(other.name, wait=0)) == 1


def test_a_worker_takes_a_function_registered_for_push(bench: Bench) -> None:
    assert bench.job(preferredMode="push")["function_id"] == bench.name


def test_a_run_without_a_worker_waits_visibly(bench: Bench) -> None:
    bench.server.register(bench.name, bench.name)
    (run_id,) = bench.server.emit(bench.name)["run_ids"]
    assert bench.server.run(run_id)["status"] == "waiting_for_capacity"
    (row,) = bench.server.yes("GET", f"/api/v1/functions?name={bench.name}")["functions"]
    assert row["workers"] == 0
    bench.server.join(bench.name, bench.name)
    assert bench.next_job()["run_id"] == run_id


def test_racing_workers_never_get_the_same_run(bench: Bench) -> None:
    bench.said(bench.job(), "completed")
    wanted = {bench.server.emit(bench.name)["run_ids"][0] for _ in range(60)}

    def work(i: int) -> list[str]:
        line, mine = Line(bench.server), []
        line.join(f"{bench.name}-{i}", bench.name)
        while jobs := line.poll(f"{bench.name}-{i}", 1 + i, wait=0):
            mine += [job["run_id"] for job in jobs]
            assert all(line.tell(job, "completed")[0] == 200 for job in jobs)
        return mine

    with ThreadPoolExecutor(4) as threads:
        found = [run_id for mine in threads.map(work, range(4)) for run_id in mine]
    assert sorted(found) == sorted(wanted)


def test_every_dispatch_has_a_new_fence_token_and_job_id(bench: Bench) -> None:
    job = bench.job(retry={"initialDelayMs": 1})
    bench.said(job, "failed", error={"message": "m", "retryable": True})
    again = bench.next_job()
    assert again["run_id"] == job["run_id"]
    assert again["execution_seq"] > job["execution_seq"]
    assert again["lease_token"] != job["lease_token"]
    assert again["job_id"] != job["job_id"]


# --- Reports ---------------------------------------------------------------------------


def test_an_ack_makes_the_lease_long(bench: Bench) -> None:
    job = bench.job()
    reserved = bench.row(job, "lease_until")
    bench.said(job, "ack")
    assert bench.row(job, "lease_until") - reserved > 3600 - 15 - 1
    assert bench.run(job)["status"] == "running"


def test_a_report_without_an_ack_counts_as_both(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "progress", steps=[step(job, "a")])
    assert bench.row(job, "acked") == 1


def test_progress_is_kept_at_once_and_twice_is_once(bench: Bench) -> None:
    job = bench.job()
    for _ in range(2):
        bench.said(job, "progress", steps=[step(job, "a", 1), step(job, "b", None)], step_offset=0)
    assert bench.steps(job) == [("a", "completed", 0, 1), ("b", "completed", 1, None)]
    assert bench.run(job)["status"] == "running"


def test_progress_takes_up_to_500_steps(bench: Bench) -> None:
    job = bench.job()
    many = [step(job, "a", index=i) for i in range(501)]
    assert code(bench.tell(job, "progress", steps=many)) == INVALID
    assert bench.steps(job) == []


@pytest.mark.parametrize("output", [None, 0, "", {"a": 1}, [1, "é"], "\0"])
def test_a_run_completes_with_its_output(bench: Bench, output: Any) -> None:
    job = bench.job()
    bench.said(job, "completed", output=output, steps=[step(job, "a", output)])
    run = bench.run(job)
    assert (run["status"], run["output"]) == ("completed", output)
    assert bench.steps(job) == [("a", "completed", 0, output)]


def test_a_missing_output_is_null(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "completed", steps=[{"id": "s", "name": "a", "status": "completed"}])
    assert bench.run(job)["output"] is None
    assert bench.steps(job) == [("a", "completed", 0, None)]


@pytest.mark.parametrize("kind", ["invoke", "compensate", "publish", "sleep", "unheard_of"])
def test_a_step_of_any_type_is_kept(bench: Bench, kind: str) -> None:
    job = bench.job()
    bench.said(job, "progress", steps=[step(job, "a", 1, type=kind, compensation_for="b")])
    (row,) = bench.server.steps(job["run_id"])
    assert (row["step_type"], row["compensation_for"]) == (kind, "b")


def test_step_ids_are_opaque(bench: Bench) -> None:
    job = bench.job()
    ids = ["a:b", r"run\:x:ä/ö .:0", ".", "x" * 1000, "A", "a"]
    bench.said(job, "progress", steps=[step(job, "n") | {"id": each} for each in ids])
    assert [row["step_id"] for row in bench.server.steps(job["run_id"])] == ids


def test_completed_steps_come_back_with_the_next_dispatch(bench: Bench) -> None:
    job = bench.job(retry={"initialDelayMs": 1})
    failed = step(job, "b", status="failed", error={"message": "m"})
    bench.said(job, "failed", steps=[step(job, "a", {"x": 1}), failed, step(job, "c")],
               error={"message": "m", "retryable": True})  # fmt: skip
    again = bench.next_job()
    assert again["completed_steps"] == [
        {"step_id": f"{job['run_id']}:{name}:0", "name": name, "output": output,
         "status": "completed"} for name, output in (("a", {"x": 1}), ("c", None))
    ]  # fmt: skip
    assert again["step_sequence_base"] == 3


def test_a_failed_step_gives_way_and_keeps_its_place(bench: Bench) -> None:
    job = bench.job()
    failed = step(job, "a", status="failed", error={"message": "m", "stack": "s"})
    bench.said(job, "progress", steps=[failed])
    (row,) = bench.server.steps(job["run_id"])
    assert (row["status"], row["error"]["message"]) == ("failed", "m")
    assert not has_null(row)
    bench.said(job, "progress", steps=[step(job, "b"), step(job, "a", 2)], step_offset=1)
    assert bench.steps(job) == [("a", "completed", 0, 2), ("b", "completed", 1, None)]


def test_a_completed_step_never_changes(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "progress", steps=[step(job, "a", 1)])
    failed = step(job, "a", status="failed", error={"message": "m"})
    bench.said(job, "progress", steps=[failed, step(job, "a", 2)], step_offset=1)
    assert bench.steps(job) == [("a", "completed", 0, 1)]


def test_sequences_follow_the_offset(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "progress", steps=[step(job, "a"), step(job, "b")], step_offset=0)
    bench.said(job, "progress", steps=[step(job, "c")], step_offset=5)
    bench.said(job, "yielded", **sleep_until(job, 0))
    assert [sequence for _, _, sequence, _ in bench.steps(job)] == [0, 1, 5, 6]
    assert bench.next_job()["step_sequence_base"] == 7


ENDS: dict[str, dict[str, Any]] = {"completed": {"output": 1}, "failed": {"error": {}}}
ENDS["yielded"] = {"yield": {"type": "sleep", "step_id": "s", "until": "2999-01-01T00:00:00Z"}}


@pytest.mark.parametrize("status", ENDS)
def test_the_same_final_report_twice_is_answered_the_same(bench: Bench, status: str) -> None:
    job = bench.job()
    bench.said(job, status, **ENDS[status])
    before = bench.run(job), bench.history(job)
    bench.said(job, status, **ENDS[status])
    assert (bench.run(job), bench.history(job)) == before


@pytest.mark.parametrize("status", ["ack", "progress", *ENDS])
@pytest.mark.parametrize("change", ["execution_seq", "lease_token", "job_id"])
def test_a_report_with_a_stale_fence_is_refused(
    bench: Bench, status: str, change: str
) -> None:
    job = bench.job()
    other = {"execution_seq": 7, "lease_token": "lt_x", "job_id": f"{job['job_id']}0"}
    before = bench.run(job), bench.history(job)
    more = ENDS.get(status, {}) | {"steps": [step(job, "a")]}
    assert refused(bench.tell(job | {change: other[change]}, status, **more), STALE)
    assert (bench.run(job), bench.history(job)) == before


@pytest.mark.parametrize("status", ["ack", "progress", *ENDS])
def test_a_report_for_a_run_never_heard_of_is_not_found(bench: Bench, status: str) -> None:
    job = {"job_id": "job_x_1", "run_id": "run_x", "execution_seq": 1, "lease_token": "lt"}
    assert code(bench.tell(job, status, **ENDS.get(status, {}))) == UNKNOWN


def test_a_cancelled_runs_handler_is_stopped_by_its_next_checkpoint(bench: Bench) -> None:
    job = bench.job()
    bench.server.rpc("CancelRun", {"id": job["run_id"]})
    assert refused(bench.tell(job, "progress", steps=[step(job, "a")]), STALE)
    assert refused(bench.tell(job, "ack"), STALE)
    assert bench.steps(job) == []


@pytest.mark.parametrize("status", ENDS)
def test_a_final_report_for_a_cancelled_run_is_too_late(bench: Bench, status: str) -> None:
    job = bench.job()
    bench.server.rpc("CancelRun", {"id": job["run_id"]})
    assert refused(bench.tell(job, status, **ENDS[status]), NOT_RUNNING)
    assert bench.run(job)["status"] == "cancelled"


def test_a_second_different_end_is_too_late(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "completed", output=1)
    assert refused(bench.tell(job, "failed", error={}), NOT_RUNNING)
    assert bench.run(job)["output"] == 1


def test_a_cancelled_run_is_handed_to_nobody(bench: Bench) -> None:
    bench.said(bench.job(), "completed")
    (run_id,) = bench.server.emit(bench.name)["run_ids"]
    bench.server.rpc("CancelRun", {"id": run_id})
    assert bench.server.poll(bench.name, wait=0) == []


def test_updates_in_bulk_are_judged_each_alone_in_order(bench: Bench) -> None:
    good, stale, gone = bench.job(), bench.job(), bench.job()
    bench.server.rpc("CancelRun", {"id": gone["run_id"]})

    def update(job: Any, status: str, **more: Any) -> dict[str, Any]:
        kept = {k: job[k] for k in ("job_id", "run_id", "execution_seq", "lease_token")}
        return kept | {"status": status} | more

    answer = bench.server.yes("PUT", f"/api/v1/workers/{bench.name}/jobs", {"updates": [
        update(good, "ack"),
        update(stale | {"lease_token": "lt_x"}, "ack"),
        update(good, "progress", steps=[step(good, "a", 1)]),
        update(gone, "completed"),
        update(good, "dancing"),
        update(good, "completed", output=2),
    ]})  # fmt: skip
    statuses = [result["status"] for result in answer["results"]]
    assert statuses == [200, 409, 200, 409, 400, 200]
    bodies = [result["body"] for result in answer["results"]]
    assert bodies[0] == {"status": "ok"}
    assert [bodies[i]["error"] for i in (1, 3)] == ["STALE_EXECUTION", "RUN_NOT_RUNNING"]
    assert bench.run(good)["output"] == 2
    assert bench.steps(good)[0][3] == 1


# --- Retries ---------------------------------------------------------------------------


def due_in_ms(bench: Bench, job: Any) -> int:
    """How long after its end a failed attempt is tried again."""
    due_at, ended_at = bench.row(job, "due_at", "updated_at")
    return round(float(due_at - ended_at) * 1000)


@pytest.mark.parametrize(
    ("attempt", "retry", "after_ms", "delay_ms"),
    [
        (1, {}, None, 1000),
        (1, {"initialDelayMs": 70}, None, 70),
        (2, {"initialDelayMs": 1, "backoffFactor": 3}, None, 3),
        (2, {"initialDelayMs": 1, "backoffFactor": 1}, None, 1),
        (2, {"initialDelayMs": 1, "backoffFactor": 1000, "maxDelayMs": 20}, None, 20),
        (1, {}, 5000, 5000),
        (1, {"maxDelayMs": 2000}, 5000, 2000),
        (1, {}, 10**12, 300_000),
        (1, {}, 0, 0),
    ],
)
def test_a_failed_attempt_is_tried_again_later(
    bench: Bench, attempt: int, retry: Any, after_ms: int | None, delay_ms: int
) -> None:
    job = bench.job(retry=retry)
    error = {"message": "m", "code": "E", "retryable": True}
    if attempt == 2:
        bench.said(job, "failed", error=error)
        job = bench.next_job()
    if after_ms is not None:
        error["retry_after_ms"] = after_ms
    bench.said(job, "failed", error=error)
    if delay_ms >= 1000:  # else it may be due before we look
        run = bench.run(job)
        assert (run["status"], run["attempt"]) == ("waiting", attempt + 1)
        assert run["error"] == {"message": "m", "code": "E"}
        assert due_in_ms(bench, job) == delay_ms
    else:
        assert bench.next_job()["attempt"] == attempt + 1


@pytest.mark.parametrize(("policy", "status"), [("fail", "failed"), ("pause", "paused")])
def test_when_attempts_are_exhausted_the_policy_decides(
    bench: Bench, policy: str, status: str
) -> None:
    job = bench.job(retry={"maxAttempts": 2, "initialDelayMs": 1, "onExhausted": policy})
    for _ in range(2):
        assert job["max_attempts"] == 2
        bench.said(job, "failed", error={"message": "m", "retryable": True})
        job = bench.next_job() if bench.run(job)["attempt"] > job["attempt"] else job
    run = bench.run(job)
    assert (run["status"], run["attempt"], run["error"]["message"]) == (status, 2, "m")


@pytest.mark.parametrize("policy", ["fail", "pause"])
@pytest.mark.parametrize("error", [
    {"message": "m", "retryable": False}, {"message": "m"}, "m", None,
])
def test_what_is_not_retryable_fails_at_once(bench: Bench, policy: str, error: Any) -> None:
    job = bench.job(retry={"onExhausted": policy})
    bench.said(job, "failed", error=error)
    run = bench.run(job)
    assert (run["status"], run["attempt"]) == ("failed", 1)
    assert run["error"]["message"] == ("m" if error else "unknown error")


def test_a_run_keeps_the_policy_it_started_with(bench: Bench) -> None:
    job = bench.job(retry={"maxAttempts": 1})
    bench.server.register(bench.name, bench.name, retry={"maxAttempts": 9})
    bench.said(job, "failed", error={"message": "m", "retryable": True})
    assert bench.run(job)["status"] == "failed"


# --- Sleeps and other yields -----------------------------------------------------------


def test_a_sleeping_run_waits_and_wakes(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "yielded", **sleep_until(job, time.time() + 0.2))
    again = bench.next_job()
    assert (again["run_id"], again["attempt"]) == (job["run_id"], 1)
    (slept,) = again["completed_steps"]
    assert slept == {"step_id": f"{job['run_id']}:nap:0", "name": "nap", "output": None,
                     "status": "completed"}  # fmt: skip


def test_a_sleep_is_visible_while_it_lasts(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "yielded", **ENDS["yielded"])
    assert bench.run(job)["status"] == "waiting"
    (row,) = bench.server.steps(job["run_id"])
    assert (row["status"], row["step_type"]) == ("sleeping", "sleep")
    assert row["sleep_until"] == "2999-01-01T00:00:00.000Z"


def test_a_sleep_that_is_past_is_over_at_once(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "yielded", steps=[step(job, "a")], **sleep_until(job, 1.0))
    assert [name for name, *_ in bench.steps(job)] == ["a", "nap"]
    assert len(bench.next_job()["completed_steps"]) == 2


def test_a_sleep_yielded_again_keeps_its_end(bench: Bench) -> None:
    """Branches yield one at a time: the replay for one yields the other's sleep again."""
    job = bench.job()
    bench.said(job, "yielded", **sleep_until(job, time.time() + 0.2))
    job = bench.next_job()
    bench.said(job, "yielded", **sleep_until(job, time.time() + 3600))
    assert bench.next_job()["run_id"] == job["run_id"]


def test_a_sleeping_run_is_due_when_its_sleep_ends(bench: Bench) -> None:
    job = bench.job()
    late = time.time() + 3600
    bench.said(job, "yielded", **sleep_until(job, late, "late"))
    assert bench.row(job, "status", "due_at") == ("waiting", pytest.approx(late, abs=0.002))


@pytest.mark.parametrize("kind", ["wait_for_event", "invoke_function",
                                  "invoke_function_async", "x"])
def test_a_yield_that_is_not_built_fails_the_run_and_not_the_report(
    bench: Bench, kind: str
) -> None:
    job = bench.job()
    wish = {"type": kind, "step_id": f"{job['run_id']}:b:0", "function_id": "g"}
    bench.said(job, "yielded", steps=[step(job, "a")], **{"yield": wish})
    run = bench.run(job)
    assert (run["status"], run["error"]["code"]) == ("failed", "UNSUPPORTED_YIELD")
    assert kind in run["error"]["message"]
    assert bench.steps(job) == [("a", "completed", 0, None)]


# --- What cannot be kept ---------------------------------------------------------------


@pytest.mark.parametrize("status", ["progress", "completed"])
def test_a_step_output_too_large_fails_the_run_and_not_the_report(
    bench: Bench, status: str
) -> None:
    job = bench.job(retry={"onExhausted": "pause"})
    steps = [step(job, "a", 1), step(job, "big", "x" * 100_000)]
    bench.said(job, status, steps=steps)
    run = bench.run(job)
    if status == "completed":  # the answer was lost: a final report may come twice
        bench.said(job, status, steps=steps)
    assert (run["status"], run["error"]["code"]) == ("failed", "STEP_OUTPUT_TOO_LARGE")
    assert all(w in run["error"]["message"] for w in ("big", "100002", "--max-step-bytes"))
    assert bench.steps(job) == [("a", "completed", 0, 1)]


def test_a_run_output_too_large_fails_the_run_and_not_the_report(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "completed", output="x" * 100_000)
    run = bench.run(job)
    assert (run["status"], run["error"]["code"]) == ("failed", "STEP_OUTPUT_TOO_LARGE")
    assert "output" not in run


@pytest.mark.parametrize("one_more", ["step", "sleep"])
def test_a_step_too_many_fails_the_run_and_not_the_report(
    bench: Bench, one_more: str
) -> None:
    job = bench.job()
    bench.said(job, "progress", steps=[step(job, "a", index=i) for i in range(20)])
    assert bench.run(job)["status"] == "running"
    if one_more == "sleep":
        bench.said(job, "yielded", **sleep_until(job, 1.0))
    else:
        bench.said(job, "progress", steps=[step(job, "a", index=20)])
    run = bench.run(job)
    assert (run["status"], run["error"]["code"]) == ("failed", "TOO_MANY_STEPS")
    assert len(bench.steps(job)) == 20


def test_a_run_that_failed_over_a_checkpoint_stops_its_handler(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "progress", steps=[step(job, "big", "x" * 100_000)])
    assert refused(bench.tell(job, "progress", steps=[step(job, "b")]), STALE)


# ======================================================================================
# Leases
# ======================================================================================


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose leases end after half a second, and which gives up after three."""
    flags = ("--lease-seconds", "0.5", "--max-lost-leases", "3")
    with serve(tmp_path_factory.mktemp("hasty"), *flags) as running:
        yield running


@pytest.fixture
def brief(hasty: RunningServer) -> Bench:
    return Bench(hasty)


def lease_ends(bench: Bench, job: Any) -> None:
    bench.server.run_becomes(job["run_id"], "waiting_for_capacity")


@pytest.mark.parametrize("acked", [False, True], ids=["reservation", "lease"])
def test_a_lease_that_ends_makes_the_run_due_again(brief: Bench, acked: bool) -> None:
    job = brief.job()
    if acked:
        brief.said(job, "ack")
    lease_ends(brief, job)
    assert (again := brief.next_job())["run_id"] == job["run_id"]
    assert again["attempt"] == 1  # a crash spends none


def test_the_old_holder_may_report_until_the_run_is_leased_again(brief: Bench) -> None:
    job = brief.job()
    lease_ends(brief, job)
    brief.said(job, "progress", steps=[step(job, "a", 1)])
    lease_ends(brief, job)
    brief.said(job, "completed", output=2)
    assert brief.run(job)["output"] == 2
    assert brief.server.poll(brief.name, wait=0) == []


def test_the_old_holder_is_stale_once_the_run_is_leased_again(brief: Bench) -> None:
    job = brief.job()
    lease_ends(brief, job)
    again = brief.next_job()
    for status in "ack", "progress", "completed":
        assert refused(brief.tell(job, status), STALE)
    brief.said(again, "completed")


def beat(bench: Bench, *jobs: Any) -> None:
    listed = [{"job_id": job["job_id"], "started_at": "2026-01-01T00:00:00Z"} for job in jobs]
    path = f"/api/v1/workers/{bench.name}/heartbeat"
    bench.server.yes("POST", path, {"worker_id": bench.name, "jobs": listed})


def test_a_heartbeat_renews_the_leases_it_lists_and_no_others(brief: Bench) -> None:
    kept, dropped = brief.job(), brief.job()
    brief.said(kept, "ack")
    brief.said(dropped, "ack")
    first = brief.row(kept, "lease_until")

    def others_are_over() -> bool:
        beat(brief, kept)
        renewed = (brief.row(kept, "lease_until") or 0.0) > first
        return renewed and bool(brief.run(dropped)["status"] == "waiting_for_capacity")

    eventually(others_are_over)
    assert brief.row(kept, "fence", "lease_token") == (1, kept["lease_token"])
    assert brief.row(dropped, "lost_leases") == 1


def test_a_heartbeat_of_another_worker_renews_nothing(brief: Bench) -> None:
    job = brief.job()
    brief.said(job, "ack")
    stranger = Bench(brief.server)
    stranger.server.join(stranger.name, "nothing")

    def is_over() -> bool:
        beat(stranger, job)
        return bool(brief.run(job)["status"] == "waiting_for_capacity")

    eventually(is_over)


def test_a_heartbeat_takes_back_a_lease_that_ended(brief: Bench) -> None:
    job = brief.job()
    lease_ends(brief, job)
    beat(brief, job)
    assert brief.row(job, "fence") == 1
    brief.said(job, "completed")


def test_a_young_lease_is_not_renewed(bench: Bench) -> None:
    job = bench.job()
    bench.said(job, "ack")
    before = bench.row(job, "lease_until", "updated_at")
    beat(bench, job)
    assert bench.row(job, "lease_until", "updated_at") == before


def test_a_run_that_loses_every_worker_is_paused(brief: Bench) -> None:
    job = brief.job()
    for _ in range(2):
        lease_ends(brief, job)
        assert brief.next_job()["attempt"] == 1
    run = brief.server.run_becomes(job["run_id"], "paused")
    assert run["error"]["code"] == "WORKER_LOST"
    assert brief.server.poll(brief.name, wait=0) == []


def test_a_new_step_makes_lost_workers_forgotten(brief: Bench) -> None:
    job = brief.job()
    for i in range(4):
        brief.said(job, "progress", steps=[step(job, "a", index=i)])
        lease_ends(brief, job)
        assert brief.row(job, "lost_leases") == 1
        job = brief.next_job()


def test_a_poll_whose_client_vanished_before_swallows_nothing(bench: Bench) -> None:
    bench.said(bench.job(), "completed")
    with held_poll(bench.server, bench.name):
        pass
    (run_id,) = bench.server.emit(bench.name)["run_ids"]
    (job,) = bench.server.poll(bench.name, wait=10)  # its reservation would be 15 s
    assert job["run_id"] == run_id


def test_a_poll_whose_client_vanished_after_is_given_back(bench: Bench) -> None:
    bench.said(bench.job(), "completed")
    with held_poll(bench.server, bench.name) as poll:
        (run_id,) = bench.server.emit(bench.name)["run_ids"]
        assert poll.getresponse().status == 200  # its head was read, it was never acked
    (job,) = bench.server.poll(bench.name, wait=10)
    assert (job["run_id"], job["attempt"]) == (run_id, 1)


def test_many_polls_of_vanished_clients_swallow_nothing(bench: Bench) -> None:
    bench.said(bench.job(), "completed")
    for _ in range(5):
        with held_poll(bench.server, bench.name) as poll:
            assert poll.sock is not None
            linger = struct.pack("ii", 1, 0)  # close with a reset, as a dead machine's peer
            poll.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        bench.server.emit(bench.name)
    found = bench.server.poll(bench.name, 5)
    while len(found) < 5:
        found += bench.server.poll(bench.name, 5, wait=10)
    assert len({job["run_id"] for job in found}) == 5


def test_a_restart_extends_leases(tmp_path: Path) -> None:
    with serve(tmp_path, "--lease-seconds", "3600") as server:
        bench = Bench(server)
        job = bench.job()
        bench.said(job, "ack")
        before = bench.row(job, "lease_until")
        server.kill()
        server.start()
        eventually(lambda: bench.row(job, "lease_until") > before)
        assert server.tell(job, "completed") == (200, {"status": "ok"})


def test_a_server_away_for_longer_than_a_lease_takes_the_report(tmp_path: Path) -> None:
    with serve(tmp_path, "--lease-seconds", "2") as server:
        bench = Bench(server)
        job = bench.job()
        bench.said(job, "ack")
        server.kill()
        until = bench.row(job, "lease_until")
        eventually(lambda: time.time() > until)
        server.start()
        assert server.poll(bench.name, wait=0) == []  # nobody else is handed the run
        assert server.tell(job, "completed", output=1) == (200, {"status": "ok"})
        assert server.run(job["run_id"])["output"] == 1


def written(server: RunningServer) -> tuple[Any, ...]:
    """Whatever grows when the server writes to its disk."""
    assert server.process is not None
    io = Path(f"/proc/{server.process.pid}/io")
    found = re.search(r"^write_bytes: (\d+)", io.read_text(), re.M) if io.exists() else None
    sizes = [os.stat(f"{server.db}{suffix}").st_size for suffix in ("", "-wal")]
    return stored(server), sizes, found and found[1]


def test_heartbeats_and_empty_polls_write_nothing(server: RunningServer) -> None:
    bench = Bench(server)
    job = bench.job()
    bench.said(job, "ack")
    eventually(lambda: os.stat(f"{server.db}-wal").st_size == 0)  # folded in: it is idle
    before = written(server)
    for _ in range(200):
        beat(bench, job)
        assert bench.server.poll(bench.name, wait=0) == []
    assert written(server) == before
