"""The ASGI application, driven directly: routing, bodies, streams, errors, disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from headrace.errors import OverloadedError, RequestFailedError, UnavailableError
from services.router.generation import OutputPiece
from services.router.http.app import HttpApp
from services.router.http.exchange import HttpLimits
from tests.patience import NEVER_S, WAIT_S
from tests.unit.router.fake_engine import FakeEngine

LIMITS = HttpLimits(max_body_bytes=2000, body_timeout_s=0.05, max_timeout_s=100, send_timeout_s=0.05)
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
STREAM_BODY = json.dumps(
    {"messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {"include_usage": True}}
).encode()


class Client:
    """One exchange with the application."""

    def __init__(self, engine: FakeEngine) -> None:
        self.app = HttpApp(engine, LIMITS)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.chunks: list[bytes] = []
        self.is_done = False
        self.gone = asyncio.Event()
        self.block_sends = False
        self.num_cuts = 0

    async def request(
        self, method: str, path: str, body: bytes | Sequence[bytes] = b"", *, is_stalling: bool = False, **headers: str
    ) -> Client:
        parts = [body] if isinstance(body, bytes) else list(body)

        async def receive() -> dict[str, Any]:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts) or is_stalling}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if self.block_sends:
                await asyncio.Event().wait()
            if message["type"] == "http.response.start":
                assert not self.status
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                assert not self.is_done
                self.chunks.append(message["body"])
                self.body += message["body"]
                self.is_done = not message["more_body"]

        def cut() -> None:
            self.num_cuts += 1

        named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": named,
            "extensions": {"headrace.cut": cut},
        }
        await self.app(scope, receive, send)
        return self

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


async def test_a_chat_is_answered_whole_with_usage_and_request_id() -> None:
    engine = FakeEngine()
    client = await Client(engine).request("POST", "/v1/chat/completions", BODY, traceparent="00-a-b-01")
    assert client.status == 200
    assert client.json["choices"][0]["message"]["content"] == "Hello!"
    assert client.json["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert client.headers["x-request-id"] == "id0"
    assert client.json["id"] == "chatcmpl-id0"
    assert engine.traceparents == ["00-a-b-01"]
    assert engine.ended == [("200", None)]
    assert engine.streams[0].num_closes >= 1


async def test_a_request_is_counted_to_its_user_else_to_its_key() -> None:
    engine = FakeEngine()
    await Client(engine).request("POST", "/v1/chat/completions", BODY, authorization="Bearer secret")
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "user": "me"}).encode()
    await Client(engine).request("POST", "/v1/chat/completions", body, authorization="Bearer secret")
    await Client(engine).request("POST", "/v1/chat/completions", BODY)
    assert engine.calls[0].tenant.startswith("key:")
    assert [call.tenant for call in engine.calls[1:]] == ["user:me", ""]


async def test_a_streamed_chat_has_role_text_reason_usage_and_done_in_order() -> None:
    client = await Client(FakeEngine()).request("POST", "/v1/chat/completions", STREAM_BODY)
    assert client.headers["content-type"].startswith("text/event-stream")
    first, *texts, last, usage, done = client.events
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"]["content"] for event in texts) == "Hello!"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 6
    assert done == "[DONE]"
    assert client.is_done


async def test_streamed_text_equals_the_whole_text() -> None:
    pieces = [
        OutputPiece("", (1,)),
        OutputPiece("a", (2,)),
        OutputPiece("", (3,)),
        OutputPiece("b\n", (4,)),
        OutputPiece("", (), "length"),
    ]
    whole = await Client(FakeEngine(*pieces)).request("POST", "/v1/completions", b'{"prompt": "x"}')
    streamed = await Client(FakeEngine(*pieces)).request("POST", "/v1/completions", b'{"prompt": "x", "stream": true}')
    choices = [event["choices"][0] for event in streamed.events[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole.json["choices"][0]["text"] == "ab\n"
    assert choices[-1]["finish_reason"] == whole.json["choices"][0]["finish_reason"] == "length"


TWO_CHOICES = [
    OutputPiece("a", (1,), None, 0),
    OutputPiece("x", (5,), None, 1),
    OutputPiece("", (), "stop", 1),
    OutputPiece("b", (2,), None, 0),
    OutputPiece("c", (3,), "length", 0),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_several_choices_are_told_apart_by_their_index(path: str) -> None:
    body: dict[str, Any] = {"n": 2, "messages": [{"role": "user", "content": "hi"}]}
    if path == "/v1/completions":
        body = {"n": 2, "prompt": "hi"}
    engine = FakeEngine(*TWO_CHOICES)
    whole = (await Client(engine).request("POST", path, json.dumps(body).encode())).json
    assert engine.requests[0].num_choices == 2
    texts = [choice["text"] if path == "/v1/completions" else choice["message"]["content"] for choice in whole["choices"]]
    assert texts == ["abc", "x"]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["length", "stop"]
    assert whole["usage"]["prompt_tokens"] == 3, "the prompt counts once"
    assert whole["usage"]["completion_tokens"] == 4

    body |= {"stream": True, "stream_options": {"include_usage": True}}
    client = await Client(FakeEngine(*TWO_CHOICES)).request("POST", path, json.dumps(body).encode())
    *events, usage, done = client.events
    assert done == "[DONE]"
    assert usage["usage"] == whole["usage"]
    choices = [choice for event in events for choice in event["choices"]]
    for index, text in enumerate(texts):
        mine = [choice for choice in choices if choice["index"] == index]
        if path == "/v1/completions":
            assert "".join(choice["text"] for choice in mine) == text
        else:
            assert mine[0]["delta"]["role"] == "assistant"
            assert "".join(choice["delta"].get("content", "") for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == [whole["choices"][index]["finish_reason"]]


async def test_an_error_before_the_first_output_has_its_own_status_even_when_streaming() -> None:
    engine = FakeEngine(UnavailableError("no worker", retry_after_s=3))
    client = await Client(engine).request("POST", "/v1/chat/completions", STREAM_BODY)
    assert (client.status, client.headers["retry-after"]) == (503, "3")
    assert client.error["code"] == "unavailable"
    assert engine.ended == [("503", "unavailable")]


async def test_an_error_after_the_first_output_is_the_last_event() -> None:
    engine = FakeEngine(OutputPiece("a", (1,)), RequestFailedError("broke"))
    client = await Client(engine).request("POST", "/v1/chat/completions", STREAM_BODY)
    assert client.status == 200
    assert client.events[-1]["error"]["message"] == "broke"
    assert client.is_done
    assert engine.ended == [("200", "request_failed")]


async def test_overload_says_when_to_come_back() -> None:
    engine = FakeEngine()
    engine.refusal = OverloadedError("full", retry_after_s=7.2)
    client = await Client(engine).request("POST", "/v1/chat/completions", BODY)
    assert (client.status, client.headers["retry-after"], client.error["type"]) == (429, "7", "rate_limit_error")


async def test_an_unknown_model_is_404_with_openais_code() -> None:
    body = json.dumps({"model": "nope", "messages": [{"role": "user", "content": "hi"}]}).encode()
    client = await Client(FakeEngine()).request("POST", "/v1/chat/completions", body)
    assert (client.status, client.error["code"], client.error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize("body", [BODY, STREAM_BODY])
async def test_a_disconnect_closes_the_stream_at_once(body: bytes) -> None:
    engine = FakeEngine(OutputPiece("a", (1,)), NEVER_S)
    client = Client(engine)
    task = asyncio.create_task(client.request("POST", "/v1/chat/completions", body))
    async with asyncio.timeout(WAIT_S):
        while not engine.streams:  # noqa: ASYNC110
            await asyncio.sleep(0)
    client.gone.set()
    await asyncio.wait_for(task, WAIT_S)
    assert engine.streams[0].num_closes >= 1
    assert engine.ended == [("499", "aborted")]


async def test_a_disconnect_gives_a_tokenize_call_up() -> None:
    engine = FakeEngine()
    engine.tokenize_delay_s = NEVER_S
    client = Client(engine)
    task = asyncio.create_task(client.request("POST", "/tokenize", b'{"prompt": "x"}'))
    await asyncio.sleep(0)
    client.gone.set()
    await asyncio.wait_for(task, WAIT_S)
    assert engine.ended == [("499", "aborted")]


async def test_a_body_over_the_limit_is_refused_by_its_length_and_while_reading() -> None:
    by_length = await Client(FakeEngine()).request("POST", "/v1/chat/completions", b"", content_length="100000000")
    assert (by_length.status, by_length.error["code"]) == (413, "request_too_large")
    assert "2000 bytes" in by_length.error["message"]
    reading = await Client(FakeEngine()).request("POST", "/v1/chat/completions", [b"x" * 1500, b"y" * 1500, b"z" * 1500])
    assert reading.status == 413


async def test_a_body_that_never_ends_is_given_up() -> None:
    client = await Client(FakeEngine()).request("POST", "/v1/chat/completions", b"{", is_stalling=True)
    assert (client.status, client.error["code"]) == (408, "deadline_exceeded")


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"content_type": "text/plain"}, "content-type"),
        ({"content_encoding": "gzip"}, "content-encoding"),
        ({"headrace_timeout_ms": "0"}, "headrace-timeout-ms"),
        ({"headrace_timeout_ms": "-5"}, "headrace-timeout-ms"),
        ({"headrace_timeout_ms": "100001"}, "headrace-timeout-ms"),
        ({"headrace_timeout_ms": "9" * 30}, "headrace-timeout-ms"),
        ({"headrace_timeout_ms": "soon"}, "headrace-timeout-ms"),
    ],
)
async def test_bad_headers_are_refused_by_name(headers: dict[str, str], param: str) -> None:
    client = await Client(FakeEngine()).request("POST", "/v1/chat/completions", BODY, **headers)
    assert (client.status, client.error["param"]) == (400, param)


async def test_a_deadline_header_reaches_the_engine() -> None:
    engine = FakeEngine()
    await Client(engine).request(
        "POST", "/v1/chat/completions", BODY, headrace_timeout_ms="1500", content_type="application/json; charset=utf-8"
    )
    assert engine.calls[0].timeout_s == 1.5


async def test_unknown_paths_and_wrong_methods_are_errors_in_our_shape() -> None:
    assert (await Client(FakeEngine()).request("GET", "/nope")).error["code"] == "not_found"
    wrong = await Client(FakeEngine()).request("GET", "/v1/chat/completions")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert wrong.error["type"] == "invalid_request_error"
    assert (await Client(FakeEngine()).request("DELETE", "/health")).status == 405
    assert (await Client(FakeEngine()).request("HEAD", "/health")).status == 200


async def test_models_are_listed_and_shown() -> None:
    models = await Client(FakeEngine()).request("GET", "/v1/models")
    model = {"id": "m", "object": "model", "created": 7, "owned_by": "headrace", "max_model_len": 128}
    assert models.json == {"object": "list", "data": [model]}
    assert (await Client(FakeEngine()).request("GET", "/v1/models/m")).json == model
    unknown = await Client(FakeEngine()).request("GET", "/v1/models/nope")
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")


async def test_health_ready_and_metrics_answer_outside_any_queue() -> None:
    engine = FakeEngine()
    engine.refusal = OverloadedError("full")
    assert (await Client(engine).request("GET", "/health")).json["status"] == "alive"
    assert (await Client(engine).request("GET", "/ready")).json == {"ready": True, "reason": None}
    engine.reason = "no worker"
    not_ready = await Client(engine).request("GET", "/ready")
    assert (not_ready.status, not_ready.json["reason"]) == (503, "no worker")
    assert (await Client(engine).request("GET", "/metrics")).body == b"headrace_x 1\n"


async def test_tokens_and_text_are_answered_in_vllms_shape() -> None:
    tokens = await Client(FakeEngine()).request("POST", "/tokenize", b'{"prompt": "x"}')
    assert tokens.json == {"count": 3, "max_model_len": 128, "tokens": [1, 2, 3]}
    text = await Client(FakeEngine()).request("POST", "/detokenize", b'{"tokens": [4, 5]}')
    assert text.json == {"prompt": "4-5True"}


async def test_a_client_that_takes_no_whole_answer_is_cut_off() -> None:
    client = Client(FakeEngine())
    client.block_sends = True
    await client.request("POST", "/v1/chat/completions", BODY)
    assert client.num_cuts == 1


async def test_a_bug_is_a_500_that_tells_nothing_of_the_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(engine, "open_stream", lambda request, call: 1 / 0)
    client = await Client(engine).request("POST", "/v1/chat/completions", BODY)
    assert (client.status, client.error["code"]) == (500, "request_failed")
    assert "division" not in client.error["message"]
    assert engine.ended == [("500", "request_failed")]
