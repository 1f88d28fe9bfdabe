"""One lane: what the scheduler knows of one worker group.

A lane owns its KV pages, its slots and its running sequences: those still extending their prompt and those that decode. A
sequence is admitted with pages for all its known tokens, so a prefill that has begun never waits for pages and only growing
outputs can run out of them. What a step computes is decided by the planner; what came of it is applied by the results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from services.scheduler.decode_clock import DecodeClock
from services.scheduler.kv_pages import KvPages
from services.scheduler.logprobs import PROMPT_LOGITS_MAX
from services.scheduler.page_pool import PagePool
from services.scheduler.radix_tree import NO_MATCH, Eviction, Match
from services.scheduler.sequence import Sequence, Status
from services.scheduler.slot_table import SlotTable
from services.scheduler.step_costs import StepCosts
from services.scheduler.step_plan import Rows, StepInFlight
from services.scheduler.token_fanout import TokenFanout


@dataclass(frozen=True, slots=True)
class LaneCapacity:
    """What a worker group offers.

    Attributes:
        model: Name of its model.
        max_model_len: Most tokens of prompt and output together.
        vocab_size: Token ids are below it.
        num_pages: Pages of its pool for ordinary attention.
        page_size: Tokens a page.
        max_num_seqs: Most sequences it holds at once.
        max_num_batched_tokens: Most tokens it computes in a step: the token budget.
        pool_name: Which of its pools the pages belong to.
        group: Lanes of one group step together; empty for one that steps alone.
        copies_pages: It copies pages where a plan says so.
        max_num_drafts: Most drafts it verifies in a row of a step; 0 where it does not speculate.
    """

    model: str
    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    pool_name: str = "full"
    group: str = ""
    copies_pages: bool = False
    max_num_drafts: int = 0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "vocab_size", "num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"lane capacity: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def num_page_tokens(self) -> int:
        """Tokens for which it has pages."""
        return self.num_pages * self.page_size

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens with which a sequence can enter and still get one more."""
        return min(self.max_model_len - 1, self.num_page_tokens)


@dataclass(frozen=True, slots=True)
class StepRules:
    """How a lane's steps are planned.

    Attributes:
        run_ahead: Plan a step while the one before it is at the worker.
        mixed_step_target_ns: How long a step with decodes and prompts shall take, nanoseconds; 0 for no limit.
    """

    run_ahead: bool = True
    mixed_step_target_ns: int = 0


def preemption_order(sequence: Sequence) -> tuple[float, int, int]:
    """The smallest is preempted first: in the lowest class, who has the fewest outputs to compute again, then the latest."""
    return sequence.promoted_priority, sequence.num_output_tokens, -sequence.admission


