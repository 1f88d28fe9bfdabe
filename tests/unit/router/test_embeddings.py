"""/v1/embeddings, /v1/score and /v1/rerank: shapes, limits, and the vectors that come of them."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from headrace.errors import InvalidRequestError, OverloadedError
from services.router.embed_calls import check_dimensions, cut
from services.router.generation import EmbeddingOffer, TextPrompt, TokenPrompt
from services.router.http.app import HttpApp
from services.router.http.embeddings_routes import EmbeddingsRoutes
from tests.unit.router.fake_engine import FakeEngine
from tests.unit.router.http_client import LIMITS, Answer, ask


async def post(engine: FakeEngine, path: str = "embeddings", **body: Any) -> Answer:
    return await ask(HttpApp(engine, LIMITS, EmbeddingsRoutes(engine).routes()), "POST", f"/v1/{path}", body)


async def test_vectors_come_in_openais_shape() -> None:
    engine = FakeEngine()
    answer = await post(engine, model="e", input=["ab", "abc"], user="me")
    assert answer.json == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [2.0, 1.0]},
            {"object": "embedding", "index": 1, "embedding": [3.0, 1.0]},
        ],
        "model": "e",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    assert engine.calls[0].tenant == "user:me"


async def test_base64_holds_the_same_numbers() -> None:
    answer = await post(FakeEngine(), input="abc", encoding_format="base64")
    packed = base64.b64decode(answer.json["data"][0]["embedding"])
    assert np.frombuffer(packed, dtype="<f4").tolist() == [3.0, 1.0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ab", [TextPrompt("ab")]),
        (["ab", "c"], [TextPrompt("ab"), TextPrompt("c")]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_every_form_of_input_is_taken(given: Any, expected: list[Any]) -> None:
    engine = FakeEngine()
    assert (await post(engine, input=given)).status == 200
    inputs = engine.embed_requests[0].inputs
    assert [one.token_ids.tolist() if isinstance(one, TokenPrompt) else one for one in inputs] == expected


async def test_special_tokens_can_be_left_out() -> None:
    engine = FakeEngine()
    await post(engine, input="ab", add_special_tokens=False)
    assert engine.embed_requests[0].inputs == (TextPrompt("ab", add_special_tokens=False),)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "input is required"),
        ({"input": ""}, "input", "must not be an empty string"),
        ({"input": []}, "input", "none of them empty"),
        ({"input": 5}, "input", "a string, an array of strings"),
        ({"input": ["a", ""]}, "input.1", "must not be an empty string"),
        ({"input": ["a", [1]]}, "input.1", "same kind as the others"),
        ({"input": [[1], []]}, "input.1", "1 to"),
        ({"input": [1, "a"]}, "input", "token ids in"),
        ({"input": [True]}, "input.0", "same kind"),
        ({"input": ["a"] * 2049}, "input", "at most 2048 texts; got '2049 of them'"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float or base64; got 'hex'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "at least 1; got 0"),
        ({"input": "a", "dimension": 2}, "dimension", "did you mean dimensions?"),
        ({"input": "a", "user": "x" * 300}, "user", "at most 256 characters"),
    ],
)
async def test_bad_fields_are_named(body: dict[str, Any], param: str, words: str) -> None:
    answer = await post(FakeEngine(), **body)
    assert answer.status == 400
    assert answer.json["error"]["param"] == param
    assert words in answer.json["error"]["message"]


async def test_refusals_of_the_engine_keep_their_status() -> None:
    engine = FakeEngine()
    engine.refusal = OverloadedError("full", retry_after_s=3)
    answer = await post(engine, input="a")
    assert answer.status == 429


@pytest.mark.parametrize(
    ("offer", "dimensions", "words"),
    [
        (EmbeddingOffer(8), 4, "left out, or 8: vectors of 'm' cannot be cut; got 4"),
        (EmbeddingOffer(8, True), 9, r"in \[1, 8\]; got 9"),
        (EmbeddingOffer(8, True, (2, 4)), 3, "one of 2, 4, 8; got 3"),
    ],
)
def test_a_size_that_vectors_cannot_be_cut_to_is_refused(offer: EmbeddingOffer, dimensions: int, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as refusal:
        check_dimensions("m", offer, dimensions)
    assert refusal.value.param == "dimensions"


def test_sizes_that_can_be_had_are_taken() -> None:
    for offer, dimensions in ((EmbeddingOffer(8), 8), (EmbeddingOffer(8, True), 1), (EmbeddingOffer(8, True, (2, 4)), 4)):
        check_dimensions("m", offer, dimensions)
    check_dimensions("m", None, 5)


def test_cut_vectors_have_length_one_and_their_first_numbers() -> None:
    vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]], dtype=np.float32)
    np.testing.assert_allclose(cut(vectors, 2), [[0.6, 0.8], [0.0, 0.0]], atol=1e-6)
    assert cut(vectors, None) is vectors
    assert cut(vectors, 3) is vectors


def cosine(first: int, second: int) -> float:
    return float((first * second + 1) / np.hypot(first, 1) / np.hypot(second, 1))


async def test_scores_are_cosines_and_one_text_is_compared_with_all() -> None:
    answer = (await post(FakeEngine(), "score", text_1="a", text_2=["a", "abc"])).json
    assert [entry["score"] for entry in answer["data"]] == pytest.approx([1.0, cosine(1, 3)])
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}
    answer = (await post(FakeEngine(), "score", text_1=["a", "ab"], text_2=["abc", "a"])).json
    assert [entry["score"] for entry in answer["data"]] == pytest.approx([cosine(1, 3), cosine(2, 1)])


async def test_documents_come_nearest_first() -> None:
    engine = FakeEngine()
    answer = (await post(engine, "rerank", query="abcd", documents=["a", {"text": "abc"}, "abcd"], top_n=2)).json
    assert [(entry["index"], entry["document"]["text"]) for entry in answer["results"]] == [(2, "abcd"), (1, "abc")]
    assert [entry["relevance_score"] for entry in answer["results"]] == pytest.approx([1.0, cosine(4, 3)])
    answer = (await post(engine, "rerank", query="a", documents=["b"], return_documents=False)).json
    assert answer["results"] == [{"index": 0, "relevance_score": pytest.approx(1.0)}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("score", {"text_1": "a", "text_2": []}, "text_2"),
        ("score", {"text_1": "a", "text_2": ["a", 5]}, "text_2"),
        ("score", {"text_1": "a", "text_2": ["a"] * 2048}, "text_2"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": "a", "documents": [{"image": "x"}]}, "documents.0"),
        ("rerank", {"query": "", "documents": ["a"]}, "query"),
        ("rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
    ],
)
async def test_bad_comparisons_are_named(path: str, body: dict[str, Any], param: str) -> None:
    answer = await post(FakeEngine(), path, **body)
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
