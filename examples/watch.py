"""Watching: what becomes of every run, as it is committed, and nothing is missed.

    python examples/watch.py

The watcher has no part in the work. It leaves in the middle, and the run goes on. When
it comes back it says how far it had come, and hears the rest, each message once.
`system.run.>` is all that happens to runs; `events:>` are events, `>` is everything.

Prints:
run created: waiting_for_capacity
run updated: running
step mix created: completed
step mix completed: completed
--- nobody watched, and there is a lemon cake ---
step heat created: failed
step heat failed: failed
run updated: waiting
run updated: waiting_for_capacity
run updated: running
step heat completed: completed
run completed: completed
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, StreamEvent, Worker, function


@function(id="bake", triggers=[{"event": "cake.ordered"}], retry={"initial_delay": 0.1})
async def bake(ctx: Context) -> str:
    async def heat() -> None:
        if ctx.run.attempt == 1:
            raise OSError("the oven is cold")
    await ctx.step.run("mix", lambda: asyncio.sleep(0))
    await ctx.step.run("heat", heat)
    return f"a {ctx.event.data} cake"


def told(event: StreamEvent) -> str:
    verb, data = event.topic.rpartition(".")[2], event.data  # system.run.<id>.<verb>
    who = f"step {data['name']}" if ".step." in event.topic else "run"
    return f"{who} {verb}: {data['status']}"


async def watch(client: AsyncClient, since: int, until: str) -> list[StreamEvent]:
    """What comes after `since`, up to that."""
    heard = []
    async with client.subscribe("system.run.>", since=since) as events:
        async for event in events:
            heard.append(event)
            if told(event) == until:
                break
    return heard


async def main(folder: str) -> None:
    async with (ironflow.Server(db=Path(folder, "cakes.db"), port=0) as server,
                Worker([bake], server.url), AsyncClient(server.url) as client):
        order = asyncio.create_task(client.emit_sync("cake.ordered", "lemon"))
        heard = await watch(client, 0, "step mix completed: completed")
        print(*map(told, heard), sep="\n")
        (run,) = (await order).results
        print(f"--- nobody watched, and there is {run.output} ---")
        rest = await watch(client, heard[-1].sequence, "run completed: completed")
        print(*map(told, rest), sep="\n")
        assert heard + rest == await watch(client, 0, "run completed: completed")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
