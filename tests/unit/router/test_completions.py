"""Goal: logprobs, echo, best_of and batches of prompts have OpenAI's shapes, and a stream says what an answer in one piece says."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from headrace.errors import OverloadedError, RequestFailedError
from headrace.v1 import common_pb2 as common
from headrace.v1 import inference_pb2 as inference
from services.router.generation import Call, GenerationRequest, LikelyToken, OutputPiece, Sampling, TokenLogprob
from services.router.grpc import conversions
from services.router.http.app import HttpApp
from services.router.http.logprob_shapes import CompletionLogprobs, token_text
from tests.patience import NEVER_S
from tests.unit.router.fake_engine import FakeEngine, FakeStream, Step
from tests.unit.router.http_client import LIMITS, Answer, ask

EURO = "€".encode()
A = TokenLogprob(1, b"He", -0.5, (LikelyToken(1, b"He", -0.5), LikelyToken(9, b"Ho", -1.5)))
B = TokenLogprob(2, EURO[:2], -2.0, (LikelyToken(8, b"!", -0.25), LikelyToken(7, b"?", -3.0)))
C = TokenLogprob(3, EURO[2:], -0.125, (LikelyToken(3, EURO[2:], -0.125), LikelyToken(7, b"?", -4.0)))
PROMPT = (TokenLogprob(30, b"<s>", None), TokenLogprob(31, b"Oh", -1.0, (LikelyToken(32, b"Ah", -0.5),)))
PIECES = (
    OutputPiece("He", (1,), logprobs=(A,), prompt_logprobs=PROMPT),
    OutputPiece("", (2,), logprobs=(B,)),
    OutputPiece("€", (3,), logprobs=(C,)),
    OutputPiece("", (), "stop"),
)


async def complete(engine: FakeEngine, **fields: Any) -> Answer:
    return await ask(HttpApp(engine, LIMITS), "POST", "/v1/completions", {"prompt": "Oh", **fields})


async def chat(engine: FakeEngine, **fields: Any) -> Answer:
    return await ask(
        HttpApp(engine, LIMITS), "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Oh"}], **fields}
    )


def streamed(answer: Answer) -> list[dict[str, Any]]:
    """Choices of a stream's chunks."""
    assert answer.events[-1][1] == "[DONE]"
    return [choice for _, event in answer.events[:-1] for choice in event["choices"]]


async def test_a_chats_logprobs_are_those_of_its_tokens_with_exact_bytes() -> None:
    engine = FakeEngine(*PIECES)
    whole = await chat(engine, logprobs=True, top_logprobs=2)
    assert engine.requests[0].logprobs == 2
    told = whole.json["choices"][0]["logprobs"]
    assert [token["token"] for token in told["content"]] == ["He", "bytes:\\xe2\\x82", "bytes:\\xac"]
    assert bytes(byte for token in told["content"] for byte in token["bytes"]).decode() == "He€"
    assert told["content"][1]["logprob"] == -2.0
    assert told["content"][1]["top_logprobs"] == [
        {"token": "!", "logprob": -0.25, "bytes": [33]},
        {"token": "?", "logprob": -3.0, "bytes": [63]},
    ]
    chunks = streamed(await chat(FakeEngine(*PIECES), logprobs=True, top_logprobs=2, stream=True))
    assert [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["content"]] == told["content"]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "He€"


async def test_who_does_not_ask_gets_null() -> None:
    engine = FakeEngine(*PIECES)
    assert (await chat(engine)).json["choices"][0]["logprobs"] is None
    assert (await complete(engine)).json["choices"][0]["logprobs"] is None
    assert [(request.logprobs, request.prompt_logprobs) for request in engine.requests] == [(None, None)] * 2
    assert (await chat(engine, logprobs=True)).json["choices"][0]["logprobs"]["content"]
    assert engine.requests[-1].logprobs == 0


async def test_a_completions_logprobs_are_four_arrays() -> None:
    whole = (await complete(FakeEngine(*PIECES), logprobs=2)).json["choices"][0]
    assert whole["logprobs"] == {
        "text_offset": [0, 2, 2],
        "token_logprobs": [-0.5, -2.0, -0.125],
        "tokens": ["He", "bytes:\\xe2\\x82", "bytes:\\xac"],
        "top_logprobs": [
            {"He": -0.5, "Ho": -1.5},
            {"!": -0.25, "?": -3.0, "bytes:\\xe2\\x82": -2.0},
            {"bytes:\\xac": -0.125, "?": -4.0},
        ],
    }
    assert "prompt_logprobs" not in whole
    chunks = streamed(await complete(FakeEngine(*PIECES), logprobs=2, stream=True))
    for name, values in whole["logprobs"].items():
        assert [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][name]] == values


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_gives_the_prompt_with_its_logprobs_first(stream: bool) -> None:
    engine = FakeEngine(*PIECES)
    answer = await complete(engine, echo=True, logprobs=1, stream=stream)
    assert (engine.requests[0].logprobs, engine.requests[0].prompt_logprobs) == (1, 1)
    choices = streamed(answer) if stream else answer.json["choices"]
    assert "".join(choice["text"] for choice in choices) == "OhHe€"
    told: dict[str, list[Any]] = defaultdict(list)
    for choice in choices:
        for name, values in (choice["logprobs"] or {}).items():
            told[name] += values
    assert told["tokens"] == ["<s>", "Oh", "He", "bytes:\\xe2\\x82", "bytes:\\xac"]
    assert told["token_logprobs"] == [None, -1.0, -0.5, -2.0, -0.125]
    assert told["text_offset"] == [0, 3, 5, 7, 7]
    assert told["top_logprobs"][:2] == [None, {"Ah": -0.5, "Oh": -1.0}]


