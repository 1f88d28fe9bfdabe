"""The API's description says what is served, and only that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from services.router.api_keys import ApiKeys
from services.router.http import anthropic, generate, ollama, openai, openapi
from services.router.http.app import HttpApp
from services.router.http.describing import PAGE
from services.router.http.protocols import Protocols
from services.router.http.responses import shapes
from tests.unit.router.fake_engine import FakeEngine
from tests.unit.router.http_client import LIMITS, ask, storage_settings


@pytest.fixture
def app() -> HttpApp:
    engine = FakeEngine()
    return HttpApp(engine, LIMITS, Protocols(engine, storage_settings()).routes())


async def described(app: HttpApp) -> Any:
    answer = await ask(app, "GET", "/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    return answer.json


async def test_every_path_that_is_served_is_described_and_no_other(app: HttpApp) -> None:
    served = {
        (method, route.template.replace("*}", "}"))
        for route in [*app._own_routes(), *Protocols(FakeEngine(), storage_settings()).routes()]
        for method in route.methods
    }
    assert {(operation.method, operation.path) for operation in openapi.OPERATIONS} == served
    assert len(openapi.OPERATIONS) == len(served), "described twice"
    assert (await described(app))["openapi"].startswith("3.1.")


async def test_every_schema_is_one_and_every_reference_leads_somewhere(app: HttpApp) -> None:
    document = await described(app)
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = (await ask(app, "GET", "/openapi.json")).body.decode()
    references = set(re.findall(r'"\$ref":"#/components/schemas/([^"]+)"', text))
    assert references <= schemas.keys()
    assert len(references) > 30


async def test_the_described_body_is_the_one_that_is_checked(app: HttpApp) -> None:
    document = await described(app)
    for path, good, bad in (
        ("/v1/messages", {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}, {"max_tokens": "1"}),
        ("/v1/responses", {"input": "x"}, {"inptu": "x"}),
        ("/generate", {"text": "x"}, {"text": 5}),
    ):
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = {**reference, "components": document["components"]}
        assert jsonschema.Draft202012Validator(schema).is_valid(good)
        assert not jsonschema.Draft202012Validator(schema).is_valid({**good, **bad})
        assert (await ask(app, "POST", path, good)).status == 200
        assert (await ask(app, "POST", path, {**good, **bad})).status == 400


async def test_the_page_is_one_file_that_loads_nothing(app: HttpApp) -> None:
    page = await ask(app, "GET", "/docs")
    assert page.body == PAGE.read_bytes()
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)=.?(https?:|//)|@import|url\(", page.body.decode())


async def test_both_are_open_and_the_rest_needs_a_key() -> None:
    engine = FakeEngine()
    app = HttpApp(engine, LIMITS, Protocols(engine, storage_settings()).routes(), ApiKeys(["secret"]))
    assert [(await ask(app, "GET", path)).status for path in ("/docs", "/openapi.json", "/api/tags")] == [200, 200, 401]
    refused = await ask(app, "POST", "/v1/messages", {})
    assert (refused.status, refused.json["error"]["type"]) == (401, "authentication_error")
    assert (await ask(app, "GET", "/api/tags", x_api_key="secret")).status == 200


@pytest.mark.parametrize(
    ("heading", "ignored"),
    [
        ("## OpenAI", openai.IGNORED_FIELDS),
        ("### Responses and conversations", shapes.IGNORED_FIELDS),
        ("## Anthropic", anthropic.IGNORED_FIELDS),
        ("## Ollama", ollama.IGNORED_FIELDS | ollama.IGNORED_OPTIONS),
        ("## SGLang", generate.IGNORED_FIELDS),
    ],
)
def test_every_ignored_field_is_documented(heading: str, ignored: frozenset[str]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    section = page.split(f"{heading}\n", 1)[1].partition("\n#")[0]
    told = section.split("Ignored:", 1)[1].partition("\n\n")[0]
    assert set(re.findall(r"`([^`]+)`", told)) >= ignored
