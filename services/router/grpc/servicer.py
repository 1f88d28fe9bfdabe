"""headrace.v1.Inference over the engine. Part of the shell; conversions.py has the shapes.

Closing the stream on the way out aborts the request at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from headrace.v1 import inference_pb2 as inference
from headrace.v1 import inference_pb2_grpc
from services.router.generation import Call, Engine, GenerationRequest, OutputPiece
from services.router.grpc import conversions
from services.router.grpc.calls import Context, client_call
from services.router.limits import check_token_ids
from services.router.messages import model_info

SERVICE_NAME = "headrace.v1.Inference"


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """The public gRPC service."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Generate(self, request: inference.GenerateRequest, context: Context) -> AsyncIterator[inference.GenerateResponse]:
        """Text or token ids to text, streamed."""
        async with self._call("Generate", context) as call:
            async for piece, usage in self._pieces(conversions.generate_request(request), call):
                yield inference.GenerateResponse(
                    request_id=call.request_id,
                    text=piece.text,
                    token_ids=piece.token_ids,
                    finish_reason=conversions.finish_reason_of(piece.finish_reason),
                    usage=usage,
                    choice=piece.choice,
                    logprobs=conversions.token_logprobs(piece.logprobs),
                    prompt_logprobs=conversions.token_logprobs(piece.prompt_logprobs),
                )

    async def Chat(self, request: inference.ChatRequest, context: Context) -> AsyncIterator[inference.ChatResponse]:
        """A conversation to the assistant's next turn, streamed."""
        async with self._call("Chat", context) as call:
            async for piece, usage in self._pieces(conversions.chat_request(request), call):
                yield inference.ChatResponse(
                    request_id=call.request_id,
                    content=piece.text,
                    reasoning=piece.reasoning,
                    tool_calls=conversions.tool_call_deltas(piece.tool_calls),
                    token_ids=piece.token_ids,
                    finish_reason=conversions.finish_reason_of(piece.finish_reason),
                    usage=usage,
                    choice=piece.choice,
                    logprobs=conversions.token_logprobs(piece.logprobs),
                    prompt_logprobs=conversions.token_logprobs(piece.prompt_logprobs),
                )

    async def Tokenize(self, request: inference.TokenizeRequest, context: Context) -> inference.TokenizeResponse:
        """Text or a conversation to token ids."""
        async with self._call("Tokenize", context) as call:
            encoded = await self._engine.tokenize(request.model, conversions.tokenize_prompt(request), call)
            return inference.TokenizeResponse(token_ids=encoded.token_ids.tolist(), max_model_len=encoded.max_model_len)
        raise AssertionError("an error ends the call")

    async def Detokenize(self, request: inference.DetokenizeRequest, context: Context) -> inference.DetokenizeResponse:
        """Token ids to text."""
        async with self._call("Detokenize", context) as call:
            token_ids = list(request.token_ids)
            if token_ids:
                check_token_ids("token_ids", token_ids)
            skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
            text = await self._engine.detokenize(request.model, token_ids, call, skip_special_tokens=skip)
            return inference.DetokenizeResponse(text=text)
        raise AssertionError("an error ends the call")

    async def Embed(self, request: inference.EmbedRequest, context: Context) -> inference.EmbedResponse:
        """Texts to vectors."""
        async with self._call("Embed", context) as call:
            answer = await self._engine.embed(conversions.embed_request(request), call)
            return inference.EmbedResponse(
                request_id=call.request_id,
                embeddings=[inference.Embedding(values=vector) for vector in answer.vectors],
                num_prompt_tokens=sum(answer.num_tokens),
            )
        raise AssertionError("an error ends the call")

    async def ListModels(self, request: inference.ListModelsRequest, context: Context) -> inference.ListModelsResponse:
        """The models that can be asked for."""
        return inference.ListModelsResponse(models=[model_info(offer) for offer in self._engine.list_models()])

    async def _pieces(self, generation: GenerationRequest, call: Call) -> AsyncIterator[tuple[OutputPiece, inference.Usage | None]]:
        """Pieces of all choices; the usage with the last of them."""
        stream = self._engine.open_stream(generation, call)
        num_unfinished = generation.num_choices
        try:
            while num_unfinished:
                piece = await stream.next()
                num_unfinished -= piece.finish_reason is not None
                yield piece, None if num_unfinished else conversions.usage_of(stream)
        finally:
            stream.close()

    def _call(self, method: str, context: Context) -> AbstractAsyncContextManager[Call]:
        is_streaming = method in {"Generate", "Chat"}
        return client_call(self._engine, f"{SERVICE_NAME}/{method}", context, is_streaming=is_streaming)
