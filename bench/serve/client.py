"""The shell of the load client: sends requests, reads streams, keeps one record a request.

One session lives as long as the run. Every failure becomes a record with a kind; only a mistake of the caller is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

import aiohttp
import orjson

from bench.serve.openai_stream import DONE, ChunkError, Endpoint, Sampling, apply_chunk, request_body
from bench.serve.records import RequestRecord, RequestSpec
from bench.serve.sse import SseError, SseParser

_CONNECT_TIMEOUT_S = 10
_HTTP_OK = 200


class LoadClient:
    """Sends requests of one run to one endpoint.

    A stream must end in `data: [DONE]`; with `needs_done` false, for a server that sends none, a finish reason will do.
    """

    def __init__(
        self, session: aiohttp.ClientSession, *, base_url: str, endpoint: Endpoint, sampling: Sampling, needs_done: bool = True
    ) -> None:
        self._session = session
        self._needs_done = needs_done
        # A base URL is given with `/v1` (as to OpenAI's own clients) or without; both mean the same server.
        self._url = base_url.rstrip("/").removesuffix("/v1") + endpoint.path
        self._endpoint = endpoint
        self._sampling = sampling

    async def send(self, spec: RequestSpec, *, late_ns: int = 0) -> RequestRecord:
        """Send one request and read its stream to the end."""
        body = request_body(self._endpoint, self._sampling, spec)
        record = RequestRecord(index=spec.index, started_ns=time.monotonic_ns(), late_ns=late_ns)
        try:
            async with self._session.post(self._url, data=body, headers={"content-type": "application/json"}) as response:
                if response.status != _HTTP_OK:
                    raise ChunkError(f"http_{response.status}", _error_text(await response.read()))
                await _read_stream(response, record, needs_done=self._needs_done)
        except ChunkError as error:
            record.error_kind, record.error_message = error.kind, str(error)
        except SseError as error:
            record.error_kind, record.error_message = "bad_chunk", str(error)
        except TimeoutError as error:
            record.error_kind, record.error_message = "timeout", str(error) or "no answer within --timeout-s"
        except aiohttp.ClientConnectorError as error:
            record.error_kind, record.error_message = "connect", str(error)
        except aiohttp.ClientError as error:
            record.error_kind, record.error_message = "disconnected", f"{type(error).__name__}: {error}"
        record.ended_ns = time.monotonic_ns()
        return record

    async def run_closed(self, specs: Sequence[RequestSpec], *, concurrency: int) -> list[RequestRecord]:
        """Keep `concurrency` requests open: each of as many loops sends its next request when its last one has ended."""
        remaining = iter(specs)
        records: list[RequestRecord] = []

        async def loop() -> None:
            for spec in remaining:
                records.append(await self.send(spec))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(specs))):
                group.create_task(loop())
        return sorted(records, key=lambda record: record.index)

    async def run_open(self, specs: Sequence[RequestSpec], *, offsets_ns: Sequence[int]) -> list[RequestRecord]:
        """Send each request when it is due, however many are still open."""
        start_ns = time.monotonic_ns()
        tasks = []
        async with asyncio.TaskGroup() as group:
            for spec, offset_ns in zip(specs, offsets_ns, strict=True):
                due_ns = start_ns + offset_ns
                await asyncio.sleep(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
                tasks.append(group.create_task(self.send(spec, late_ns=max(0, time.monotonic_ns() - due_ns))))
        return [task.result() for task in tasks]


@contextlib.asynccontextmanager
async def open_session(*, api_key: str | None, timeout_s: float, new_connections: bool) -> AsyncIterator[aiohttp.ClientSession]:
    """The one session of a run: no limit on connections, kept alive between requests unless `new_connections`."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    connector = aiohttp.TCPConnector(limit=0, force_close=new_connections)
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        yield session


async def _read_stream(response: aiohttp.ClientResponse, record: RequestRecord, *, needs_done: bool) -> None:
    parser = SseParser()
    is_done = False
    async for piece in response.content.iter_any():
        now_ns = time.monotonic_ns()
        for event in parser.feed(piece):
            if event.data == DONE:
                is_done = True
            else:
                apply_chunk(record, event.data, now_ns=now_ns)
    if not is_done and (needs_done or record.finish_reason is None):
        raise ChunkError("truncated", "the stream ended before data: [DONE]")


def _error_text(body: bytes) -> str:
    """The message of an OpenAI error body, or the beginning of whatever was sent instead."""
    with contextlib.suppress(orjson.JSONDecodeError, TypeError, KeyError):
        return str(orjson.loads(body)["error"]["message"])
    return body[:200].decode("utf-8", "replace")
