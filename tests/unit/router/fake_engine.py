"""An engine for tests of the protocol layers: answers from a script, remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from headrace.errors import HeadraceError, NotFoundError, RequestAbortedError
from services.router.generation import (
    Call,
    EmbedAnswer,
    EmbedRequest,
    EncodedPrompt,
    EngineLoad,
    GenerationRequest,
    ModelDescription,
    ModelOffer,
    OutputPiece,
    Prompt,
    Sampling,
    TextPrompt,
)
from services.router.kv_mirror import KvMirror, KvReader

Step = OutputPiece | HeadraceError | float


class FakeStream:
    """Plays a script: pieces are given, errors raised, numbers slept."""

    model = "m"
    num_prompt_tokens = 3
    num_cached_tokens = 1
    num_reasoning_tokens = 0

    def __init__(self, script: Sequence[Step]) -> None:
        self.num_output_tokens = 0
        self.num_closes = 0
        self.closed = asyncio.Event()
        self._script = list(script)

    async def next(self) -> OutputPiece:
        while True:
            if self.num_closes or not self._script:
                raise RequestAbortedError("closed")
            step = self._script.pop(0)
            if isinstance(step, HeadraceError):
                raise step
            if isinstance(step, OutputPiece):
                self.num_output_tokens += len(step.token_ids)
                return step
            try:
                await asyncio.wait_for(self.closed.wait(), step)
            except TimeoutError:
                continue

    def close(self) -> None:
        self.num_closes += 1
        self.closed.set()


class FakeKv:
    """Implements `KvSource`."""

    def __init__(self, mirror: KvMirror) -> None:
        self.mirror = mirror

    def read(self, wake: Callable[[], object]) -> KvReader:
        return self.mirror.open(wake)

    def close(self, reader: KvReader) -> None:
        self.mirror.close(reader)


class FakeEngine:
    """Implements `Engine`."""

    num_online_requests = 0

    def __init__(self, *script: Step) -> None:
        self.script: Sequence[Step] = script or [OutputPiece("Hel", (1,)), OutputPiece("lo", (2,)), OutputPiece("!", (3,), "stop")]
        self.requests: list[GenerationRequest] = []
        self.embed_requests: list[EmbedRequest] = []
        self.streams: list[FakeStream] = []
        self.calls: list[Call] = []
        self.ended: list[tuple[str, str | None]] = []
        self.traceparents: list[str] = []
        self.reason: str | None = None
        self.refusal: HeadraceError | None = None
        self.tokenize_delay_s = 0.0
        self.mirror = KvMirror()

    def begin_call(self, *, protocol: str, endpoint: str, traceparent: str = "", tracestate: str = "") -> Call:
        call = Call(f"id{len(self.calls)}", endpoint, 0, 0)
        self.calls.append(call)
        self.traceparents.append(traceparent)
        return call

    def end_call(self, call: Call, *, status: str, error_code: str | None = None) -> None:
        self.ended.append((status, error_code))

    def open_stream(self, request: GenerationRequest, call: Call) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        if request.model not in ("", "m"):
            raise NotFoundError(f"the model {request.model!r} does not exist", param="model")
        self.requests.append(request)
        self.streams.append(FakeStream(self.script))
        return self.streams[-1]

    async def tokenize(self, model: str, prompt: Prompt, call: Call) -> EncodedPrompt:
        await asyncio.sleep(self.tokenize_delay_s)
        return EncodedPrompt(np.array([1, 2, 3], dtype=np.int32), 128)

    async def detokenize(self, model: str, token_ids: Sequence[int], call: Call, *, skip_special_tokens: bool) -> str:
        return "-".join(map(str, token_ids)) + str(skip_special_tokens)

    async def embed(self, request: EmbedRequest, call: Call) -> EmbedAnswer:
        """Vectors of two numbers: the length of the text, and 1."""
        if self.refusal is not None:
            raise self.refusal
        self.embed_requests.append(request)
        sizes = [len(one.text) if isinstance(one, TextPrompt) else int(one.token_ids.size) for one in request.inputs]
        vectors = np.array([[size, 1.0] for size in sizes], dtype=np.float32)
        return EmbedAnswer(request.model or "e", vectors, tuple(sizes))

    async def flush_cache(self, call: Call) -> int:
        if self.refusal is not None:
            raise self.refusal
        return 12

    async def describe(self, model: str, call: Call, *, with_files: bool = False) -> ModelDescription:
        files = b"zip" * 200_000 if with_files else b""
        defaults = Sampling(temperature=0.6)
        return ModelDescription("/models/m", ("LlamaForCausalLM",), "llama", 100, 128, (99,), 1, None, defaults, files)

    def load(self) -> EngineLoad:
        return EngineLoad(2, 3, 40, max_num_seqs=8, num_kv_tokens=1000, num_used_tokens=250)

    @property
    def kv(self) -> FakeKv:
        return FakeKv(self.mirror)

    def list_models(self) -> list[ModelOffer]:
        return [ModelOffer("m", 128, 7)]

    def not_ready_reason(self) -> str | None:
        return self.reason

    def health(self) -> dict[str, object]:
        return {"stages": {"tokenizer": []}}

    def metrics(self) -> bytes:
        return b"headrace_x 1\n"
