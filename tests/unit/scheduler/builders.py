"""Short ways to make schedulers, lanes and sequences for tests."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from services.scheduler.lane import Lane, LaneCapacity, StepRules
from services.scheduler.lanes import Lanes
from services.scheduler.logprobs import TokenLogs
from services.scheduler.outbox import Outbox
from services.scheduler.output_lengths import Float64Array, Int64Array
from services.scheduler.policies.registry import POLICIES
from services.scheduler.prefill_delayer import DelayerLimits
from services.scheduler.radix_tree import Eviction
from services.scheduler.scheduler import Scheduler
from services.scheduler.sequence import Sequence, StoppingRules
from services.scheduler.step_costs import PromptShare, StepCosts
from services.scheduler.waiting_queue import WaitingQueue

MODEL = "tiny"


def capacity(
    *,
    num_pages: int = 64,
    page_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 128,
    vocab_size: int = 50,
    model: str = MODEL,
    group: str = "",
    copies_pages: bool = True,
    max_num_drafts: int = 0,
) -> LaneCapacity:
    """A small worker group."""
    return LaneCapacity(
        model=model,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        group=group,
        copies_pages=copies_pages,
        max_num_drafts=max_num_drafts,
    )


class NoForesight:
    """Expects no output to grow."""

    longest = None

    def record(self, num_output_tokens: int) -> None:
        """Nothing is learnt."""

    def expected(self, made: Int64Array, limits: Int64Array, draws: Float64Array) -> Float64Array:
        """What is there."""
        return made.astype(float)


def scheduler(
    *,
    max_requests: int = 1000,
    max_tokens: int = 1_000_000,
    linger_s: float = 30.0,
    eviction: Eviction | None = "lru",
    policy: str = "fcfs",
    run_ahead: bool = False,
    has_foresight: bool = False,
    delayer_limits: DelayerLimits | None = None,
    mixed_step_target_ns: int = 0,
) -> Scheduler:
    """A scheduler without lanes.

    It waits for each result unless told to run ahead, so that steps are easy to tell apart, and admits without a thought for what
    outputs will need unless told to have foresight, so that pages run out.
    """
    lanes = Lanes()
    queue = WaitingQueue(POLICIES[policy](lanes), max_requests=max_requests, max_tokens=max_tokens)
    lengths = None if has_foresight else NoForesight()
    return Scheduler(
        lanes,
        queue,
        Outbox(linger_s=linger_s),
        eviction,
        rules=StepRules(run_ahead, mixed_step_target_ns),
        preemption_threshold=10 if policy == "priority" else None,
        lengths=lengths,
        delayer_limits=delayer_limits,
    )


def teach_costs(lane: Lane, *, token_ns: int) -> None:
    """Let a lane know what a prompt's token costs beside decodes, as three steps would."""
    for _ in range(3):
        share = PromptShare(StepCosts(), 1, 1)
        share.take(1, 0)
        lane.costs.record_share(share, 0, token_ns)


def sequence(
    core: Scheduler,
    request_id: str,
    tokens: Iterable[int] = (1, 2, 3),
    *,
    num_output_tokens: int = 0,
    max_tokens: int | None = 8,
    min_tokens: int = 0,
    stop: Iterable[int] = (),
    deadline_ns: int = 0,
    owner: int = 1,
    stream_id: int | None = None,
    detokenizer: str = "detokenizer-0",
    model: str = MODEL,
    priority: int = 0,
    namespace: str = "",
    num_drafts_asked: int | None = None,
    wants_drafts: bool = False,
    fork_group: str = "",
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> Sequence:
    """A sequence, not submitted; its stream id follows from its request id when none is given."""
    known = array("i", tokens)
    return Sequence(
        request_id=request_id,
        stream_id=stream_id if stream_id is not None else hash(request_id) & 0xFFFF_FFFF,
        owner=owner,
        model=model,
        tokens=known,
        num_prompt_tokens=len(known) - num_output_tokens,
        stopping=StoppingRules(frozenset(stop), min_tokens, max_tokens),
        target=core.outbox.target(detokenizer, 7),
        logprobs=None if logprobs is None else TokenLogs(logprobs),
        prompt_logprobs=None if prompt_logprobs is None else TokenLogs(prompt_logprobs),
        deadline_ns=deadline_ns,
        priority=priority,
        namespace=namespace,
        num_drafts_asked=num_drafts_asked,
        wants_drafts=wants_drafts,
        fork_group=fork_group,
    )