@pytest.mark.parametrize("max_tokens", [0, 5])
async def test_echo_of_tokens_gives_their_text_and_may_give_it_alone(max_tokens: int) -> None:
    engine = FakeEngine(*PIECES)
    answer = (await complete(engine, prompt=[4, 5], echo=True, logprobs=0, max_tokens=max_tokens)).json
    assert engine.requests[0].stopping.max_tokens == max(1, max_tokens)
    (choice,) = answer["choices"]
    assert choice["text"] == "4-5True" + ("He€" if max_tokens else "")
    assert len(choice["logprobs"]["tokens"]) == (5 if max_tokens else 2)
    assert choice["finish_reason"] == ("stop" if max_tokens else "length")
    assert answer["usage"]["completion_tokens"] == (3 if max_tokens else 0)


async def test_prompt_logprobs_have_vllms_shape() -> None:
    expected = [
        None,
        {
            "32": {"logprob": -0.5, "rank": 1, "decoded_token": "Ah"},
            "31": {"logprob": -1.0, "rank": None, "decoded_token": "Oh"},
        },
    ]
    engine = FakeEngine(*PIECES)
    assert (await complete(engine, prompt_logprobs=1)).json["choices"][0]["prompt_logprobs"] == expected
    assert (await chat(engine, prompt_logprobs=1)).json["prompt_logprobs"] == expected
    assert [(request.logprobs, request.prompt_logprobs) for request in engine.requests] == [(None, 1)] * 2


def choice_of(choice: int, logprobs: Sequence[float]) -> list[OutputPiece]:
    told = tuple(TokenLogprob(0, b"x", value) for value in logprobs)
    return [
        OutputPiece(str(choice), (0,), None, choice, logprobs=told[:1]),
        OutputPiece("!", (0,) * (len(told) - 1), "stop", choice, logprobs=told[1:]),
    ]


async def test_best_of_gives_the_likeliest_a_token_and_counts_all() -> None:
    pieces = [*choice_of(0, [-1.0, -1.0]), *choice_of(1, [-0.9, -0.9, -0.9]), *choice_of(2, [-3.0])]
    engine = FakeEngine(*pieces)
    answer = (await complete(engine, n=2, best_of=3)).json
    assert (engine.requests[0].num_choices, engine.requests[0].logprobs) == (3, 0)
    assert [(choice["index"], choice["text"], choice["logprobs"]) for choice in answer["choices"]] == [
        (0, "1!", None),
        (1, "0!", None),
    ]
    assert answer["usage"]["completion_tokens"] == 6
    told = (await complete(FakeEngine(*pieces), best_of=3, logprobs=0)).json["choices"]
    assert [choice["logprobs"]["token_logprobs"] for choice in told] == [[-0.9, -0.9, -0.9]]
    for fields in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"best_of": 129}):
        refused = await complete(FakeEngine(), **fields)
        assert (refused.status, refused.json["error"]["param"]) == (400, "best_of")
    assert (await complete(FakeEngine(*PIECES), best_of=1, stream=True)).status == 200


class PromptEngine(FakeEngine):
    """Answers each prompt with its own text, the later the sooner; some fail."""

    def __init__(self, *, failing: int | None = None, full_at: int | None = None) -> None:
        super().__init__()
        self.failing = failing
        self.full_at = full_at
        self.ids: list[str] = []
        self.has_two = asyncio.Event()

    def open_stream(self, request: GenerationRequest, call: Call) -> FakeStream:
        number = len(self.requests)
        if number == self.full_at:
            raise OverloadedError("full", retry_after_s=1)
        self.ids.append(call.request_id)
        self.script = [0.02 * (3 - number), *self.pieces(number, request.num_choices)]
        if number == 1:
            self.has_two.set()
        return super().open_stream(request, call)

    def pieces(self, number: int, num_choices: int) -> list[Step]:
        if number == self.failing:
            return [RequestFailedError("broken")]
        pieces = [replace(piece, choice=choice) for choice in range(num_choices) for piece in PIECES]
        return [replace(piece, text=f"{number}{piece.text}" if piece.text else "") for piece in pieces]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [["a", "b", "c"], [[1], [2, 3], [4]]])
