"""What clients send to have texts embedded or compared, and what they get: OpenAI's embeddings, scores and rankings. Pure.

Scores and rankings have the shapes in which vLLM, Jina and Cohere serve them. They are the cosine of the angle between two vectors.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from headrace.errors import InvalidRequestError
from services.router.generation import EmbedAnswer, EmbedRequest, TextPrompt, TokenPrompt, VectorArray
from services.router.http.validation import Body, load_object, validate
from services.router.limits import MAX_INPUTS, check_token_ids, refuse, shown

_INPUT = "a string, an array of strings, an array of token ids, or an array of arrays of token ids"
_TEXTS = "a string or an array of strings"


class EmbeddingsBody(Body):
    """POST /v1/embeddings."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None
    add_special_tokens: bool | None = None


class ScoreBody(Body):
    """POST /v1/score."""

    text_1: str | list[Any]
    text_2: str | list[Any]
    model: str | None = None
    user: str | None = None


class RerankBody(Body):
    """POST /v1/rerank."""

    query: str
    documents: list[Any]
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingsCall:
    """A call of /v1/embeddings; vectors are given as base64 of little-endian float32, or as numbers."""

    request: EmbedRequest
    user: str | None
    is_base64: bool


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """A call of /v1/score: the texts of `request` are `num_first` first ones, then the second ones."""

    request: EmbedRequest
    user: str | None
    num_first: int


@dataclass(frozen=True, slots=True)
class RerankCall:
    """A call of /v1/rerank: the texts of `request` are the query, then the documents."""

    request: EmbedRequest
    user: str | None
    documents: tuple[str, ...]
    top_n: int
    returns_documents: bool


def parse_embeddings(body: bytes) -> EmbeddingsCall:
    """Read a body of POST /v1/embeddings.

    Raises:
        InvalidRequestError: It names the field, the limit and the value.
    """
    asked = validate(EmbeddingsBody, load_object(body), unions={"input": _INPUT})
    if asked.encoding_format not in (None, "float", "base64"):
        refuse("encoding_format", "float or base64", asked.encoding_format)
    if asked.dimensions is not None and asked.dimensions < 1:
        refuse("dimensions", "at least 1", asked.dimensions)
    inputs = _inputs(asked.input, add_special_tokens=asked.add_special_tokens is not False)
    return EmbeddingsCall(
        EmbedRequest(asked.model or "", inputs, asked.dimensions), asked.user, is_base64=asked.encoding_format == "base64"
    )


def _inputs(given: Any, *, add_special_tokens: bool) -> tuple[TextPrompt | TokenPrompt, ...]:
    if isinstance(given, str):
        return (_text("input", given, add_special_tokens=add_special_tokens),)
    if not isinstance(given, list) or not given:
        refuse("input", f"{_INPUT}, none of them empty", given)
    if type(given[0]) is int:
        return (TokenPrompt(check_token_ids("input", given)),)
    if len(given) > MAX_INPUTS:
        refuse("input", f"at most {MAX_INPUTS} texts", f"{len(given)} of them")
    found: list[TextPrompt | TokenPrompt] = []
    for index, one in enumerate(given):
        name = f"input.{index}"
        if type(one) is not type(given[0]) or not isinstance(one, (str, list)):
            refuse(name, f"of the same kind as the others: input is {_INPUT}", one)
        if isinstance(one, str):
            found.append(_text(name, one, add_special_tokens=add_special_tokens))
        else:
            found.append(TokenPrompt(check_token_ids(name, one)))
    return tuple(found)


def _text(name: str, text: str, *, add_special_tokens: bool = True) -> TextPrompt:
    if not text:
        raise InvalidRequestError(f"{name} must not be an empty string", param=name)
    return TextPrompt(text, add_special_tokens)


