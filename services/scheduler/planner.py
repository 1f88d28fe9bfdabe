"""The planner: one step of one lane.

Every decoding sequence gets one token. What is left of the token budget extends the prompts that are being prefilled, oldest first:
a long prompt is spread over steps (chunked prefill) and shares them with decodes (mixed steps). A decoding sequence that crosses a
page border gets a page; where none can be had, the sequences with the fewest output tokens lose theirs (preemption) and wait again
at the front. The one with the most always goes on, so some sequence always comes to its end.

The planner reads counts, never token values, so it can plan a step before the result of the last one is back.

Source: iteration-level scheduling, Orca (OSDI 2022); chunked prefill, Sarathi-Serve (OSDI 2024).
"""

from __future__ import annotations

from services.scheduler.lane import Lane, preemption_order
from services.scheduler.sequence import Sequence, Status
from services.scheduler.step_plan import StepInFlight, StepPlan

# Plans at the worker whose results are not back. One: the next plan leaves when the result has come.
MAX_STEPS_IN_FLIGHT = 1


def plan_step(lane: Lane) -> StepPlan | None:
    """Decide the lane's next step.

    Returns:
        A plan, or None when one is at the worker already or there is nothing to say. A plan may have no rows, only freed slots;
        it is not answered.
    """
    if len(lane.in_flight) >= MAX_STEPS_IN_FLIGHT or not lane.has_work:
        return None
    lane.last_step_id += 1
    plan = StepPlan(lane.last_step_id)
    if not lane.num_running:
        plan.freed_slots = lane.slots.take_freed()
        return plan
    lane.clock.tick += 1
    _give_pages(lane, plan)
    plan.freed_slots = lane.slots.take_freed()
    if lane.rows_changed:
        lane.refresh_rows()
        lane.is_steady = False
    _add_rows(lane, plan)
    return plan


def _give_pages(lane: Lane, plan: StepPlan) -> None:
    """Give a page to each decoding sequence that needs one at this tick, preempting where the pool is empty."""
    due = lane.clock.take_page_due()
    # Who is preempted last comes first: then whoever is preempted has been given nothing in this plan.
    due.sort(key=preemption_order, reverse=True)
    for sequence in due:
        # Preempted for the sake of another.
        if sequence.lane is not lane:
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


def _preempt(lane: Lane, victim: Sequence, plan: StepPlan) -> None:
    lane.release(victim)
    victim.status = Status.WAITING
    victim.num_preemptions += 1
    plan.preempted.append(victim)


def _add_rows(lane: Lane, plan: StepPlan) -> None:
    """Fill in the rows: all that decode, then chunks of prompts as far as the budget goes."""
    decode_rows = lane.decode_rows
    plan.num_rows = plan.num_tokens = len(decode_rows)
    sampled, sampled_slots = decode_rows, lane.decode_slots
    extended: list[tuple[Sequence, int, int]] = []
    completed: list[Sequence] = []
    if lane.prefilling:
        extended, completed = _extend(lane, plan)
        if completed:
            sampled = decode_rows + completed
            sampled_slots = lane.decode_slots + [sequence.slot for sequence in completed]
    if plan.num_rows > len(decode_rows):
        lane.is_steady = False
    elif lane.is_steady:
        plan.same_rows = True
    else:
        plan.row_slots = lane.decode_slots
        lane.is_steady = True
    lane.in_flight[plan.step_id] = StepInFlight(lane.clock.tick, lane.version, sampled, sampled_slots, extended, completed)


def _extend(lane: Lane, plan: StepPlan) -> tuple[list[tuple[Sequence, int, int]], list[Sequence]]:
    """Spend the rest of the budget on prompts. Returns those that go on in a later step, and those that are complete."""
    budget = lane.capacity.max_num_batched_tokens - plan.num_tokens
    extended: list[tuple[Sequence, int, int]] = []
    completed: list[Sequence] = []
    slots: list[int] = []
    counts: list[int] = []
    for sequence in list(lane.prefilling):
        if budget == 0:
            break
        if not sequence.is_announced:
            sequence.is_announced = True
            plan.new_sequences.append(sequence)
            plan.add_pages(sequence.slot, sequence.pages)
        num_left = sequence.num_tokens - sequence.num_scheduled
        num_new = min(budget, num_left)
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
            extended.append((sequence, sequence.slot, sequence.num_scheduled))
    if slots:
        plan.num_rows += len(slots)
        plan.row_slots = lane.decode_slots + slots
        if plan.num_tokens > plan.num_rows:
            plan.row_num_new_tokens = [1] * len(lane.decode_slots) + counts
    return extended, completed
