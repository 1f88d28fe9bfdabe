"""The planner: one step of one lane.

Every decoding sequence gets one token. What is left of the token budget extends the prompts that are being prefilled, oldest first:
a long prompt is spread over steps (chunked prefill) and shares them with decodes (mixed steps), which it may not make longer than
is set (`step_costs.py`). A decoding sequence that crosses a page border gets a page; where none can be had, the sequences with the
fewest output tokens lose theirs (preemption) and wait again at the front. The one with the most always goes on, so some sequence
always comes to its end.

A worker that speculates may answer a row with several tokens: how many drafts the row carries is its own affair, within the budget
of the step, the pages the sequence has and the length at which it ends, less one token each. That one token is what makes the next
plan true whatever is accepted. The planner's part is to give sequences pages ahead of their need, as long as nobody else loses any.

The planner reads counts, never token values, so it may run ahead: a step is planned while the one before it is at the worker, which
appends the tokens it samples by itself. A sequence whose last token is under way gets no further row; one that turns out to have
stopped is trimmed when the result comes; and a plan that would have to preempt waits, for the result may free pages.

Source: iteration-level scheduling, Orca (OSDI 2022); chunked prefill, Sarathi-Serve (OSDI 2024).
"""

from __future__ import annotations

from services.scheduler.lane import Lane, preemption_order
from services.scheduler.logprobs import PROMPT_LOGITS_MAX
from services.scheduler.sequence import Sequence, Status
from services.scheduler.step_costs import PromptShare
from services.scheduler.step_plan import Rows, StepInFlight, StepPlan


def plan_step(lane: Lane, *, may_begin: bool = True) -> StepPlan | None:
    """Decide the lane's next step.

    Args:
        lane: Whose.
        may_begin: Whether prompts of which nothing is computed yet may begin.

    Returns:
        A plan, or None when enough of them are at the worker or there is nothing to say. A plan may have no rows, only freed
        slots; it is not answered.
    """
    if not can_plan(lane):
        return None
    has_rows = lane.decoding or any(may_begin or not sequence.is_new_prompt for sequence in lane.prefilling)
    if not has_rows and not lane.slots.has_freed:
        return None
    lane.last_step_id += 1
    plan = StepPlan(lane.last_step_id)
    for page, copy in lane.kv.take_copies():
        plan.copied_pages.append(page)
        plan.page_copies.append(copy)
    if not has_rows:
        plan.freed_slots = lane.slots.take_freed()
        return plan
    lane.clock.tick += 1
    _give_pages(lane, plan)
    plan.freed_slots = lane.slots.take_freed()
    if lane.rows is None:
        # New lists: plans in flight keep the old ones.
        lane.rows = Rows.of(lane.decoding)
        lane.is_steady = False
    _add_rows(lane, plan, lane.rows, may_begin=may_begin)
    return plan


def can_plan(lane: Lane) -> bool:
    """Whether there is something to say to the lane's worker, and it may be said now."""
    return lane.has_work and (not lane.in_flight or _can_run_ahead(lane))


def _can_run_ahead(lane: Lane) -> bool:
    """Whether a step can be planned, and truly, before the results under way are back."""
    if len(lane.in_flight) >= lane.max_in_flight:
        return False
    # The first token of a constrained sequence may be withheld: whether it is also its last is known with the result.
    if any(sequence.constraint is not None and not sequence.is_sound for sequence in lane.clock.limits_under_way()):
        return False
    lane.retire()
    return bool(lane.decoding or lane.prefilling) and lane.clock.num_page_due() <= lane.kv.num_usable


def _give_pages(lane: Lane, plan: StepPlan) -> None:
    """Give pages to decoding sequences: to those that need one at this tick, preempting where the pool is empty; then ahead."""
    due = lane.clock.take_page_due()
    # Who is preempted last comes first: then whoever is preempted has been given nothing in this plan.
    due.sort(key=preemption_order, reverse=True)
    ahead = []
    for sequence in due:
        # Preempted for the sake of another.
        if sequence.lane is not lane:
            continue
        if sequence.lookahead_tokens:
            ahead.append(sequence)
            if not lane.clock.needs_page(sequence):
                continue
        pages = lane.kv.allocate(1)
        while pages is None:
            victim = lane.next_victim()
            _preempt(lane, victim, plan)
            if victim is sequence:
                break
            pages = lane.kv.allocate(1)
        else:
            sequence.pages += pages
            plan.add_pages(sequence.slot, pages)
            lane.clock.grow(sequence, lane.kv.pool.page_size)
    for sequence in ahead:
        if sequence.lane is lane:
            _look_ahead(lane, sequence, plan)


