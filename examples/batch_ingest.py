"""A CSV goes in by arrays; the program dies half way, runs again, and doubles nothing.

    python examples/batch_ingest.py

Each row has a key made of what it is, not of when it was sent. So the program need not
remember how far it came: it sends all of it again, and the server keeps what is new. An
array is accepted all or nothing, in one commit.

Prints:
readings.csv has 2500 rows
first run: exit status 1, 1500 events on disk
second run: exit status 0, 2500 rows sent
event_names: reading.taken 2500
events: 2500 different rows, the newest 2500, the oldest 1
events of sensor s7: 250
"""

from __future__ import annotations

import asyncio
import csv
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Client


def ingest(url: str, path: Path, dies_after: int) -> None:
    """The program. It dies where the example wants it to."""
    with path.open(newline="") as file, Client(url) as client:
        events = [{"name": "reading.taken", "data": row,
                   "idempotency_key": f"{path.name}:{row['row']}"}
                  for row in csv.DictReader(file)]
        for at in range(0, len(events), 500):
            if at == dies_after:
                os._exit(1)  # no goodbye
            client.emit_many(events[at:at + 500])


async def run_program(url: str, path: Path, dies_after: int) -> int:
    command = [sys.executable, __file__, url, str(path), str(dies_after)]
    return await (await asyncio.create_subprocess_exec(*command)).wait()


async def main(path: Path) -> None:
    async with (ironflow.Server(db=path.with_suffix(".db"), port=0) as server,
                AsyncClient(server.url) as client):
        status = await run_program(server.url, path, dies_after=1500)
        (known,) = await client.event_names()
        print(f"first run: exit status {status}, {known.count} events on disk")
        status = await run_program(server.url, path, dies_after=-1)
        print(f"second run: exit status {status}, 2500 rows sent")

        (known,) = await client.event_names()
        print("event_names:", known.name, known.count)
        rows = [int(event.data["row"]) async for event in client.events()]
        print(f"events: {len(set(rows))} different rows, the newest {rows[0]}, "
              f"the oldest {rows[-1]}")
        found = [event async for event in client.events(search='"s7"')]
        print("events of sensor s7:", len(found))


if __name__ == "__main__":
    if sys.argv[1:]:
        ingest(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, "readings.csv")
            lines = [f"{n},s{n % 10},{20 + n % 7}\n" for n in range(1, 2501)]
            made.write_text("row,sensor,celsius\n" + "".join(lines))
            print(f"readings.csv has {len(lines)} rows")
            asyncio.run(main(made))
