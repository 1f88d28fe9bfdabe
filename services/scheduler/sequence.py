"""One sequence: what the scheduler knows of a request while it holds it.

A sequence is state only. It is moved by the waiting queue, a lane, the planner and the results; it sends nothing and reads no
clock. Its tokens (prompt, then every output token of this and former lives) are kept until it ends, so that it can be started
again on another lane and its output can be sent again to another detokenizer.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.scheduler.lane import Lane
    from services.scheduler.logprobs import TokenLogs
    from services.scheduler.outbox import Target
    from services.scheduler.radix_tree import Node


class Status(Enum):
    """Where a sequence is: every sequence is in exactly one place."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(IntEnum):
    """Why a sequence ended; the numbers are those of `headrace.v1.FinishReason`."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4


@dataclass(frozen=True, slots=True)
class StoppingRules:
    """When a sequence ends.

    Attributes:
        stop_token_ids: Tokens that end it, the model's end-of-sequence tokens included unless the request ignores them.
        min_tokens: Output tokens, the stop token counted, before one of them ends it.
        max_tokens: Most output tokens over all lives; None means as many as the context allows.
    """

    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    max_tokens: int | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream being generated for a request.

    Attributes:
        request_id: Minted by the router.
        stream_id: The router's number for the stream; the detokenizer knows it.
        owner: Incarnation of the router that submitted it.
        model: The model asked for.
        tokens: Prompt, then output tokens.
        num_prompt_tokens: How many of `tokens`, from the start, are prompt.
        stopping: When it ends.
        target: Detokenizer its tokens go to.
        sampling: Sampling parameters, handed through to the worker unread.
        speculative: How it may be speculated on, likewise.
        constraint: What its output must be, likewise; None for anything.
        wants_drafts: It was asked that it be.
        num_drafts_asked: Most drafts of a step; None for as many as its lane verifies.
        trace: Trace state of the shell, never looked at here.
        tenant: Whose it is; only compared. Empty for all who did not say.
        namespace: Prefixes are shared only inside one. Empty for all who did not say.
        fork_group: Sequences of one group have the same prompt and fork from one prefill. Empty for one alone.
        priority: The larger, the more important.
        deadline_ns: Monotonic time at which it is ended; zero means none.
        queued_ns: Monotonic time at which it was submitted.
        logprobs: Those of its outputs, by output position; None when nobody asked.
        prompt_logprobs: Those of its prompt, without its first token; None when nobody asked.
    """

    request_id: str
    stream_id: int
    owner: int
    model: str
    tokens: array[int]
    num_prompt_tokens: int
    stopping: StoppingRules
    target: Target
    sampling: object = None
    speculative: object = None
    constraint: object = None
    wants_drafts: bool = False
    num_drafts_asked: int | None = None
    trace: object = None
    tenant: str = ""
    namespace: str = ""
    fork_group: str = ""
    priority: int = 0
    deadline_ns: int = 0
    queued_ns: int = 0
    logprobs: TokenLogs | None = None
    prompt_logprobs: TokenLogs | None = None

    status: Status = Status.WAITING
    finish_reason: FinishReason = FinishReason.NONE
    num_stop_tokens: int = 0
    finished_ns: int = 0
    # It ended with a finish that its detokenizer has to be told; an abort, an error or a stop string is known elsewhere.
    has_final_output: bool = False
    # Prompt tokens whose KV was there when it was first admitted: what its client is told.
    num_cached_tokens: int = 0
    num_admissions: int = 0
    # Its priority with what waiting had added when it was last admitted; zero where the order is not by priority.
    promoted_priority: float = 0.0
    num_preemptions: int = 0
    num_times_lost: int = 0
    # Lanes that were lost with it in a row, before it had got far on them.
    num_lanes_lost: int = 0
    was_scheduled: bool = False

    # Of its stay in a lane; meaningless while it waits.
    lane: Lane | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    # Of its pages, so many at the start are the tree's; `prefix` is the node it has locked for them.
    num_shared_pages: int = 0
    prefix: Node | None = None
    # Flushes of the lane's cache before it entered.
    num_flushes_before: int = 0
    # Tokens whose KV was there when it entered.
    num_reused_tokens: int = 0
    # Whose pages some of its own are copies of.
    fork_source: Sequence | None = None
    # Its prompt's result is back and good: what is computed may be shared.
    is_sound: bool = False
    admission: int = 0
    # The worker knows the slot: its first plan has been made.
    is_announced: bool = False
    # Tokens handed to the worker, and tokens whose result is back. While a sequence decodes both follow from the lane's decode
    # clock, so that a decode step touches no sequence; these two hold their values of the prefill.
    num_scheduled: int = 0
    num_computed: int = 0
    # Set when it begins to decode: its num_scheduled is `clock.tick - decode_origin`.
    decode_origin: int = 0
    # When it shall get a page, 0 where that is not to be; when it must have one; when it reaches its last token.
    page_due_tick: int = 0
    page_needed_tick: int = 0
    limit_due_tick: int = 0
    # Tokens, prompt and outputs, at which it ends in this lane; drafts that its row may carry; tokens ahead of its need for which
    # it shall have pages.
    max_num_tokens: int = 0
    max_num_drafts: int = 0
    lookahead_tokens: int = 0
    # What came after its tokens the last time that they were in this lane, for drafts.
    foretold: array[int] = field(default_factory=lambda: array("i"))

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and outputs."""
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens over all lives: also the output position of the next one."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def tells(self) -> bool:
        """Whether logprobs of its tokens are wanted."""
        return self.logprobs is not None or self.prompt_logprobs is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether its prompt must be computed whole because logprobs of it are wanted and not all here."""
        return self.prompt_logprobs is not None and len(self.tokens) == self.num_prompt_tokens

    @property
    def is_new_prompt(self) -> bool:
        """Whether it waits in its lane to begin a prefill; one token is a row like that of a decode, and no prefill."""
        return not self.is_announced and self.num_tokens - self.num_scheduled > 1

    def token_limit(self, max_model_len: int) -> int:
        """Most tokens, prompt and outputs together, that its own rules and the model allow."""
        if self.stopping.max_tokens is None:
            return max_model_len
        return min(max_model_len, self.num_prompt_tokens + self.stopping.max_tokens)

    def is_stop(self, token_id: int) -> bool:
        """Whether `token_id`, which has just been appended, ends the sequence."""
        return token_id in self.stopping.stop_token_ids and self.num_output_tokens >= self.stopping.min_tokens

    def output_from(self, position: int) -> array[int]:
        """Output tokens from an output position on."""
        return self.tokens[self.num_prompt_tokens + position :]

    def leave_lane(self) -> None:
        """Forget the stay in a lane; the pages and the slot have been given back."""
        self.lane = None
        self.slot = -1
        self.pages = []
        self.num_shared_pages = 0
        self.prefix = None
        self.fork_source = None
        self.is_sound = False
        self.is_announced = False
        self.num_scheduled = 0
        self.num_computed = 0
