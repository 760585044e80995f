"""A journey that cannot be booked as a whole is given back, newest part first.

    python examples/saga.py

Flight and hotel are booked, the rental car is not to be had. The run fails for good, so
the undo of each completed step is called: each is a recorded step, and never twice. One
of them fails; it is told in the run's error, and the others are called all the same.

Prints:
book flight
book hotel
book insurance
the car: none left
undo insurance
undo hotel: the hotel does not answer
undo flight
failed: none left; 'hotel' is not undone: the hotel does not answer
  flight               completed
  hotel                completed
  insurance            completed
  car                  failed
  compensate:          completed
  compensate:insurance completed
  compensate:hotel     failed
  compensate:flight    completed
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
from ironflow_client import AsyncClient, Context, NonRetryableError, Worker, function


def book(what: str) -> None:
    if what == "car":
        print("the car: none left")
        raise NonRetryableError("none left", "SOLD_OUT")
    print(f"book {what}")


def give_back(what: str) -> None:
    if what == "hotel":
        print("undo hotel: the hotel does not answer")
        raise ConnectionError("the hotel does not answer")
    print(f"undo {what}")


@function(id="journey", triggers=[{"event": "journey.wanted"}])
async def journey(ctx: Context) -> None:
    for what in ctx.event.data:
        await ctx.step.run(what, partial(book, what))
        ctx.step.compensate(what, partial(give_back, what))


async def main(folder: str) -> None:
    async with (ironflow.Server(db=Path(folder, "saga.db"), port=0) as server,
                Worker([journey], server.url), AsyncClient(server.url) as client):
        wanted = ["flight", "hotel", "insurance", "car", "guide"]
        (run,) = (await client.emit_sync("journey.wanted", wanted)).results
        print(f"{run.status}: {run.error['message']}")
        for step in await client.run_steps(run.run_id):
            print(f"  {step.name:20} {step.status}")


if __name__ == "__main__":
    logging.getLogger("ironflow").setLevel("CRITICAL")  # the failures are staged
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
