"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from headrace_client import answers, options, requests
from headrace_client.errors import REQUEST_ID_KEY, CancelledError, error_of
from headrace_client.fields import ChatFields, GenerateFields, TokenizeFields
from headrace_client.options import CHANNEL_OPTIONS, Retries, Settings, Trace
from headrace_client.requests import Request
from headrace_client.types import EmbedReply, Message, Model, Piece, Reply
from headrace_client.v1 import inference_pb2 as inference
from headrace_client.v1 import inference_pb2_grpc


class Stream:
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

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Piece]:
        """Pieces, until the answer is whole.

        Raises:
            HeadraceError: It ends without being whole.
        """
        has_begun = False
        while True:
            try:
                for message in self._call:
                    has_begun = True
                    self.request_id = message.request_id
                    yield answers.piece_of(message)
                return
            except grpc.RpcError as failure:
                error = error_of(failure, self._told_request_id())
                self.request_id = error.request_id
                wait_s = None
                if not has_begun and not self._is_cancelled:
                    wait_s = self._settings.retries.wait_s(error, self.num_retries, options.remaining_s(self._deadline_s))
                if wait_s is None:
                    raise error from None
                time.sleep(wait_s)
                self.num_retries += 1
                self._call = self._begin()

    def cancel(self) -> None:
        """Give up the rest; the server frees what it holds at once."""
        self._is_cancelled = True
        self._call.cancel()

    def read(self) -> Reply:
        """Wait for the whole answer."""
        reply = Reply.empty(requests.num_choices_of(self._request))
        for piece in self:
            reply.add(piece)
        reply.request_id, reply.trace_id = self.request_id, self.trace_id
        return reply

    def _begin(self) -> Any:
        if self._is_cancelled:
            raise CancelledError("the call was cancelled", code="aborted")
        metadata = options.metadata_of(self._settings, self._trace)
        return self._method(self._request, timeout=options.remaining_s(self._deadline_s), metadata=metadata)

    def _told_request_id(self) -> str:
        return str(dict(self._call.initial_metadata() or ()).get(REQUEST_ID_KEY, self.request_id))


class Client:
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
        if credentials is None:
            self._channel = grpc.insecure_channel(target, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, CHANNEL_OPTIONS)
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all calls and the connection."""
        self._channel.close()

    def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout_s: float | None = None,
        traceparent: str | None = None,
        **fields: Unpack[ChatFields],
    ) -> Reply:
        """The assistant's next turn, whole; arguments as for `stream_chat`."""
        return self.stream_chat(messages, timeout_s=timeout_s, traceparent=traceparent, **fields).read()

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        timeout_s: float | None = None,
        traceparent: str | None = None,
        **fields: Unpack[ChatFields],
    ) -> Stream:
        """The assistant's next turn as it comes.

        Args:
            messages: The conversation so far.
            timeout_s: The call's deadline, seconds from now.
            traceparent: The span that the call belongs to; None for OpenTelemetry's current one, or a new trace.
            fields: temperature, max_tokens, stop, tools, constraint, reasoning, logprobs, …: all of `fields.ChatFields`.

        Raises:
            TypeError: There is no such field, or its value is of another type.
            ValueError: A value is out of its field's range.
        """
        return self._open(self._stub.Chat, requests.chat_request(self.model, messages, fields), timeout_s, traceparent)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        traceparent: str | None = None,
        **fields: Unpack[GenerateFields],
    ) -> Reply:
        """A prompt, text or token ids, gone on with; arguments as for `stream_chat`."""
        return self.stream_generate(prompt, timeout_s=timeout_s, traceparent=traceparent, **fields).read()

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        traceparent: str | None = None,
        **fields: Unpack[GenerateFields],
    ) -> Stream:
        """The same as it comes; arguments as for `stream_chat`."""
        return self._open(self._stub.Generate, requests.generate_request(self.model, prompt, fields), timeout_s, traceparent)

    def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        dimensions: int | None = None,
        model: str | None = None,
        timeout_s: float | None = None,
        traceparent: str | None = None,
    ) -> EmbedReply:
        """Vectors of texts, each given as text or as token ids.

        Args:
            texts: 1 to 2048 of them.
            dimensions: Numbers in each vector, for models whose vectors can be cut; None for all.
            model: None for the client's own. A server that chats with one model and embeds with another has two.
            timeout_s: The call's deadline, seconds from now.
            traceparent: As for `stream_chat`.
        """
        request = requests.embed_request(self.model, texts, {"dimensions": dimensions, "model": model})
        trace = options.trace_of(traceparent)
        answer = self._ask(self._stub.Embed, request, timeout_s, trace)
        vectors = [list(one.values) for one in answer.embeddings]
        return EmbedReply(vectors, answer.num_prompt_tokens, answer.request_id, trace.trace_id)

    def tokenize(
        self,
        text: str | Sequence[Message],
        *,
        timeout_s: float | None = None,
        traceparent: str | None = None,
        **fields: Unpack[TokenizeFields],
    ) -> list[int]:
        """Token ids of a text, or of a conversation as the model's template writes it with the same fields as in `stream_chat`."""
        request = requests.tokenize_request(self.model, text, fields)
        return list(self._ask(self._stub.Tokenize, request, timeout_s, options.trace_of(traceparent)).token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        model: str | None = None,
        timeout_s: float | None = None,
        traceparent: str | None = None,
    ) -> str:
        """Text of token ids."""
        fields = {"skip_special_tokens": skip_special_tokens, "model": model}
        request = requests.detokenize_request(self.model, token_ids, fields)
        return str(self._ask(self._stub.Detokenize, request, timeout_s, options.trace_of(traceparent)).text)

    def list_models(self, *, timeout_s: float | None = None, traceparent: str | None = None) -> list[Model]:
        """The models that can be asked for."""
        request = inference.ListModelsRequest()
        return answers.models_of(self._ask(self._stub.ListModels, request, timeout_s, options.trace_of(traceparent)))

    def _open(self, method: Any, request: Request, timeout_s: float | None, traceparent: str | None) -> Stream:
        deadline_s = self._deadline_s(timeout_s)
        return Stream(method, request, self._settings, options.trace_of(traceparent), deadline_s)

    def _deadline_s(self, timeout_s: float | None) -> float | None:
        return options.deadline_of(timeout_s if timeout_s is not None else self._settings.timeout_s)

    def _ask(self, method: Callable[..., Any], request: Any, timeout_s: float | None, trace: Trace) -> Any:
        deadline_s, num_done = self._deadline_s(timeout_s), 0
        while True:
            try:
                return method(request, timeout=options.remaining_s(deadline_s), metadata=options.metadata_of(self._settings, trace))
            except grpc.RpcError as failure:
                error = error_of(failure, "")
                wait_s = self._settings.retries.wait_s(error, num_done, options.remaining_s(deadline_s))
                if wait_s is None:
                    raise error from None
                time.sleep(wait_s)
                num_done += 1