def parse_score(body: bytes) -> ScoreCall:
    """Read a body of POST /v1/score.

    Raises:
        InvalidRequestError: It names the field, the limit and the value.
    """
    asked = validate(ScoreBody, load_object(body), unions={"text_1": _TEXTS, "text_2": _TEXTS})
    first, second = _texts("text_1", asked.text_1), _texts("text_2", asked.text_2)
    if len(first) not in (1, len(second)):
        refuse("text_1", f"one text, or as many as text_2, {len(second)}", f"{len(first)} of them")
    if len(first) + len(second) > MAX_INPUTS:
        refuse("text_2", f"at most {MAX_INPUTS} texts together with text_1", f"{len(first) + len(second)} of them")
    return ScoreCall(EmbedRequest(asked.model or "", (*first, *second), param="texts"), asked.user, len(first))


def _texts(name: str, given: Any) -> tuple[TextPrompt, ...]:
    if isinstance(given, str):
        return (_text(name, given),)
    if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
        refuse(name, f"{_TEXTS}, at least one", given)
    return tuple(_text(f"{name}.{index}", one) for index, one in enumerate(given))


def parse_rerank(body: bytes) -> RerankCall:
    """Read a body of POST /v1/rerank.

    Raises:
        InvalidRequestError: It names the field, the limit and the value.
    """
    asked = validate(RerankBody, load_object(body))
    if not 1 <= len(asked.documents) < MAX_INPUTS:
        refuse("documents", f"1 to {MAX_INPUTS - 1} documents", f"{len(asked.documents)} of them")
    if asked.top_n is not None and asked.top_n < 0:
        refuse("top_n", "at least 0, which is all", asked.top_n)
    documents = tuple(_document(f"documents.{index}", one) for index, one in enumerate(asked.documents))
    texts = (_text("query", asked.query), *(_text(f"documents.{index}", one) for index, one in enumerate(documents)))
    return RerankCall(
        EmbedRequest(asked.model or "", texts, param="texts"),
        asked.user,
        documents,
        top_n=asked.top_n or len(documents),
        returns_documents=asked.return_documents is not False,
    )


def _document(name: str, given: Any) -> str:
    """A document's text: itself, or the `text` of an object."""
    text = given.get("text") if isinstance(given, dict) and given.keys() == {"text"} else given
    if not isinstance(text, str):
        raise InvalidRequestError(f'{name} must be a string or {{"text": string}}; got {shown(given)}', param=name)
    return text


def embeddings(answer: EmbedAnswer, *, is_base64: bool) -> bytes:
    """Answer of POST /v1/embeddings."""
    values: Sequence[Any] = [_base64(vector) if is_base64 else vector for vector in answer.vectors]
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    body = {"object": "list", "data": data, "model": answer.model, "usage": _usage(answer)}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64(vector: VectorArray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def scores(answer: EmbedAnswer, call: ScoreCall, *, request_id: str, created_unix_s: int) -> bytes:
    """Answer of POST /v1/score."""
    first, second = answer.vectors[: call.num_first], answer.vectors[call.num_first :]
    data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(_cosines(first, second))]
    return orjson.dumps(
        {
            "id": f"score-{request_id}",
            "object": "list",
            "created": created_unix_s,
            "model": answer.model,
            "data": data,
            "usage": {**_usage(answer), "completion_tokens": 0},
        }
    )


def ranking(answer: EmbedAnswer, call: RerankCall, *, request_id: str) -> bytes:
    """Answer of POST /v1/rerank: the documents nearest to the query, nearest first."""
    scores = _cosines(answer.vectors[:1], answer.vectors[1:])
    # Of equal ones the earlier comes first.
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: call.top_n]
    results: list[dict[str, Any]] = []
    for index in order:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if call.returns_documents:
            result["document"] = {"text": call.documents[index]}
        results.append(result)
    return orjson.dumps({"id": f"rerank-{request_id}", "model": answer.model, "usage": _usage(answer), "results": results})


def _cosines(first: VectorArray, second: VectorArray) -> list[float]:
    products = (first * second).sum(axis=1, dtype=np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return [float(cosine) for cosine in np.clip(products / np.maximum(lengths, np.finfo(np.float32).tiny), -1.0, 1.0)]


def _usage(answer: EmbedAnswer) -> dict[str, int]:
    num_tokens = sum(answer.num_tokens)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
