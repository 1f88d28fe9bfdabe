"""Paths of /v1/files and /v1/batches. Part of the shell."""

from __future__ import annotations

import time
import uuid
from typing import BinaryIO

import orjson

from headrace.errors import InvalidRequestError
from services.router.http import serving
from services.router.http.batches import shapes
from services.router.http.batches.opening import OpeningStorage
from services.router.http.batches.runner import BatchRunner
from services.router.http.batches.storage import Row
from services.router.http.batches.upload import Upload, boundary_of
from services.router.http.exchange import Exchange
from services.router.http.routing import Route
from services.router.http.validation import validate
from services.router.tenants import tenant_of

_READ_BYTES = 1024 * 1024
_FRAME_BYTES = 64 * 1024
"""Room for the parts of an upload beside the file's content."""


class FilesRoutes:
    """POST /v1/files and what belongs to it."""

    def __init__(self, storage: OpeningStorage, *, max_file_bytes: int) -> None:
        self._storage = storage
        self._max_file_bytes = max_file_bytes

    def routes(self) -> list[Route]:
        """Paths with their handlers."""
        return [
            Route("/v1/files", {"POST": self._create, "GET": self._list}),
            Route("/v1/files/{file_id}", {"GET": self._show, "DELETE": self._delete}),
            Route("/v1/files/{file_id}/content", {"GET": self._content}),
        ]

    async def _create(self, exchange: Exchange) -> None:
        boundary = boundary_of(exchange.headers.get("content-type", ""))
        file_id = f"file-{uuid.uuid4().hex}"
        await self._storage.run(lambda storage: storage.files.check_room(time.time()))
        sink = await self._storage.run(lambda storage: storage.files.begin(file_id))
        try:
            upload = await self._receive(exchange, boundary, sink)
            now_s = time.time()
            purpose, expires_s = shapes.check_upload(upload.fields, now_s)
            made = shapes.file_object(
                file_id, filename=upload.filename, purpose=purpose, num_bytes=upload.num_bytes, created_s=now_s, expires_s=expires_s
            )
            await self._storage.run(lambda storage: storage.files.check_room(now_s, upload.num_bytes))
            await self._storage.run(lambda storage: storage.files.add(made, key_name=exchange.key_name))
        except BaseException:
            await self._storage.run(lambda storage: storage.files.discard(file_id))
            raise
        await exchange.respond(200, orjson.dumps(made))

    async def _receive(self, exchange: Exchange, boundary: bytes, sink: BinaryIO) -> Upload:
        upload = Upload(boundary, sink)
        try:
            limit = self._max_file_bytes + _FRAME_BYTES
            async for chunk in exchange.read_chunks(limit, setting="router.max_file_bytes", bytes_a_timeout=_READ_BYTES):
                # Parsing and writing are one call on the thread: neither is the event loop's.
                await self._storage.run(lambda _, chunk=chunk: upload.feed(chunk))  # type: ignore[misc]
            upload.finish()
        finally:
            await self._storage.run(lambda _: sink.close())
        return upload

    async def _list(self, exchange: Exchange) -> None:
        asked = validate(shapes.FilesQuery, dict(exchange.query))
        page = await self._storage.run(
            lambda storage: storage.files.page(
                time.time(),
                key_name=exchange.key_name,
                purpose=asked.purpose,
                after=asked.after,
                limit=asked.limit,
                is_ascending=asked.order == "asc",
            )
        )
        await exchange.respond(200, shapes.page_bytes(page))

    async def _show(self, exchange: Exchange) -> None:
        file_id = exchange.path_values["file_id"]
        await exchange.respond(200, orjson.dumps(await self._get(exchange, file_id)))

    async def _get(self, exchange: Exchange, file_id: str) -> Row:
        return await self._storage.run(lambda storage: storage.files.get(file_id, time.time(), key_name=exchange.key_name))

    async def _delete(self, exchange: Exchange) -> None:
        file_id = exchange.path_values["file_id"]
        await self._storage.run(lambda storage: storage.files.delete(file_id, time.time(), key_name=exchange.key_name))
        await exchange.respond(200, orjson.dumps({"id": file_id, "object": "file", "deleted": True}))

    async def _content(self, exchange: Exchange) -> None:
        file_id = exchange.path_values["file_id"]
        found = await self._get(exchange, file_id)
        num_left: int = found["bytes"]
        head = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % num_left)]
        await exchange.start(200, head)
        if exchange.method == "HEAD" or not num_left:
            await exchange.write_or_cut(b"", is_last=True)
            return
        offset = 0
        while num_left:
            part = await self._storage.run(lambda storage, offset=offset: storage.files.read(file_id, offset, _READ_BYTES))  # type: ignore[misc]
            offset += len(part)
            num_left -= len(part)
            await exchange.write_or_cut(part, is_last=not num_left)


class BatchesRoutes:
    """POST /v1/batches and what belongs to it."""

    def __init__(self, storage: OpeningStorage, runner: BatchRunner) -> None:
        self._storage = storage
        self._runner = runner

    def routes(self) -> list[Route]:
        """Paths with their handlers."""
        return [
            Route("/v1/batches", {"POST": self._create, "GET": self._list}),
            Route("/v1/batches/{batch_id}", {"GET": self._show}),
            Route("/v1/batches/{batch_id}/cancel", {"POST": self._cancel}),
        ]

    async def _create(self, exchange: Exchange) -> None:
        asked = shapes.parse_batch(await exchange.read_body())
        now_s = time.time()
        source = await self._storage.run(lambda storage: storage.files.get(asked.input_file_id, now_s, key_name=exchange.key_name))
        if source["purpose"] != "batch":
            message = f"input_file_id must name a file whose purpose is batch; {source['id']} has {source['purpose']}"
            raise InvalidRequestError(message, param="input_file_id")
        tenant = tenant_of(None, serving.authorization(exchange))
        made = shapes.batch_object(f"batch_{exchange.open_call.request_id}", asked, now_s)
        await self._storage.run(lambda storage: storage.batches.add(made, tenant, key_name=exchange.key_name))
        self._runner.wake()
        await exchange.respond(200, orjson.dumps(made))

    async def _list(self, exchange: Exchange) -> None:
        asked = validate(shapes.BatchesQuery, dict(exchange.query))
        page = await self._storage.run(
            lambda storage: storage.batches.page(key_name=exchange.key_name, after=asked.after, limit=asked.limit)
        )
        await exchange.respond(200, shapes.page_bytes(page))

    async def _show(self, exchange: Exchange) -> None:
        batch_id = exchange.path_values["batch_id"]
        await exchange.respond(200, orjson.dumps(await self._get(exchange, batch_id)))

    async def _get(self, exchange: Exchange, batch_id: str) -> Row:
        return await self._storage.run(lambda storage: storage.batches.get(batch_id, key_name=exchange.key_name))

    async def _cancel(self, exchange: Exchange) -> None:
        batch_id = exchange.path_values["batch_id"]
        found = await self._get(exchange, batch_id)
        if found["status"] in ("validating", "in_progress"):
            found = {**found, "status": "cancelling", "cancelling_at": int(time.time())}
            await self._storage.run(lambda storage: storage.batches.update(found))
            self._runner.wake()
        elif found["status"] not in ("cancelling", "cancelled"):
            message = f"batch_id must name a batch that is not finished; {batch_id} is {found['status']}"
            raise InvalidRequestError(message, param="batch_id")
        await exchange.respond(200, orjson.dumps(found))
