"""Three orders, one worker killed in the middle of the second, nothing done twice.

    python examples/quickstart.py

A server with a journal in a temporary folder; a worker in a process of its own, with a
function of three steps. Each step's body writes a line to a ledger file: that is the
outside world, which sees what was really done. Worker 1 is killed with SIGKILL while it
charges ord_2, worker 2 takes over. `reserve` was recorded, so it does not run again;
`charge` had not been, so it does.

Prints:
emitted ord_1, ord_2, ord_3
worker 1 killed while it charged ord_2
worker 2 started
ord_1 completed: reserve by 1, charge by 1, ship by 1
ord_2 completed: reserve by 1, charge by 2, ship by 2
ord_3 completed: reserve by 2, charge by 2, ship by 2
9 steps recorded, 9 lines in the ledger, none of them twice
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that it runs from a bare copy, too

from ironflow_client import Client, Context, Worker, function  # noqa: E402


def run_worker(url: str, ledger: Path, me: str) -> None:
    """A worker as anybody would write it, but for the ledger and the staged accident."""

    @function(id="process-order", triggers=[{"event": "order.placed"}])
    def process_order(ctx: Context) -> str:
        order = ctx.event.data["orderId"]

        def do(what: str) -> str:
            if (order, what, me) == ("ord_2", "charge", "1"):
                ledger.with_suffix(".charging").touch()
                time.sleep(3600)  # killed in here
            with ledger.open("a") as book:
                book.write(f"{order} {what} by {me}\n")
            return f"{what} done by {me}"

        for what in ("reserve", "charge", "ship"):
            ctx.step.run(what, partial(do, what))
        return f"{order} is on its way"

    Worker([process_order], server_url=url, max_concurrent_jobs=1,
           heartbeat_interval=0.5).run()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, start_server(Path(folder)) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[4].rstrip(",")
        ledger = Path(folder, "ledger")
        first = start_worker(url, ledger, "1")
        client = Client(url)
        wait_until(client.list_functions)  # an event starts the functions known by then
        orders = {order: client.emit("order.placed", {"orderId": order})
                  for order in ("ord_1", "ord_2", "ord_3")}
        print("emitted", ", ".join(orders))

        wait_until(ledger.with_suffix(".charging").exists)
        first.kill()
        first.wait()
        print("worker 1 killed while it charged ord_2")

        second = start_worker(url, ledger, "2")
        print("worker 2 started")
        for order, event in orders.items():
            (run_id,) = event.run_ids
            wait_until(partial(has_ended, client, run_id))
            done = [step.output.replace("done ", "") for step in client.run_steps(run_id)]
            print(f"{order} {client.get_run(run_id).status}: {', '.join(done)}")
        second.terminate()
        second.wait()
        server.terminate()

        lines = ledger.read_text().splitlines()
        steps_done = {line.partition(" by ")[0] for line in lines}
        assert len(steps_done) == len(lines), lines
        print(f"9 steps recorded, {len(lines)} lines in the ledger, none of them twice")


def start_server(folder: Path) -> subprocess.Popen[str]:
    """On a free port; a short lease, so that the killed worker is missed soon."""
    command = [sys.executable, str(HERE.parent / "ironflow.py"), "--port", "0"]
    command += ["--db", str(folder / "orders.db"), "--lease-seconds", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def start_worker(url: str, ledger: Path, me: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, url, str(ledger), me])


def has_ended(client: Client, run_id: str) -> bool:
    return client.get_run(run_id).status in ("completed", "failed")


def wait_until(ready: Callable[[], object]) -> None:
    while not ready():
        time.sleep(0.02)


if __name__ == "__main__":
    if sys.argv[1:]:
        run_worker(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        main()
