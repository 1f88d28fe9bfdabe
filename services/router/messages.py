"""The protobuf bodies a router sends, made from an open request; and what it reads from those it gets. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from google.protobuf.message import Message

from headrace.errors import HeadraceError, ProtocolError, error_from_code
from headrace.output_formats import CHANNELS_FORMAT
from headrace.telemetry.traces import Context
from headrace.v1 import common_pb2 as common
from headrace.v1 import control_pb2 as control
from headrace.v1 import detokenizer_pb2 as detokenizer
from headrace.v1 import router_pb2 as router
from headrace.v1 import scheduler_pb2 as scheduler
from headrace.v1 import tokenizer_pb2 as tokenizer
from headrace.wire.envelope import float32_array, int32_array
from services.router import logprobs
from services.router.generation import (
    TOOL_CALLS_KIND,
    ChatTurn,
    Constraint,
    ConversationPrompt,
    EmbeddingOffer,
    EncodedPrompt,
    GenerationRequest,
    ModelDescription,
    ModelOffer,
    OutputFormats,
    Prompt,
    Sampling,
    TextPrompt,
    TokenArray,
    TokenPrompt,
    Tool,
    ToolCallDelta,
    VectorArray,
)
from services.router.limits import seed_bits
from services.router.open_request import Kind, OpenRequest, Output
from services.router.prefix_directory import STORED, LaneNews

PROMPT_TAIL_TOKENS = 32
"""Prompt tokens a detokenizer gets as context, so that the first output token is decoded as it would be in the middle of a text."""

_SPECULATIVE_METHODS = {
    "off": common.SPECULATIVE_METHOD_OFF,
    "ngram": common.SPECULATIVE_METHOD_NGRAM,
    "auto": common.SPECULATIVE_METHOD_AUTO,
}

_CONSTRAINT_KINDS = {
    "json_schema": common.CONSTRAINT_KIND_JSON_SCHEMA,
    "json_object": common.CONSTRAINT_KIND_JSON_OBJECT,
    "regex": common.CONSTRAINT_KIND_REGEX,
    "ebnf": common.CONSTRAINT_KIND_EBNF,
    "choice": common.CONSTRAINT_KIND_CHOICE,
    "structural_tag": common.CONSTRAINT_KIND_STRUCTURAL_TAG,
    TOOL_CALLS_KIND: common.CONSTRAINT_KIND_TOOL_CALLS,
}

WorkMessage = tuple[str, Message, list[TokenArray]]
"""Arm of the receiver's inbox, body, further frames."""


def work_header(request_id: str, *, context: Context, deadline_unix_ns: int, enqueued_unix_ns: int) -> common.WorkHeader:
    """What every message that starts work carries."""
    return common.WorkHeader(
        request_id=request_id,
        traceparent=context.traceparent,
        tracestate=context.tracestate,
        deadline_unix_ns=deadline_unix_ns,
        enqueued_unix_ns=enqueued_unix_ns,
    )


def tokenize(request: OpenRequest, work: common.WorkHeader) -> WorkMessage:
    """The prompt, or the tokens whose text is wanted, for a tokenizer."""
    generation = request.generation
    if request.kind is Kind.DETOKENIZE:
        assert isinstance(generation.prompt, TokenPrompt)
        whole = tokenizer.Detokenize(work=work, model=generation.model, skip_special_tokens=generation.skip_special_tokens)
        return "detokenize", whole, [generation.prompt.token_ids]
    if request.kind in {Kind.DESCRIBE, Kind.DESCRIBE_WITH_FILES}:
        with_files = request.kind is Kind.DESCRIBE_WITH_FILES
        return "describe", tokenizer.Describe(work=work, model=generation.model, with_files=with_files), []
    body = tokenizer.Tokenize(work=work, model=generation.model, skip_length_check=request.kind is not Kind.GENERATE)
    if generation.stopping.max_tokens is not None:
        body.max_tokens = generation.stopping.max_tokens
    if generation.constraint is not None:
        body.constraint.CopyFrom(_constraint(generation.constraint))
        body.constraint_param = generation.constraint.param
    return "tokenize", body, _fill_prompt(body, generation.prompt)


