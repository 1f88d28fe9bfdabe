"""The OpenAPI 3.1 description of the HTTP API, made from the same shapes that check its requests. Pure.

`OPERATIONS` says what there is besides the shapes; a test holds it to the routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.router.http import anthropic, embeddings, generate, ollama, openai
from services.router.http.batches import shapes as batches
from services.router.http.responses import shapes as responses

_EVENTS = "text/event-stream"
_LINES = "application/x-ndjson"
_SCHEMAS = "#/components/schemas/"


@dataclass(frozen=True, slots=True)
class Operation:
    """One path and method.

    Attributes:
        body: Shape of a JSON body; None where there is none.
        query: Shape of the query string.
        stream: Media type of a streamed answer.
        is_form: The body is a form with a file.
    """

    method: str
    path: str
    tag: str
    summary: str
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    stream: str = ""
    is_form: bool = False


_OPENAI, _ANTHROPIC, _OLLAMA, _NATIVE, _OPERATOR = "OpenAI", "Anthropic", "Ollama", "native", "operator"

OPERATIONS: tuple[Operation, ...] = (
    Operation("POST", "/v1/chat/completions", _OPENAI, "Answer a conversation.", openai.SHAPES["chat"], stream=_EVENTS),
    Operation("POST", "/v1/completions", _OPENAI, "Continue a prompt, or several.", openai.SHAPES["completion"], stream=_EVENTS),
    Operation("POST", "/v1/embeddings", _OPENAI, "Make one vector a text.", embeddings.EmbeddingsBody),
    Operation("POST", "/v1/score", _NATIVE, "Cosines between texts, as vLLM gives them.", embeddings.ScoreBody),
    Operation("POST", "/v1/rerank", _NATIVE, "Documents by their nearness to a query.", embeddings.RerankBody),
    Operation("GET", "/v1/models", _OPENAI, "List models; in Anthropic's shape where anthropic-version is sent."),
    Operation("GET", "/v1/models/{model}", _OPENAI, "Tell of one model."),
    Operation("POST", "/v1/responses", _OPENAI, "Make a response, now or in the background.", responses.CreateBody, stream=_EVENTS),
    Operation(
        "GET", "/v1/responses/{response_id}", _OPENAI, "Tell of a response, or its events from one on.",
        query=responses.RetrieveQuery, stream=_EVENTS,
    ),
    Operation("DELETE", "/v1/responses/{response_id}", _OPENAI, "Forget a response."),
    Operation("POST", "/v1/responses/{response_id}/cancel", _OPENAI, "Cancel a background response."),
    Operation(
        "GET", "/v1/responses/{response_id}/input_items", _OPENAI, "List what a response was given.", query=responses.PageQuery
    ),
    Operation("POST", "/v1/conversations", _OPENAI, "Begin a conversation.", responses.ConversationBody),
    Operation("GET", "/v1/conversations/{conversation_id}", _OPENAI, "Tell of a conversation."),
    Operation("POST", "/v1/conversations/{conversation_id}", _OPENAI, "Give it other metadata.", responses.UpdateBody),
    Operation("DELETE", "/v1/conversations/{conversation_id}", _OPENAI, "Forget a conversation."),
    Operation(
        "GET", "/v1/conversations/{conversation_id}/items", _OPENAI, "List what was said in it.", query=responses.PageQuery
    ),
    Operation("POST", "/v1/conversations/{conversation_id}/items", _OPENAI, "Add items to it.", responses.ItemsBody),
    Operation("GET", "/v1/conversations/{conversation_id}/items/{item_id}", _OPENAI, "Tell of one item."),
    Operation("DELETE", "/v1/conversations/{conversation_id}/items/{item_id}", _OPENAI, "Take an item out of it."),
    Operation("POST", "/v1/files", _OPENAI, "Upload a file.", is_form=True),
    Operation("GET", "/v1/files", _OPENAI, "List files.", query=batches.FilesQuery),
    Operation("GET", "/v1/files/{file_id}", _OPENAI, "Tell of a file."),
    Operation("DELETE", "/v1/files/{file_id}", _OPENAI, "Delete a file."),
    Operation("GET", "/v1/files/{file_id}/content", _OPENAI, "Give a file's content."),
    Operation("POST", "/v1/batches", _OPENAI, "Have the requests of a file answered within a day.", batches.BatchBody),
    Operation("GET", "/v1/batches", _OPENAI, "List batches.", query=batches.BatchesQuery),
    Operation("GET", "/v1/batches/{batch_id}", _OPENAI, "Tell of a batch."),
    Operation("POST", "/v1/batches/{batch_id}/cancel", _OPENAI, "Cancel a batch; what is done stays."),
    Operation("POST", "/v1/messages", _ANTHROPIC, "Answer a conversation.", anthropic.MessagesBody, stream=_EVENTS),
    Operation(
        "POST", "/v1/messages/count_tokens", _ANTHROPIC, "Count the tokens that a conversation has.", anthropic.CountTokensBody
    ),
    Operation("POST", "/api/chat", _OLLAMA, "Answer a conversation; by default streamed.", ollama.ChatBody, stream=_LINES),
    Operation("POST", "/api/generate", _OLLAMA, "Answer a prompt; by default streamed.", ollama.GenerateBody, stream=_LINES),
    Operation("POST", "/api/show", _OLLAMA, "Tell of a model.", ollama.ShowBody),
    Operation("GET", "/api/tags", _OLLAMA, "List the models that are served."),
    Operation("GET", "/api/ps", _OLLAMA, "List the models that are loaded: all that are served."),
    Operation("GET", "/api/version", _OLLAMA, "Tell the version."),
    Operation("POST", "/generate", _NATIVE, "Continue a prompt or several, as SGLang does.", generate.GenerateBody, stream=_EVENTS),
    Operation("POST", "/tokenize", _NATIVE, "Tokens of a prompt or a conversation.", openai.SHAPES["tokenize"]),
    Operation("POST", "/detokenize", _NATIVE, "Text of tokens.", openai.SHAPES["detokenize"]),
    Operation("POST", "/flush_cache", _OPERATOR, "Drop all cached prefixes."),
    Operation("GET", "/health", _OPERATOR, "Whether the process lives, and what it knows of every stage."),
    Operation("GET", "/ready", _OPERATOR, "Whether a request could be served now; 503 and what is missing otherwise."),
    Operation("GET", "/metrics", _OPERATOR, "Metrics in Prometheus' text format."),
    Operation("GET", "/openapi.json", _OPERATOR, "This description."),
    Operation("GET", "/docs", _OPERATOR, "This description as a page."),
)  # fmt: skip


def description(version: str) -> bytes:
    """The whole document."""
    used = {shape for operation in OPERATIONS for shape in (operation.body, operation.query) if shape is not None}
    ordered = sorted(used, key=lambda shape: (shape.__module__, shape.__qualname__))
    names, definitions = models_json_schema([(shape, "validation") for shape in ordered], ref_template=f"{_SCHEMAS}{{model}}")
    references = {shape: names[shape, "validation"] for shape in ordered}
    schemas: dict[str, Any] = definitions["$defs"]
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, references, schemas)
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "Headrace", "version": version, "description": "What is ignored, field by field: docs/api.md."},
            "paths": paths,
            "components": {
                "schemas": {**schemas, "Error": _ERROR},
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                },
            },
        }
    )


_ERROR = {
    "type": "object",
    "description": "An error in OpenAI's shape; Anthropic's and Ollama's paths have their own.",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "description": "The field, the limit and the value."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field, by its path in the body."},
                "code": {"type": "string", "description": "Stable: headrace/errors.py."},
            },
        }
    },
}
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": list(batches.PURPOSES)},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": batches.EXPIRY_MIN_S, "maximum": batches.EXPIRY_MAX_S},
    },
}


def _operation(operation: Operation, references: dict[type[BaseModel], Any], schemas: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if operation.stream:
        content[operation.stream] = {"schema": {"type": "string"}}
    made: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [*_path_parameters(operation.path), *_query_parameters(operation.query, references, schemas)],
        "responses": {
            "200": {"description": "As asked.", "content": content},
            "default": {"description": "What is wrong.", "content": {"application/json": {"schema": {"$ref": f"{_SCHEMAS}Error"}}}},
        },
    }
    if operation.body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": references[operation.body]}}}
    if operation.is_form:
        made["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    return made


def _path_parameters(path: str) -> Sequence[dict[str, Any]]:
    names = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _query_parameters(
    query: type[BaseModel] | None, references: dict[type[BaseModel], Any], schemas: dict[str, Any]
) -> Sequence[dict[str, Any]]:
    if query is None:
        return []
    properties = schemas[references[query]["$ref"].removeprefix(_SCHEMAS)]["properties"]
    return [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]
