"""Functions behind a URL, in an ASGI app, to which the server posts runs.

    python examples/push_asgi.py

`serve` makes an app for any ASGI server, or to be mounted: in FastAPI it would be
`app.mount("/ironflow", serve([quote, look_up]))`. Here the few lines of `over_aiohttp`
run it. Async handlers share its loop: each look-up here waits until ten are under way.

Prints:
10 look-ups were under way at once: [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, function, serve

KEY = "both sides know this"
ten_are_here = asyncio.Barrier(10)


@function(id="quote", triggers=[{"event": "quote.wanted"}])
async def quote(ctx: Context) -> object:
    return await ctx.step.invoke("look-up", ctx.event.data)


@function(id="look-up")
async def look_up(ctx: Context) -> int:
    await ctx.step.run("wait", ten_are_here.wait)
    return int(ctx.event.data**2)


async def over_aiohttp(app: Any) -> tuple[web.ServerRunner, str]:
    async def handle(request: web.BaseRequest) -> web.Response:
        asked = [{"type": "http.request", "body": await request.read()}]
        reply: dict[str, Any] = {}

        async def receive() -> Any:
            return asked.pop() if asked else await asyncio.Event().wait()  # it stays

        async def send(message: Any) -> None:
            reply.update(message)

        head = [(name.lower(), value) for name, value in request.raw_headers]
        await app({"type": "http", "method": request.method, "headers": head},
                  receive, send)
        return web.Response(status=reply["status"], body=reply["body"])

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/ironflow"


async def main(folder: str) -> None:
    endpoint, url = await over_aiohttp(serve([quote, look_up], signing_key=KEY))
    async with (ironflow.Server(db=Path(folder, "push.db"), port=0, signing_key=KEY)
                as server, AsyncClient(server.url) as client):
        await client.register([quote, look_up], endpoint_url=url)
        done = await asyncio.gather(
            *(client.emit_sync("quote.wanted", n) for n in range(10)))
        prices = [one.results[0].output for one in done]
        print("10 look-ups were under way at once:", prices)
    await endpoint.cleanup()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