def _fill_prompt(body: tokenizer.Tokenize, prompt: Prompt) -> list[TokenArray]:
    match prompt:
        case TextPrompt():
            body.text = prompt.text
            body.add_special_tokens = prompt.add_special_tokens
        case ConversationPrompt():
            body.chat.add_generation_prompt = prompt.add_generation_prompt
            body.chat.continue_final_message = prompt.continue_final_message
            body.chat.messages.extend(_chat_message(turn) for turn in prompt.turns)
            if prompt.tools:
                body.chat.tools = tools_json(prompt.tools)
            if prompt.template_kwargs:
                body.chat.template_kwargs = json.dumps(prompt.template_kwargs, ensure_ascii=False)
        case TokenPrompt():
            body.num_token_ids = prompt.token_ids.size
            return [prompt.token_ids]
    return []


def _chat_message(turn: ChatTurn) -> tokenizer.ChatMessage:
    message = tokenizer.ChatMessage(
        role=turn.role, content=turn.content, name=turn.name, tool_call_id=turn.tool_call_id, reasoning=turn.reasoning
    )
    if turn.tool_calls:
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.tool_calls
        ]
        message.tool_calls = json.dumps(calls, ensure_ascii=False)
    return message


def tools_json(tools: tuple[Tool, ...]) -> str:
    """Tools as the wire carries them: OpenAI's form, which chat templates expect."""
    functions: list[dict[str, object]] = []
    for tool in tools:
        function: dict[str, object] = {"name": tool.name}
        if tool.description:
            function["description"] = tool.description
        if tool.parameters is not None:
            function["parameters"] = tool.parameters
        functions.append({"type": "function", "function": function})
    return json.dumps(functions, ensure_ascii=False)


def open_stream(request: OpenRequest, work: common.WorkHeader) -> WorkMessage:
    """A stream for a detokenizer, with the history that lets it go on exactly where ours ends."""
    encoded = _encoded(request)
    outputs = np.frombuffer(request.output_tokens, dtype=np.int32) if request.output_tokens else _NO_TOKENS
    body = detokenizer.OpenStream(
        work=work,
        stream_id=request.stream_id,
        model=request.generation.model,
        stopping=_stopping(request, with_stop_strings=True),
        skip_special_tokens=request.generation.skip_special_tokens,
        num_output_tokens=outputs.size,
        num_sent_chars=request.read.num_chars,
    )
    reading = _reading(request.generation, encoded.formats, has_budget=not request.read.is_reasoning_closed)
    if reading is not None:
        body.reading.CopyFrom(reading)
        body.sent.CopyFrom(
            detokenizer.SentOutput(
                num_reasoning_chars=request.read.num_reasoning_chars,
                num_tool_calls=request.read.num_tool_calls,
                num_argument_chars=request.read.num_argument_chars,
            )
        )
    return "open_stream", body, [np.concatenate((encoded.token_ids[-PROMPT_TAIL_TOKENS:], outputs))]


REQUIRED_CALLS_FORMAT = "json"
"""How calls are written where a grammar makes the model write them: a JSON array of calls, with nothing but reasoning before it."""


def _reading(generation: GenerationRequest, formats: OutputFormats, *, has_budget: bool) -> detokenizer.OutputReading | None:
    """How a detokenizer is to read the output; None where it is only text."""
    prompt = generation.prompt
    if not isinstance(prompt, ConversationPrompt):
        return None
    wants_tools = bool(prompt.tools) and generation.tool_choice.kind != "none"
    is_forced = wants_tools and generation.tool_choice.kind != "auto"
    wire = common.OutputFormats()
    wire.tool_format = REQUIRED_CALLS_FORMAT if is_forced else formats.tool_format if wants_tools else ""
    # Channels are no block that could stand before a grammar's own text: forced calls are all of the output there.
    if not is_forced or formats.reasoning_format != CHANNELS_FORMAT:
        wire.reasoning_format = formats.reasoning_format
        wire.starts_in_reasoning = formats.starts_in_reasoning
    if not wire.tool_format and not wire.reasoning_format:
        return None
    options = generation.reasoning
    return detokenizer.OutputReading(
        formats=wire,
        tools=tools_json(prompt.tools) if wire.tool_format else "",
        keeps_reasoning_in_text=not options.is_separate,
        holds_reasoning=not options.is_streamed,
        reasoning_budget=options.budget_tokens if has_budget and formats.reasoning_end_token_ids else None,
    )


