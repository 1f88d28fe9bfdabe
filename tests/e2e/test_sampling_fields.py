"""Goal: every field that shapes sampling has its effect, and logprobs come through all five services, over HTTP and gRPC."""

from __future__ import annotations

import math
from typing import Any

import grpc
import openai
import pytest

from headrace.v1.common_pb2 import LogitBias, SamplingParams, StoppingParams
from headrace.v1.inference_pb2 import GenerateRequest
from headrace.v1.inference_pb2_grpc import InferenceStub
from tests.e2e.server import Server
from tests.patience import WAIT_S

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
PROMPT = "The capital of France is"


def complete(server: Server, **fields: Any) -> Any:
    client = openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
    ours = ("repetition_penalty", "min_tokens", "prompt_logprobs", "ignore_eos", "min_p")
    extra = {name: fields.pop(name) for name in ours if name in fields}
    return client.completions.create(
        **{"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "extra_body": extra} | fields
    )


def tokens_of(answer: Any) -> list[str]:
    tokens: list[str] = answer.choices[0].logprobs.tokens
    return tokens


def test_penalties_and_biases_change_the_text_as_they_should(server: Server) -> None:
    plain = tokens_of(complete(server, logprobs=0, max_tokens=40, ignore_eos=True))
    assert len(set(plain)) < len(plain), "a small model repeats itself"
    penalised = tokens_of(complete(server, logprobs=0, max_tokens=40, ignore_eos=True, frequency_penalty=2, presence_penalty=2))
    repeated = tokens_of(complete(server, logprobs=0, max_tokens=40, ignore_eos=True, repetition_penalty=2.0))
    assert len(set(penalised)) > len(set(plain))
    assert len(set(repeated)) > len(set(plain))
    only = tokens_of(complete(server, logprobs=0, logit_bias={"260": 100}, max_tokens=5))
    assert len(set(only)) == 1
    barred = complete(server, logprobs=0, prompt_logprobs=0)
    first = next(iter(barred.choices[0].model_extra["prompt_logprobs"][-1]))
    again = complete(server, logprobs=1, logit_bias={first: -100})
    assert again.choices[0].text


def test_min_tokens_keeps_the_end_away(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
    messages: Any = [{"role": "user", "content": "Say only: yes"}]
    ask = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 64}
    longer = client.chat.completions.create(**ask, logprobs=True, extra_body={"min_tokens": 40})
    told = longer.choices[0].logprobs.content
    assert "<|im_end|>" not in [token.token for token in told[:40]]
    assert longer.usage.completion_tokens > 40


@pytest.mark.usefixtures("native_library")
def test_logprobs_are_the_same_streamed_whole_echoed_and_over_grpc(server: Server) -> None:
    whole = complete(server, logprobs=3).choices[0]
    stream = complete(server, logprobs=3, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in stream if chunk.choices and chunk.choices[0].logprobs]
    assert [token for part in streamed for token in part.tokens] == whole.logprobs.tokens
    assert [value for part in streamed for value in part.token_logprobs] == whole.logprobs.token_logprobs
    assert len(whole.logprobs.tokens) == 12
    assert "".join(whole.logprobs.tokens) == whole.text
    assert all(
        max(top.values()) == value for top, value in zip(whole.logprobs.top_logprobs, whole.logprobs.token_logprobs, strict=True)
    )

    # What was made is scored as a prompt: the same numbers, and nothing of it comes from a cache.
    echoed = complete(server, prompt=PROMPT + whole.text, echo=True, logprobs=3, max_tokens=0)
    told = echoed.choices[0].logprobs
    assert (echoed.choices[0].text, echoed.usage.completion_tokens) == (PROMPT + whole.text, 0)
    assert told.tokens[-12:] == whole.logprobs.tokens
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[-12:] == pytest.approx(whole.logprobs.token_logprobs, abs=1e-4)
    assert "".join(told.tokens)[told.text_offset[-12] :] == whole.text

    request = GenerateRequest(
        text=PROMPT,
        sampling=SamplingParams(temperature=0, logit_bias=[LogitBias(token_id=5, bias=-1)]),
        stopping=StoppingParams(max_tokens=12),
        logprobs=3,
        prompt_logprobs=0,
    )
    with grpc.insecure_channel(server.grpc) as channel:
        pieces = list(InferenceStub(channel).Generate(request, timeout=WAIT_S))
    tokens = [token for piece in pieces for token in piece.logprobs]
    assert [token.text.decode() for token in tokens] == whole.logprobs.tokens
    assert [token.logprob for token in tokens] == pytest.approx(whole.logprobs.token_logprobs)
    prompt = [token for piece in pieces for token in piece.prompt_logprobs]
    assert b"".join(token.text for token in prompt).decode() == PROMPT
    assert [token.HasField("logprob") for token in prompt] == [False] + [True] * (len(prompt) - 1)


def test_batches_and_the_best_of_several(server: Server) -> None:
    batch = complete(server, prompt=[PROMPT, "One two three"], n=2, temperature=1, seed=3, max_tokens=4, logprobs=0)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    singles = [
        complete(server, prompt=prompt, n=2, temperature=1, seed=3, max_tokens=4).choices for prompt in (PROMPT, "One two three")
    ]
    assert [choice.text for choice in batch.choices] == [choice.text for choices in singles for choice in choices]
    best = complete(server, best_of=4, temperature=1, seed=3, max_tokens=4, logprobs=0)
    every = complete(server, n=4, temperature=1, seed=3, max_tokens=4, logprobs=0)
    means = [math.fsum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens) for choice in every.choices]
    assert best.choices[0].text == every.choices[means.index(max(means))].text
    assert best.usage.completion_tokens == every.usage.completion_tokens
