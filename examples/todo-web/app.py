"""A list of todos that works on itself, on a page that is live.

    python examples/todo-web/app.py      # then open http://localhost:8080, twice

Each todo is a run: a function reads it, estimates it, plans it, waits for the day when
you tick it off, and forgets it a day later. The page follows the journal: `follow`
hears what becomes of the runs, and the browser asks `/stream` for all todos that
changed since the last one it saw. So a reload, a second window, a lost connection and a
kill -9 of all of this are one case: go on after that number.

The browser talks to this app and not to ironflow, which therefore needs no open port
and no key in a page, and the app decides what a visitor may see.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, StreamEvent, Worker, function

CLIENT = web.AppKey("CLIENT", AsyncClient)
KINDS = {"talk": "call phone mail ask invite", "shop": "buy order get", "desk":
         "read write learn pay", "home": "clean fix paint water cook wash"}


@function(id="todo", triggers=[{"event": "todo.added"}],
          cancel_on=[{"event": "todo.dropped", "match": "id"}])
async def todo(ctx: Context) -> None:
    words = ctx.event.data["text"].lower().split()

    async def think(answer: str) -> str:
        await asyncio.sleep(random.uniform(0.6, 1.2))  # stands for what takes its time
        return answer

    kinds = [kind for kind, verbs in KINDS.items() if {*words} & {*verbs.split()}]
    await ctx.step.run("read", lambda: think((kinds or ["other"])[0]))
    await ctx.step.run("estimate", lambda: think(f"{5 * min(12, 1 + len(words))} min"))
    day = "tomorrow" if "tomorrow" in words else "today"
    hour = random.choice(("at ten", "after lunch", "at four"))  # whatever it is, the
    await ctx.step.run("plan", lambda: think(f"{day} {hour}"))  # recorded one counts
    await ctx.step.wait_for_event("done", event="todo.done", match="id", timeout="365d")
    await ctx.step.sleep("keep it a day", "1d")


class Board:
    """The todos as the journal tells them, each with the `seq` of its last change."""

    def __init__(self) -> None:
        self.todos: dict[str, dict[str, Any]] = {}
        self.bell = asyncio.Event()

    def follow(self, event: StreamEvent) -> None:
        _, _, run_id, what, *_ = event.topic.split(".")
        if what == "created" and event.data["functionId"] == "todo":
            self.todos[run_id] = {"run": run_id, "steps": {}, **event.data["input"]}
        if run_id not in self.todos:
            return
        known = self.todos[run_id]
        if what != "step":
            known["status"] = event.data["status"]
        elif event.data["status"] == "completed":
            known["steps"][event.data["name"]] = event.data.get("output")
        known["seq"] = event.sequence
        self.bell.set()
        self.bell = asyncio.Event()

    def since(self, seq: int) -> list[dict[str, Any]]:
        news = (known for known in self.todos.values() if known["seq"] > seq)
        return sorted(news, key=lambda known: int(known["seq"]))


def make_app(db: str) -> web.Application:
    board = Board()

    async def lifespan(app: web.Application) -> AsyncIterator[None]:
        limits = ironflow.Limits(lease_s=5)  # a killed worker is missed soon
        async with (ironflow.Server(db=db, port=0, limits=limits) as server,
                    Worker([todo], server.url, heartbeat_interval=1, drain_timeout=1),
                    AsyncClient(server.url) as app[CLIENT]):
            print(f'to watch: python ironflow.py subscribe -s {server.url} ">"')
            following = app[CLIENT].subscribe("system.run.>", since=0,
                                              on_event=board.follow)
            yield
            await following.unsubscribe()

    async def page(request: web.Request) -> web.FileResponse:
        return web.FileResponse(Path(__file__).with_name("index.html"))

    async def say(request: web.Request) -> web.Response:
        """An event; with the same id it is the same one, so the page may repeat it."""
        if request.content_type != "application/json":  # a form on somebody else's page
            raise web.HTTPUnsupportedMediaType
        what = request.match_info["what"]
        try:
            said = await request.json()
            data = {"id": str(said["id"]), "text": str(said.get("text", ""))[:200]}
        except (LookupError, TypeError, ValueError):
            raise web.HTTPBadRequest from None
        await request.app[CLIENT].emit(f"todo.{what}", data,
                                       idempotency_key=f"{what} {data['id']}")
        return web.Response(status=204)

    async def stream(request: web.Request) -> web.StreamResponse:
        """Server-sent events. A browser reconnects by itself and says where it was."""
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream",
                                             "Cache-Control": "no-store"})
        await answer.prepare(request)
        await answer.write(b"retry: 500\n\n")
        seen = int(request.headers.get("Last-Event-ID", 0))
        while True:
            bell = board.bell
            for known in board.since(seen):
                seen, text = known["seq"], json.dumps(known)
                await answer.write(f"id: {seen}\ndata: {text}\n\n".encode())
            try:
                await asyncio.wait_for(bell.wait(), 15)
            except TimeoutError:
                await answer.write(b": still here\n\n")

    app = web.Application()
    app.cleanup_ctx.append(lifespan)
    app.add_routes([web.get("/", page), web.get("/stream", stream),
                    web.post("/todo/{what:added|done|dropped}", say)])
    return app


if __name__ == "__main__":
    args = argparse.ArgumentParser(description="A list of todos that works on itself.")
    args.add_argument("--port", type=int, default=8080)
    args.add_argument("--db", default="todo.db")
    given = args.parse_args()
    web.run_app(make_app(given.db), host="localhost", port=given.port, access_log=None,
                shutdown_timeout=0.1, print=lambda banner: print(
                    f"todos: http://localhost:{given.port}", flush=True))