def submit_text(request: OpenRequest, work: common.WorkHeader) -> WorkMessage:
    """The tokens of a text that is to be embedded, for a scheduler."""
    tokens = _encoded(request).token_ids
    kind = control.WORK_KIND_EMBED
    return "submit", scheduler.Submit(work=work, model=request.generation.model, num_tokens=tokens.size, kind=kind), [tokens]


def vectors(body: router.Embeddings, frames: Sequence[memoryview]) -> Iterator[tuple[str, VectorArray]]:
    """The requests of a message and their vectors.

    Raises:
        ProtocolError: The frame does not hold them.
    """
    num = len(body.request_ids)
    values = float32_array(frames[0] if frames else None, count=num * body.vector_size).reshape(num, body.vector_size)
    # A copy: the frame is the socket's.
    yield from zip(body.request_ids, np.array(values), strict=True)


def submit(request: OpenRequest, work: common.WorkHeader, *, seed: int, target: scheduler.DetokenizerTarget) -> WorkMessage:
    """Prompt and outputs so far for a scheduler, every sampling field filled."""
    encoded = _encoded(request)
    tokens = encoded.token_ids
    if request.output_tokens:
        tokens = np.concatenate((tokens, np.frombuffer(request.output_tokens, dtype=np.int32)))
    sampling = merged_sampling(request.generation.sampling, encoded.defaults)
    body = scheduler.Submit(
        work=work,
        model=request.generation.model,
        stream_id=request.stream_id,
        num_tokens=tokens.size,
        num_output_tokens=len(request.output_tokens),
        sampling=common.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=seed,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=[common.LogitBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        ),
        stopping=_stopping(request, with_stop_strings=False),
        eos_token_ids=encoded.eos_token_ids,
        detokenizer=target,
        tenant=request.generation.tenant,
        priority=request.generation.priority,
        cache_namespace=request.generation.cache_namespace,
        fork_group=request.fork_group,
        logprobs=request.generation.logprobs,
        # They come with the first output.
        prompt_logprobs=None if request.output_tokens else request.generation.prompt_logprobs,
    )
    speculative = request.generation.speculative
    if speculative.method is not None:
        body.speculative.method = _SPECULATIVE_METHODS[speculative.method]
    if speculative.num_tokens is not None:
        body.speculative.num_speculative_tokens = speculative.num_tokens
    if encoded.grammar:
        body.constraint.CopyFrom(common.Constraint(kind=common.CONSTRAINT_KIND_GRAMMAR, source=encoded.grammar))
    return "submit", body, [tokens]


def _constraint(constraint: Constraint) -> common.Constraint:
    return common.Constraint(kind=_CONSTRAINT_KINDS[constraint.kind], source=constraint.source)


def lane_news(body: router.CacheEvents, frames: Sequence[memoryview] = ()) -> LaneNews:
    """What a scheduler tells of a lane's cache.

    Raises:
        ProtocolError: The arrays do not match.
    """
    if len(body.kinds) != len(body.num_hashes) or sum(body.num_hashes) != len(body.hashes):
        raise ProtocolError(
            f"cache events: {len(body.kinds)} kinds, {len(body.num_hashes)} counts and {len(body.hashes)} hashes do not match"
        )
    events, start = [], 0
    for kind, count in zip(body.kinds, body.num_hashes, strict=True):
        events.append((int(kind), tuple(body.hashes[start : start + count])))
        start += count
    news = LaneNews(body.lane, body.page_size, body.first_number, tuple(events), body.is_snapshot)
    if not frames:
        return news
    tokens = int32_array(frames[0], count=body.num_tokens).tobytes()
    num_stored = sum(len(hashes) for kind, hashes in events if kind == STORED)
    if len(body.parents) != len(events) or body.num_tokens != num_stored * body.page_size:
        raise ProtocolError(
            f"cache events: {body.num_tokens} tokens and {len(body.parents)} hashes before events do not match "
            f"{num_stored} stored blocks of {body.page_size} tokens in {len(events)} events"
        )
    return replace(news, has_tokens=True, parents=tuple(body.parents), tokens=tokens)


