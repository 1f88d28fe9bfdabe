"""One open client request: a state machine that survives the loss of any stage.

    TOKENIZING ──tokens──▶ SUBMITTED ──first output──▶ STREAMING ──finish reason──▶ FINISHED
         └───────────────────────┴──── error, deadline, abort ───────┴──────────────────▲

It holds the prompt's tokens and every output token so far, so any other stage can be given the request anew: a tokenizer the
prompt, a scheduler prompt and outputs, a detokenizer the token history. `advance` compares what the request needs with what it has
and returns the actions that close the difference; a loss only takes something away and advances again. Output is taken strictly by
position, so duplicates, repeats and two schedulers at once do no harm.

Of a request for several choices each is one of these. The first asks for the tokens and shares them; the others begin with them, at
the same scheduler, which has them fork from one prefill.

Pure: time comes in, actions go out.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

from headrace.errors import (
    DeadlineExceededError,
    HeadraceError,
    OverloadedError,
    ReplicaDeadError,
    RequestAbortedError,
    RequestFailedError,
    UnavailableError,
)
from headrace.v1 import common_pb2 as common
from services.router.actions import (
    Action,
    Deliver,
    End,
    SendAbort,
    SendCloseStream,
    SendOpenStream,
    SendRedirect,
    SendSubmit,
    SendTokenize,
    SendWork,
    ShareTokens,
)
from services.router.generation import (
    EncodedPrompt,
    GenerationRequest,
    ModelDescription,
    OutputPiece,
    TokenLogprob,
    ToolCallDelta,
    VectorArray,
)
from services.router.places import DETOKENIZER, SCHEDULER, STAGE_NAMES, TOKENIZER, Placement, Places
from services.router.prefix_directory import CachePrompt
from services.router.tools import with_ids

REOPEN_INTERVAL_NS = 200_000_000
_FINISH_NAMES: dict[int, str] = {common.FINISH_REASON_STOP: "stop", common.FINISH_REASON_LENGTH: "length"}
_ROLE_OF: dict[type[SendWork], int] = {
    SendTokenize: TOKENIZER,
    SendOpenStream: DETOKENIZER,
    SendSubmit: SCHEDULER,
    SendRedirect: SCHEDULER,
}


class Kind(Enum):
    """What the client asked for."""

    GENERATE = "generate"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    EMBED = "embed"
    DESCRIBE = "describe"
    DESCRIBE_WITH_FILES = "describe_with_files"


class Stage(Enum):
    """How far the request is."""

    TOKENIZING = "tokenizing"
    SUBMITTED = "submitted"
    STREAMING = "streaming"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what."""

    unavailable_wait_ns: int
    recovery_wait_ns: int
    stall_nudge_ns: int
    move_delay_ns: int
    max_moves: int

    def wait_ns(self, num_moves: int) -> int:
        """How long a missing stage is waited for: a request that was under way may wait for a restart and a model's load."""
        return self.recovery_wait_ns if num_moves else self.unavailable_wait_ns


@dataclass(slots=True)
class Output:
    """What one message says of one stream."""

    first_position: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: int = 0
    num_cached_tokens: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    num_reasoning_tokens: int = 0
    """Of all output so far."""
    is_budget_spent: bool = False
    """Whether it stopped because of the reasoning budget."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class ReadOutput:
    """How much of the output's text has come, by what it was read as."""

    num_chars: int = 0
    num_reasoning_chars: int = 0
    num_tool_calls: int = 0
    num_argument_chars: int = 0
    num_reasoning_tokens: int = 0
    is_reasoning_closed: bool = False
    """Whether a reasoning block was closed from here, its budget being spent."""

    def add(self, output: Output) -> None:
        """Count what has come."""
        self.num_chars += len(output.text)
        if output.num_reasoning_tokens:
            self.num_reasoning_tokens = output.num_reasoning_tokens
            self.num_reasoning_chars += len(output.reasoning)
        if output.tool_calls:
            self.num_tool_calls = max(self.num_tool_calls, output.tool_calls[-1].index + 1)
            self.num_argument_chars += sum(len(delta.arguments) for delta in output.tool_calls)


