"""The tokenizer's shell: requests of routers in, tokens out, on threads beside the event loop.

Encoding a long prompt takes as long as a thousand heartbeats, so nothing is encoded on the loop, however short: the hop to a thread
costs less than deciding would. Each thread has an engine of its own (tokenizer, renderer), and the queue before them is bounded.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from headrace.errors import (
    DeadlineExceededError,
    HeadraceError,
    InvalidRequestError,
    ModelError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    ReplicaDeadError,
    RequestFailedError,
    UnavailableError,
)
from headrace.lifecycle import State
from headrace.models.embedding_config import load_embedding_config
from headrace.models.model_config import TOKENIZER_FILE, load_generation_defaults, load_model_config, load_tokenizer_config
from headrace.output_formats import REASONING_FORMATS
from headrace.service import ServiceContext
from headrace.telemetry import logs, names
from headrace.telemetry.metrics import TokenizerMetrics
from headrace.telemetry.traces import Context, Span
from headrace.v1.common_pb2 import ConstraintKind, ErrorDetail, ModelInfo, OutputFormats, WorkHeader
from headrace.v1.control_pb2 import Load, Progress, Register, Role
from headrace.v1.tokenizer_pb2 import (
    ChatPrompt,
    Describe,
    DescribeReply,
    Detokenize,
    DetokenizeReply,
    ModelDescription,
    Tokenize,
    TokenizeReply,
    TokenizerInbox,
)
from headrace.wire.envelope import int32_array, int32_frame
from headrace.wire.session import Peer
from headrace.wire.topology import ROUTER_BACKPLANE, ROUTER_TOKENIZER
from services.tokenizer.config import Settings
from services.tokenizer.constraint_desk import ConstraintDesk, make_desk
from services.tokenizer.constraints.call_grammar import takes_call_grammar
from services.tokenizer.constraints.reasoning_first import Block
from services.tokenizer.conversations import template_kwargs_of, text_of, tools_of, turns_of
from services.tokenizer.description import describe, tokenizer_zip
from services.tokenizer.encoding import Encoder, Field, PromptLimits, TokenIds
from services.tokenizer.output_formats import block_before, reasoning_format_of, starts_in_reasoning, tool_format_of
from services.tokenizer.renderer import Renderer, RenderLimits
from services.tokenizer.sampling_defaults import sampling_defaults

if TYPE_CHECKING:
    from headrace.wire.fake import FakeBack
    from headrace.wire.link import Back

log = logs.get_logger()

_SMOOTHING: Final = 0.05


@dataclass(slots=True)
class _Engine:
    """What one thread works with; `renderer` is None for a model without a chat template."""

    encoder: Encoder
    renderer: Renderer | None


@dataclass(slots=True)
class _Result:
    """An answer, made on a thread."""

    tokens: TokenIds | None = None
    text: str = ""
    archive: bytes = b""
    num_tokens: int = 0
    formats: OutputFormats | None = None
    block: Block | None = None
    """The block of reasoning that the output may begin with."""
    render_ns: int = 0
    encode_ns: int = 0


@dataclass(slots=True)
class _Job:
    """One request, from its arrival to its answer."""

    peer: Peer
    arm: str
    body: Tokenize | Detokenize | Describe
    frame: memoryview | None
    span: Span
    begun_ns: int
    grammar: str = ""

    @property
    def work(self) -> WorkHeader:
        """Identity, trace, deadline."""
        return self.body.work


class TokenizerService:
    """Answers Tokenize, Detokenize and Describe of every router."""

    def __init__(self, context: ServiceContext, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._metrics = TokenizerMetrics(context.registry)
        self._routers: Back | FakeBack | None = None
        self._executor = ThreadPoolExecutor(settings.num_threads, thread_name_prefix="encode")
        self._engines: queue.SimpleQueue[_Engine] = queue.SimpleQueue()
        self._waiting_since_ns: deque[int] = deque()
        self._num_open = 0
        self._num_done = 0
        self._last_done_unix_ns = 0
        self._job_s = 0.01
        self._is_draining = False
        self._is_stopped = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._renderers: list[Renderer] = []
        self._constraints: ConstraintDesk | None = None
        self._model = ModelInfo()
        self._formats = OutputFormats()
        self._description = ModelDescription()
        self._limits = PromptLimits(model="", vocab_size=0, max_model_len=0, prompt_bytes_max=0)

    async def start(self) -> None:
        """Load the model's tokenizer and template once a thread, then dial the routers.

        Raises:
            ModelError: The model directory cannot be used.
        """
        # One text a call and one call a thread: the library's own threads would only fight ours.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loop = asyncio.get_running_loop()
        directory = self._context.model_directory
        await loop.run_in_executor(self._executor, self._load, directory)
        self._context.end_phase("tokenizer")
        self._routers = self._context.wire.dial(
            ROUTER_BACKPLANE,
            self._context.dial_targets(ROUTER_BACKPLANE),
            self,
            register=lambda: Register(role=Role.ROLE_TOKENIZER, instance=self._context.instance, models=self.models()),
        )

    def on_peer(self, peer: Peer) -> None:
        """A router took us on: nothing to prepare."""

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """A router is gone: its answers find no receiver when they are ready, and are dropped then."""

    def on_heartbeat(self, peer: Peer) -> None:
        """Routers' states change nothing here."""

    def on_message(self, peer: Peer, message: TokenizerInbox, frames: list[memoryview]) -> None:
        """Queue a request for a thread, or answer at once why not."""
        arm = str(message.WhichOneof("body"))
        body: Tokenize | Detokenize | Describe = getattr(message, arm)
        work = body.work
        taken_unix_ns = time.time_ns()
        parent = Context(work.traceparent, work.tracestate)
        self._context.tracer.record_queue(
            ROUTER_TOKENIZER.name, parent=parent, enqueued_unix_ns=work.enqueued_unix_ns, taken_unix_ns=taken_unix_ns
        )
        span = self._context.tracer.start(
            names.SPAN_TOKENIZER_ENCODE,
            parent=parent,
            start_unix_ns=taken_unix_ns,
            attributes={names.ATTR_REQUEST_ID: work.request_id},
        )
        job = _Job(peer, arm, body, frames[0] if frames else None, span, time.monotonic_ns())
        try:
            self._admit(job)
        except HeadraceError as error:
            self._answer(job, error)
            return
        self._num_open += 1
        self._idle.clear()
        self._waiting_since_ns.append(job.begun_ns)
        self._metrics.queue.set(len(self._waiting_since_ns))
        loop = asyncio.get_running_loop()

        def tell_loop(future: Future[_Result | HeadraceError]) -> None:
            if not self._is_stopped:
                loop.call_soon_threadsafe(self._constrain, job, future.result())

        self._executor.submit(self._work, job).add_done_callback(tell_loop)

    def _constrain(self, job: _Job, result: _Result | HeadraceError) -> None:
        """A request's prompt has been encoded, or refused; now for its constraint, which may stand behind reasoning."""
        body = job.body
        if isinstance(result, HeadraceError) or not isinstance(body, Tokenize) or not body.HasField("constraint"):
            self._finish(job, result)
            return

        def tell(verdict: str | HeadraceError) -> None:
            if isinstance(verdict, HeadraceError):
                self._finish(job, verdict)
                return
            job.grammar = verdict
            self._finish(job, result)

        if body.constraint.kind == ConstraintKind.CONSTRAINT_KIND_TOOL_CALLS and not takes_call_grammar(self._formats.tool_format):
            tell("")
            return
        assert self._constraints is not None
        self._constraints.take(body.constraint, body.constraint_param, tell, block=result.block)

    def not_ready_reason(self) -> str | None:
        """Ready once a router has taken us on."""
        if self._routers is None:
            return "the model's tokenizer is being loaded"
        return None if self._routers.peers else "no router has answered yet"

    def models(self) -> tuple[ModelInfo, ...]:
        """The one model."""
        return (self._model,)

    def load(self) -> Load:
        """Requests on threads and before them."""
        num_waiting = len(self._waiting_since_ns)
        return Load(num_running=max(0, self._num_open - num_waiting), num_waiting=num_waiting)

    def progress(self) -> Progress:
        """Answers given."""
        try:
            age_ns = time.monotonic_ns() - self._waiting_since_ns[0]
        except IndexError:
            age_ns = 0
        return Progress(num_steps=self._num_done, last_step_unix_ns=self._last_done_unix_ns, oldest_waiting_age_ns=age_ns)

    def health(self) -> dict[str, Any]:
        """What /health adds."""
        return {"model": self._model.name, "has_chat_template": bool(self._renderers)}

    async def drain(self) -> None:
        """Refuse new requests and answer those that are open."""
        self._is_draining = True
        if self._routers is not None:
            self._routers.announce_drain()
        await self._idle.wait()

    async def stop(self) -> None:
        """Drop what waits and end the renderers. A text being encoded is waited for: its length is bounded."""
        self._is_stopped = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        for renderer in self._renderers:
            renderer.interrupt()
        if self._constraints is not None:
            await self._constraints.stop()
        await asyncio.to_thread(self._executor.shutdown, wait=True)
        for renderer in self._renderers:
            renderer.close()

    def _load(self, directory: Path) -> None:
        config = load_model_config(directory)
        tokenizer_config = load_tokenizer_config(directory)
        model_settings = self._context.settings.model
        name = model_settings.name_for_clients
        max_model_len = min(model_settings.max_model_len or config.max_position_embeddings, config.max_model_len)
        self._limits = PromptLimits(name, config.vocab_size, max_model_len, self._settings.prompt_bytes_limit(max_model_len))
        try:
            tokenizer_json = (directory / TOKENIZER_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{directory / TOKENIZER_FILE}: cannot be read: {error}; pull the model again") from error
        waits = itertools.count(1)
        for _ in range(self._settings.num_threads):
            encoder = Encoder(tokenizer_json, self._limits)
            if encoder.tokenizer_vocab_size > config.vocab_size:
                raise ModelError(
                    f"{directory}: tokenizer.json has {encoder.tokenizer_vocab_size} tokens, but config.json says vocab_size "
                    f"{config.vocab_size}; pull the model again"
                )
            renderer = None
            if tokenizer_config.chat_template is not None:
                renderer = Renderer(
                    tokenizer_config.chat_template,
                    special_tokens=tokenizer_config.special_tokens,
                    model=name,
                    limits=RenderLimits(
                        timeout_s=self._settings.render_timeout_s,
                        memory_bytes=self._settings.render_memory_bytes,
                        output_max=self._limits.prompt_bytes_max,
                    ),
                )
                self._renderers.append(renderer)
                renderer.start(lambda reason: self._tell_wait(next(waits), reason))
            self._engines.put(_Engine(encoder, renderer))
        self._formats = _output_formats(tokenizer_config.chat_template, encoder, self._settings)
        self._constraints = make_desk(
            self._settings,
            directory,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            tool_format=self._formats.tool_format,
        )
        defaults = sampling_defaults(load_generation_defaults(directory))
        self._description = describe(directory, config, max_model_len=max_model_len, defaults=defaults)
        self._model = ModelInfo(name=name, max_model_len=max_model_len, loaded_unix_s=int(time.time()))
        if (vectors := load_embedding_config(directory, config)) is not None:
            self._model.embedding.size, self._model.embedding.is_matryoshka = vectors.size, vectors.is_matryoshka
            self._model.embedding.dimensions.extend(vectors.dimensions)

    def _tell_wait(self, number: int, reason: str) -> None:
        """The start goes on, though slowly: for the log, and for the supervisor, whose time for a start begins anew."""
        log.warning("renderer.awaited", reason=reason)
        if self._context.notifier is not None:
            self._context.notifier.state(State.STARTING, reason)
            self._context.notifier.progress({"num_waits": number})

    def _admit(self, job: _Job) -> None:
        if self._is_draining:
            raise UnavailableError("tokenizer: this instance is stopping; another one may serve")
        if job.body.model != self._model.name:
            raise NotFoundError(f"model: {job.body.model!r} is not served here; {self._model.name!r} is", param="model")
        _check_deadline(job)
        if self._num_open >= self._settings.num_threads + self._settings.queue_max:
            retry_after_s = max(0.1, self._job_s * self._num_open / self._settings.num_threads)
            raise OverloadedError(
                f"tokenizer: {len(self._waiting_since_ns)} requests wait for a thread, the limit is {self._settings.queue_max}; "
                f"retry in {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
            )

    def _work(self, job: _Job) -> _Result | HeadraceError:
        """Answer one request; runs on a thread."""
        self._waiting_since_ns.popleft()
        engine = self._engines.get()
        try:
            _check_deadline(job)
            if isinstance(job.body, Tokenize):
                return self._tokenize(engine, job.body, job.frame)
            if isinstance(job.body, Describe):
                return _Result(archive=tokenizer_zip(self._context.model_directory) if job.body.with_files else b"")
            return self._detokenize(engine, job.body, job.frame)
        except HeadraceError as error:
            return error
        except Exception:
            log.exception("request.failed", request_id=job.work.request_id)
            return RequestFailedError("tokenizer: internal error; the tokenizer's log has it under the request's id")
        finally:
            self._engines.put(engine)

    def _tokenize(self, engine: _Engine, body: Tokenize, frame: memoryview | None) -> _Result:
        begun_ns = rendered_ns = time.monotonic_ns()
        formats = block = None
        kind = body.WhichOneof("prompt")
        field: Field = "prompt"
        if kind == "num_token_ids":
            tokens: TokenIds = int32_array(frame, count=body.num_token_ids)
            self._limits.check_token_ids(tokens, field)
        elif kind == "text":
            is_special = body.add_special_tokens if body.HasField("add_special_tokens") else True
            tokens = engine.encoder.encode(body.text, add_special_tokens=is_special, field=field)
        elif kind == "chat":
            field = "messages"
            text, formats, block = self._render(engine, body.chat)
            rendered_ns = time.monotonic_ns()
            # The template writes the special tokens itself.
            tokens = engine.encoder.encode(text, add_special_tokens=False, field=field)
        else:
            raise ProtocolError("tokenize: there is no prompt")
        if not body.skip_length_check:
            max_tokens = body.max_tokens if body.HasField("max_tokens") else None
            self._limits.check_length(len(tokens), max_tokens=max_tokens, field=field)
        ended_ns = time.monotonic_ns()
        return _Result(
            tokens,
            num_tokens=len(tokens),
            formats=formats,
            block=block,
            render_ns=rendered_ns - begun_ns,
            encode_ns=ended_ns - rendered_ns,
        )

    def _render(self, engine: _Engine, chat: ChatPrompt) -> tuple[str, OutputFormats, Block | None]:
        """The prompt's text, how the output is to be read, and the block of reasoning that it may begin with."""
        if engine.renderer is None:
            raise InvalidRequestError(
                f"messages: the model {self._limits.model} has no chat template; send the whole text as a prompt to "
                "/v1/completions, or add a chat_template.jinja to the model directory",
                param="messages",
            )
        self._limits.check_text(text_of(chat), "messages")
        # Who asks to go on with a message does not ask for a new turn as well.
        is_opened = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not chat.continue_final_message
        text = engine.renderer.render(
            turns_of(chat),
            add_generation_prompt=is_opened,
            continue_final_message=chat.continue_final_message,
            tools=tools_of(chat),
            kwargs=template_kwargs_of(chat),
        )
        formats = OutputFormats()
        formats.CopyFrom(self._formats)
        continued = chat.messages[-1].content if chat.continue_final_message else None
        block = block_before(formats.reasoning_format, text, continued=continued, is_turn_opened=is_opened)
        formats.starts_in_reasoning = starts_in_reasoning(
            formats.reasoning_format, text, continued=continued, is_turn_opened=is_opened
        )
        return text, formats, block

    def _detokenize(self, engine: _Engine, body: Detokenize, frame: memoryview | None) -> _Result:
        begun_ns = time.monotonic_ns()
        tokens: npt.NDArray[np.int32] = int32_array(frame)
        skip_special = body.skip_special_tokens if body.HasField("skip_special_tokens") else True
        text = engine.encoder.decode(tokens, skip_special_tokens=skip_special)
        return _Result(text=text, num_tokens=len(tokens), encode_ns=time.monotonic_ns() - begun_ns)

    def _finish(self, job: _Job, result: _Result | HeadraceError) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self._idle.set()
        self._num_done += 1
        self._last_done_unix_ns = time.time_ns()
        self._metrics.queue.set(len(self._waiting_since_ns))
        self._answer(job, result)

    def _answer(self, job: _Job, result: _Result | HeadraceError) -> None:
        elapsed_s = (time.monotonic_ns() - job.begun_ns) / 1e9
        self._metrics.duration.observe(elapsed_s)
        kind = job.body.WhichOneof("prompt") or "none" if isinstance(job.body, Tokenize) else job.arm
        if isinstance(result, HeadraceError):
            self._metrics.requests.labels(kind, result.code).inc()
            job.span.error(result.code)
        else:
            self._job_s += _SMOOTHING * ((result.render_ns + result.encode_ns) / 1e9 - self._job_s)
            self._metrics.requests.labels(kind, "ok").inc()
            self._metrics.tokens.inc(result.num_tokens)
            job.span.set(names.ATTR_NUM_TOKENS, result.num_tokens)
            job.span.set(names.ATTR_RENDER_NS, result.render_ns)
            job.span.set(names.ATTR_ENCODE_NS, result.encode_ns)
        job.span.end()
        try:
            if isinstance(job.body, Tokenize):
                self._send_tokens(job, result)
            else:
                job.peer.send(*_other_reply(job, result, self._description))
        except (OverloadedError, ReplicaDeadError) as error:
            # The router is gone or does not read; it retries elsewhere or its client's deadline ends the request.
            self._metrics.requests.labels(kind, "unanswered").inc()
            log.warning("reply.dropped", request_id=job.work.request_id, error_type=error.code)

    def _send_tokens(self, job: _Job, result: _Result | HeadraceError) -> None:
        reply = TokenizeReply(request_id=job.work.request_id, max_model_len=self._model.max_model_len)
        if isinstance(result, HeadraceError):
            reply.error.CopyFrom(_error_detail(result))
            job.peer.send("tokenize_reply", reply)
            return
        assert result.tokens is not None
        reply.num_tokens = result.num_tokens
        reply.grammar = job.grammar
        reply.eos_token_ids.extend(self._description.eos_token_ids)
        reply.sampling_defaults.CopyFrom(self._description.sampling_defaults)
        if result.formats is not None:
            reply.formats.CopyFrom(result.formats)
        job.peer.send("tokenize_reply", reply, [int32_frame(result.tokens)])


def _check_deadline(job: _Job) -> None:
    deadline_unix_ns = job.work.deadline_unix_ns
    if deadline_unix_ns and time.time_ns() >= deadline_unix_ns:
        waited_ms = (time.monotonic_ns() - job.begun_ns) / 1e6
        raise DeadlineExceededError(
            f"tokenizer: the request's deadline passed before it was encoded ({waited_ms:.0f} ms in the queue)"
        )


def _output_formats(template: str | None, encoder: Encoder, settings: Settings) -> OutputFormats:
    """How the model writes tool calls and reasoning."""
    formats = OutputFormats(
        tool_format=tool_format_of(template, settings.tool_parser),
        reasoning_format=reasoning_format_of(template, settings.reasoning_parser),
    )
    form = REASONING_FORMATS.get(formats.reasoning_format)
    if form is not None and form.budget_end:
        end = encoder.encode(form.budget_end, add_special_tokens=False, field="text")
        formats.reasoning_end_token_ids.extend(end.tolist())
    log.info("formats.chosen", tool_format=formats.tool_format, reasoning_format=formats.reasoning_format)
    return formats


def _error_detail(error: HeadraceError) -> ErrorDetail:
    detail = ErrorDetail(code=error.code, message=error.message, param=error.param or "")
    if isinstance(error, OverloadedError | UnavailableError):
        detail.retry_after_s = error.retry_after_s
    return detail


def _other_reply(
    job: _Job, result: _Result | HeadraceError, description: ModelDescription
) -> tuple[str, DetokenizeReply | DescribeReply]:
    """A text, or what the model is, with its arm."""
    reply = DetokenizeReply() if isinstance(job.body, Detokenize) else DescribeReply()
    reply.request_id = job.work.request_id
    if isinstance(result, HeadraceError):
        reply.error.CopyFrom(_error_detail(result))
    elif isinstance(reply, DetokenizeReply):
        reply.text = result.text
    else:
        reply.description.CopyFrom(description)
        reply.tokenizer_zip = result.archive
    return ("detokenize_reply" if isinstance(reply, DetokenizeReply) else "describe_reply"), reply