def merged_sampling(asked: Sampling, defaults: Sampling) -> Sampling:
    """The client's value wins, then the model's, then plain sampling from the whole distribution."""

    def first(*values: float | None) -> float:
        return next(value for value in values if value is not None)

    return replace(
        asked,
        temperature=first(asked.temperature, defaults.temperature, 1.0),
        top_p=first(asked.top_p, defaults.top_p, 1.0),
        top_k=int(first(asked.top_k, defaults.top_k, 0)),
        min_p=first(asked.min_p, defaults.min_p, 0.0),
        repetition_penalty=first(asked.repetition_penalty, defaults.repetition_penalty, 1.0),
    )


def _stopping(request: OpenRequest, *, with_stop_strings: bool) -> common.StoppingParams:
    stopping = request.generation.stopping
    body = common.StoppingParams(
        min_tokens=stopping.min_tokens,
        ignore_eos=stopping.ignore_eos,
        stop_token_ids=stopping.stop_token_ids,
        include_stop_in_output=stopping.include_stop_in_output,
    )
    if stopping.max_tokens is not None:
        body.max_tokens = stopping.max_tokens
    if with_stop_strings:
        body.stop.extend(stopping.stop)
    return body


def tokenizer_answer(
    reply: tokenizer.TokenizeReply | tokenizer.DetokenizeReply | tokenizer.DescribeReply, frames: Sequence[memoryview]
) -> EncodedPrompt | ModelDescription | str:
    """What a tokenizer answered: a prompt's tokens, the text of tokens, or what the model is."""
    if isinstance(reply, tokenizer.DetokenizeReply):
        return reply.text
    if isinstance(reply, tokenizer.DescribeReply):
        return model_description(reply)
    return encoded_prompt(reply, int32_array(frames[0] if frames else None, count=reply.num_tokens))


def encoded_prompt(reply: tokenizer.TokenizeReply, tokens: TokenArray) -> EncodedPrompt:
    """What a tokenizer answered."""
    return EncodedPrompt(
        token_ids=tokens,
        max_model_len=reply.max_model_len,
        eos_token_ids=tuple(reply.eos_token_ids),
        grammar=reply.grammar,
        defaults=_defaults(reply.sampling_defaults),
        formats=OutputFormats(
            reply.formats.tool_format,
            reply.formats.reasoning_format,
            reply.formats.starts_in_reasoning,
            tuple(reply.formats.reasoning_end_token_ids),
        ),
    )


def _defaults(defaults: common.SamplingParams) -> Sampling:
    return Sampling(
        temperature=defaults.temperature if defaults.HasField("temperature") else None,
        top_p=defaults.top_p if defaults.HasField("top_p") else None,
        top_k=defaults.top_k if defaults.HasField("top_k") else None,
        min_p=defaults.min_p if defaults.HasField("min_p") else None,
        repetition_penalty=defaults.repetition_penalty if defaults.HasField("repetition_penalty") else None,
    )


def model_description(reply: tokenizer.DescribeReply) -> ModelDescription:
    """What a tokenizer tells of its model."""
    body = reply.description
    return ModelDescription(
        path=body.path,
        architectures=tuple(body.architectures),
        model_type=body.model_type,
        vocab_size=body.vocab_size,
        max_model_len=body.max_model_len,
        eos_token_ids=tuple(body.eos_token_ids),
        bos_token_id=body.bos_token_id if body.HasField("bos_token_id") else None,
        pad_token_id=body.pad_token_id if body.HasField("pad_token_id") else None,
        defaults=_defaults(body.sampling_defaults),
        tokenizer_zip=reply.tokenizer_zip,
    )


