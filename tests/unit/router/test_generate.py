"""POST /generate in SGLang's shape: one prompt and many, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from headrace.errors import InvalidRequestError, OverloadedError, RequestFailedError
from services.router.generation import Constraint, LikelyToken, OutputPiece, TextPrompt, TokenLogprob, TokenPrompt
from services.router.http import generate
from services.router.http.app import HttpApp
from services.router.http.generate_routes import GenerateRoutes
from tests.patience import NEVER_S, WAIT_S
from tests.unit.router.fake_engine import FakeEngine
from tests.unit.router.http_client import LIMITS, Answer, ask


def app(engine: FakeEngine) -> HttpApp:
    return HttpApp(engine, LIMITS, GenerateRoutes(engine).routes())


async def post(engine: FakeEngine, **body: Any) -> Answer:
    return await ask(app(engine), "POST", "/generate", body)


async def test_an_answer_has_text_ids_and_meta_info() -> None:
    engine = FakeEngine()
    answer = (await post(engine, text="hi", sampling_params={"max_new_tokens": 5}, rid="mine")).json
    meta = answer["meta_info"]
    assert (answer["text"], answer["output_ids"]) == ("Hello!", [1, 2, 3])
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "stop", "matched": 3},
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "cached_tokens": 1,
    }
    asked = engine.requests[0]
    assert asked.prompt == TextPrompt("hi")
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k) == (1.0, 1.0, -1)
    assert asked.stopping.max_tokens == 5


async def test_a_stream_tells_all_text_so_far_and_ends_as_the_whole_answer() -> None:
    whole = (await post(FakeEngine(), text="hi")).json
    answer = await post(FakeEngine(), text="hi", stream=True)
    *events, (_, done) = answer.events
    assert done == "[DONE]"
    assert [event["text"] for _, event in events] == ["Hel", "Hello", "Hello!"]
    assert [event["output_ids"] for _, event in events] == [[1], [1, 2], [1, 2, 3]]
    last = events[-1][1]
    del last["meta_info"]["e2e_latency"], whole["meta_info"]["e2e_latency"]
    assert last == whole


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_with_several_choices_are_told_apart(stream: bool) -> None:
    pieces = [OutputPiece("a", (1,), None, 0), OutputPiece("x", (5,), "length", 1), OutputPiece("b", (2,), "stop", 0)]
    engine = FakeEngine(*pieces)
    answer = await post(engine, input_ids=[[1, 2], [3]], sampling_params={"n": 2}, stream=stream)
    if stream:
        outputs: dict[int, Any] = {event["index"]: event for _, event in answer.events[:-1]}
        found = [outputs[index] for index in range(4)]
    else:
        found = answer.json
    assert [output["text"] for output in found] == ["ab", "x", "ab", "x"]
    assert [output["meta_info"]["finish_reason"]["type"] for output in found] == ["stop", "length"] * 2
    assert len({output["meta_info"]["id"] for output in found}) == 4
    prompts = [request.prompt for request in engine.requests]
    assert all(isinstance(prompt, TokenPrompt) for prompt in prompts)
    assert [np.asarray(prompt.token_ids).tolist() for prompt in prompts if isinstance(prompt, TokenPrompt)] == [[1, 2], [3]]
    assert [status for status, _ in engine.ended] == ["200", "200"]


async def test_one_prompt_in_a_list_is_answered_by_a_list() -> None:
    assert [output["text"] for output in (await post(FakeEngine(), text=["hi"])).json] == ["Hello!"]


async def test_the_stop_string_is_named_and_trimmed_unless_it_shall_stay() -> None:
    pieces = [OutputPiece("one ", (1,)), OutputPiece("two END", (2,), "stop")]
    trimmed = (await post(FakeEngine(*pieces), text="x", sampling_params={"stop": "END"})).json
    assert (trimmed["text"], trimmed["meta_info"]["finish_reason"]) == ("one two ", {"type": "stop", "matched": "END"})
    kept = (await post(FakeEngine(*pieces), text="x", sampling_params={"stop": ["END"], "no_stop_trim": True})).json
    assert kept["text"] == "one two END"


async def test_logprobs_are_triples_with_and_without_text() -> None:
    prompt = (TokenLogprob(7, b"p", None), TokenLogprob(8, b"q", -1.0, (LikelyToken(9, b"r", -0.5),)))
    made = TokenLogprob(1, b"a", -0.25, (LikelyToken(1, b"a", -0.25), LikelyToken(2, b"b", -2.0)))
    pieces = [OutputPiece("a", (1,), "length", logprobs=(made,), prompt_logprobs=prompt)]
    engine = FakeEngine(*pieces)
    told = (await post(engine, text="x", return_logprob=True, top_logprobs_num=2, logprob_start_len=0)).json["meta_info"]
    assert (engine.requests[0].logprobs, engine.requests[0].prompt_logprobs) == (2, 2)
    assert told["input_token_logprobs"] == [[None, 7, None], [-1.0, 8, None]]
    assert told["output_token_logprobs"] == [[-0.25, 1, None]]
    assert told["input_top_logprobs"] == [None, [[-0.5, 9, None]]]
    assert told["output_top_logprobs"] == [[[-0.25, 1, None], [-2.0, 2, None]]]
    texts = (await post(FakeEngine(*pieces), text="x", return_logprob=True, return_text_in_logprobs=True)).json["meta_info"]
    assert texts["output_token_logprobs"] == [[-0.25, 1, "a"]]
    assert "output_top_logprobs" not in texts
    assert "input_token_logprobs" not in (await post(FakeEngine(), text="x")).json["meta_info"]


async def test_an_error_within_a_stream_is_its_last_event() -> None:
    answer = await post(FakeEngine(OutputPiece("a", (1,)), RequestFailedError("broke")), text=["a", "b"], stream=True)
    assert answer.events[-1][1]["error"]["message"] == "broke"
    assert answer.is_done


async def test_when_one_prompt_cannot_begin_none_does() -> None:
    engine = FakeEngine()
    opened = engine.open_stream

    def open_two(request: Any, call: Any) -> Any:
        if len(engine.streams) == 2:
            raise OverloadedError("full")
        return opened(request, call)

    engine.open_stream = open_two  # type: ignore[method-assign]
    answer = await post(engine, text=["a", "b", "c"])
    assert answer.status == 429
    assert [stream.num_closes for stream in engine.streams] == [1, 1]


async def test_a_disconnect_closes_all_streams() -> None:
    engine = FakeEngine(OutputPiece("a", (1,)), NEVER_S)
    answer = Answer()
    task = asyncio.create_task(ask(app(engine), "POST", "/generate", {"text": ["a", "b"]}, answer=answer))
    async with asyncio.timeout(WAIT_S):
        while len(engine.streams) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        answer.gone.set()
        await task
    assert all(stream.num_closes for stream in engine.streams)
    assert ("499", "aborted") in engine.ended


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "text", "exactly one of text and input_ids"),
        ({"text": "a", "input_ids": [1]}, "text", "exactly one"),
        ({"text": ""}, "text", "non-empty"),
        ({"text": ["a", ""]}, "text", "non-empty"),
        ({"input_ids": []}, "input_ids", "non-empty"),
        ({"input_ids": [-1]}, "input_ids", "token ids in [0,"),
        ({"input_ids": [[1], []]}, "input_ids", "1 to"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature", "in [0, 2]; got -1"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, "sampling_params.max_new_tokens", "in [1,"),
        ({"text": "a", "sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens", "did you mean max_new_tokens?"),
        ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n", "in [1, 128]"),
        ({"text": "a", "sampling_params": {"stop_regex": "x"}}, "sampling_params.stop_regex", "not supported"),
        ({"text": "a", "sampling_params": {"regex": "a", "ebnf": "b"}}, "sampling_params.ebnf", "at most one"),
        ({"text": "a", "sampling_params": {"logit_bias": {"x": 1}}}, "sampling_params.logit_bias", "token ids; got 'x'"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params", "one for each of the 2 prompts"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params.n", "same for all"),
        ({"text": "a", "logprob_start_len": -2}, "logprob_start_len", "-1 or more"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num", "in [0, 20]"),
        ({"text": "a", "lora_path": "x"}, "lora_path", "not supported"),
        ({"text": "a", "priority": 101}, "priority", "between -100 and 100"),
    ],
)
def test_bad_values_are_refused_with_field_limit_and_value(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        generate.parse_generate(json.dumps(body).encode())
    assert refused.value.param == param, refused.value.message
    assert words in refused.value.message


def test_constraints_and_penalties_are_taken_over() -> None:
    params = {"regex": "a+", "frequency_penalty": 0.5, "logit_bias": {"3": -1.5}, "sampling_seed": 4, "ignore_eos": True}
    asked = generate.parse_generate(json.dumps({"text": "a", "sampling_params": params, "log_metrics": True}).encode())
    made = asked.prompts[0].generation
    assert made.constraint == Constraint("regex", "a+", param="sampling_params.regex")
    assert (made.sampling.frequency_penalty, made.sampling.logit_bias, made.sampling.seed) == (0.5, ((3, -1.5),), 4)
    assert made.stopping.ignore_eos
