"""What time starts: a function each second, and one that waits until nobody types.

    python examples/schedule.py

A cron expression has five fields, or six with the seconds first, in UTC. The next tick
is in the journal: none is doubled, and the server may restart. The debounced function
runs once for five edits, with the last of them, a second after it.

Prints:
tick 1 is a whole second
tick 2 is another second
tick 3 is another second
5 edits, no run yet
saved 'Hello', 1 run
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, Worker, function

ticks: asyncio.Queue[datetime] = asyncio.Queue()
saved: asyncio.Queue[str] = asyncio.Queue()


@function(id="every-second", triggers=[{"cron": "* * * * * *"}])
async def every_second(ctx: Context) -> None:
    await ticks.put(datetime.fromisoformat(ctx.event.data["scheduled_at"]))


@function(id="save", triggers=[{"event": "text.edited"}],
          debounce={"period": "1s", "key": "file", "max_wait": "1m"})
async def save(ctx: Context) -> None:
    await saved.put(ctx.event.data["text"])


async def main(folder: str) -> None:
    async with (ironflow.Server(db=Path(folder, "time.db"), port=0) as server,
                Worker([every_second, save], server.url),
                AsyncClient(server.url) as client):
        first = await ticks.get()
        assert first.microsecond == 0
        print("tick 1 is a whole second")
        seen = {first}
        for n in (2, 3):
            tick = await ticks.get()
            assert tick not in seen
            seen.add(tick)
            print(f"tick {n} is another second")

        edits = [{"name": "text.edited", "data": {"file": "a", "text": "Hello"[:end]}}
                 for end in range(1, 6)]
        assert not any(edit.run_ids for edit in await client.emit_many(edits))
        print("5 edits, no run yet")
        text = await saved.get()
        runs = await client.list_runs(function_id="save")
        print(f"saved {text!r}, {len(runs)} run")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
