"""A trip of four bookings, of which the third fails: what was booked is undone.

    python examples/saga.py

When the run fails for good the undos are called, newest first, each a recorded step.
One of them is staged to end its process: the next worker goes on from there.

Prints:
booked flight
booked hotel
cancelled hotel
the worker died; another one is here
cancelled flight
trip failed: no car is left
recorded: flight, hotel, compensate:, compensate:hotel, compensate:flight
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that it runs from a bare copy, too

from ironflow_client import Client, Context, NonRetryableError, Worker, function  # noqa: E402

def run_worker(url: str, again: bool) -> None:
    def book(what: str) -> str:
        if what == "car":
            raise NonRetryableError("no car is left")
        print("booked", what, flush=True)
        return f"{what}-7"

    def cancel(what: str) -> None:
        if what == "flight" and not again:
            os._exit(1)  # the accident
        print("cancelled", what, flush=True)

    @function(id="trip", triggers=[{"event": "trip.wanted"}])
    def trip(ctx: Context) -> None:
        for what in ("flight", "hotel", "car", "insurance"):
            ctx.step.run(what, partial(book, what))
            ctx.step.compensate(what, partial(cancel, what))

    logging.disable()
    Worker([trip], url, heartbeat_interval=0.5).run()

def main(folder: str) -> None:
    server = subprocess.Popen(
        [sys.executable, HERE.parent / "ironflow.py", "--port", "0", "--lease-seconds", "2",
         "--db", Path(folder, "trips.db")], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().split()[4].rstrip(",")
    worker, client = [sys.executable, __file__, url], Client(url)
    first = subprocess.Popen(worker)
    while not client.list_functions():
        time.sleep(0.02)  # an event starts the functions known by then
    client.emit("trip.wanted", idempotency_key="ann")
    first.wait()
    print("the worker died; another one is here", flush=True)
    second = subprocess.Popen([*worker, "again"])
    (run,) = client.emit_sync("trip.wanted", idempotency_key="ann").results
    print(f"trip {run.status}: {run.error['message']}")
    done = [s.name for s in client.run_steps(run.run_id) if s.status == "completed"]
    print("recorded:", ", ".join(done))
    for process in (second, server):
        process.terminate()
        process.wait()

if __name__ == "__main__":
    if sys.argv[1:]:
        run_worker(sys.argv[1], again=len(sys.argv) > 2)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
