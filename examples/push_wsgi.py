"""A function behind a URL, in a WSGI app, to which the server posts runs.

    python examples/push_wsgi.py

`serve_wsgi` makes an app for any WSGI server; this one is the standard library's. No
worker: the server posts a run, the answer says what was done and what to wait for. Both
share a key; what is not signed with it is turned away.

Prints:
a post that nobody signed: 401 Unauthorized
attempt 1: reserve
attempt 1: charge fails
attempt 2: charge
attempt 2: ship, after a sleep
completed: 'ord_1 is on its way', in 3 posts
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, make_server

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

import ironflow
from ironflow_client import AsyncClient, Context, function, serve_wsgi

KEY = "both sides know this"  # in real life: IRONFLOW_SIGNING_KEY, on both sides
posts: set[str] = set()


@function(id="process-order", triggers=[{"event": "order.placed"}],
          retry={"initial_delay": "10ms"})
def process_order(ctx: Context) -> str:
    def do(what: str, fails: bool = False) -> None:
        print(f"attempt {ctx.run.attempt}: {what}{' fails' * fails}")
        if fails:
            raise ConnectionError("the card reader is busy")

    ctx.step.run("reserve", lambda: do("reserve"))
    ctx.step.run("charge", lambda: do("charge", fails=ctx.run.attempt == 1))
    ctx.step.sleep("let it be packed", "200ms")
    ctx.step.run("ship", lambda: do("ship, after a sleep"))
    return f"{ctx.event.data} is on its way"


class Handler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        posts.add(self.headers.get("Idempotency-Key", "unsigned"))


async def main(folder: str) -> None:
    app = serve_wsgi([process_order], signing_key=KEY)
    with make_server("127.0.0.1", 0, app, handler_class=Handler) as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{endpoint.server_port}/ironflow"
        try:
            await asyncio.to_thread(urlopen, url, b"{}")
        except HTTPError as refused:
            print("a post that nobody signed:", refused.code, refused.reason)
        async with (ironflow.Server(db=Path(folder, "push.db"), port=0, signing_key=KEY)
                    as server, AsyncClient(server.url) as client):
            await client.register([process_order], endpoint_url=url)
            (run,) = (await client.emit_sync("order.placed", "ord_1")).results
            print(f"{run.status}: {run.output!r}, in {len(posts) - 1} posts")
        endpoint.shutdown()


if __name__ == "__main__":
    logging.getLogger("ironflow").setLevel("CRITICAL")  # the failure is staged
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
