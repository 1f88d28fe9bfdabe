"""One open client request: a state machine that survives the loss of any stage.

    TOKENIZING ──tokens──▶ SUBMITTED ──first output──▶ STREAMING ──finish reason──▶ FINISHED
         └───────────────────────┴──── error, deadline, abort ───────┴──────────────────▲

It holds the prompt's tokens and every output token so far, so any other stage can be given the request anew: a tokenizer the
prompt, a scheduler prompt and outputs, a detokenizer the token history. `advance` compares what the request needs with what it has
and returns the actions that close the difference; a loss only takes something away and advances again. Output is taken strictly by
position, so duplicates, repeats and two schedulers at once do no harm.

Pure: time comes in, actions go out.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from headrace.errors import (
    DeadlineExceededError,
    HeadraceError,
    NotFoundError,
    OverloadedError,
    ReplicaDeadError,
    RequestAbortedError,
    RequestFailedError,
    UnavailableError,
)
from headrace.v1 import common_pb2 as common
from headrace.v1 import control_pb2 as control
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
)
from services.router.generation import EncodedPrompt, GenerationRequest

TOKENIZER, SCHEDULER, DETOKENIZER = control.ROLE_TOKENIZER, control.ROLE_SCHEDULER, control.ROLE_DETOKENIZER
STAGE_NAMES: dict[int, str] = {TOKENIZER: "tokenizer", SCHEDULER: "scheduler", DETOKENIZER: "detokenizer"}
REOPEN_INTERVAL_NS = 500_000_000
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


class Stage(Enum):
    """How far the request is."""

    TOKENIZING = "tokenizing"
    SUBMITTED = "submitted"
    STREAMING = "streaming"
    FINISHED = "finished"


class Placement(Protocol):
    """Chooses instances and counts what they hold for us."""

    def take(self, role: int, model: str, *, avoid: int | None) -> int | None:
        """Choose an instance that can serve the model and count one piece of work on it; None when there is none."""
        ...

    def give_back(self, incarnation: int) -> None:
        """One piece of work on the instance is over; unknown instances are ignored."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what."""

    unavailable_wait_ns: int
    stall_nudge_ns: int
    move_delay_ns: int
    max_moves: int