class OpenRequest:
    """The state of one request. Events return the actions they cause."""

    def __init__(
        self,
        request_id: str,
        *,
        kind: Kind,
        generation: GenerationRequest,
        stream_id: int,
        deadline_ns: int,
        placement: Placement,
        patience: Patience,
        fork_group: str = "",
    ) -> None:
        self.request_id = request_id
        self.kind = kind
        self.generation = generation
        self.stream_id = stream_id
        self.deadline_ns = deadline_ns
        self.fork_group = fork_group
        self.stage = Stage.TOKENIZING
        self.places = Places(placement, generation.model, move_delay_ns=patience.move_delay_ns)
        self.encoded: EncodedPrompt | None = None
        self.description: ModelDescription | None = None
        self.output_tokens = array("i")
        self.read = ReadOutput()
        self.num_cached_tokens = 0
        self.num_moves = 0
        # The choice whose tokens it has, if it is another one of the same client request.
        self.first: OpenRequest | None = None
        self._held = self.places.held
        self._patience = patience
        self._needs_redirect = False
        self._heard_ns = 0
        self._reopened_ns: int | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended."""
        return self.stage is Stage.FINISHED

    def due_ns(self) -> int:
        """When `on_time` must be called next, at the latest."""
        if self.places.waiting_for is None:
            due = min(self.deadline_ns, self._heard_ns + self._patience.stall_nudge_ns)
        else:
            due = min(self.deadline_ns, self.places.waiting_since_ns + self._patience.wait_ns(self.num_moves))
        return due if self.places.retry_at_ns is None else min(due, self.places.retry_at_ns)

    # What the request needs, against what it has.

    def advance(self, now_ns: int) -> list[Action]:
        """Give the request to the stages it needs and is not at yet."""
        places = self.places
        if self.is_finished or (places.retry_at_ns is not None and now_ns < places.retry_at_ns):
            return []
        places.retry_at_ns = None
        actions: list[Action] = []
        if self.stage is Stage.TOKENIZING:
            if TOKENIZER not in self._held and places.take(TOKENIZER, now_ns):
                actions.append(SendTokenize(self, self._held[TOKENIZER]))
        elif self.kind is Kind.EMBED:
            if SCHEDULER not in self._held and places.take(SCHEDULER, now_ns):
                actions.append(SendSubmit(self, self._held[SCHEDULER]))
        else:
            if DETOKENIZER not in self._held:
                if not places.take(DETOKENIZER, now_ns):
                    return actions
                actions.append(SendOpenStream(self, self._held[DETOKENIZER]))
                self._needs_redirect = SCHEDULER in self._held
            if SCHEDULER not in self._held:
                near = None if self.first is None else self.first.places.held.get(SCHEDULER)
                if places.take(SCHEDULER, now_ns, partial(_cache_prompt, self), near=near):
                    self._needs_redirect = False
                    actions.append(SendSubmit(self, self._held[SCHEDULER]))
            elif self._needs_redirect:
                self._needs_redirect = False
                actions.append(SendRedirect(self, self._held[SCHEDULER], len(self.output_tokens)))
        if actions:
            self._heard_ns = now_ns
        return actions

    def _move(self, role: int, error: HeadraceError, now_ns: int) -> list[Action]:
        """Take the request from an instance to another."""
        self.places.leave(role, now_ns)
        self.num_moves += 1
        if self.num_moves <= self._patience.max_moves:
            return self.advance(now_ns)
        if isinstance(error, UnavailableError):
            return self.end(error)
        limit = self._patience.max_moves
        message = f"{STAGE_NAMES[role]}: the request was moved {limit} times, the limit of router.max_moves; last: {error.message}"
        return self.end(RequestFailedError(message))

    # Events.

    def on_tokenized(self, peer: int, answer: EncodedPrompt | ModelDescription | str, now_ns: int) -> list[Action]:
        """The tokenizer answered: the prompt's tokens, the text of a detokenize call, or what the model is."""
        if self.stage is not Stage.TOKENIZING or self._held.get(TOKENIZER) != peer:
            return []
        self.places.drop(TOKENIZER)
        self._heard_ns = now_ns
        if isinstance(answer, str):
            return [Deliver(self, OutputPiece(answer, (), "stop")), *self.end(None)]
        if isinstance(answer, ModelDescription):
            self.description = answer
            return self.end(None)
        self.encoded = answer
        if self.kind not in {Kind.GENERATE, Kind.EMBED}:
            return self.end(None)
        self.stage = Stage.SUBMITTED
        actions = self.advance(now_ns)
        return [*actions, ShareTokens(self)] if self.fork_group else actions

    def on_refused(self, role: int, peer: int, error: HeadraceError, now_ns: int) -> list[Action]:
        """A stage will not serve the request, or serve it no further; or it could not be sent there."""
        if self.is_finished or self._held.get(role) != peer:
            return []
        if isinstance(error, OverloadedError):
            return self._on_overloaded(role, error, now_ns)
        if not isinstance(error, (ReplicaDeadError, UnavailableError)):
            if role == SCHEDULER:
                # It holds nothing any more, so there is nothing to abort there.
                self.places.drop(role)
            return self.end(error)
        # The answer may be to something said before the last Submit; the abort keeps that from running on unseen.
        abort: list[Action] = [SendAbort(self.request_id, peer)] if role == SCHEDULER else []
        return [*abort, *self._move(role, error, now_ns)]

    def _on_overloaded(self, role: int, error: OverloadedError, now_ns: int) -> list[Action]:
        """Another instance may have room. Before any output a client is better told to come back than left waiting."""
        self.places.leave(role, now_ns)
        self.num_moves += 1
        if self.num_moves > self._patience.max_moves:
            return self.end(error)
        actions = self.advance(now_ns)
        if role in self._held or self.output_tokens:
            return actions
        return [*actions, *self.end(error)]

    def on_unsent(self, unsent: Sequence[SendWork], error: HeadraceError, now_ns: int) -> list[Action]:
        """The first of these could not be sent, so the others were not either."""
        failed = unsent[0]
        for action in unsent[1:]:
            if isinstance(action, SendRedirect):
                self._needs_redirect = True
            else:
                self.places.drop(_ROLE_OF[type(action)])
        if isinstance(failed, SendRedirect) and isinstance(error, OverloadedError):
            # The request still runs there; a resubmission elsewhere would compute it twice.
            self._needs_redirect = True
            self.places.retry_at_ns = now_ns + self._patience.move_delay_ns
            return []
        return self.on_refused(_ROLE_OF[type(failed)], failed.to, error, now_ns)

    def on_peer_lost(self, peer: int, now_ns: int) -> list[Action]:
        """An instance is gone; whatever it held for this request goes elsewhere."""
        roles = [role for role, incarnation in self._held.items() if incarnation == peer]
        return [action for role in roles for action in self._move(role, ReplicaDeadError("the instance is gone"), now_ns)]

    def on_output(self, peer: int, output: Output, now_ns: int) -> list[Action]:
        """The detokenizer sent output: taken when it begins exactly where ours ends."""
        if self.is_finished or self._held.get(DETOKENIZER) != peer:
            return []
        reason = output.finish_reason
        if reason == common.FINISH_REASON_ERROR:
            # Failed sequences are told by their scheduler; this is a detokenizer that will not have the stream.
            return self._on_overloaded(DETOKENIZER, OverloadedError("detokenizer: it refused the stream; see its log"), now_ns)
        expected = len(self.output_tokens)
        if output.first_position != expected:
            is_known = output.first_position + len(output.token_ids) <= expected
            return [] if is_known else self._reopen(now_ns)
        self.stage = Stage.STREAMING
        self._heard_ns = now_ns
        self.output_tokens.extend(output.token_ids)
        if output.tool_calls:
            assert self.encoded is not None
            output.tool_calls = with_ids(output.tool_calls, self.request_id, self.encoded.formats.tool_format)
        self.read.add(output)
        if output.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        if not reason:
            return [Deliver(self, _piece(output, None))]
        if output.is_budget_spent and reason == common.FINISH_REASON_STOP:
            return _close_reasoning(self, output, now_ns)
        if reason not in _FINISH_NAMES:
            return self.end(RequestAbortedError("the request was aborted by an operator"))
        name = _FINISH_NAMES[reason]
        return [
            Deliver(self, _piece(output, "tool_calls" if name == "stop" and self.read.num_tool_calls else name)),
            *self.end(None),
        ]

    def on_gap(self, peer: int, expected_position: int) -> list[Action]:
        """The detokenizer missed tokens: the scheduler sends them again."""
        scheduler = self._held.get(SCHEDULER)
        if self.is_finished or self._held.get(DETOKENIZER) != peer or scheduler is None:
            return []
        return [SendRedirect(self, scheduler, expected_position)]

    def _reopen(self, now_ns: int) -> list[Action]:
        """Output is missing between the detokenizer and us: begin the stream again where ours ends."""
        if self._reopened_ns is not None and now_ns - self._reopened_ns < REOPEN_INTERVAL_NS:
            return []
        self._reopened_ns = now_ns
        self._needs_redirect = SCHEDULER in self._held
        return [SendOpenStream(self, self._held[DETOKENIZER]), *self.advance(now_ns)]

    def on_time(self, now_ns: int) -> list[Action]:
        """Deadline, missing stages, silence."""
        if self.is_finished:
            return []
        if now_ns >= self.deadline_ns:
            return self.end(DeadlineExceededError(f"the request's deadline passed while it was {self.stage.value}"))
        actions = self.advance(now_ns)
        missing, wait_ns = self.places.waiting_for, self._patience.wait_ns(self.num_moves)
        if missing is not None:
            if now_ns - self.places.waiting_since_ns < wait_ns:
                return actions
            stage, model = STAGE_NAMES[missing], self.generation.model
            return [*actions, *self.end(UnavailableError(f"no {stage} can serve model {model!r} now; waited {wait_ns / 1e9:g} s"))]
        if now_ns - self._heard_ns >= self._patience.stall_nudge_ns and not actions:
            self._heard_ns = now_ns
            actions = self._nudge(now_ns)
        return actions

    def _nudge(self, now_ns: int) -> list[Action]:
        """Nothing has come for long: a message may be lost. Ask again; all stages take repeats well."""
        if self.stage is Stage.TOKENIZING:
            self.places.leave(TOKENIZER, now_ns)
            return self.advance(now_ns)
        if self.kind is Kind.EMBED:
            return [SendSubmit(self, self._held[SCHEDULER])] if SCHEDULER in self._held else []
        if DETOKENIZER not in self._held:
            return []
        self._reopened_ns = None
        return self._reopen(now_ns)

    def end(self, error: HeadraceError | None) -> list[Action]:
        """End the request, once: free what other stages hold of it."""
        if self.is_finished:
            return []
        self.stage = Stage.FINISHED
        actions: list[Action] = []
        # After a whole output scheduler and detokenizer have let go by themselves, unless the request had been moved.
        if error is not None or self.num_moves:
            if SCHEDULER in self._held:
                actions.append(SendAbort(self.request_id, self._held[SCHEDULER]))
            if DETOKENIZER in self._held:
                actions.append(SendCloseStream(self.stream_id, self._held[DETOKENIZER]))
        self.places.drop_all()
        return [*actions, End(self, error)]