def _look_ahead(lane: Lane, sequence: Sequence, plan: StepPlan) -> None:
    """Give a sequence the pages that its drafts may want, as long as a page is left for each that runs."""
    pool = lane.kv.pool
    # Its last token is never computed.
    num_tokens = min(lane.clock.num_scheduled(sequence) + sequence.lookahead_tokens, sequence.max_num_tokens - 1)
    num_missing = max(0, pool.pages_for(num_tokens) - len(sequence.pages))
    are_plenty = lane.kv.num_usable - num_missing >= lane.num_running
    if num_missing and are_plenty:
        pages = lane.kv.allocate(num_missing)
        assert pages is not None
        sequence.pages += pages
        plan.add_pages(sequence.slot, pages)
        lane.clock.grow(sequence, num_missing * pool.page_size)
    if are_plenty and len(sequence.pages) * pool.page_size < sequence.max_num_tokens - 1:
        lane.clock.look_ahead(sequence)
    else:
        # Its pages last to its end, or there are too few: it waits for the next one that it needs.
        lane.clock.grow(sequence, 0)


def _preempt(lane: Lane, victim: Sequence, plan: StepPlan) -> None:
    lane.release(victim)
    victim.status = Status.WAITING
    victim.num_preemptions += 1
    plan.preempted.append(victim)


def _add_rows(lane: Lane, plan: StepPlan, rows: Rows, *, may_begin: bool) -> None:
    """Fill in the rows: all that decode, then chunks of prompts as far as the budget goes."""
    plan.num_rows = plan.num_tokens = len(rows.slots)
    sampled = rows
    extended: list[tuple[Sequence, int, int, int]] = []
    completed: list[Sequence] = []
    share = None
    if lane.prefilling:
        share = PromptShare(lane.costs, len(rows.slots), lane.capacity.page_size)
        extended, completed = _extend(lane, plan, rows.slots, share, may_begin=may_begin)
        if completed:
            sampled = rows + Rows.of(completed)
    if plan.num_rows > len(rows.slots):
        lane.is_steady = False
    elif lane.is_steady:
        plan.same_rows = True
    else:
        plan.row_slots = rows.slots
        lane.is_steady = True
    lane.in_flight[plan.step_id] = StepInFlight(lane.clock.tick, lane.version, plan.num_tokens, sampled, extended, completed, share)


def _extend(
    lane: Lane, plan: StepPlan, decode_slots: list[int], share: PromptShare, *, may_begin: bool
) -> tuple[list[tuple[Sequence, int, int, int]], list[Sequence]]:
    """Spend the rest of the budget on prompts. Gives those that go on in a later step, and those that are complete."""
    budget = lane.capacity.max_num_batched_tokens - plan.num_tokens
    logits_budget = PROMPT_LOGITS_MAX
    extended: list[tuple[Sequence, int, int, int]] = []
    completed: list[Sequence] = []
    slots: list[int] = []
    counts: list[int] = []
    for sequence in list(lane.prefilling):
        if budget == 0:
            break
        if not may_begin and sequence.is_new_prompt:
            continue
        num_left = sequence.num_tokens - sequence.num_scheduled
        num_new = min(budget, num_left)
        if sequence.wants_prompt_logprobs:
            if not logits_budget:
                continue
            num_new = min(num_new, logits_budget)
        num_new = share.take(num_new, sequence.num_scheduled)
        if not num_new:
            break
        if sequence.wants_prompt_logprobs:
            logits_budget -= num_new
        if not sequence.is_announced:
            sequence.is_announced = True
            plan.new_sequences.append(sequence)
            plan.add_pages(sequence.slot, sequence.pages)
        budget -= num_new
        sequence.num_scheduled += num_new
        lane.num_backlog_tokens -= num_new
        plan.num_tokens += num_new
        slots.append(sequence.slot)
        counts.append(num_new)
        if num_new == num_left:
            completed.append(sequence)
            lane.begin_decode(sequence)
        else:
            extended.append((sequence, sequence.slot, sequence.admission, sequence.num_scheduled))
    if slots:
        plan.num_rows += len(slots)
        plan.row_slots = decode_slots + slots
        if plan.num_tokens > plan.num_rows:
            plan.row_num_new_tokens = [1] * len(decode_slots) + counts
    return extended, completed
