"""A job of a hundred checkpoints, whose worker is killed twice.

    python examples/long_job.py

Each page is a step: its result is on disk before the next begins. Pages that were
recorded when a worker was killed (SIGKILL) are not done again.

Prints:
worker 1 killed with page 30 in hand
worker 2 killed with page 70 in hand
worker 1 did pages 0 to 29
worker 2 did pages 30 to 69
worker 3 did pages 70 to 99
100 pages in the ledger, 0 of them twice
"""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

SERVER = Path(__file__).resolve().parent.parent / "ironflow.py"
sys.path.insert(0, str(SERVER.parent))  # runs from a copy

from ironflow_client import Client, Context, Worker, function  # noqa: E402

DIES_AT = {"1": 30, "2": 70}


def run_worker(url: str, folder: Path, me: str) -> None:
    @function(id="import", triggers=[{"event": "file.uploaded"}])
    def import_file(ctx: Context) -> int:
        def read(page: int) -> int:
            if page == DIES_AT.get(me):
                (folder / f"dies.{me}").touch()
                time.sleep(3600)  # killed in here
            with (folder / "ledger").open("a") as ledger:
                ledger.write(f"{me} {page}\n")
            return page
        return sum(ctx.step.run(f"page {n}", partial(read, n)) for n in range(100))

    Worker([import_file], url, heartbeat_interval=0.5).run()


def main(folder: Path) -> None:
    command = [sys.executable, str(SERVER), "--port=0", "--lease-seconds=1",
               f"--db={folder / 'job.db'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[4].rstrip(",")
        client, run_id = Client(url), ""
        for me in "123":
            worker = subprocess.Popen([sys.executable, __file__, url, str(folder), me])
            while not client.list_functions():
                time.sleep(0.02)
            run_id = run_id or client.emit("file.uploaded").run_ids[0]
            dies = folder / f"dies.{me}"
            while not (dies.exists() or client.get_run(run_id).ended_at):
                time.sleep(0.02)
            worker.kill()
            if dies.exists():
                print(f"worker {me} killed with page {DIES_AT[me]} in hand")
        server.terminate()
    done = [line.split() for line in (folder / "ledger").read_text().splitlines()]
    for me in "123":
        pages = [page for who, page in done if who == me]
        print(f"worker {me} did pages {pages[0]} to {pages[-1]}")
    doubled = len(done) - len({page for _, page in done})
    print(f"{len(done)} pages in the ledger, {doubled} of them twice")


if __name__ == "__main__":
    if sys.argv[1:]:
        run_worker(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
