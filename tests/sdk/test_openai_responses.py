"""OpenAI's own Python client against the default model: responses, conversations, files and batches."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of Japan?"
ASKED: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 32}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def test_a_response_is_made_kept_and_forgotten(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASKED, metadata={"who": "me"})
    assert "Tokyo" in response.output_text
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert client.responses.retrieve(response.id).output_text == response.output_text
    (item,) = client.responses.input_items.list(response.id).data
    assert item.content[0].text == QUESTION  # type: ignore[union-attr]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_the_streamed_response_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    with client.responses.stream(**ASKED) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))  # type: ignore[union-attr]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == final.output_text == whole.output_text
    assert (final.status, final.usage) == (whole.status, final.usage)


def test_a_response_follows_on_another(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASKED)
    second = client.responses.create(**{**ASKED, "input": "And of Italy?"}, previous_response_id=first.id, instructions="Be brief.")
    assert first.usage is not None
    assert second.usage is not None
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


def test_a_conversation_remembers(client: openai.OpenAI) -> None:
    conversation = client.conversations.create(metadata={"topic": "towns"})
    client.responses.create(**ASKED, conversation=conversation.id)
    client.responses.create(**{**ASKED, "input": "And of Italy?"}, conversation=conversation.id)
    items = list(client.conversations.items.list(conversation.id, order="asc", limit=2))
    assert [item.role for item in items] == ["user", "assistant"] * 2  # type: ignore[union-attr]
    assert client.conversations.update(conversation.id, metadata={"topic": "cities"}).metadata == {"topic": "cities"}
    added = client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x"}])
    client.conversations.items.delete(added.data[0].id, conversation_id=conversation.id)  # type: ignore[union-attr, arg-type]
    assert client.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)


def until(client: openai.OpenAI, response_id: str) -> Any:
    """The test's own timeout bounds it."""
    while (found := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        time.sleep(0.05)
    return found


def test_a_background_response_is_fetched_later_and_read_again_from_an_event_on(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    queued = client.responses.create(**ASKED, background=True)
    assert queued.status == "queued"
    assert until(client, queued.id).output_text == whole.output_text
    events = list(client.responses.retrieve(queued.id, stream=True))
    assert events[-1].type == "response.completed" or events[-1].type == "response.incomplete"
    assert list(client.responses.retrieve(queued.id, stream=True, starting_after=3)) == events[4:]


def test_a_cancelled_background_response_ends_at_once(client: openai.OpenAI) -> None:
    queued = client.responses.create(**{**ASKED, "max_output_tokens": 2000}, background=True, extra_body={})
    # On a slow machine it may have ended by itself before it was cancelled; what was cancelled is not gone on with.
    assert client.responses.cancel(queued.id).status in ("cancelled", "completed", "incomplete")
    found = client.responses.retrieve(queued.id)
    assert found.status in ("cancelled", "completed", "incomplete")
    assert found.status != "cancelled" or found.usage is None or found.usage.output_tokens < 2000


def test_a_tool_that_must_be_used_is_used(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool: Any = {"type": "function", "name": "get_weather", "parameters": parameters, "strict": True}
    response = client.responses.create(
        **{**ASKED, "input": "How is the weather in Paris?", "max_output_tokens": 96}, tools=[tool], tool_choice="required"
    )
    (call,) = [item for item in response.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert isinstance(json.loads(call.arguments)["city"], str)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    answer = client.responses.create(**{**ASKED, "input": [result]}, previous_response_id=response.id)
    assert answer.output_text


def test_a_text_keeps_to_its_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
    form: Any = {"format": {"type": "json_schema", "name": "digit", "schema": {**schema, "additionalProperties": False}}}
    response = client.responses.create(**ASKED, text=form)
    assert 0 <= json.loads(response.output_text)["n"] <= 9


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{**ASKED, "max_output_tokens": 0})
    assert refused.value.param == "max_output_tokens"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**{**ASKED, "model": "nope"})


def test_files_are_kept_listed_read_and_deleted(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{name}.txt", io.BytesIO(name.encode() * 1000)), purpose="user_data") for name in "abc"]
    assert [one.bytes for one in made] == [1000] * 3
    listed = [one.id for one in client.files.list(purpose="user_data", limit=2)]
    assert listed == [one.id for one in reversed(made)]
    assert client.files.content(made[0].id).read() == b"a" * 1000
    assert client.files.retrieve(made[1].id).filename == "b.txt"
    for one in made:
        assert client.files.delete(one.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made[0].id)


def test_a_batch_answers_as_online_requests_do(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16}
    online = client.chat.completions.create(**body).choices[0].message.content
    lines = [{"custom_id": str(index), "method": "POST", "url": "/v1/chat/completions", "body": body} for index in range(3)]
    lines.append({**lines[0], "custom_id": "bad", "body": {**body, "temperature": 9}})
    source = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=source.id, endpoint="/v1/chat/completions", completion_window="24h")
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
        time.sleep(0.05)
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 3, "failed": 1}
    assert batch.output_file_id
    assert batch.error_file_id
    output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {line["custom_id"] for line in output} == {"0", "1", "2"}
    assert {line["response"]["body"]["choices"][0]["message"]["content"] for line in output} == {online}
    (error,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("bad", 400)
    assert batch.id in [one.id for one in client.batches.list(limit=1)]