def outputs(deltas: router.OutputDeltas) -> Iterator[tuple[int, Output]]:
    """The streams of a batch and what it says of each.

    Raises:
        ProtocolError: The arrays do not fit each other.
    """
    stream_ids = deltas.stream_ids
    num = len(stream_ids)
    counts = list(deltas.num_tokens) or [1] * num
    finish: list[int] = [*deltas.finish_reasons] or [0] * num
    cached = list(deltas.num_cached_tokens) or [0] * num
    told = logprobs.of_outputs(deltas) if deltas.HasField("logprobs") else {}
    prompts = logprobs.of_prompts(deltas) if deltas.HasField("prompt_logprobs") else {}
    tokens = list(deltas.token_ids)
    positions, texts = deltas.first_positions, deltas.texts
    if not num == len(counts) == len(finish) == len(cached) == len(positions) == len(texts) or sum(counts) != len(tokens):
        raise ProtocolError(f"OutputDeltas of {num} streams with arrays of other lengths")
    readings = _readings(deltas, num)
    start = 0
    for index in range(num):
        end = start + counts[index]
        ids = tuple(tokens[start:end])
        output = Output(positions[index], ids, texts[index], finish[index], cached[index])
        if readings is not None:
            output.reasoning, output.num_reasoning_tokens, output.tool_calls = readings[index]
            output.is_budget_spent = bool(deltas.is_budget_spent) and deltas.is_budget_spent[index]
        if index in told:
            output.logprobs = logprobs.beside(ids, told[index])
        if index in prompts:
            output.prompt_logprobs = prompts[index]
        yield stream_ids[index], output
        start = end


_Reading = tuple[str, int, tuple[ToolCallDelta, ...]]


def _readings(deltas: router.OutputDeltas, num: int) -> list[_Reading] | None:
    """Reasoning and tool calls by stream; None where there are none, as in most messages."""
    if not deltas.num_reasoning_tokens and not deltas.HasField("tool_calls"):
        return None
    reasonings = list(deltas.reasonings) or [""] * num
    num_tokens = list(deltas.num_reasoning_tokens) or [0] * num
    calls = deltas.tool_calls
    counts = list(calls.num_deltas) or [0] * num
    parts = [
        ToolCallDelta(index, arguments, id_, name)
        for index, arguments, id_, name in zip(calls.indexes, calls.arguments, calls.ids, calls.names, strict=False)
    ]
    lengths = {len(calls.indexes), len(calls.names), len(calls.arguments), len(calls.ids), sum(counts)}
    if (
        not num == len(reasonings) == len(num_tokens) == len(counts)
        or lengths != {len(parts)}
        or len(deltas.is_budget_spent) not in (0, num)
    ):
        raise ProtocolError(f"OutputDeltas of {num} streams with reasoning or tool calls of other lengths")
    found, start = [], 0
    for index, count in enumerate(counts):
        found.append((reasonings[index], num_tokens[index], tuple(parts[start : start + count])))
        start += count
    return found


def offers(models: tuple[common.ModelInfo, ...]) -> tuple[ModelOffer, ...]:
    """Models as the directory keeps them."""
    return tuple(ModelOffer(model.name, model.max_model_len, model.loaded_unix_s, _embedding(model)) for model in models)


def _embedding(model: common.ModelInfo) -> EmbeddingOffer | None:
    told = model.embedding
    return EmbeddingOffer(told.size, told.is_matryoshka, tuple(told.dimensions)) if model.HasField("embedding") else None


def model_info(offer: ModelOffer) -> common.ModelInfo:
    """A model as heartbeats and gRPC answers carry it."""
    info = common.ModelInfo(name=offer.name, max_model_len=offer.max_model_len, loaded_unix_s=offer.loaded_unix_s)
    if (embedding := offer.embedding) is not None:
        info.embedding.size, info.embedding.is_matryoshka = embedding.size, embedding.is_matryoshka
        info.embedding.dimensions.extend(embedding.dimensions)
    return info


def error_of(detail: common.ErrorDetail) -> HeadraceError:
    """The error a peer sent."""
    retry_after_s = detail.retry_after_s if detail.HasField("retry_after_s") else None
    return error_from_code(detail.code, detail.message, param=detail.param or None, retry_after_s=retry_after_s)


def drawn_seed(asked: int | None, random_bits: int, choice: int) -> int:
    """The seed a choice runs with: the client's, or one drawn once so that a move goes on along the same path; plus its number."""
    return seed_bits((random_bits if asked is None else asked) + choice)


def _encoded(request: OpenRequest) -> EncodedPrompt:
    assert request.encoded is not None
    return request.encoded


_NO_TOKENS = np.empty(0, dtype=np.int32)
