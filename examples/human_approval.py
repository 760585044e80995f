"""A person decides: runs that wait for an event, for days if need be, as rows on disk.

    python examples/human_approval.py

Two claims wait for their decisions; the third is decided before its run has asked; for
the fourth nobody decides in time.

Prints:
exp_1 waits for expense.decided: ask the boss of ann
exp_2 waits for expense.decided: ask the boss of bob
the worker may go home meanwhile, and another one comes
exp_2: approved by carol
exp_1: rejected by carol
exp_3, decided before it asked: approved by dan
exp_4, which nobody decides: failed, WAIT_TIMEOUT
"""

import asyncio
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, Run, Worker, function

@function(id="expense", triggers=[{"event": "expense.filed"}])
async def expense(ctx: Context) -> str:
    data = ctx.event.data
    await ctx.step.run("check the receipt", lambda: data["total"] > 0)
    answer = await ctx.step.wait_for_event(
        "decision", event="expense.decided", match="id", timeout=data["patience"],
        payload=f"ask the boss of {data['who']}")
    return "{verdict} by {by}".format(**answer.data)

def claim(claim_id: str, who: str, patience: str = "7d") -> dict[str, Any]:
    return {"name": "expense.filed", "idempotency_key": claim_id,
            "data": {"id": claim_id, "who": who, "total": 120, "patience": patience}}

def decision(claim_id: str, verdict: str, by: str) -> dict[str, Any]:
    return {"name": "expense.decided",
            "data": {"id": claim_id, "verdict": verdict, "by": by}}

async def question(client: AsyncClient, filed: dict[str, Any]) -> str:
    """File a claim; what its run asks, once it waits."""
    (run_id,) = (await client.emit(**filed)).run_ids
    while not (asked := [s for s in await client.run_steps(run_id) if s.input]):
        await asyncio.sleep(0.02)
    return f"waits for {asked[0].wait_event_name}: {asked[0].input}"

async def end_of(client: AsyncClient, filed: dict[str, Any]) -> Run:
    """The same event under the same key is not another one: this waits for its run."""
    return (await client.emit_sync(**filed)).results[0]

async def main(folder: str) -> None:
    async with (ironflow.Server(db=Path(folder, "claims.db"), port=0) as server,
                AsyncClient(server.url) as client):
        one, two = claim("exp_1", "ann"), claim("exp_2", "bob")
        async with Worker([expense], server.url):
            for each in (one, two):
                print(each["data"]["id"], await question(client, each))
        print("the worker may go home meanwhile, and another one comes")
        async with Worker([expense], server.url):
            await client.emit(**decision("exp_2", "approved", "carol"))
            print("exp_2:", (await end_of(client, two)).output)
            await client.emit(**decision("exp_1", "rejected", "carol"))
            print("exp_1:", (await end_of(client, one)).output)
            three = claim("exp_3", "eve")
            await client.emit_many([three, decision("exp_3", "approved", "dan")])
            print("exp_3, decided before it asked:", (await end_of(client, three)).output)
            four = await end_of(client, claim("exp_4", "fay", patience="300ms"))
            print(f"exp_4, which nobody decides: {four.status}, {four.error['code']}")

if __name__ == "__main__":
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
