"""OpenAI's own Python client, synchronous and not, against the default model: text completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
PROMPT = "The capital of France is"
ASKED: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 6}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def texts(client: openai.OpenAI, **fields: Any) -> list[str]:
    """The texts of all choices, whole; they are the streamed ones too."""
    asked = {**ASKED, **fields}
    choices = client.completions.create(**asked).choices
    assert [choice.index for choice in choices] == list(range(len(choices)))
    streamed = [""] * len(choices)
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    whole = [choice.text for choice in choices]
    assert streamed == whole
    return whole


def test_a_prompt_is_continued_and_counted(client: openai.OpenAI) -> None:
    (text,) = texts(client)
    assert "Paris" in text
    whole = client.completions.create(**ASKED)
    *_, last = client.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    assert whole.usage is not None
    assert last.usage is not None
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)
    assert whole.usage.completion_tokens == 6


def test_prompts_come_in_batches_with_as_many_choices_each(client: openai.OpenAI) -> None:
    other = "Two plus two is"
    together = texts(client, prompt=[PROMPT, other])
    assert together == texts(client) + texts(client, prompt=other)
    assert texts(client, prompt=[PROMPT, other], n=2) == [together[0]] * 2 + [together[1]] * 2


def test_a_prompt_may_be_tokens(client: openai.OpenAI) -> None:
    (text,) = texts(client, prompt=[504, 3575, 282, 4649, 314])
    assert texts(client, prompt=[[504, 3575, 282, 4649, 314]] * 2) == [text] * 2


def test_the_best_of_several_is_given(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**ASKED, "temperature": 1, "seed": 3, "logprobs": 0}
    drawn = client.completions.create(**asked, n=4).choices
    best = client.completions.create(**asked, n=1, best_of=4).choices
    assert len(best) == 1
    assert best[0].text in [choice.text for choice in drawn]


def test_the_prompt_is_given_back_with_its_logprobs(client: openai.OpenAI) -> None:
    (alone,) = texts(client)
    assert texts(client, echo=True) == [PROMPT + alone]
    found = client.completions.create(**ASKED, echo=True, logprobs=2).choices[0].logprobs
    assert found is not None
    assert found.tokens
    assert "".join(found.tokens) == PROMPT + alone
    assert found.token_logprobs
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    assert len(found.text_offset or []) == len(found.top_logprobs or []) == len(found.tokens)
    scored = client.completions.create(**{**ASKED, "max_tokens": 0}, echo=True, logprobs=0).choices[0]
    assert scored.text == PROMPT


@pytest.mark.usefixtures("native_library")
def test_draws_come_again(client: openai.OpenAI) -> None:
    """See `test_choices_have_seeds_of_their_own_and_come_again`: torch does not promise it."""
    drawn = texts(client, temperature=1.5, seed=11, n=2)
    assert drawn[0] != drawn[1]
    assert texts(client, temperature=1.5, seed=11, n=2) == drawn


def test_an_answer_stops_where_it_should(client: openai.OpenAI) -> None:
    (text,) = texts(client, stop=["Paris"])
    assert "Paris" not in text
    (with_stop,) = texts(client, stop="Paris", extra_body={"include_stop_str_in_output": True})
    assert with_stop.endswith("Paris")


def test_a_penalty_ends_repetition_and_a_bias_bans_a_token(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": "ha ha ha ha ha ha ha ha", "max_tokens": 24}
    (plain,) = texts(client, **asked)
    assert plain.count(" ha") > 15
    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 1.8}}):
        (varied,) = texts(client, **asked, **penalty)
        assert varied != plain
    (only,) = texts(client, logit_bias={"1904": 100}, max_tokens=1)
    assert texts(client, logit_bias={"1904": 100}, max_tokens=3) == [only * 3]
    assert texts(client, logit_bias={"1904": -100, "1905": 100}, max_tokens=1) != [only]


def test_what_is_wrong_is_named(client: openai.OpenAI) -> None:
    for fields, param in (
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"logprobs": 1000}, "logprobs"),
        ({"best_of": 0}, "best_of"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**{**ASKED, **fields})
        assert refused.value.param == param


def test_many_at_once_say_what_one_says(client: openai.OpenAI, server: Server) -> None:
    (text,) = texts(client)

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0, timeout=120) as together:
            answers = await asyncio.gather(*(together.completions.create(**ASKED) for _ in range(6)))
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == [text] * 6
