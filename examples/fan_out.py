"""One run that works in branches, three at a time, and calls other functions.

    python examples/fan_out.py

Each branch has steps of its own, which are recorded one by one: a crash repeats none of
them. One region's child fails for good; with on_error="collect" the others go on, and
its error stands in the place of its result.

Prints:
north: 3 orders, 60 euros
east: no report, the till is broken
south: 1 orders, 5 euros
west: 2 orders, 30 euros
at most 3 branches at a time
4 children, each of them knows its parent
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, InvokeError, Step, Worker, function

SALES = {"north": [10, 20, 30], "east": None, "south": [5], "west": [15, 15]}
at_work, most = set[str](), list[int]()


async def look_up(region: str) -> object:
    at_work.add(region)
    most.append(len(at_work))
    await asyncio.sleep(0.01)
    at_work.remove(region)
    return SALES[region]


@function(id="sum-up", retry={"max_attempts": 1})
async def sum_up(ctx: Context) -> str:
    if ctx.event.data is None:
        raise ValueError("the till is broken")
    return f"{len(ctx.event.data)} orders, {sum(ctx.event.data)} euros"


@function(id="report", triggers=[{"event": "day.over"}])
async def report(ctx: Context) -> list[object]:
    async def of_region(region: str, step: Step, index: int) -> object:
        sales = await step.run("look up", lambda: look_up(region))
        return await step.invoke(sum_up, sales)

    found = await ctx.step.map("regions", ctx.event.data, of_region, concurrency=3,
                               on_error="collect")
    return [f"no report, {one.cause}" if isinstance(one, InvokeError) else one
            for one in found]


async def main(folder: str) -> None:
    async with (ironflow.Server(db=Path(folder, "sales.db"), port=0) as server,
                Worker([report, sum_up], server.url),
                AsyncClient(server.url) as client):
        (run,) = (await client.emit_sync("day.over", list(SALES))).results
        for region, said in zip(SALES, run.output, strict=True):
            print(f"{region}: {said}")
        print(f"at most {max(most)} branches at a time")
        children = await client.list_runs(function_id="sum-up")
        assert {child.parent_run_id for child in children} == {run.run_id}
        print(f"{len(children)} children, each of them knows its parent")


if __name__ == "__main__":
    logging.getLogger("ironflow").setLevel("CRITICAL")  # the failure is staged
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
