"""What the Python client sends and gives back is all that the protos have: over a real port and a scripted engine."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

import pytest

import headrace_client
from headrace_client import (
    AsyncClient,
    Client,
    EmbeddingInfo,
    EmbedReply,
    InvalidRequestError,
    LikelyToken,
    Message,
    Model,
    Piece,
    Reply,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
    assistant,
    fields,
    requests,
    tool,
    user,
)
from headrace_client.v1 import common_pb2 as common
from headrace_client.v1 import inference_pb2 as inference
from headrace_client.v1 import tokenizer_pb2 as tokenizer
from services.router import generation
from services.router.generation import EmbeddingOffer, ModelOffer, OutputPiece
from tests.integration.clients.served import Served
from tests.patience import WAIT_S
from tests.unit.router.fake_engine import FakeStream

WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a place", "parameters": {"type": "object"}}}
LOGPROB = generation.TokenLogprob(
    1, b"\xc3", -0.5, (generation.LikelyToken(2, b"b", -0.25), generation.LikelyToken(1, b"\xc3", -0.5))
)
FIRST_OF_PROMPT = generation.TokenLogprob(9, b"<s>", None)
SCRIPT = (
    OutputPiece("", (1,), reasoning="hm", logprobs=(LOGPROB,), prompt_logprobs=(FIRST_OF_PROMPT, LOGPROB)),
    OutputPiece("", (2,), choice=1, reasoning="oh", prompt_logprobs=(FIRST_OF_PROMPT,)),
    OutputPiece("I ", (3,), reasoning="m", logprobs=(LOGPROB,)),
    OutputPiece("look", (4,), tool_calls=(generation.ToolCallDelta(0, '{"a"', "c0", "weather"),)),
    OutputPiece("", (5,), choice=1, tool_calls=(generation.ToolCallDelta(0, "{}", "d0", "time"),)),
    OutputPiece("", (6,), tool_calls=(generation.ToolCallDelta(0, ": 1}"), generation.ToolCallDelta(1, "", "c1", "time"))),
    OutputPiece("", (7,), "tool_calls", tool_calls=(generation.ToolCallDelta(1, "{}"),)),
    OutputPiece("no", (8,), "length", choice=1),
)


@pytest.fixture
def served() -> Iterator[Served]:
    running = Served()
    yield running
    running.stop()


def check_whole(reply: Reply) -> None:
    """The reply is what SCRIPT makes, joined for each choice."""
    assert (reply.text, reply.texts, reply.reasoning, reply.reasonings) == ("I look", ["I look", "no"], "hmm", ["hmm", "oh"])
    assert reply.tool_calls == [
        [ToolCall("c0", "weather", '{"a": 1}'), ToolCall("c1", "time", "{}")],
        [ToolCall("d0", "time", "{}")],
    ]
    assert (reply.token_ids, reply.finish_reasons) == ([[1, 3, 4, 6, 7], [2, 5, 8]], ["stop", "length"])
    likely = TokenLogprob(1, b"\xc3", -0.5, (LikelyToken(2, b"b", -0.25), LikelyToken(1, b"\xc3", -0.5)))
    first = TokenLogprob(9, b"<s>", None)
    assert (reply.logprobs, reply.prompt_logprobs) == ([[likely, likely], []], [[first, likely], [first]])
    assert reply.usage == Usage(num_prompt_tokens=3, num_output_tokens=8, num_cached_tokens=1, num_reasoning_tokens=2)


async def test_reasoning_calls_and_logprobs_arrive_streamed_and_joined(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStream, "num_reasoning_tokens", 2)
    served.engine.script = SCRIPT
    with Client(served.target, timeout_s=WAIT_S) as client:
        check_whole(client.chat([user("x")], num_choices=2))
        pieces = list(client.stream_chat([user("x")], num_choices=2))
    assert [piece.reasoning for piece in pieces] == ["hm", "oh", "m", "", "", "", "", ""]
    assert pieces[3].tool_calls == (ToolCallDelta(0, "c0", "weather", '{"a"'),)
    assert pieces[5].tool_calls == (ToolCallDelta(0, arguments=": 1}"), ToolCallDelta(1, "c1", "time"))
    assert pieces[0].prompt_logprobs[0] == TokenLogprob(9, b"<s>", None)
    async with AsyncClient(served.target, timeout_s=WAIT_S) as asyncio_client:
        check_whole(await asyncio_client.chat([user("x")], num_choices=2))


def test_logprobs_of_a_generation_arrive(served: Served) -> None:
    served.engine.script = [OutputPiece("a", (1,), "stop", logprobs=(LOGPROB,), prompt_logprobs=(FIRST_OF_PROMPT, LOGPROB))]
    with Client(served.target, timeout_s=WAIT_S) as client:
        reply = client.generate("x", logprobs=2, prompt_logprobs=0)
    assert [one.logprob for one in reply.prompt_logprobs[0]] == [None, -0.5]
    assert [one.token_id for one in reply.logprobs[0][0].top] == [2, 1]
    (request,) = served.engine.requests
    assert (request.logprobs, request.prompt_logprobs) == (2, 0)


def test_every_end_of_an_answer_has_a_name() -> None:
    from headrace_client.answers import piece_of

    told = [piece_of(inference.ChatResponse(finish_reason=one)).finish_reason for one in range(6)]  # type: ignore[arg-type]
    assert told == [None, "stop", "length", "abort", "error", "5"]


def names_of(message: Any) -> set[str]:
    """Fields of a message of the protos, or of a dataclass or dict of ours."""
    if hasattr(message, "DESCRIPTOR"):
        return {one.name for one in message.DESCRIPTOR.fields}
    return {one.name for one in dataclasses.fields(message)} if dataclasses.is_dataclass(message) else set(get_type_hints(message))


@pytest.mark.parametrize(
    ("ours", "theirs", "renamed", "added"),
    [
        # The id of a stream's request is the stream's.
        (Piece, inference.ChatResponse, {"content": "text", "request_id": None}, set()),
        (Usage, inference.Usage, {}, set()),
        (ToolCallDelta, inference.ToolCallDelta, {}, set()),
        (TokenLogprob, inference.TokenLogprob, {}, set()),
        (LikelyToken, inference.LikelyToken, {}, set()),
        (EmbedReply, inference.EmbedResponse, {}, {"trace_id"}),
        (Model, common.ModelInfo, {}, set()),
        (EmbeddingInfo, common.EmbeddingInfo, {}, set()),
        (Message, tokenizer.ChatMessage, {}, set()),
        (fields.SamplingFields, common.SamplingParams, {}, set()),
        (fields.StoppingFields, common.StoppingParams, {}, set()),
        (fields.PromptFields, tokenizer.ChatPrompt, {"messages": None}, set()),
        (fields.LogitBias, common.LogitBias, {}, set()),
        (fields.Constraint, common.Constraint, {}, set()),
        (fields.SpeculativeParams, common.SpeculativeParams, {}, set()),
        (fields.ReasoningParams, inference.ReasoningParams, {}, set()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_types_have_the_fields_of_the_protos(ours: Any, theirs: Any, renamed: dict[str, str | None], added: set[str]) -> None:
    assert names_of(ours) == {renamed.get(name, name) for name in names_of(theirs)} - {None} | added


def test_calls_have_the_fields_of_their_requests() -> None:
    """Those of the request, and of what lies in it, but for what is an argument."""
    drawn = names_of(common.SamplingParams) | names_of(common.StoppingParams)
    prompt = names_of(tokenizer.ChatPrompt) - {"messages"}
    generate = names_of(inference.GenerateRequest) - {"text", "token_ids", "sampling", "stopping"}
    assert names_of(fields.GenerateFields) == generate | drawn
    chat = names_of(inference.ChatRequest) - {"prompt", "sampling", "stopping"}
    assert names_of(fields.ChatFields) == chat | drawn | prompt
    assert names_of(fields.TokenizeFields) == names_of(inference.TokenizeRequest) - {"text", "chat"} | prompt
    for client in (Client, AsyncClient):
        embed, detokenize = (set(inspect.signature(getattr(client, name)).parameters) for name in ("embed", "detokenize"))
        assert names_of(inference.EmbedRequest) - {"inputs"} < embed
        assert names_of(inference.DetokenizeRequest) < detokenize
    kinds = get_args(get_type_hints(fields.Constraint)["kind"])
    methods = get_args(get_type_hints(fields.SpeculativeParams)["method"])
    assert kinds == generation.CONSTRAINT_KINDS
    assert get_args(methods[0]) == generation.SPECULATIVE_METHODS


def test_every_call_of_the_service_has_a_method_in_both_clients() -> None:
    rpcs = {one.name for one in inference.DESCRIPTOR.services_by_name["Inference"].methods}
    methods = {name for name in vars(Client) if not name.startswith("_")}
    assert {name.replace("_", "") for name in methods} >= {name.lower() for name in rpcs}
    for name in methods - {"close"}:
        ours, theirs = (inspect.signature(getattr(client, name)) for client in (Client, AsyncClient))
        assert ours.parameters == theirs.parameters, name
    assert set(headrace_client.__all__) <= set(vars(headrace_client))


def test_all_that_a_chat_can_ask_arrives(served: Served) -> None:
    schema = {"type": "object", "title": "é"}
    with Client(served.target, model="m", timeout_s=WAIT_S) as client:
        calls = [ToolCall("c0", "weather", '{"at": "Rome"}'), ToolCall("c1", "weather", "{}")]
        client.chat(
            [user("hot?"), assistant(tool_calls=calls, reasoning="hm"), tool("30", "c0", name="weather"), tool("-3", "c1")],
            tools=[WEATHER],
            tool_choice="function:weather",
            parallel_tool_calls=False,
            template_kwargs={"enable_thinking": False},
            reasoning={"separate": False, "stream": False, "budget_tokens": 5},
            constraint={"kind": "json_schema", "source": schema},
            speculative={"method": "ngram", "num_speculative_tokens": 3},
            logit_bias=[{"token_id": 7, "bias": -1.5}, common.LogitBias(token_id=8, bias=2)],
            logprobs=3,
            prompt_logprobs=0,
            skip_special_tokens=False,
            priority=-5,
            cache_salt="s",
            frequency_penalty=0.5,
            min_tokens=2,
            stop_token_ids=[4],
            include_stop_in_output=True,
        )
    (request,) = served.engine.requests
    prompt = request.prompt
    assert isinstance(prompt, generation.ConversationPrompt)
    theirs = tuple(generation.ToolCall(call.id, call.name, call.arguments) for call in calls)
    assert prompt.turns == (
        generation.ChatTurn("user", "hot?"),
        generation.ChatTurn("assistant", "", tool_calls=theirs, reasoning="hm"),
        generation.ChatTurn("tool", "30", "weather", tool_call_id="c0"),
        generation.ChatTurn("tool", "-3", tool_call_id="c1"),
    )
    assert prompt.tools == (generation.Tool("weather", "of a place", {"type": "object"}),)
    assert prompt.template_kwargs == {"enable_thinking": False}
    assert (request.tool_choice, request.parallel_tool_calls) == (generation.ToolChoice("named", "weather"), False)
    assert request.reasoning == generation.ReasoningOptions(False, False, 5)
    assert request.constraint is not None
    assert (request.constraint.kind, json.loads(request.constraint.source)) == ("json_schema", schema)
    assert request.speculative == generation.Speculative("ngram", 3)
    assert request.sampling.logit_bias == ((7, -1.5), (8, 2.0))
    assert (request.logprobs, request.prompt_logprobs, request.skip_special_tokens) == (3, 0, False)
    assert (request.priority, request.cache_salt, request.sampling.frequency_penalty) == (-5, "s", 0.5)
    stopping = request.stopping
    assert (stopping.min_tokens, stopping.stop_token_ids, stopping.include_stop_in_output) == (2, (4,), True)


@pytest.mark.parametrize(
    ("asked", "kind", "source"),
    [
        ({"kind": "regex", "source": "a+"}, "regex", "a+"),
        ({"kind": "choice", "source": ["a", "b"]}, "choice", '["a", "b"]'),
        ({"kind": "json_object"}, "json_object", ""),
        ({"kind": "CONSTRAINT_KIND_EBNF", "source": "g"}, "ebnf", "g"),
        ({"kind": "structural_tag", "source": "{}"}, "structural_tag", "{}"),
        (common.Constraint(kind=common.CONSTRAINT_KIND_REGEX, source="b"), "regex", "b"),
    ],
)
def test_constraints_are_dicts_or_messages(served: Served, asked: Any, kind: str, source: str) -> None:
    with Client(served.target, timeout_s=WAIT_S) as client:
        client.generate("x", constraint=asked)
    (request,) = served.engine.requests
    assert request.constraint is not None
    assert (request.constraint.kind, request.constraint.source) == (kind, source)


def test_none_is_as_good_as_absent_and_a_seed_is_drawn_all_the_same(served: Served) -> None:
    with Client(served.target, timeout_s=WAIT_S) as client:
        client.chat([user("x")], seed=None, constraint=None, reasoning={"budget_tokens": None}, max_tokens=None, model=None)
        with pytest.raises(InvalidRequestError, match="constraint"):
            client.generate("x", constraint={"kind": "tool_calls", "source": "x"})  # type: ignore[arg-type]
    (request,) = served.engine.requests
    assert request.sampling.seed is not None
    assert (request.constraint, request.reasoning, request.stopping) == (None, generation.ReasoningOptions(), generation.Stopping())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"temprature": 1}, TypeError, "no field 'temprature'; there are .*temperature"),
        ({"sampling": {"top_p": 1}}, TypeError, "no field 'sampling'"),
        ({"messages": []}, TypeError, "no field 'messages'"),
        ({"reasoning": {"budget": 1}}, TypeError, "no field 'budget' in reasoning; there are budget_tokens, separate, stream"),
        ({"reasoning": "high"}, TypeError, "reasoning must be a dict of budget_tokens, separate, stream; got 'high'"),
        (
            {"reasoning": {"budget_tokens": -1}},
            ValueError,
            "reasoning.budget_tokens must be an integer from 0 to 4294967295; got -1",
        ),
        ({"reasoning": {"stream": 1}}, TypeError, "reasoning.stream must be a bool; got 1"),
        ({"constraint": {"kind": "xml"}}, ValueError, "constraint.kind must be one of json_schema, .*; got 'xml'"),
        ({"constraint": {"kind": None, "source": {"a": {1}}}}, TypeError, "constraint.source must be what JSON can say"),
        ({"constraint": {"source": [float("nan")]}}, ValueError, "constraint.source must be what JSON can say"),
        ({"speculative": common.Constraint()}, TypeError, "speculative must be a dict of method, num_speculative_tokens"),
        ({"tools": 7}, TypeError, "tools must be text; got 7"),
        ({"tool_choice": {"name": "f"}}, TypeError, "tool_choice must be text; got {'name': 'f'}"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number; got 'hot'"),
        ({"temperature": True}, TypeError, "temperature must be a number; got True"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer from -2147483648 to 2147483647; got 1.5"),
        ({"seed": 2**64}, ValueError, "seed must be an integer from 0 to 18446744073709551615; got 18446744073709551616"),
        ({"cache_salt": "\ud800"}, ValueError, "cache_salt must be text"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a list; got 5"),
        ({"stop_token_ids": [1, -1]}, ValueError, "stop_token_ids must be a list, each an integer from 0 to 4294967295: .*-1"),
        ({"logit_bias": {5: 1.0}}, TypeError, "logit_bias must be a list"),
        ({"logit_bias": [{"token_id": 5}, {"token": 6}]}, TypeError, "no field 'token' in logit_bias.1"),
    ],
    ids=str,
)
def test_what_cannot_be_sent_is_named(given: Mapping[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        requests.chat_request("", [user("x")], given)


def test_prompts_of_a_wrong_type_are_named() -> None:
    with pytest.raises(TypeError, match=r"messages\.1 must be a Message.*; got {'role': 'user'}"):
        requests.chat_request("", [user("x"), {"role": "user"}], {})  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"messages\.0\.content must be text; got 5"):
        requests.chat_request("", [user(5)], {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"messages\.0\.tool_calls\.0 must be a ToolCall; got {}"):
        requests.chat_request("", [assistant(tool_calls=[{}])], {})  # type: ignore[list-item]
    with pytest.raises(TypeError, match="prompt must be a list, each an integer"):
        requests.generate_request("", [1.5], {})  # type: ignore[list-item]
    with pytest.raises(TypeError, match="texts must be a list of texts; got 'abc'"):
        requests.embed_request("", "abc", {})
    with pytest.raises(TypeError, match=r"texts\.1 must be a list; got 7"):
        requests.embed_request("", ["a", 7], {})  # type: ignore[list-item]
    with pytest.raises(TypeError, match="no field 'tools'"):
        requests.tokenize_request("", "text", {"tools": []})


async def test_texts_become_vectors(served: Served) -> None:
    with Client(served.target, model="m", timeout_s=WAIT_S) as client:
        reply = client.embed(["abc", [1, 2]], dimensions=2, model="e", traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01")
        assert reply == EmbedReply([[3.0, 1.0], [2.0, 1.0]], 5, "id0", "ab" * 16)
        with pytest.raises(InvalidRequestError) as invalid:
            client.embed([])
        assert (invalid.value.param, invalid.value.request_id) == ("inputs", "id1")
    async with AsyncClient(served.target, timeout_s=WAIT_S) as asyncio_client:
        again = await asyncio_client.embed(["abcd"])
        assert (again.embeddings, again.num_prompt_tokens, len(again.trace_id)) == ([[4.0, 1.0]], 4, 32)
    first, second = served.engine.embed_requests
    assert (first.model, first.dimensions, second.model, second.dimensions) == ("e", 2, "", None)


def test_tokens_are_asked_for_as_a_chat_would_be(served: Served) -> None:
    with Client(served.target, timeout_s=WAIT_S) as client:
        assert client.tokenize([user("x")], tools=[WEATHER], timeout_s=WAIT_S) == [1, 2, 3]
        assert client.detokenize([1, 2], skip_special_tokens=False) == "1-2False"
    request = requests.tokenize_request("m", [user("x")], {"tools": [WEATHER], "add_generation_prompt": False, "model": "n"})
    assert (request.model, request.chat.add_generation_prompt, json.loads(request.chat.tools)) == ("n", False, [WEATHER])
    text = requests.tokenize_request("m", "x", {"add_special_tokens": False})
    assert (text.model, text.text, text.add_special_tokens) == ("m", "x", False)


def test_models_tell_what_vectors_they_make(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    offers = [ModelOffer("m", 128, 7), ModelOffer("e", 64, 8, EmbeddingOffer(384, True, (64, 128)))]
    monkeypatch.setattr(served.engine, "list_models", lambda: offers)
    with Client(served.target, timeout_s=WAIT_S) as client:
        assert client.list_models() == [Model("m", 128, 7), Model("e", 64, 8, EmbeddingInfo(384, True, (64, 128)))]
