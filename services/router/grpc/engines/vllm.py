"""`vllm.grpc.engine.VllmEngine` over the engine: tokens or text in, tokens out, for gateways that detokenize by themselves.

Source: vllm_engine.proto of the package smg-grpc-proto. Part of the shell.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Final

import orjson
from smg_grpc_proto.generated import common_pb2 as public
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from headrace.errors import InvalidRequestError
from services.router.generation import (
    Call,
    Constraint,
    Engine,
    GenerationRequest,
    OutputStream,
    Prompt,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
)
from services.router.grpc.calls import Context, client_call
from services.router.grpc.engines.generations import Choice, Generations, Step
from services.router.grpc.engines.shared import (
    VERSION,
    Descriptions,
    input_logprobs,
    kv_batches,
    load_fields,
    logit_bias,
    model_info_fields,
    model_name,
    not_here,
    now_text,
    output_logprobs,
    refuse_set,
    token_embedding,
    tokenizer_chunks,
)
from services.router.limits import check_logprobs, check_num_choices, check_sampling, check_stopping, check_token_ids, refuse

SERVICE_NAME: Final = "vllm.grpc.engine.VllmEngine"

_NOT_HERE: Final = ("kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "media_refs", "extra_mm_inputs")


def generation_request(message: vllm.GenerateRequest) -> GenerationRequest:
    """A Generate call, checked.

    Only a temperature can be left out for the model's default. The other sampling fields are as they stand, where 0 is what changes
    nothing: gateways fill in themselves what their client leaves out, from the defaults that GetModelInfo tells.

    Raises:
        InvalidRequestError: It names the field, the limit and the value.
    """
    refuse_set(message, _NOT_HERE, "this engine generates text from text")
    asked = message.sampling_params
    refuse_set(asked, ("truncate_prompt_tokens",), "shorten the prompt before it is sent")
    sampling = Sampling(
        temperature=asked.temperature if asked.HasField("temperature") else None,
        top_p=asked.top_p or 1.0,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=asked.seed if asked.HasField("seed") else None,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        repetition_penalty=asked.repetition_penalty or 1.0,
        logit_bias=logit_bias(asked.logit_bias),
    )
    stopping = Stopping(
        max_tokens=asked.max_tokens if asked.HasField("max_tokens") else None,
        min_tokens=asked.min_tokens,
        ignore_eos=asked.ignore_eos,
        stop=tuple(asked.stop),
        stop_token_ids=tuple(asked.stop_token_ids),
        include_stop_in_output=asked.include_stop_str_in_output,
    )
    check_sampling(sampling)
    check_stopping(stopping)
    num_choices = asked.n or 1
    check_num_choices("n", num_choices)
    num_top = asked.logprobs if asked.HasField("logprobs") else None
    num_prompt_top = asked.prompt_logprobs if asked.HasField("prompt_logprobs") else None
    check_logprobs("logprobs", num_top)
    check_logprobs("prompt_logprobs", num_prompt_top)
    return GenerationRequest(
        model="",
        prompt=_prompt(message),
        sampling=sampling,
        stopping=stopping,
        skip_special_tokens=asked.skip_special_tokens,
        num_choices=num_choices,
        constraint=_constraint(asked),
        logprobs=num_top,
        prompt_logprobs=num_prompt_top,
    )


def _constraint(asked: vllm.SamplingParams) -> Constraint | None:
    field = asked.WhichOneof("constraint")
    match field:
        case None:
            return None
        case "json_object":
            return Constraint("json_object", "", field) if asked.json_object else None
        case "choice":
            return Constraint("choice", orjson.dumps(list(asked.choice.choices)).decode(), field)
        case "grammar":
            return Constraint("ebnf", asked.grammar, field)
        case _:
            return Constraint(field, getattr(asked, field), field)


def _prompt(message: vllm.GenerateRequest) -> Prompt:
    match message.WhichOneof("input"):
        case "tokenized":
            return TokenPrompt(check_token_ids("input_ids", list(message.tokenized.input_ids)))
        case "text":
            if not message.text:
                refuse("text", "a non-empty string", message.text)
            return TextPrompt(message.text)
        case _:
            raise InvalidRequestError("one of tokenized and text is required", param="tokenized")


def _chunk(choice: Choice, new: Step, stream: OutputStream) -> vllm.GenerateResponse:
    chunk = vllm.GenerateStreamChunk(
        token_ids=new.token_ids,
        output_logprobs=output_logprobs(vllm, new.logprobs),
        input_logprobs=input_logprobs(vllm, new.prompt_logprobs),
        prompt_tokens=stream.num_prompt_tokens,
        completion_tokens=choice.num_tokens,
        cached_tokens=stream.num_cached_tokens,
        index=choice.index,
    )
    return vllm.GenerateResponse(chunk=chunk)


def _complete(choice: Choice, stream: OutputStream) -> vllm.GenerateResponse:
    complete = vllm.GenerateComplete(
        output_ids=choice.token_ids,
        output_logprobs=output_logprobs(vllm, choice.logprobs),
        input_logprobs=input_logprobs(vllm, choice.prompt_logprobs),
        finish_reason=choice.finish_reason or "",
        prompt_tokens=stream.num_prompt_tokens,
        completion_tokens=choice.num_tokens,
        cached_tokens=stream.num_cached_tokens,
        index=choice.index,
    )
    if choice.stop_token_id is not None:
        complete.matched_token_id = choice.stop_token_id
    elif choice.stop_string is not None:
        complete.matched_stop_str = choice.stop_string
    return vllm.GenerateResponse(complete=complete)


class VllmServicer:
    """The service; what this engine has no part of is answered UNIMPLEMENTED."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._generations = Generations(engine)
        self._descriptions = Descriptions(engine)
        self._started_s = time.time()

    async def Generate(self, request: vllm.GenerateRequest, context: Context) -> AsyncIterator[vllm.GenerateResponse]:
        """Tokens to tokens: pieces, and one completion a choice; without `stream` the completions alone."""
        async with self._call("Generate", context, is_streaming=request.stream, sends_head=request.stream) as call:
            generation = generation_request(request)
            description = await self._descriptions.get(call)
            async for choice, new, stream in self._generations.run(request.request_id, generation, description, call):
                if request.stream and new.token_ids:
                    yield _chunk(choice, new, stream)
                if choice.finish_reason is not None:
                    yield _complete(choice, stream)

    async def Abort(self, request: vllm.AbortRequest, context: Context) -> vllm.AbortResponse:
        """End generations; those that are over already are none to complain about."""
        for request_id in request.request_ids:
            self._generations.abort(request_id)
        return vllm.AbortResponse()

    async def HealthCheck(self, request: vllm.HealthCheckRequest, context: Context) -> vllm.HealthCheckResponse:
        """Whether a request could be served now."""
        reason = self._engine.not_ready_reason()
        return vllm.HealthCheckResponse(healthy=reason is None, message=reason or "ready")

    async def GetModelInfo(self, request: vllm.GetModelInfoRequest, context: Context) -> vllm.GetModelInfoResponse:
        """What the model is."""
        async with self._call("GetModelInfo", context) as call:
            found = await self._descriptions.get(call)
            return vllm.GetModelInfoResponse(**model_info_fields(found, model_name(self._engine)))
        raise AssertionError("an error ends the call")

    async def GetServerInfo(self, request: vllm.GetServerInfoRequest, context: Context) -> vllm.GetServerInfoResponse:
        """What the server is."""
        return vllm.GetServerInfoResponse(
            active_requests=self._generations.num_open,
            uptime_seconds=time.time() - self._started_s,
            server_type="headrace",
            data_parallel_size=1,
            max_num_seqs=self._engine.load().max_num_seqs,
        )

    async def GetLoads(self, request: vllm.GetLoadsRequest, context: Context) -> vllm.GetLoadsResponse:
        """How busy all schedulers together are; to a gateway they are one engine."""
        one = vllm.SchedulerLoad(**load_fields(self._engine.load(), self._generations.tokens_per_s()))
        return vllm.GetLoadsResponse(timestamp=now_text(), version=VERSION, dp_rank_count=1, loads=[one])

    async def FlushCache(self, request: public.FlushCacheRequest, context: Context) -> public.FlushCacheResponse:
        """Drop every cached prefix."""
        async with self._call("FlushCache", context) as call:
            num_pages = await self._engine.flush_cache(call)
            return public.FlushCacheResponse(success=True, message=f"{num_pages} pages dropped")
        raise AssertionError("an error ends the call")

    async def GetTokenizer(self, request: public.GetTokenizerRequest, context: Context) -> AsyncIterator[public.GetTokenizerChunk]:
        """The tokenizer's files."""
        async with self._call("GetTokenizer", context) as call:
            async for chunk in tokenizer_chunks(self._engine, call):
                yield chunk

    async def SubscribeKvEvents(
        self, request: public.SubscribeKvEventsRequest, context: Context
    ) -> AsyncIterator[public.KvEventBatch]:
        """What the prefix caches hold, then every change. The head goes out at once: gateways give up on a silent stream."""
        await context.send_initial_metadata(())
        async for batch in kv_batches(self._engine, request):
            yield batch

    async def Embed(self, request: vllm.EmbedRequest, context: Context) -> vllm.EmbedResponse:
        """The vector of one text, by the one model that makes vectors."""
        async with self._call("Embed", context) as call:
            answer = await self._engine.embed(token_embedding(request.tokenized.input_ids), call)
            (vector,), (num_tokens,) = answer.vectors, answer.num_tokens
            return vllm.EmbedResponse(embedding=vector, prompt_tokens=num_tokens, embedding_dim=vector.size)
        raise AssertionError("an error ends the call")

    StartProfile = StopProfile = not_here("there is no profiler over gRPC")

    def _call(self, method: str, context: Context, **options: bool) -> AbstractAsyncContextManager[Call]:
        return client_call(self._engine, f"{SERVICE_NAME}/{method}", context, **options)