def _close_reasoning(request: OpenRequest, output: Output, now_ns: int) -> list[Action]:
    """The reasoning budget is spent, and the detokenizer has stopped the sequence: have it go on behind the end of the block.

    What is on its way of the old stream counts nowhere: the stream goes on under another number.
    """
    assert request.encoded is not None
    end = request.encoded.formats.reasoning_end_token_ids
    num_tokens, most = len(request.output_tokens) + len(end), request.generation.stopping.max_tokens
    room = request.encoded.max_model_len - int(request.encoded.token_ids.size)
    if num_tokens >= min(room if most is None else most, room):
        return [Deliver(request, _piece(output, "length")), *request.end(None)]
    request.output_tokens.extend(end)
    request.read.is_reasoning_closed = True
    request.stream_id = (request.stream_id + 1) % (1 << 64)
    output.token_ids += end
    actions: list[Action] = [Deliver(request, _piece(output, None))]
    held = request.places.held
    if DETOKENIZER in held:
        actions.append(SendOpenStream(request, held[DETOKENIZER]))
    if SCHEDULER in held:
        # It takes this in place of what it may still hold of the request.
        actions.append(SendSubmit(request, held[SCHEDULER]))
    return [*actions, *request.advance(now_ns)]


def _piece(output: Output, finish_reason: str | None) -> OutputPiece:
    return OutputPiece(
        output.text,
        output.token_ids,
        finish_reason,
        reasoning=output.reasoning,
        tool_calls=output.tool_calls,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
    )


def take_vector(request: OpenRequest, peer: int, vector: VectorArray) -> list[Action]:
    """A scheduler sent the vector of a text, which is all there is to come."""
    if request.is_finished or request.places.held.get(SCHEDULER) != peer:
        return []
    return [Deliver(request, OutputPiece("", (), "stop", vector=vector)), *request.end(None)]


def begin_beside(request: OpenRequest, first: OpenRequest) -> None:
    """Have a request begin, when it is opened, with the tokens of another choice of the same client request, and near it."""
    assert first.encoded is not None
    request.encoded = first.encoded
    request.stage = Stage.SUBMITTED
    request.first = first


def _cache_prompt(request: OpenRequest) -> CachePrompt:
    """What of a request may be cached somewhere: its prompt and outputs so far."""
    assert request.encoded is not None
    tokens = request.encoded.token_ids.astype("<i4").tobytes() + request.output_tokens.tobytes()
    return CachePrompt(tokens, request.generation.cache_namespace)
