"""A web app with a worker inside: one process takes the requests and does the work.

    python examples/embedded.py

`async with worker` starts it with the app, and lets its jobs end when the app stops. In
FastAPI the same three lines are the `lifespan`; WSGI apps `worker.start_in_thread()`.

Prints:
POST /orders: 202, accepted
GET /orders/ord_1: 200, packed
POST /orders: 202, accepted
GET /orders/ord_2: 200, in hand
the app has stopped; ord_2 is packed
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, Worker, function

states: dict[str, str] = {}  # what the pages show


@function(id="pack", triggers=[{"event": "order.placed"}])
async def pack(ctx: Context) -> None:
    states[ctx.event.data] = "in hand"
    await ctx.step.run("pack", lambda: asyncio.sleep(0.2))
    states[ctx.event.data] = "packed"


def make_app(server_url: str) -> web.Application:
    client, worker = AsyncClient(server_url), Worker([pack], server_url)

    async def lifespan(app: web.Application) -> AsyncIterator[None]:
        async with worker, client:
            yield

    async def place(request: web.Request) -> web.Response:
        await client.emit("order.placed", await request.text())
        return web.Response(text="accepted", status=202)

    async def show(request: web.Request) -> web.Response:
        return web.Response(text=states.get(request.match_info["order"], "?"))

    app = web.Application()
    app.add_routes([web.post("/orders", place), web.get("/orders/{order}", show)])
    app.cleanup_ctx.append(lifespan)
    return app


async def main(folder: str) -> None:
    async with ironflow.Server(db=Path(folder, "app.db"), port=0) as server:
        async with TestClient(TestServer(make_app(server.url))) as browser:
            async def ask(method: str, path: str, data: str = "") -> str:
                answer = await browser.request(method, path, data=data)
                return f"{method} {path}: {answer.status}, {await answer.text()}"

            for order, state in ("ord_1", "packed"), ("ord_2", "in hand"):
                print(await ask("POST", "/orders", order))
                while state not in (page := await ask("GET", f"/orders/{order}")):
                    pass
                print(page)
        print("the app has stopped; ord_2 is", states["ord_2"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