@dataclass(slots=True)
class Output:
    """What one message says of one stream."""

    first_position: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: int = 0
    num_cached_tokens: int = 0


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
    ) -> None:
        self.request_id = request_id
        self.kind = kind
        self.generation = generation
        self.stream_id = stream_id
        self.deadline_ns = deadline_ns
        self.stage = Stage.TOKENIZING
        self.held: dict[int, int] = {}
        self.encoded: EncodedPrompt | None = None
        self.output_tokens = array("i")
        self.num_sent_chars = 0
        self.num_cached_tokens = 0
        self.num_moves = 0
        self.waiting_for: int | None = None
        self._placement = placement
        self._patience = patience
        self._waiting_since_ns = 0
        self._avoid: dict[int, tuple[int, int]] = {}
        self._retry_at_ns: int | None = None
        self._needs_redirect = False
        self._is_redirected = False
        self._heard_ns = 0
        self._reopened_ns = 0

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended."""
        return self.stage is Stage.FINISHED

    def due_ns(self) -> int:
        """When `on_time` must be called next, at the latest."""
        due = min(self.deadline_ns, self._heard_ns + self._patience.stall_nudge_ns)
        if self.waiting_for is not None:
            due = min(due, self._waiting_since_ns + self._patience.unavailable_wait_ns)
        return due if self._retry_at_ns is None else min(due, self._retry_at_ns)

    # What the request needs, against what it has.

    def advance(self, now_ns: int) -> list[Action]:
        """Give the request to the stages it needs and is not at yet."""
        if self.is_finished or (self._retry_at_ns is not None and now_ns < self._retry_at_ns):
            return []
        self._retry_at_ns = None
        actions: list[Action] = []
        if self.stage is Stage.TOKENIZING:
            if TOKENIZER not in self.held and self._take(TOKENIZER, now_ns):
                actions.append(SendTokenize(self, self.held[TOKENIZER]))
            return actions
        if DETOKENIZER not in self.held:
            if not self._take(DETOKENIZER, now_ns):
                return actions
            actions.append(SendOpenStream(self, self.held[DETOKENIZER]))
            self._needs_redirect = SCHEDULER in self.held
        if SCHEDULER not in self.held:
            if self._take(SCHEDULER, now_ns):
                self._needs_redirect = self._is_redirected = False
                actions.append(SendSubmit(self, self.held[SCHEDULER]))
        elif self._needs_redirect:
            self._needs_redirect = False
            self._is_redirected = True
            actions.append(SendRedirect(self, self.held[SCHEDULER], len(self.output_tokens)))
        return actions

    def _take(self, role: int, now_ns: int) -> bool:
        model = self.generation.model
        avoid, until_ns = self._avoid.get(role, (None, 0))
        chosen = self._placement.take(role, model, avoid=avoid)
        if chosen is None and avoid is not None:
            if now_ns >= until_ns:
                chosen = self._placement.take(role, model, avoid=None)
            else:
                self._retry_at_ns = until_ns
        if chosen is None:
            if self.waiting_for != role:
                self.waiting_for, self._waiting_since_ns = role, now_ns
            return False
        self.waiting_for = None
        self._heard_ns = now_ns
        self._avoid.pop(role, None)
        self.held[role] = chosen
        return True

    def _leave(self, role: int, now_ns: int) -> int | None:
        """Take the request from the instance that has it, and prefer another next time."""
        incarnation = self.held.pop(role, None)
        if incarnation is not None:
            self._placement.give_back(incarnation)
            self._avoid[role] = (incarnation, now_ns + self._patience.move_delay_ns)
        return incarnation

    def _move(self, role: int, now_ns: int) -> list[Action]:
        self._leave(role, now_ns)
        self.num_moves += 1
        if self.num_moves > self._patience.max_moves:
            error = RequestFailedError(
                f"{STAGE_NAMES[role]}: the request was moved {self.num_moves} times, the limit is {self._patience.max_moves}; "
                "instances keep failing, see their logs"
            )
            return self.end(error)
        return self.advance(now_ns)

    # Events.

    def on_tokens(self, peer: int, encoded: EncodedPrompt, now_ns: int) -> list[Action]:
        """The tokenizer answered."""
        if self.stage is not Stage.TOKENIZING or self.held.get(TOKENIZER) != peer:
            return []
        self._leave(TOKENIZER, now_ns)
        self.encoded = encoded
        self._heard_ns = now_ns
        if self.kind is not Kind.GENERATE:
            return self.end(None)
        self.stage = Stage.SUBMITTED
        return self.advance(now_ns)

    def on_text(self, peer: int, text: str) -> list[Action]:
        """The tokenizer answered a detokenize call."""
        if self.stage is not Stage.TOKENIZING or self.held.get(TOKENIZER) != peer:
            return []
        return [Deliver(self, text, (), "stop"), *self.end(None)]

    def on_refused(self, role: int, peer: int, error: HeadraceError, now_ns: int) -> list[Action]:
        """A stage will not serve the request, or serve it no further; or it could not be sent there."""
        if self.is_finished or self.held.get(role) != peer:
            return []
        if isinstance(error, ReplicaDeadError):
            return self._move(role, now_ns)
        if isinstance(error, NotFoundError) and role == SCHEDULER and error.param != "model":
            return self._on_not_held(now_ns)
        if isinstance(error, OverloadedError):
            return self._on_overloaded(role, error, now_ns)
        if role == SCHEDULER:
            # It holds nothing any more, so there is nothing to abort there.
            self._leave(role, now_ns)
        return self.end(error)

    def _on_not_held(self, now_ns: int) -> list[Action]:
        """The scheduler answered a Redirect: it has not got the request. Stale without a Redirect since the last Submit."""
        if not self._is_redirected:
            return []
        # Should the answer be a stale one after all, the abort keeps the scheduler from holding the request twice.
        abort = SendAbort(self.request_id, self.held[SCHEDULER])
        return [abort, *self._move(SCHEDULER, now_ns)]

    def _on_overloaded(self, role: int, error: OverloadedError, now_ns: int) -> list[Action]:
        """Another instance may have room. Before any output a client is better told to come back than left waiting."""
        self._leave(role, now_ns)
        self.num_moves += 1
        actions = self.advance(now_ns) if self.num_moves <= self._patience.max_moves else []
        if role in self.held or self.output_tokens:
            return actions
        return [*actions, *self.end(error)]

    def on_unsent(self, unsent: Sequence[SendWork], error: HeadraceError, now_ns: int) -> list[Action]:
        """The first of these could not be sent, so the others were not either."""
        failed = unsent[0]
        for action in unsent[1:]:
            if isinstance(action, SendRedirect):
                self._needs_redirect = True
            else:
                self._placement.give_back(self.held.pop(_ROLE_OF[type(action)], 0))
        if isinstance(failed, SendRedirect) and isinstance(error, OverloadedError):
            # The request still runs there; a resubmission elsewhere would compute it twice.
            self._needs_redirect = True
            self._retry_at_ns = now_ns + self._patience.move_delay_ns
            return []
        return self.on_refused(_ROLE_OF[type(failed)], failed.to, error, now_ns)

    def on_peer_lost(self, peer: int, now_ns: int) -> list[Action]:
        """An instance is gone; whatever it held for this request goes elsewhere."""
        actions: list[Action] = []
        for role in [role for role, incarnation in self.held.items() if incarnation == peer]:
            actions += self._move(role, now_ns)
        return actions

    def on_accepted(self, peer: int, now_ns: int) -> None:
        """The scheduler holds the request."""
        if self.held.get(SCHEDULER) == peer:
            self._heard_ns = now_ns

    def on_output(self, peer: int, output: Output, now_ns: int) -> list[Action]:
        """The detokenizer sent output: taken when it begins exactly where ours ends."""
        if self.is_finished or self.held.get(DETOKENIZER) != peer:
            return []
        expected = len(self.output_tokens)
        if output.first_position != expected:
            is_known = output.first_position + len(output.token_ids) <= expected
            return [] if is_known else self._reopen(now_ns)
        self.stage = Stage.STREAMING
        self._heard_ns = now_ns
        self.output_tokens.extend(output.token_ids)
        self.num_sent_chars += len(output.text)
        if output.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        reason = output.finish_reason
        if reason in _FINISH_NAMES:
            return [Deliver(self, output.text, output.token_ids, _FINISH_NAMES[reason]), *self.end(None)]
        if reason == common.FINISH_REASON_ABORT:
            return self.end(RequestAbortedError("the request was aborted by an operator"))
        if reason:
            return self.end(RequestFailedError("the request failed in the worker; its log names the reason"))
        return [Deliver(self, output.text, output.token_ids, None)]

    def on_gap(self, peer: int, expected_position: int) -> list[Action]:
        """The detokenizer missed tokens: the scheduler sends them again."""
        scheduler = self.held.get(SCHEDULER)
        if self.is_finished or self.held.get(DETOKENIZER) != peer or scheduler is None:
            return []
        self._is_redirected = True
        return [SendRedirect(self, scheduler, expected_position)]

    def _reopen(self, now_ns: int) -> list[Action]:
        """Output is missing between the detokenizer and us: begin the stream again where ours ends."""
        if now_ns - self._reopened_ns < REOPEN_INTERVAL_NS and self._reopened_ns:
            return []
        self._reopened_ns = now_ns
        actions: list[Action] = [SendOpenStream(self, self.held[DETOKENIZER])]
        self._needs_redirect = SCHEDULER in self.held
        return [*actions, *self.advance(now_ns)]

    def on_time(self, now_ns: int) -> list[Action]:
        """Deadline, missing stages, silence."""
        if self.is_finished:
            return []
        if now_ns >= self.deadline_ns:
            return self.end(DeadlineExceededError(f"the request's deadline passed while it was {self.stage.value}"))
        actions = self.advance(now_ns)
        if self.waiting_for is not None and now_ns - self._waiting_since_ns >= self._patience.unavailable_wait_ns:
            wait_s = self._patience.unavailable_wait_ns / 1e9
            stage, model = STAGE_NAMES[self.waiting_for], self.generation.model
            return [*actions, *self.end(UnavailableError(f"no {stage} can serve model {model!r} now; waited {wait_s:g} s"))]
        if now_ns - self._heard_ns >= self._patience.stall_nudge_ns and not actions:
            self._heard_ns = now_ns
            actions = self._nudge(now_ns)
        return actions

    def _nudge(self, now_ns: int) -> list[Action]:
        """Nothing has come for long: a message may be lost. Ask again; all stages take repeats well."""
        if self.stage is Stage.TOKENIZING:
            self._leave(TOKENIZER, now_ns)
            return self.advance(now_ns)
        if DETOKENIZER not in self.held:
            return []
        self._reopened_ns = 0
        return self._reopen(now_ns)

    def end(self, error: HeadraceError | None) -> list[Action]:
        """End the request, once: free what other stages hold of it."""
        if self.is_finished:
            return []
        self.stage = Stage.FINISHED
        self.waiting_for = None
        actions: list[Action] = []
        # After a whole output scheduler and detokenizer have let go by themselves, unless the request had been moved.
        if error is not None or self.num_moves:
            if SCHEDULER in self.held:
                actions.append(SendAbort(self.request_id, self.held[SCHEDULER]))
            if DETOKENIZER in self.held:
                actions.append(SendCloseStream(self.stream_id, self.held[DETOKENIZER]))
        for incarnation in self.held.values():
            self._placement.give_back(incarnation)
        self.held.clear()
        return [*actions, End(self, error)]
