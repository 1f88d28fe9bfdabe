"""OpenAI's Responses and Conversations APIs: whole, streamed, in the background, and what is remembered."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import InvalidRequestError, NotFoundError, RequestFailedError, RequestTooLargeError, UnavailableError
from services.router.generation import (
    ChatTurn,
    Constraint,
    ConversationPrompt,
    OutputPiece,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)
from services.router.http.app import HttpApp
from services.router.http.protocols import Protocols
from services.router.http.responses import shapes
from services.router.http.responses.claims import Claims
from services.router.http.responses.entries import HistoryLimits
from services.router.http.responses.history import History
from tests.patience import NEVER_S, WAIT_S
from tests.unit.router.fake_engine import FakeEngine
from tests.unit.router.http_client import LIMITS, Answer, ask, storage_settings

BOUNDS = HistoryLimits(max_entries=100, max_bytes=1_000_000, ttl_s=1000)
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


class Service:
    """Engine and application with everything they keep."""

    def __init__(self, *script: Any, path: str = ":memory:", bounds: HistoryLimits = BOUNDS) -> None:
        self.engine = FakeEngine(*script)
        self.protocols = Protocols(self.engine, storage_settings(history_path=path, history=bounds))
        self.app = HttpApp(self.engine, LIMITS, self.protocols.routes())

    async def create(self, **fields: Any) -> Answer:
        return await ask(self.app, "POST", "/v1/responses", {"model": "m", "input": "hi", **fields})

    async def get(self, path: str) -> Answer:
        return await ask(self.app, "GET", path)

    async def until(self, response_id: str, *statuses: str) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while True:
                found = (await self.get(f"/v1/responses/{response_id}")).json
                if found["status"] in statuses:
                    return found
                await asyncio.sleep(0.01)


@pytest.fixture
def made() -> Iterator[list[Service]]:
    services: list[Service] = []
    yield services
    for service in services:
        asyncio.run(service.protocols.stop())


@pytest.fixture
def service(made: list[Service]) -> Any:
    def make(*script: Any, **options: Any) -> Service:
        made.append(Service(*script, **options))
        return made[-1]

    return make


async def test_a_response_has_openais_shape(service: Any) -> None:
    here = service()
    answer = await here.create(instructions="be brief", metadata={"a": "b"})
    response = answer.json
    assert (response["object"], response["status"], response["model"]) == ("response", "completed", "m")
    assert response["output"] == [
        {
            "id": "msg_id000",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello!", "annotations": [], "logprobs": []}],
        }
    ]
    assert response["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 6,
    }
    assert here.engine.requests[0].prompt.turns == (ChatTurn("system", "be brief"), ChatTurn("user", "hi"))
    assert (await here.get(f"/v1/responses/{response['id']}")).json == response


PIECES = [
    OutputPiece("", (1,), reasoning="so"),
    OutputPiece("a", (2,), reasoning=" it is"),
    OutputPiece("b", (3,)),
    OutputPiece("", (4,), tool_calls=(ToolCallDelta(0, id="call_1", name="weather"), ToolCallDelta(0, '{"city": '))),
    OutputPiece("", (5,), tool_calls=(ToolCallDelta(0, '"Rome"}'), ToolCallDelta(1, "{}", "call_2", "weather"))),
    OutputPiece("", (), "tool_calls"),
]


async def test_a_stream_makes_the_same_response_as_the_whole_answer(service: Any) -> None:
    whole = (await service(*PIECES).create(tools=[WEATHER])).json
    answer = await service(*PIECES).create(tools=[WEATHER], stream=True)
    events = [event for _, event in answer.events]
    assert [name for name, _ in answer.events] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    final = events[-1]["response"]
    assert final["output"] == whole["output"]
    items: dict[int, dict[str, Any]] = {}
    for event in events[2:-1]:
        index = event["output_index"]
        if event["type"] == "response.output_item.added":
            assert index == len(items)
            items[index] = {**event["item"], "text": ""}
        elif event["type"].endswith(".delta"):
            items[index]["text"] += event["delta"]
        elif event["type"].endswith(("text.done", "arguments.done")):
            assert items[index]["text"] == event.get("text", event.get("arguments"))
        elif event["type"] == "response.output_item.done":
            assert event["item"] == whole["output"][index]
            assert event["item"]["id"] == items[index]["id"]
    assert [item["type"] for item in items.values()] == ["reasoning", "message", "function_call", "function_call"]
    assert [items[index]["text"] for index in range(4)] == ["so it is", "ab", '{"city": "Rome"}', "{}"]


async def test_an_output_cut_by_its_length_is_incomplete(service: Any) -> None:
    answer = await service(OutputPiece("a", (1,), "length")).create(max_output_tokens=1, stream=True)
    assert answer.events[-1][0] == "response.incomplete"
    response = answer.events[-1][1]["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"


async def test_an_error_in_a_stream_is_a_failed_response(service: Any) -> None:
    answer = await service(OutputPiece("a", (1,)), RequestFailedError("broke")).create(stream=True)
    name, event = answer.events[-1]
    assert (name, event["response"]["error"]) == ("response.failed", {"code": "server_error", "message": "broke"})
    assert answer.is_done
    refused = await service(UnavailableError("none")).create(stream=True)
    assert (refused.status, refused.json["error"]["code"]) == (503, "unavailable")


async def test_logprobs_are_told_where_they_are_included(service: Any) -> None:
    pieces = [OutputPiece("é", (1,), "stop", logprobs=(TokenLogprob(1, "é".encode(), -0.5),))]
    here = service(*pieces)
    response = (await here.create(include=["message.output_text.logprobs"], top_logprobs=2)).json
    assert response["output"][0]["content"][0]["logprobs"] == [
        {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": []}
    ]
    assert here.engine.requests[0].logprobs == 2


def token(text: str) -> tuple[TokenLogprob, ...]:
    return (TokenLogprob(1, text.encode(), -0.5),)


async def test_logprobs_of_tokens_whose_text_comes_later_are_told_streamed_or_not(service: Any) -> None:
    pieces = [
        OutputPiece("", (1,), logprobs=token("t"), reasoning="t"),
        OutputPiece("", (2,), logprobs=token("x")),
        OutputPiece("xy", (3,), logprobs=token("y")),
        OutputPiece("", (4,), logprobs=token("<call>")),
        OutputPiece("", (5,), tool_calls=(ToolCallDelta(0, "{}", "call_1", "weather"),), logprobs=token("{}")),
        OutputPiece("", (6,), "tool_calls", logprobs=token("<end>")),
    ]
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 0, "tools": [WEATHER]}
    whole = (await service(*pieces).create(**asked)).json
    (message,) = [item for item in whole["output"] if item["type"] == "message"]
    assert [one["token"] for one in message["content"][0]["logprobs"]] == ["t", "x", "y", "<call>", "{}"]
    events = [event for _, event in (await service(*pieces).create(stream=True, **asked)).events]
    assert events[-1]["response"]["output"] == whole["output"]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [[one["token"] for one in event["logprobs"]] for event in deltas] == [["t", "x", "y"], ["<call>", "{}"]]


async def test_a_message_ends_with_the_logprobs_of_its_last_tokens(service: Any) -> None:
    pieces = [OutputPiece("a", (1,), logprobs=token("a")), OutputPiece("", (2,), "stop", logprobs=token("<end>"))]
    response = (await service(*pieces).create(include=["message.output_text.logprobs"])).json
    assert [one["token"] for one in response["output"][0]["content"][0]["logprobs"]] == ["a", "<end>"]


async def test_a_response_follows_on_another_through_the_chain(service: Any) -> None:
    here = service(*PIECES)
    first = (await here.create(tools=[WEATHER], instructions="only here")).json
    result = {"type": "function_call_output", "call_id": "call_1", "output": "sun"}
    second = (await here.create(input=[result], previous_response_id=first["id"])).json
    await here.create(input="and?", previous_response_id=second["id"])
    made = ChatTurn(
        "assistant",
        "ab",
        reasoning="so it is",
        tool_calls=(ToolCall("call_1", "weather", '{"city": "Rome"}'), ToolCall("call_2", "weather", "{}")),
    )
    turns = here.engine.requests[2].prompt.turns
    assert turns == (
        ChatTurn("user", "hi"), made, ChatTurn("tool", "sun", name="weather", tool_call_id="call_1"), made, ChatTurn("user", "and?")
    )  # fmt: skip
    missing = await here.create(previous_response_id="resp_nope")
    assert (missing.status, missing.json["error"]["param"]) == (400, "previous_response_id")


async def test_a_response_that_is_not_stored_is_not_found(service: Any) -> None:
    here = service()
    response = (await here.create(store=False)).json
    found = await here.get(f"/v1/responses/{response['id']}")
    assert (found.status, found.json["error"]["code"]) == (404, "not_found")


async def test_input_items_are_listed_in_pages(service: Any) -> None:
    here = service()
    items = [{"role": "user", "content": str(index)} for index in range(5)]
    response = (await here.create(input=items)).json
    page = (await here.get(f"/v1/responses/{response['id']}/input_items?limit=2")).json
    assert [item["content"][0]["text"] for item in page["data"]] == ["4", "3"]
    assert (page["has_more"], page["last_id"]) == (True, page["data"][1]["id"])
    rest = (await here.get(f"/v1/responses/{response['id']}/input_items?limit=9&after={page['last_id']}&include[]=x")).json
    assert [item["content"][0]["text"] for item in rest["data"]] == ["2", "1", "0"]
    assert not rest["has_more"]
    oldest = (await here.get(f"/v1/responses/{response['id']}/input_items?order=asc&limit=1")).json
    assert oldest["data"][0] == {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "0"}],
        "id": "msg_id00000",
        "status": "completed",
    }
    for query, param in (
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=nope", "after"),
        ("befor=1", "befor"),
    ):
        refused = await here.get(f"/v1/responses/{response['id']}/input_items?{query}")
        assert (refused.status, refused.json["error"]["param"]) == (400, param)


async def test_deleting_a_response_forgets_it(service: Any) -> None:
    here = service()
    response = (await here.create()).json
    path = f"/v1/responses/{response['id']}"
    assert (await ask(here.app, "DELETE", path)).json == {"id": response["id"], "object": "response", "deleted": True}
    assert (await ask(here.app, "DELETE", path)).status == 404


async def test_a_background_response_is_made_while_nobody_waits(service: Any) -> None:
    here = service(0.05, OutputPiece("a", (1,)), 0.05, OutputPiece("b", (2,), "stop"))
    queued = (await here.create(background=True)).json
    assert (queued["status"], queued["output"], queued["background"]) == ("queued", [], True)
    assert (await here.until(queued["id"], "in_progress"))["usage"] is None
    done = await here.until(queued["id"], "completed")
    assert done["output"][0]["content"][0]["text"] == "ab"
    assert done["usage"]["output_tokens"] == 2
    assert [status for status, _ in here.engine.ended if status == "200"]


async def test_the_events_of_a_background_response_can_be_read_again_from_any_of_them(service: Any) -> None:
    here = service(OutputPiece("a", (1,)), 0.05, OutputPiece("b", (2,), "stop"))
    answer = Answer()
    task = asyncio.create_task(
        ask(here.app, "POST", "/v1/responses", {"input": "hi", "background": True, "stream": True}, answer=answer)
    )
    async with asyncio.timeout(WAIT_S):
        while b"output_text.delta" not in answer.body:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        answer.gone.set()
        await task
    response_id = answer.events[0][1]["response"]["id"]
    assert [name for name, _ in answer.events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    rest = await here.get(f"/v1/responses/{response_id}?stream=true&starting_after={len(answer.events) - 1}")
    everything = await here.get(f"/v1/responses/{response_id}?stream=true")
    assert everything.events[-1][0] == "response.completed"
    assert answer.events + rest.events == everything.events
    refused = await here.get(f"/v1/responses/{response_id}?stream=true&starting_after=99")
    assert refused.json["error"]["param"] == "starting_after"
    foreground = (await here.create()).json
    assert (await here.get(f"/v1/responses/{foreground['id']}?stream=true")).json["error"]["param"] == "stream"


async def test_cancelling_a_background_response_frees_it(service: Any) -> None:
    here = service(OutputPiece("a", (1,)), NEVER_S)
    queued = (await here.create(background=True)).json
    await here.until(queued["id"], "in_progress")
    cancelled = await ask(here.app, "POST", f"/v1/responses/{queued['id']}/cancel")
    assert cancelled.json["status"] == "cancelled"
    assert here.engine.streams[0].num_closes >= 1
    again = await ask(here.app, "POST", f"/v1/responses/{queued['id']}/cancel")
    assert again.json["status"] == "cancelled"


async def test_a_failed_background_response_says_why(service: Any) -> None:
    here = service(OutputPiece("a", (1,)), RequestFailedError("broke"))
    queued = (await here.create(background=True)).json
    failed = await here.until(queued["id"], "failed")
    assert failed["error"] == {"code": "server_error", "message": "broke"}


async def test_a_foreground_response_cannot_be_cancelled(service: Any) -> None:
    here = service()
    response = (await here.create()).json
    refused = await ask(here.app, "POST", f"/v1/responses/{response['id']}/cancel")
    assert (refused.status, refused.json["error"]["param"]) == (400, "response_id")


async def test_responses_survive_a_restart_and_unfinished_ones_have_failed(service: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "data" / "history.sqlite")
    before = service(OutputPiece("a", (1,)), NEVER_S, path=path)
    unfinished = (await before.create(background=True)).json["id"]
    await before.until(unfinished, "in_progress")
    before.engine.script = [OutputPiece("done", (1,), "stop")]
    finished = (await before.create()).json
    # A death lets go of its files.
    before.protocols._history.close()
    after = service(path=path)
    await after.protocols.start(after.app)
    assert (await after.get(f"/v1/responses/{finished['id']}")).json == finished
    failed = (await after.get(f"/v1/responses/{unfinished}")).json
    assert failed["status"] == "failed"
    assert "has ended" in failed["error"]["message"]
    before.engine.streams[0].close()


async def test_a_response_that_another_router_makes_is_left_alone(service: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "data" / "history.sqlite")
    maker = service(OutputPiece("a", (1,)), NEVER_S, path=path)
    root = f"/v1/responses/{(await maker.create(background=True)).json['id']}"
    await maker.until(root.rpartition("/")[2], "in_progress")
    other = service(path=path)
    await other.protocols.start(other.app)
    assert (await other.get(root)).json["status"] == "in_progress"
    for method, tail in (("POST", "/cancel"), ("DELETE", ""), ("GET", "?stream=true")):
        refused = await ask(other.app, method, root + tail)
        assert (refused.status, "another router" in refused.json["error"]["message"]) == (503, True)
    assert maker.engine.streams[0].num_closes == 0
    await ask(maker.app, "POST", f"{root}/cancel")
    assert (await other.get(root)).json["status"] == "cancelled"
    assert (await ask(other.app, "DELETE", root)).status == 200
    assert (await maker.get(root)).status == 404
    assert list((tmp_path / "data" / "history.running").iterdir()) == []


@pytest.mark.parametrize("is_shared", [True, False])
async def test_a_response_whose_end_could_not_be_kept_has_failed(service: Any, tmp_path: Path, is_shared: bool) -> None:
    path = str(tmp_path / "data" / "history.sqlite") if is_shared else ":memory:"
    long = OutputPiece("x" * 5000, (1,), "stop")
    here = service(long, path=path, bounds=HistoryLimits(max_entries=10, max_bytes=4000, ttl_s=1000))
    name = (await here.create(background=True)).json["id"]
    failed = await here.until(name, "failed")
    assert failed["error"]["code"] == "server_error"
    # What the run itself tells goes when it is over.
    async with asyncio.timeout(WAIT_S):
        await here.protocols._responses.stop()
    kept = (await here.get(f"/v1/responses/{name}")).json
    assert (kept["status"], kept["output"]) == ("failed", [])
    assert "could not keep its end" in kept["error"]["message"]


def test_what_the_dead_left_goes_after_a_day(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claims.take("mine")
    for name in ("dead", "mine", "young"):
        (tmp_path / name).touch()
    for name in ("dead", "mine"):
        os.utime(tmp_path / name, (0, 0))
    claims.sweep((tmp_path / "young").stat().st_mtime + 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "young"]
    assert Claims(tmp_path).is_taken("mine")
    claims.close()
    assert not Claims(tmp_path).is_taken("mine")


def break_history(path: str) -> None:
    """What a disk error or another program may do."""
    with closing(sqlite3.connect(path)) as other:
        other.execute("DROP TABLE entries")


async def test_a_background_response_whose_end_cannot_be_kept_ends_for_all_who_wait(service: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "history.sqlite")
    here = service(OutputPiece("a", (1,)), NEVER_S, path=path)
    name = (await here.create(background=True)).json["id"]
    await here.until(name, "in_progress")
    break_history(path)
    viewer = asyncio.create_task(here.get(f"/v1/responses/{name}?stream=true"))
    async with asyncio.timeout(WAIT_S):
        cancelled = await ask(here.app, "POST", f"/v1/responses/{name}/cancel")
        told = await viewer
    assert (cancelled.status, cancelled.json["error"]["code"]) == (500, "request_failed")
    assert "no such table" in cancelled.json["error"]["message"]
    assert told.events[-1][0] == "response.cancelled"
    assert ("499", "aborted") in here.engine.ended


async def test_a_stream_whose_response_cannot_be_kept_ends_with_an_event_that_says_so(service: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "history.sqlite")
    here = service(path=path)
    break_history(path)
    name, event = (await here.create(stream=True)).events[-1]
    assert (name, event["response"]["error"]["code"]) == ("response.failed", "server_error")


async def test_a_background_response_that_cannot_be_kept_is_not_begun(service: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "history.sqlite")
    here = service(NEVER_S, path=path)
    break_history(path)
    assert (await here.create(background=True)).status == 500
    assert here.engine.streams[0].num_closes == 1
    assert here.engine.ended == [("500", "request_failed")] * 2, "the client's call, and that of the response"


async def test_a_conversation_keeps_what_is_said_in_it(service: Any) -> None:
    here = service()
    created = (
        await ask(here.app, "POST", "/v1/conversations", {"items": [{"role": "user", "content": "first"}], "metadata": {"a": "b"}})
    ).json
    path = f"/v1/conversations/{created['id']}"
    assert (created["object"], created["metadata"]) == ("conversation", {"a": "b"})
    await here.create(conversation=created["id"], input="second")
    assert [turn.content for turn in here.engine.requests[0].prompt.turns] == ["first", "second"]
    await here.create(conversation={"id": created["id"]}, input="third")
    assert [turn.content for turn in here.engine.requests[1].prompt.turns] == ["first", "second", "Hello!", "third"]
    items = (await here.get(f"{path}/items?order=asc")).json["data"]
    assert [item["role"] for item in items] == ["user", "user", "assistant", "user", "assistant"]
    assert (await here.get(f"{path}/items/{items[2]['id']}")).json == items[2]
    assert (await ask(here.app, "DELETE", f"{path}/items/{items[2]['id']}")).json["id"] == created["id"]
    assert (await here.get(f"{path}/items/{items[2]['id']}")).status == 404
    added = (await ask(here.app, "POST", f"{path}/items", {"items": [{"role": "assistant", "content": "x"}]})).json
    assert added["data"][0]["content"] == [{"type": "output_text", "text": "x", "annotations": []}]
    updated = (await ask(here.app, "POST", path, {"metadata": {"c": "d"}})).json
    assert (await here.get(path)).json == updated
    assert updated["metadata"] == {"c": "d"}
    assert (await ask(here.app, "DELETE", path)).json == {"id": created["id"], "object": "conversation.deleted", "deleted": True}
    assert (await here.get(path)).status == 404
    assert (await here.create(conversation=created["id"])).status == 404


async def test_a_reference_stands_for_the_item_that_it_names(service: Any) -> None:
    here = service()
    first = (await here.create()).json
    await here.create(input=[{"type": "item_reference", "id": first["output"][0]["id"]}, {"role": "user", "content": "more"}])
    assert [turn.content for turn in here.engine.requests[1].prompt.turns] == ["Hello!", "more"]
    refused = await here.create(input=[{"type": "item_reference", "id": "msg_nope"}])
    assert (refused.status, refused.json["error"]["param"]) == (400, "input")


def parse(**fields: Any) -> shapes.ResponseCall:
    return shapes.parse_create(json.dumps({"input": "hi", **fields}).encode())


def test_fields_are_taken_over() -> None:
    call = parse(
        tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}, parallel_tool_calls=False, temperature=0.5, top_p=0.9,
        max_output_tokens=7, reasoning={"effort": "minimal"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    )  # fmt: skip
    asked = call.generation([{"type": "message", "role": "developer", "content": "x"}])
    assert isinstance(asked.prompt, ConversationPrompt)
    assert asked.prompt.turns == (ChatTurn("system", "x"),)
    assert asked.prompt.tools == (Tool("weather", "", {"type": "object"}),)
    assert asked.prompt.template_kwargs == {"reasoning_effort": "minimal"}
    assert (asked.tool_choice, asked.parallel_tool_calls) == (ToolChoice("named", "weather"), False)
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.stopping.max_tokens) == (0.5, 0.9, 7)
    assert asked.constraint == Constraint("json_schema", '{"type":"object"}', param="text.format.schema")
    assert parse(text={"format": {"type": "json_object"}}).generation(
        [{"role": "user", "type": "message", "content": "x"}]
    ).constraint == Constraint("json_object", param="text.format")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": ""}, "input", "non-empty"),
        ({"input": []}, "input", "non-empty"),
        ({"input": 5}, "input", "a string or an array of items; got 5"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type", "got 'input_image'"),
        ({"input": [{"role": "boss", "content": "x"}]}, "input.0.role", "got 'boss'"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type", "got 'web_search_call'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be in [1,"),
        ({"temperature": 3}, "temperature", "in [0, 2]"),
        ({"previous_response_id": "a", "conversation": "b"}, "conversation", "cannot both be given"),
        ({"background": True, "store": False}, "store", "true for a background response"),
        ({"stream_options": {}}, "stream_options", "left out unless stream is true"),
        ({"top_logprobs": 3}, "top_logprobs", "0 unless include"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "keys of 1 to 64"),
        ({"metadata": {str(index): "v" for index in range(17)}}, "metadata", "at most 16 pairs"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'; got 'web_search'"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name", "different"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", "got 'x'"),
        ({"truncation": "auto"}, "truncation", 'send null or "disabled"'),
        ({"prompt": {"id": "x"}}, "prompt", "not supported"),
        ({"max_tokens": 5}, "max_tokens", "unknown field max_tokens; did you mean max_output_tokens?"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "got 'grammar'"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_field_limit_and_value(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse(**fields)
    assert refused.value.param == param, refused.value.message
    assert words in refused.value.message


def test_a_result_without_its_call_is_refused() -> None:
    result = {"type": "function_call_output", "call_id": "nope", "output": "x"}
    with pytest.raises(InvalidRequestError, match="got 'nope'"):
        parse(input=[result]).generation([result])


def response(name: str, size: int = 10, **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "status": "completed",
        "conversation": None,
        "previous_response_id": None,
        "output": [],
        "x": "x" * size,
        **fields,
    }


def test_the_oldest_entries_go_when_there_are_too_many_or_they_are_too_big() -> None:
    history = History(":memory:", HistoryLimits(max_entries=3, max_bytes=2000, ttl_s=100))
    responses = history.of("").responses
    for index in range(4):
        responses.put(response(f"r{index}"), [], now_s=index)
    with pytest.raises(NotFoundError):
        responses.get("r0", 4)
    assert responses.get("r1", 4)["id"] == "r1"
    responses.put(response("big", 1500), [], now_s=5)
    with pytest.raises(NotFoundError):
        responses.get("r1", 5)
    assert responses.get("big", 5)
    with pytest.raises(RequestTooLargeError):
        responses.put(response("too big", 2500), [], now_s=6)
    assert responses.get("big", 6)
    history.close()


def test_an_entry_goes_when_its_time_is_over() -> None:
    history = History(":memory:", HistoryLimits(max_entries=3, max_bytes=2000, ttl_s=100))
    responses = history.of("").responses
    responses.put(response("r"), [], now_s=0)
    assert responses.get("r", 99)
    with pytest.raises(NotFoundError):
        responses.get("r", 100)
    history.close()


def test_a_chain_has_a_bound_and_needs_finished_responses() -> None:
    history = History(":memory:", HistoryLimits(max_entries=10_000, max_bytes=10**8, ttl_s=100))
    responses = history.of("").responses
    for index in range(1026):
        responses.put(response(f"r{index}", previous_response_id=f"r{index - 1}" if index else None), [], now_s=0)
    assert responses.transcript("r1023", 1) == []
    with pytest.raises(InvalidRequestError, match="at most 1024"):
        responses.transcript("r1025", 1)
    responses.begin(response("open", status="in_progress"), [], now_s=0)
    with pytest.raises(InvalidRequestError, match="finished"):
        responses.transcript("open", 1)
    history.close()
