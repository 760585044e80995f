"""What a web handler does with durable functions whose answers it wants now.

    python examples/sync_call.py

It emits an event and waits for what it starts; it invokes functions; it meets one that
takes too long. That run goes on: who asks later with the same key gets its answer.

Prints:
POST /quotes: price says 30, stock says 'plenty'
POST /prices: 7
POST /payments: 402, the card was declined
POST /reports: 202, ask again later
GET /reports: 200, 'all is well', by the same run
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, InvokeError, Worker, function

printer_is_free = asyncio.Event()


@function(id="price", triggers=[{"event": "quote.wanted"}])
async def price(ctx: Context) -> object:
    return await ctx.step.run("add up", lambda: sum(ctx.event.data))


@function(id="stock", triggers=[{"event": "quote.wanted"}])
def stock(ctx: Context) -> object:
    return ctx.step.run("look", lambda: "plenty" if max(ctx.event.data) < 99 else "few")


@function(id="pay", retry={"max_attempts": 1})
def pay(ctx: Context) -> None:
    raise ValueError("the card was declined")


@function(id="print", triggers=[{"event": "report.wanted"}])
async def print_report(ctx: Context) -> object:
    return await ctx.step.run("print", printer_is_free.wait) and "all is well"


async def main(folder: str) -> None:
    functions = [price, stock, pay, print_report]
    async with (ironflow.Server(db=Path(folder, "sync.db"), port=0) as server,
                Worker(functions, server.url), AsyncClient(server.url) as client):
        runs = (await client.emit_sync("quote.wanted", [10, 20])).results
        said = sorted(f"{run.function_id} says {run.output!r}" for run in runs)
        print("POST /quotes:", ", ".join(said))
        print("POST /prices:", await client.invoke("price", [3, 4]))
        try:
            await client.invoke("pay")
        except InvokeError as error:
            print(f"POST /payments: 402, {error.cause}")

        ask = partial(client.emit_sync, "report.wanted", idempotency_key="today")
        early = await ask(timeout="50ms")
        assert early.results[0].wait_timed_out
        print("POST /reports: 202, ask again later")
        printer_is_free.set()
        late = await ask()
        assert late.run_ids == early.run_ids
        print(f"GET /reports: 200, {late.results[0].output!r}, by the same run")


if __name__ == "__main__":
    logging.getLogger("ironflow").setLevel("CRITICAL")  # the failure is staged
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
