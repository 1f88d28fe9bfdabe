"""What both gateway protocols share: the model, its tokenizer in chunks, and the changes of the caches in batches.

Part of the shell.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from typing import Any, Final, NoReturn

import grpc
import numpy as np
import orjson
from smg_grpc_proto.generated import common_pb2 as public

from headrace.errors import InvalidRequestError
from services.router.generation import Call, EmbedRequest, Engine, EngineLoad, ModelDescription, Sampling, TokenLogprob, TokenPrompt
from services.router.grpc.calls import Context
from services.router.kv_mirror import AllCleared, BlockRemoved, BlockStored, Change
from services.router.limits import check_token_ids, refuse

VERSION: Final = version("headrace")
_CHUNK_BYTES: Final = 256 * 1024
_FRESH_S: Final = 10.0
_INT64_SIGN: Final = 1 << 63


class Descriptions:
    """The served model's description, asked for again when it is old: after a restart it may be another model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: ModelDescription | None = None
        self._asked_s = 0.0

    async def get(self, call: Call) -> ModelDescription:
        """What the model is; raises as `Engine.describe`."""
        now_s = time.monotonic()
        if self._known is None or now_s - self._asked_s > _FRESH_S:
            # Without a name it is the one that is served.
            self._known = replace(await self._engine.describe("", call), tokenizer_zip=b"")
            self._asked_s = now_s
        return self._known


def model_name(engine: Engine) -> str:
    """The name clients know the model by, of several one that generates; empty while none is served."""
    offers = sorted(engine.list_models(), key=lambda offer: offer.embedding is not None)
    return offers[0].name if offers else ""


def logit_bias(asked: Mapping[Any, float]) -> tuple[tuple[int, float], ...]:
    """A bias by token id; one of the protocols has the ids as text.

    Raises:
        InvalidRequestError: An id is none.
    """
    found = []
    for token_id, bias in asked.items():
        text = str(token_id)
        if not text.isascii() or not text.isdigit() or len(text) > 10:
            refuse("logit_bias", "by token id", token_id)
        found.append((int(text), bias))
    return tuple(sorted(found))


def model_info_fields(found: ModelDescription, name: str) -> dict[str, Any]:
    """What either protocol says of a model, by its fields' names, which are the same."""
    return {
        "model_path": found.path,
        "tokenizer_path": found.path,
        "is_generation": True,
        "served_model_name": name,
        "max_context_length": found.max_model_len,
        "max_req_input_len": found.max_model_len - 1,
        "vocab_size": found.vocab_size,
        "model_type": found.model_type,
        "architectures": found.architectures,
        "eos_token_ids": found.eos_token_ids,
        "bos_token_id": found.bos_token_id or 0,
        "pad_token_id": found.pad_token_id or 0,
        "default_sampling_params_json": default_sampling_json(found.defaults),
    }


def load_fields(load: EngineLoad, tokens_per_s: float) -> dict[str, Any]:
    """How busy all schedulers together are, by the names of either protocol's `SchedulerLoad`."""
    return {
        "num_running_reqs": load.num_running,
        "num_waiting_reqs": load.num_waiting,
        "num_total_reqs": load.num_running + load.num_waiting,
        "num_used_tokens": load.num_used_tokens,
        "max_total_num_tokens": load.num_kv_tokens,
        "token_usage": load.num_used_tokens / load.num_kv_tokens if load.num_kv_tokens else 0.0,
        "gen_throughput": tokens_per_s,
        "utilization": load.num_running / load.max_num_seqs if load.max_num_seqs else 0.0,
        "max_running_requests": load.max_num_seqs,
        "num_waiting_uncached_tokens": load.num_waiting_tokens,
    }


def output_logprobs(protocol: Any, known: Sequence[TokenLogprob]) -> Any:
    """Logprobs of outputs as messages of a protocol's module; None where there are none."""
    if not known:
        return None
    return protocol.OutputLogProbs(
        token_logprobs=[token.logprob or 0.0 for token in known],
        token_ids=[token.token_id for token in known],
        top_logprobs=[_top(protocol, token) for token in known],
    )


def input_logprobs(protocol: Any, known: Sequence[TokenLogprob]) -> Any:
    """The same of a prompt."""
    if not known:
        return None
    return protocol.InputLogProbs(
        token_logprobs=[protocol.InputTokenLogProb(value=token.logprob) for token in known],
        token_ids=[token.token_id for token in known],
        top_logprobs=[_top(protocol, token) for token in known],
    )


