from __future__ import annotations

import asyncio

import pytest

from headrace.errors import RequestAbortedError
from services.router.generation import OutputPiece
from services.router.http.prompt_batch import PromptBatch
from tests.patience import NEVER_S
from tests.unit.router.fake_engine import FakeStream


async def test_choices_are_numbered_prompt_by_prompt() -> None:
    scripts = [[OutputPiece("a", (1,), "stop", 1), OutputPiece("b", (2,), "stop", 0)] for _ in range(2)]
    batch = PromptBatch([FakeStream(script) for script in scripts], num_choices=2)
    assert sorted([(await batch.next()).choice for _ in range(4)]) == [0, 1, 2, 3]
    with pytest.raises(RequestAbortedError):
        await batch.next()


async def test_a_reader_that_waits_is_told_when_the_client_leaves() -> None:
    streams = [FakeStream([NEVER_S]), FakeStream([NEVER_S])]
    batch = PromptBatch(streams, num_choices=1)
    reader = asyncio.create_task(batch.next())
    await asyncio.sleep(0)
    batch.close()
    with pytest.raises(RequestAbortedError):
        await reader
    assert [stream.num_closes for stream in streams] == [1, 1]


async def test_a_prompt_that_has_ended_is_closed_when_its_reader_is_back() -> None:
    streams = [FakeStream([OutputPiece("a", (1,), "stop")]), FakeStream([NEVER_S])]
    batch = PromptBatch(streams, num_choices=1)
    assert (await batch.next()).text == "a"
    assert streams[0].num_closes == 0, "its last piece is still to be sent: who watches slow clients must see that"
    reader = asyncio.create_task(batch.next())
    await asyncio.sleep(0)
    assert [stream.num_closes for stream in streams] == [1, 0]
    batch.close()
    with pytest.raises(RequestAbortedError):
        await reader
