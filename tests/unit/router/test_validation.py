"""One error for a body that is not of its shape, with the field's path in the body."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from headrace.errors import InvalidRequestError
from services.router.http import anthropic, ollama, openai
from services.router.http.routing import Route, RouteTable
from services.router.http.validation import Body, load_object, validate
from services.router.limits import MAX_DEPTH


class Text(Body):
    type: Literal["text"]
    text: str


class Image(Body):
    type: Literal["image"]
    size: int = Field(ge=1, le=8)


class Shape(Body):
    content: str | list[Annotated[Text | Image, Field(discriminator="type")]]
    limit: int | None = None


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"content": [{"type": "text", "text": 5}]}, "content.0.text", "content.0.text must be a valid string; got 5"),
        (
            {"content": [{"type": "text", "text": "a", "size": 3}]},
            "content.0.size",
            "unknown field content.0.size; did you mean size?",
        ),
        ({"content": [{"type": "text"}]}, "content.0.text", "content.0.text is required"),
        ({"content": [{"type": "image", "size": 9}]}, "content.0.size", "content.0.size must be less than or equal to 8; got 9"),
        ({"content": [{"type": "sound"}]}, "content.0.type", "content.0.type must be one of text, image; got 'sound'"),
        ({"content": [{"text": "a"}]}, "content.0.type", "content.0.type is required"),
        ({"content": 5}, "content", "content must be text or parts; got 5"),
        ({}, "content", "content is required"),
        ({"content": "a", "limt": 3}, "limt", "unknown field limt; did you mean limit?"),
        ({"content": "a", "limit": "3"}, "limit", "limit must be a valid integer; got '3'"),
        ({"content": "a", "limit": True}, "limit", "limit must be a valid integer; got True"),
    ],
)
def test_the_first_error_names_the_field_by_its_path(body: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validate(Shape, body, unions={"content": "text or parts"} if body.get("content") == 5 else {})
    assert (refused.value.param, refused.value.message) == (param, message)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="the body"):
        load_object(body)


async def handler(exchange: object) -> None:
    """A handler that is only compared."""


def test_routes_are_found_by_exact_path_and_by_segments() -> None:
    table = RouteTable(
        [
            Route("/v1/things", {}),
            Route("/v1/things/{id}/cancel", {}),
            Route("/v1/things/{id}", {}),
            Route("/v1/models/{model*}", {}),
        ]
    )
    found = {
        path: (match[0].template, match[1])
        for path in ("/v1/things", "/v1/things/a%2Fb", "/v1/things/a/cancel", "/v1/models/org/name")
        if (match := table.find(path)) is not None
    }
    assert found == {
        "/v1/things": ("/v1/things", {}),
        "/v1/things/a%2Fb": ("/v1/things/{id}", {"id": "a/b"}),
        "/v1/things/a/cancel": ("/v1/things/{id}/cancel", {"id": "a"}),
        "/v1/models/org/name": ("/v1/models/{model*}", {"model": "org/name"}),
    }
    assert [table.find(path) for path in ("/", "/v1/things/", "/v1/things/a/b", "/v1/models/", "/v1/thing")] == [None] * 5


def nested(levels: int) -> str:
    """A JSON object of so many levels."""
    return '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1)


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 300, 1000])
@pytest.mark.parametrize(
    ("parse", "body", "param"),
    [
        (openai.parse_chat, '{"messages": [{"role": "user", "content": "a"}], "temperature": %s}', "temperature"),
        (openai.parse_chat, '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": %s}', "chat_template_kwargs"),
        (openai.parse_chat, '{"messages": [{"role": "user", "content": "a"}], "guided_json": %s}', "guided_json"),
        (
            anthropic.parse_messages,
            '{"model": "m", "max_tokens": 1, "messages": [{"role": "assistant", "content": '
            '[{"type": "tool_use", "id": "1", "name": "f", "input": %s}]}]}',
            "messages",
        ),
        (
            ollama.parse_chat,
            '{"model": "m", "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": %s}}]}]}',
            "messages",
        ),
    ],
)
def test_a_field_has_a_depth(parse: Any, body: str, param: str, levels: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{param} must be nested at most {MAX_DEPTH} deep") as caught:
        parse((body % nested(levels)).encode())
    assert caught.value.param == param


def test_a_field_may_be_as_deep_as_the_limit() -> None:
    body = '{"messages": [{"role": "user", "content": "a"}], "guided_json": ' + nested(MAX_DEPTH) + "}"
    parsed = openai.parse_chat(body.encode())
    assert parsed.generation.constraint is not None
    assert parsed.generation.constraint.source == nested(MAX_DEPTH)


def test_a_body_that_is_no_object_is_refused_however_deep_it_is() -> None:
    with pytest.raises(InvalidRequestError, match="nested too deeply to be shown"):
        load_object(b"[" * 1000 + b"]" * 1000)
