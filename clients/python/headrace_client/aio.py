"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

import grpc

from headrace_client import options
from headrace_client.errors import REQUEST_ID_KEY, CancelledError, error_of
from headrace_client.options import Request, Retries, Settings, Trace
from headrace_client.types import Message, Model, Piece, Reply
from headrace_client.v1 import inference_pb2 as inference
from headrace_client.v1 import inference_pb2_grpc


class AsyncStream:
    """An answer as it comes: iterate over its pieces, `cancel` when enough is there. A context manager that cancels on its way out.

    Attributes:
        trace_id: Of the trace that the call is part of.
        request_id: Its id in the server's logs; known with the first piece.
    """

    def __init__(self, method: Any, request: Request, settings: Settings, trace: Trace, deadline_s: float | None) -> None:
        self.trace_id = trace.trace_id
        self.request_id = ""
        self.num_retries = 0
        self._method = method
        self._request = request
        self._settings = settings
        self._trace = trace
        self._deadline_s = deadline_s
        self._is_cancelled = False
        self._call = self._begin()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces, until the answer is whole.

        Raises:
            HeadraceError: It ends without being whole.
        """
        has_begun = False
        while True:
            try:
                async for message in self._call:
                    has_begun = True
                    self.request_id = message.request_id
                    yield options.piece_of(message)
                return
            except grpc.RpcError as failure:
                error = error_of(failure, await self._told_request_id())
                self.request_id = error.request_id
                wait_s = None
                if not has_begun and not self._is_cancelled:
                    wait_s = self._settings.retries.wait_s(error, self.num_retries, options.remaining_s(self._deadline_s))
                if wait_s is None:
                    raise error from None
                await asyncio.sleep(wait_s)
                self.num_retries += 1
                self._call = self._begin()

    def cancel(self) -> None:
        """Give up the rest; the server frees what it holds at once."""
        self._is_cancelled = True
        self._call.cancel()

    async def read(self) -> Reply:
        """Wait for the whole answer."""
        reply = Reply.empty(options.num_choices_of(self._request))
        async for piece in self:
            reply.add(piece)
        reply.request_id, reply.trace_id = self.request_id, self.trace_id
        return reply

    def _begin(self) -> Any:
        if self._is_cancelled:
            raise CancelledError("the call was cancelled", code="aborted")
        metadata = options.metadata_of(self._settings, self._trace)
        return self._method(self._request, timeout=options.remaining_s(self._deadline_s), metadata=metadata)

    async def _told_request_id(self) -> str:
        metadata = dict(await self._call.initial_metadata() or ())
        return str(metadata.get(REQUEST_ID_KEY, self.request_id))


class AsyncClient:
    """Calls one server, or several behind one name.

    Args:
        target: `host:port`.
        model: The model that calls mean; empty for the only one that is served.
        api_key: Sent with every call; empty for none.
        timeout_s: Deadline of calls that name none, seconds; None for no deadline but the server's.
        retries: When calls are made again.
        credentials: TLS, from `grpc.ssl_channel_credentials`; None for the clear.
        metadata: Sent with every call.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:9000",
        *,
        model: str = "",
        api_key: str = "",
        timeout_s: float | None = None,
        retries: Retries | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.model = model
        self._settings = Settings(api_key, timeout_s, retries or Retries(), metadata or {})
        self._channel = grpc.aio.insecure_channel(target) if credentials is None else grpc.aio.secure_channel(target, credentials)
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls and the connection."""
        await self._channel.close(None)

    async def chat(self, messages: Sequence[Message], **fields: Any) -> Reply:
        """The assistant's next turn, whole. Fields are those of `stream_chat`."""
        return await self.stream_chat(messages, **fields).read()

    def stream_chat(
        self, messages: Sequence[Message], *, timeout_s: float | None = None, traceparent: str | None = None, **fields: Any
    ) -> AsyncStream:
        """The assistant's next turn as it comes.

        Args:
            messages: The conversation so far.
            timeout_s: The call's deadline, seconds from now.
            traceparent: The span that the call belongs to; None for OpenTelemetry's current one, or a new trace.
            fields: Those of `SamplingParams`, `StoppingParams` and `ChatRequest` in the protos: temperature, max_tokens, stop, …

        Raises:
            TypeError: There is no such field, or its value is of another type.
        """
        return self._open(self._stub.Chat, options.chat_request(self.model, messages, fields), timeout_s, traceparent)

    async def generate(self, prompt: str | Sequence[int], **fields: Any) -> Reply:
        """A prompt, text or token ids, gone on with. Fields are those of `stream_generate`."""
        return await self.stream_generate(prompt, **fields).read()

    def stream_generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, traceparent: str | None = None, **fields: Any
    ) -> AsyncStream:
        """The same as it comes; arguments as for `stream_chat`."""
        return self._open(self._stub.Generate, options.generate_request(self.model, prompt, fields), timeout_s, traceparent)

    async def tokenize(self, text: str | Sequence[Message]) -> list[int]:
        """Token ids of a text, or of a conversation as the model's template writes it."""
        return list((await self._ask(self._stub.Tokenize, options.tokenize_request(self.model, text))).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        request = inference.DetokenizeRequest(model=self.model, token_ids=token_ids)
        return str((await self._ask(self._stub.Detokenize, request)).text)

    async def list_models(self) -> list[Model]:
        """The models that can be asked for."""
        answer = await self._ask(self._stub.ListModels, inference.ListModelsRequest())
        return [Model(one.name, one.max_model_len, one.loaded_unix_s) for one in answer.models]

    def _open(self, method: Any, request: Request, timeout_s: float | None, traceparent: str | None) -> AsyncStream:
        deadline_s = options.deadline_of(timeout_s if timeout_s is not None else self._settings.timeout_s)
        return AsyncStream(method, request, self._settings, options.trace_of(traceparent), deadline_s)

    async def _ask(self, method: Callable[..., Any], request: Any) -> Any:
        deadline_s, trace, num_done = options.deadline_of(self._settings.timeout_s), options.trace_of(None), 0
        while True:
            try:
                return await method(
                    request, timeout=options.remaining_s(deadline_s), metadata=options.metadata_of(self._settings, trace)
                )
            except grpc.RpcError as failure:
                error = error_of(failure, "")
                wait_s = self._settings.retries.wait_s(error, num_done, options.remaining_s(deadline_s))
                if wait_s is None:
                    raise error from None
                await asyncio.sleep(wait_s)
                num_done += 1