class Lane:
    """A worker group's share of the work.

    Attributes:
        lane_id: The worker's incarnation.
        capacity: What it offers.
        prefilling: Sequences with known tokens left to schedule, oldest admission first.
        decoding: Sequences that get one token a step, oldest admission first.
        last_rows: Sequences whose last token is being computed: they get no further row and end with a result under way.
        in_flight: Plans whose results are not back, by step id, oldest first.
        max_in_flight: Most of them: 2 to run ahead of the worker, 1 to wait for each result.
        version: Changes whenever a running sequence leaves or its output is redirected.
        rows: Those of `decoding`; None when it has changed since they were made.
        costs: What its steps take.
        num_tokens: Tokens of its running sequences: its load.
        num_backlog_tokens: Of these, prompt tokens not yet scheduled.
        stop_token_ids: Stop tokens of its running sequences, counted.
    """

    def __init__(
        self,
        lane_id: int,
        capacity: LaneCapacity,
        eviction: Eviction | None = "lru",
        rules: StepRules | None = None,
    ) -> None:
        rules = rules or StepRules()
        self.lane_id = lane_id
        self.capacity = capacity
        self.max_in_flight = 2 if rules.run_ahead else 1
        self.kv = KvPages(PagePool(capacity.num_pages, capacity.page_size, name=capacity.pool_name), eviction)
        # A decoding sequence gets a token in every step, so there may be no more of them than the token budget has tokens.
        self.slots = SlotTable(min(capacity.max_num_seqs, capacity.max_num_batched_tokens))
        self.clock = DecodeClock()
        self.costs = StepCosts(rules.mixed_step_target_ns)
        self.fanout = TokenFanout()
        self.prefilling: dict[Sequence, None] = {}
        self.decoding: dict[Sequence, None] = {}
        self.last_rows: dict[Sequence, None] = {}
        self.in_flight: dict[int, StepInFlight] = {}
        self.is_draining = False
        self.last_step_id = 0
        self.version = 0
        self.rows: Rows | None = None
        # The last plan's rows were `rows`, one token each.
        self.is_steady = False
        self.num_tokens = 0
        self.num_backlog_tokens = 0
        self.stop_token_ids: Counter[int] = Counter()

    @property
    def num_running(self) -> int:
        """Sequences admitted and not ended."""
        return len(self.prefilling) + len(self.decoding) + len(self.last_rows)

    @property
    def has_work(self) -> bool:
        """Whether a plan made now would say anything."""
        return bool(self.decoding or self.prefilling or self.slots.has_freed)

    @property
    def has_new_prompt(self) -> bool:
        """Whether the next step could begin a prompt."""
        has_budget = len(self.decoding) < self.capacity.max_num_batched_tokens
        return has_budget and any(sequence.is_new_prompt for sequence in self.prefilling)

    @property
    def has_prompt_budget(self) -> bool:
        """Whether the next step can compute more prompt tokens than are here."""
        num_tokens = self.num_backlog_tokens + len(self.decoding)
        if self.fanout.num_telling:
            # However long they are, little is computed in a step of prompts whose logprobs are wanted.
            slow = [sequence.num_tokens - sequence.num_scheduled for sequence in self.prefilling if sequence.wants_prompt_logprobs]
            num_tokens -= max(0, sum(slow) - PROMPT_LOGITS_MAX)
        return not self.num_running or num_tokens < self.capacity.max_num_batched_tokens

    def running(self) -> Iterator[Sequence]:
        """Running sequences, those that began to decode first at the front."""
        yield from self.last_rows
        yield from self.decoding
        yield from self.prefilling

    def next_victim(self) -> Sequence:
        """The running sequence to preempt first; there must be one."""
        return min(self.running(), key=preemption_order)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of that many tokens could run here, were the lane empty."""
        return num_tokens <= self.capacity.max_prompt_tokens

    def can_admit(self, sequence: Sequence, match: Match) -> bool:
        """Whether the sequence, with the prefix found here for it, can enter now.

        There must be a slot and pages for its tokens, and then still a page for each running sequence, or it would soon be
        preempted again. No more prompt tokens are taken than the next step has budget for: what cannot start yet may start sooner
        elsewhere.
        """
        if self.is_draining or not self.slots.num_free or not self.fits(sequence.num_tokens):
            return False
        if not self.has_prompt_budget:
            return False
        return self.kv.num_left(sequence, match) >= self.num_running

    def admit(self, sequence: Sequence, match: Match = NO_MATCH, source: Sequence | None = None) -> None:
        """Give the sequence a slot, the prefix found for it and pages for all other tokens; `can_admit` must hold.

        With a `source` here, whose prompt is the same and computed, it takes that over: only its last token is computed again.
        """
        self.kv.enter(sequence, match, source)
        sequence.status = Status.RUNNING
        sequence.lane = self
        sequence.slot = self.slots.allocate()
        sequence.admission = self.slots.num_allocations
        sequence.num_scheduled = sequence.num_computed = sequence.num_reused_tokens
        most = self.capacity.max_num_drafts
        sequence.max_num_drafts = most if sequence.num_drafts_asked is None else min(most, sequence.num_drafts_asked)
        # A sequence that fills the whole pool is alone and could never grow: it ends there instead of being preempted for ever.
        if sequence.max_num_drafts:
            sequence.foretold = self.kv.foretell(sequence)
        sequence.max_num_tokens = min(sequence.token_limit(self.capacity.max_model_len), self.capacity.num_page_tokens + 1)
        self.prefilling[sequence] = None
        self.num_tokens += sequence.num_tokens
        self.num_backlog_tokens += sequence.num_tokens - sequence.num_scheduled
        self.stop_token_ids.update(sequence.stopping.stop_token_ids)
        self.fanout.num_telling += sequence.tells
        if sequence.prompt_logprobs is not None and sequence.wants_prompt_logprobs:
            # What came of it in a stay that was cut short comes again.
            sequence.prompt_logprobs.clear()

    def begin_decode(self, sequence: Sequence) -> None:
        """The step being planned schedules the last of the sequence's known tokens."""
        del self.prefilling[sequence]
        self.decoding[sequence] = None
        self.rows = None
        # So that all its drafts have pages, whatever the steps under way have accepted, and one more token.
        sequence.lookahead_tokens = self.max_in_flight * sequence.max_num_drafts + 1 if sequence.max_num_drafts else 0
        self.clock.enter(sequence, page_tokens=len(sequence.pages) * self.kv.pool.page_size, token_limit=sequence.max_num_tokens)

    def retire(self) -> None:
        """Give no row in the next step to sequences whose last token is under way."""
        for sequence in self.clock.limits_under_way():
            if sequence in self.decoding:
                del self.decoding[sequence]
                self.last_rows[sequence] = None
                self.clock.stop_growing(sequence)
                self.rows = None

    def release(self, sequence: Sequence) -> None:
        """Take the sequence's slot and pages back, whatever it is doing; the tree keeps what is known to be sound of them."""
        self.kv.leave(sequence, self.clock.num_computed(sequence))
        if sequence in self.decoding:
            del self.decoding[sequence]
            self.clock.leave(sequence)
            self.rows = None
        elif sequence in self.last_rows:
            del self.last_rows[sequence]
            self.clock.leave(sequence)
        else:
            del self.prefilling[sequence]
            self.num_backlog_tokens -= sequence.num_tokens - sequence.num_scheduled
        self.num_tokens -= sequence.num_tokens
        self.fanout.num_telling -= sequence.tells
        self.stop_token_ids.subtract(sequence.stopping.stop_token_ids)
        self.stop_token_ids = +self.stop_token_ids
        self.slots.free(sequence.slot, is_announced=sequence.is_announced)
        self.version += 1
        sequence.leave_lane()
