"""The count of open requests, and who waits for it to change."""

from __future__ import annotations

import asyncio

from services.router.admission import Admission
from services.router.gateway import Turnstile
from tests.virtual_time import virtual_time


@virtual_time
async def test_the_first_request_in_and_the_last_one_out_are_waited_for() -> None:
    turnstile = Turnstile(Admission(10))
    await turnstile.wait_idle()
    busy = asyncio.create_task(turnstile.wait_busy())
    await asyncio.sleep(1)
    assert not busy.done()
    turnstile.enter(0, 3)
    await busy
    idle = asyncio.create_task(turnstile.wait_idle())
    turnstile.leave(0, 2)
    await asyncio.sleep(1)
    assert not idle.done()
    await turnstile.wait_busy()
    turnstile.leave(0)
    await idle
    busy = asyncio.create_task(turnstile.wait_busy())
    await asyncio.sleep(1)
    assert not busy.done()
    busy.cancel()
