"""`sglang.grpc.scheduler.SglangScheduler` over the engine: tokens in, tokens out, for gateways that tokenize by themselves.

Source: sglang_scheduler.proto of the package smg-grpc-proto. Part of the shell.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Final

from smg_grpc_proto.generated import common_pb2 as public
from smg_grpc_proto.generated import sglang_scheduler_pb2 as sglang

from services.router.generation import (
    Call,
    Constraint,
    Engine,
    GenerationRequest,
    OutputStream,
    Sampling,
    Stopping,
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

SERVICE_NAME: Final = "sglang.grpc.scheduler.SglangScheduler"

_NOT_HERE: Final = (
    "mm_inputs",
    "token_ids_logprob",
    "return_hidden_states",
    "disaggregated_params",
    "custom_logit_processor",
    "input_embeds",
    "lora_id",
)


def generation_request(message: sglang.GenerateRequest) -> GenerationRequest:
    """A Generate call, checked. A zero is a field that was left out, but for temperature, where it is greedy.

    Raises:
        InvalidRequestError: It names the field, the limit and the value.
    """
    refuse_set(message, _NOT_HERE, "this engine generates text from tokens")
    asked = message.sampling_params
    refuse_set(asked, ("custom_params",), "leave it out")
    sampling = Sampling(
        temperature=asked.temperature,
        top_p=asked.top_p or 1.0,
        top_k=asked.top_k or None,
        min_p=asked.min_p,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        repetition_penalty=asked.repetition_penalty or 1.0,
        logit_bias=logit_bias(asked.logit_bias),
    )
    stopping = Stopping(
        max_tokens=asked.max_new_tokens if asked.HasField("max_new_tokens") else None,
        min_tokens=asked.min_new_tokens,
        ignore_eos=asked.ignore_eos,
        stop=tuple(asked.stop),
        stop_token_ids=tuple(asked.stop_token_ids),
        include_stop_in_output=asked.no_stop_trim,
    )
    check_sampling(sampling)
    check_stopping(stopping, max_tokens_param="max_new_tokens")
    num_choices = asked.n or 1
    check_num_choices("n", num_choices)
    # Where the prompt's begin to be told; -1 is nowhere, and 0 its beginning.
    if message.return_logprob and message.logprob_start_len > 0:
        refuse("logprob_start_len", "-1 or 0", message.logprob_start_len)
    num_top = message.top_logprobs_num if message.return_logprob else None
    check_logprobs("top_logprobs_num", num_top)
    return GenerationRequest(
        model="",
        prompt=TokenPrompt(check_token_ids("input_ids", list(message.tokenized.input_ids))),
        sampling=sampling,
        stopping=stopping,
        skip_special_tokens=asked.skip_special_tokens,
        num_choices=num_choices,
        constraint=_constraint(asked),
        logprobs=num_top,
        prompt_logprobs=num_top if message.logprob_start_len == 0 else None,
    )


def _constraint(asked: sglang.SamplingParams) -> Constraint | None:
    field = asked.WhichOneof("constraint")
    if field is None:
        return None
    kind = {"ebnf_grammar": "ebnf"}.get(field, field)
    return Constraint(kind, getattr(asked, field), field)


def _chunk(request_id: str, choice: Choice, new: Step, stream: OutputStream) -> sglang.GenerateResponse:
    return sglang.GenerateResponse(
        request_id=request_id,
        chunk=sglang.GenerateStreamChunk(
            token_ids=new.token_ids,
            output_logprobs=output_logprobs(sglang, new.logprobs),
            input_logprobs=input_logprobs(sglang, new.prompt_logprobs),
            prompt_tokens=stream.num_prompt_tokens,
            completion_tokens=choice.num_tokens,
            cached_tokens=stream.num_cached_tokens,
            index=choice.index,
        ),
    )


def _complete(request_id: str, choice: Choice, stream: OutputStream) -> sglang.GenerateResponse:
    complete = sglang.GenerateComplete(
        output_ids=choice.token_ids,
        output_logprobs=output_logprobs(sglang, choice.logprobs),
        input_logprobs=input_logprobs(sglang, choice.prompt_logprobs),
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
    return sglang.GenerateResponse(request_id=request_id, complete=complete)


class SglangServicer:
    """The service; what this engine has no part of is answered UNIMPLEMENTED."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._generations = Generations(engine)
        self._descriptions = Descriptions(engine)
        self._started_s = time.time()

    async def Generate(self, request: sglang.GenerateRequest, context: Context) -> AsyncIterator[sglang.GenerateResponse]:
        """Tokens to tokens: pieces, and one completion a choice; without `stream` the completions alone."""
        async with self._call("Generate", context, is_streaming=request.stream, sends_head=request.stream) as call:
            generation = generation_request(request)
            description = await self._descriptions.get(call)
            async for choice, new, stream in self._generations.run(request.request_id, generation, description, call):
                if request.stream and new.token_ids:
                    yield _chunk(request.request_id, choice, new, stream)
                if choice.finish_reason is not None:
                    yield _complete(request.request_id, choice, stream)

    async def Abort(self, request: sglang.AbortRequest, context: Context) -> sglang.AbortResponse:
        """End a generation; one that is over already is none to complain about."""
        is_open = self._generations.abort(request.request_id)
        return sglang.AbortResponse(success=True, message="" if is_open else "no such request is under way")

    async def HealthCheck(self, request: sglang.HealthCheckRequest, context: Context) -> sglang.HealthCheckResponse:
        """Whether a request could be served now."""
        reason = self._engine.not_ready_reason()
        return sglang.HealthCheckResponse(healthy=reason is None, message=reason or "ready")

    async def GetModelInfo(self, request: sglang.GetModelInfoRequest, context: Context) -> sglang.GetModelInfoResponse:
        """What the model is."""
        async with self._call("GetModelInfo", context) as call:
            found = await self._descriptions.get(call)
            return sglang.GetModelInfoResponse(**model_info_fields(found, model_name(self._engine)))
        raise AssertionError("an error ends the call")

    async def GetServerInfo(self, request: sglang.GetServerInfoRequest, context: Context) -> sglang.GetServerInfoResponse:
        """What the server is."""
        load = self._engine.load()
        answer = sglang.GetServerInfoResponse(
            active_requests=self._generations.num_open,
            uptime_seconds=time.time() - self._started_s,
            sglang_version=f"headrace {VERSION}",
            server_type="headrace",
            max_total_num_tokens=load.num_kv_tokens,
        )
        answer.start_time.FromNanoseconds(int(self._started_s * 1e9))
        answer.server_args.update({"served_model_name": model_name(self._engine), "dp_size": 1, "tp_size": 1})
        return answer

    async def GetLoads(self, request: sglang.GetLoadsRequest, context: Context) -> sglang.GetLoadsResponse:
        """How busy all schedulers together are; to a gateway they are one engine."""
        load = self._engine.load()
        one = sglang.SchedulerLoad(
            **load_fields(load, self._generations.tokens_per_s()),
            memory=sglang.MemoryMetrics(token_capacity=load.num_kv_tokens),
            queues=sglang.QueueMetrics(waiting=load.num_waiting),
        )
        return sglang.GetLoadsResponse(
            timestamp=now_text(),
            version=VERSION,
            dp_rank_count=1,
            loads=[one],
            aggregate=sglang.AggregateMetrics(
                total_running_reqs=load.num_running,
                total_waiting_reqs=load.num_waiting,
                total_reqs=one.num_total_reqs,
                avg_token_usage=one.token_usage,
                avg_throughput=one.gen_throughput,
                avg_utilization=one.utilization,
            ),
        )

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

    async def Embed(self, request: sglang.EmbedRequest, context: Context) -> sglang.EmbedResponse:
        """The vector of one text, by the one model that makes vectors."""
        async with self._call("Embed", context) as call:
            refuse_set(request, ("mm_inputs", "texts", "is_cross_encoder"), "this engine embeds tokens")
            answer = await self._engine.embed(token_embedding(request.tokenized.input_ids), call)
            (vector,), (num_tokens,) = answer.vectors, answer.num_tokens
            return sglang.EmbedResponse(embedding=vector, prompt_tokens=num_tokens, embedding_dim=vector.size)
        raise AssertionError("an error ends the call")

    StartProfile = StopProfile = not_here("there is no profiler over gRPC")
    LoadLoRAAdapter = UnloadLoRAAdapter = ListLoadedLoRAAdapters = not_here("adapters are not served")

    def _call(self, method: str, context: Context, **options: bool) -> AbstractAsyncContextManager[Call]:
        return client_call(self._engine, f"{SERVICE_NAME}/{method}", context, **options)