async def test_prompts_of_a_batch_are_numbered_one_after_another(stream: bool, prompt: list[Any]) -> None:
    engine = PromptEngine()
    answer = await complete(engine, prompt=prompt, n=2, stream=stream, logprobs=0)
    texts: dict[int, str] = defaultdict(str)
    for choice in streamed(answer) if stream else answer.json["choices"]:
        texts[choice["index"]] += choice["text"]
    assert dict(sorted(texts.items())) == {index: f"{index // 2}He{index // 2}€" for index in range(6)}
    assert len(set(engine.ids)) == 3
    assert [stream.num_closes > 0 for stream in engine.streams] == [True] * 3
    if not stream:
        assert [choice["index"] for choice in answer.json["choices"]] == list(range(6))
        assert answer.json["usage"]["prompt_tokens"] == 9


async def test_a_batch_echoes_each_prompt() -> None:
    answer = await complete(PromptEngine(), prompt=["a", "b"], echo=True, max_tokens=0, logprobs=0)
    assert [choice["text"] for choice in answer.json["choices"]] == ["a", "b"]


async def test_one_prompt_that_fails_ends_the_batch_with_its_error() -> None:
    engine = PromptEngine(failing=1)
    answer = await complete(engine, prompt=["a", "b", "c"])
    assert (answer.status, answer.json["error"]["message"]) == (500, "broken")
    assert all(stream.num_closes for stream in engine.streams)
    engine = PromptEngine(full_at=2)
    assert (await complete(engine, prompt=["a", "b", "c"])).status == 429
    assert [stream.num_closes for stream in engine.streams] == [1, 1]


class SilentEngine(PromptEngine):
    """Has nothing to say for a long time."""

    def pieces(self, number: int, num_choices: int) -> list[Step]:
        return [NEVER_S]


async def test_a_client_that_leaves_ends_all_prompts() -> None:
    engine = SilentEngine()
    answer = Answer()
    exchange = asyncio.create_task(ask(HttpApp(engine, LIMITS), "POST", "/v1/completions", {"prompt": ["a", "b"]}, answer=answer))
    await engine.has_two.wait()
    answer.gone.set()
    await exchange
    assert all(stream.num_closes for stream in engine.streams)


async def test_too_many_outputs_are_refused_with_the_numbers() -> None:
    refused = await complete(FakeEngine(), prompt=["a"] * 11, n=100)
    assert refused.status == 400
    assert refused.json["error"]["message"] == "prompt must be at most 10 prompts with 100 choices each; got '11 of them'"


async def test_running_usage_stands_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await complete(FakeEngine(*PIECES), stream=True, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for _, event in answer.events[:-1]]
    assert counts == [1, 3, 3, 3]
    assert answer.events[-2][1]["choices"] == []
    assert [choice["text"] for choice in streamed(answer)] == ["He", "€", ""]


def test_a_token_that_is_no_text_is_shown_by_its_bytes() -> None:
    assert token_text(b"\xff") == "bytes:\\xff"
    offsets = CompletionLogprobs().add(0, [TokenLogprob(0, piece, -1.0) for piece in (EURO[:1], EURO[1:], b"a", b"\xff", b"b")])
    assert offsets["text_offset"] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("kind", [inference.GenerateRequest, inference.ChatRequest])
def test_grpc_asks_for_the_same(kind: Any) -> None:
    sampling = common.SamplingParams(
        frequency_penalty=0.5,
        presence_penalty=-1.0,
        repetition_penalty=1.25,
        logit_bias=[common.LogitBias(token_id=3, bias=-100.0)],
    )
    message = kind(sampling=sampling, logprobs=3, prompt_logprobs=0, skip_special_tokens=False)
    if kind is inference.GenerateRequest:
        message.text = "x"
        asked = conversions.generate_request(message)
    else:
        message.prompt.messages.add(role="user", content="x")
        asked = conversions.chat_request(message)
    assert asked.sampling == Sampling(
        frequency_penalty=0.5, presence_penalty=-1.0, repetition_penalty=1.25, logit_bias=((3, -100.0),)
    )
    assert (asked.logprobs, asked.prompt_logprobs, asked.skip_special_tokens) == (3, 0, False)
    (first, second, _) = conversions.token_logprobs([A, PROMPT[0], C])
    assert (first.token_id, first.text, first.logprob, len(first.top)) == (1, b"He", -0.5, 2)
    assert (first.top[1].token_id, first.top[1].text, first.top[1].logprob) == (9, b"Ho", -1.5)
    assert not second.HasField("logprob")
