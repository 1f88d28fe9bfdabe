"""Request and answer shapes of /v1/files and /v1/batches. Pure."""

from __future__ import annotations

from typing import Any, Literal

import orjson
from pydantic import Field

from headrace.errors import InvalidRequestError
from services.router.http.batches.storage import Page, Row
from services.router.http.responses.shapes import Query, check_metadata
from services.router.http.validation import Body, load_object, validate
from services.router.limits import refuse

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
WINDOW_S = 24 * 3600
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
EXPIRY_MIN_S, EXPIRY_MAX_S = 3600, 30 * 86400
_UPLOAD_FIELDS = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}


class FilesQuery(Query):
    """Which part of the list of files is wanted."""

    purpose: str | None = None
    after: str | None = None
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"


class BatchesQuery(Query):
    """Which part of the list of batches is wanted."""

    after: str | None = None
    limit: int = Field(20, ge=1, le=100)


class ExpiresAfter(Body):
    """When the files that a batch makes go."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=EXPIRY_MIN_S, le=EXPIRY_MAX_S)


class BatchBody(Body):
    """Body of POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


def parse_batch(body: bytes) -> BatchBody:
    """Read a body of POST /v1/batches.

    Raises:
        InvalidRequestError: It names the first thing that is wrong.
    """
    asked = validate(BatchBody, load_object(body))
    check_metadata(asked.metadata)
    return asked


def check_upload(fields: dict[str, str], now_s: float) -> tuple[str, int | None]:
    """The purpose of an uploaded file, and when it goes.

    Raises:
        InvalidRequestError: A field is missing, unknown or out of range.
    """
    unknown = sorted(fields.keys() - _UPLOAD_FIELDS)
    if unknown:
        raise InvalidRequestError(
            f"unknown field {unknown[0][:60]}; known are file, {', '.join(sorted(_UPLOAD_FIELDS))}", param=unknown[0][:60]
        )
    purpose = fields.get("purpose")
    if purpose not in PURPOSES:
        refuse("purpose", f"one of {', '.join(PURPOSES)}", purpose)
    seconds = fields.get("expires_after[seconds]")
    if seconds is None:
        return purpose, None
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        refuse("expires_after[anchor]", "created_at", fields["expires_after[anchor]"])
    if not seconds.isascii() or not seconds.isdigit() or not EXPIRY_MIN_S <= int(seconds) <= EXPIRY_MAX_S:
        refuse("expires_after[seconds]", f"in [{EXPIRY_MIN_S}, {EXPIRY_MAX_S}]", seconds)
    return purpose, int(now_s) + int(seconds)


def file_object(file_id: str, *, filename: str, purpose: str, num_bytes: int, created_s: float, expires_s: int | None) -> Row:
    """A file, as it is told and kept."""
    return {
        "id": file_id,
        "object": "file",
        "bytes": num_bytes,
        "created_at": int(created_s),
        "expires_at": expires_s,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_object(batch_id: str, asked: BatchBody, now_s: float) -> Row:
    """A new batch, as it is told and kept."""
    never = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")
    expiry = asked.output_expires_after
    return {
        "id": batch_id,
        "object": "batch",
        "endpoint": asked.endpoint,
        "errors": None,
        "input_file_id": asked.input_file_id,
        "completion_window": asked.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": int(now_s),
        "expires_at": int(now_s) + WINDOW_S,
        **dict.fromkeys(never),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": asked.metadata or {},
        "output_expires_after": None if expiry is None else expiry.model_dump(),
    }


def page_bytes(page: Page) -> bytes:
    """A part of a list."""
    rows: list[dict[str, Any]] = page.rows
    ends = {"first_id": rows[0]["id"] if rows else None, "last_id": rows[-1]["id"] if rows else None}
    return orjson.dumps({"object": "list", "data": rows, **ends, "has_more": page.has_more})
