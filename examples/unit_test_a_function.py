"""Unit tests of a durable function: no server, no worker, no waiting.

    python examples/unit_test_a_function.py

`run_inline` runs the handler as a worker does, and returns what a server would have
recorded. A test hands in what comes of the steps that must not really happen, or a
function to be called instead of theirs. Sleeps are recorded and skipped. The tests are
plain functions, as pytest collects them.

Prints:
a paid order is shipped after a day: ok
a declined card ends the order: ok
a bank that is away is asked again: ok
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a copy

from ironflow_client import Context, NonRetryableError, function, run_inline

ORDER = {"id": "ord_1", "total": 99.99}


def charge(total: float) -> dict[str, str]:
    raise AssertionError("no test may charge a real card")


@function(id="process-order", triggers=[{"event": "order.placed"}])
async def process_order(ctx: Context) -> object:
    order = ctx.event.data
    payment = await ctx.step.run("charge", lambda: charge(order["total"]))
    await ctx.step.sleep("let it be packed", "1d")
    return await ctx.step.run("ship", lambda: f"{order['id']} paid by {payment['id']}")


def test_a_paid_order_is_shipped_after_a_day() -> None:
    run = run_inline(process_order, ORDER, steps={"charge": {"id": "pay_1"}})
    assert (run.status, run.output) == ("completed", "ord_1 paid by pay_1")
    assert [step.name for step in run.steps] == ["charge", "let it be packed", "ship"]
    assert run.steps[1].step_type == "sleep"


def test_a_declined_card_ends_the_order() -> None:
    def declined() -> None:
        raise NonRetryableError("insufficient funds")

    run = run_inline(process_order, ORDER, steps={"charge": declined}, attempts=3)
    assert (run.status, run.error["message"]) == ("failed", "insufficient funds")
    assert (run.attempt, len(run.steps)) == (1, 1)


def test_a_bank_that_is_away_is_asked_again() -> None:
    calls: list[str] = []

    def bank() -> object:
        calls.append("charge")
        if len(calls) == 1:
            raise ConnectionError("no route to the bank")
        return {"id": "pay_2"}

    run = run_inline(process_order, ORDER, steps={"charge": bank}, attempts=2)
    assert (run.output, run.attempt) == ("ord_1 paid by pay_2", 2)
    assert calls == ["charge", "charge"]


if __name__ == "__main__":
    logging.getLogger("ironflow").setLevel("CRITICAL")  # the failures are staged
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"{name.removeprefix('test_').replace('_', ' ')}: ok")