def _top(protocol: Any, token: TokenLogprob) -> Any:
    return protocol.TopLogProbs(values=[top.logprob for top in token.top], token_ids=[top.token_id for top in token.top])


def default_sampling_json(defaults: Sampling) -> str:
    """The model's own sampling defaults, for gateways that fill fields in for clients who left them out."""
    named = {name: getattr(defaults, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    return orjson.dumps({name: value for name, value in named.items() if value is not None}).decode()


def now_text() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat()


def not_here(message: str) -> Callable[[object, object, Context], Awaitable[NoReturn]]:
    """A method that this engine has no part of."""

    async def answer(servicer: object, request: object, context: Context) -> NoReturn:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, message)
        raise AssertionError("abort raises")

    return answer


def token_embedding(token_ids: Iterable[int]) -> EmbedRequest:
    """The request for the vector of some tokens.

    Raises:
        InvalidRequestError: There are none, or one is no token id.
    """
    return EmbedRequest("", (TokenPrompt(check_token_ids("input_ids", list(token_ids))),), param="input_ids")


def refuse_set(message: Any, fields: Iterable[str], why: str) -> None:
    """Refuse a message that sets what cannot be honoured here.

    Raises:
        InvalidRequestError: It names the first such field.
    """
    present = {descriptor.name for descriptor, _ in message.ListFields()}
    for name in fields:
        if name in present:
            raise InvalidRequestError(f"{name} is not supported: {why}", param=name)


async def tokenizer_chunks(engine: Engine, call: Call) -> AsyncIterator[public.GetTokenizerChunk]:
    """The tokenizer's files as one zip archive in pieces; the checksum of all comes with the last."""
    archive = (await engine.describe("", call, with_files=True)).tokenizer_zip
    for start in range(0, len(archive), _CHUNK_BYTES):
        chunk = public.GetTokenizerChunk(data=archive[start : start + _CHUNK_BYTES])
        if start + _CHUNK_BYTES >= len(archive):
            chunk.sha256 = sha256(archive).hexdigest()
        yield chunk


async def kv_batches(engine: Engine, request: public.SubscribeKvEventsRequest) -> AsyncIterator[public.KvEventBatch]:
    """What the caches hold, then every change, until the caller stops."""
    changed = asyncio.Event()
    reader = engine.kv.read(changed.set)
    number = request.start_sequence_number
    event_ids = _numbers()
    # Who begins in the middle of a series has heard of another state before.
    changes: list[Change] = [AllCleared()] if number else []
    try:
        while True:
            changes += reader.take()
            if changes:
                batch = public.KvEventBatch(sequence_number=number, timestamp=time.time(), dp_rank=0)
                batch.events.extend(_events(changes, event_ids))
                yield batch
                number += 1
                changes = []
            else:
                changed.clear()
                await changed.wait()
    finally:
        engine.kv.close(reader)


def _events(changes: list[Change], event_ids: Iterator[int]) -> Iterator[public.KvCacheEvent]:
    """Changes as the protocol has them: stored blocks that follow one another, and removed ones, are told together."""
    event: public.KvCacheEvent | None = None
    last: int | None = None
    for change in changes:
        match change:
            case BlockStored():
                block = public.KvBlock(
                    block_hash=_signed(change.block),
                    token_ids=np.frombuffer(change.tokens, dtype="<i4").tolist(),
                    block_size=len(change.tokens) // 4,
                )
                if event is None or event.WhichOneof("data") != "stored" or change.before is None or change.before != last:
                    if event is not None:
                        yield event
                    event = public.KvCacheEvent(event_id=next(event_ids))
                    event.stored.SetInParent()
                    if change.before is not None:
                        event.stored.parent_block_hash = _signed(change.before)
                event.stored.blocks.append(block)
                last = change.block
            case BlockRemoved():
                if event is None or event.WhichOneof("data") != "removed":
                    if event is not None:
                        yield event
                    event = public.KvCacheEvent(event_id=next(event_ids))
                event.removed.block_hashes.append(_signed(change.block))
            case AllCleared():
                if event is not None:
                    yield event
                event = public.KvCacheEvent(event_id=next(event_ids))
                event.cleared.SetInParent()
    if event is not None:
        yield event


def _numbers() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _signed(block: int) -> int:
    """A 64-bit hash as the protocol's signed number."""
    return block - (1 << 64) if block >= _INT64_SIGN else block
