"""Runs that wait for people: for one, for two at once, and for one who was too early.

    python examples/human_approval.py

Each expense is a run that waits for an answer about itself, which costs no worker. Some
wait for two people, in branches. An answer that came before the question is found.

Prints:
lunch: waits for boss
laptop: waits for boss, finance
train: paid, as boss said
lunch: refused by boss
laptop: paid, as boss and finance said
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, Step, Worker, function


@function(id="expense", triggers=[{"event": "expense.filed"}])
async def expense(ctx: Context) -> str:
    people = ctx.event.data["people"]

    async def ask(who: str, step: Step, index: int) -> bool:
        answer = await step.wait_for_event(who, event=f"answer.{who}", match="expense")
        return bool(answer.data["yes"])

    answers = await ctx.step.map("ask", people, ask)
    if not all(answers):
        return f"refused by {people[answers.index(False)]}"
    return f"paid, as {' and '.join(people)} said"


async def becomes(client: AsyncClient, run_id: str, status: str) -> object:
    while (run := await client.get_run(run_id)).status != status:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return run.output


async def main(folder: str) -> None:
    async with (ironflow.Server(db=Path(folder, "money.db"), port=0) as server,
                AsyncClient(server.url) as client):
        async def file(name: str, *people: str) -> str:
            filed = {"expense": name, "people": people}
            return (await client.emit("expense.filed", filed)).run_ids[0]

        async def answer(who: str, name: str, yes: bool = True) -> None:
            await client.emit(f"answer.{who}", {"expense": name, "yes": yes})

        async with Worker([expense], server.url):
            lunch = await file("lunch", "boss")
            laptop = await file("laptop", "boss", "finance")
            for name, run_id in (("lunch", lunch), ("laptop", laptop)):
                await becomes(client, run_id, "waiting")
                steps = await client.run_steps(run_id)
                print(f"{name}: waits for {', '.join(step.name for step in steps)}")
        train = await file("train", "boss")  # no worker is there: nobody asks yet
        await answer("boss", "train")
        async with Worker([expense], server.url):
            print("train:", await becomes(client, train, "completed"))
            await answer("finance", "laptop")
            await answer("boss", "lunch", False)
            print("lunch:", await becomes(client, lunch, "completed"))
            await answer("boss", "laptop")
            print("laptop:", await becomes(client, laptop, "completed"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
