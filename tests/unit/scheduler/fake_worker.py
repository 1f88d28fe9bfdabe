"""A worker on paper: applies step plans as the real one would and asserts that each keeps the rules of the diff.

It keeps the KV as the tokens that were written to each place of each page, and before it samples for a sequence it reads all of
the sequence's KV back, cached prefixes included. A page in two places, a page too few or a row too many is found there if not
before. The token it samples depends on all tokens before it, so the output of a request is the same on whatever lane, after
whatever preemption.

Where it speculates, it verifies as many drafts as there is room for, of which more or fewer are right, and leaves the others' KV.
"""

from __future__ import annotations

import zlib
from array import array

from services.scheduler.lane import Lane, LaneCapacity
from services.scheduler.sequence import Sequence
from services.scheduler.step_plan import StepPlan, StepResult


def next_token(tokens: array[int], vocab_size: int) -> int:
    """The token that follows `tokens`."""
    return zlib.crc32(tokens.tobytes()) % vocab_size


class HeldSequence:
    """What the worker knows of a slot."""

    def __init__(self, sequence: Sequence, page_size: int) -> None:
        self.tokens = sequence.tokens[:]
        self.num_computed = sequence.num_reused_tokens
        self.pages: list[int] = []
        # What it found cached it reads only; the pages from here on are its own.
        self.first_own_page = sequence.num_reused_tokens // page_size
        self.max_num_tokens = sequence.max_num_tokens
        self.max_num_drafts = sequence.max_num_drafts
        # A constrained sequence gives no token in so many rows; an output of so many tokens fulfils its constraint.
        self.num_withheld, self.num_at_end = getattr(sequence, "constraint", None) or (0, 0)


class FakeWorker:
    """One worker group.

    Attributes:
        held: Sequences by slot.
        num_plans: Plans applied.
        drafts: By slot, drafts and how many were right of each row that may carry some.
        are_drafts_right: All drafts are right, instead of some.
    """

    def __init__(self, capacity: LaneCapacity) -> None:
        self.capacity = capacity
        self.held: dict[int, HeldSequence] = {}
        self.num_plans = 0
        self.drafts: dict[int, list[tuple[int, int]]] = {}
        self.are_drafts_right = False
        self._last_step_id = 0
        self._last_rows: list[int] = []
        self._kv: dict[tuple[int, int], int] = {}
        # Copied into, and their owner has not entered yet.
        self._copies: set[int] = set()

    def apply(self, plan: StepPlan) -> StepResult | None:
        """Run a plan. Returns its result, or None for a plan without rows."""
        assert plan.step_id > self._last_step_id, "a step id came twice"
        self._last_step_id = plan.step_id
        self.num_plans += 1
        self._apply_diff(plan)
        rows, counts = self._rows(plan)
        assert len(rows) == plan.num_rows
        assert sum(counts) == plan.num_tokens <= self.capacity.max_num_batched_tokens, "the token budget was exceeded"
        if not rows:
            return None
        slots, token_ids, num_tokens, ended = [], [], [], []
        num_free = self.capacity.max_num_batched_tokens - plan.num_tokens
        for slot, num_new_tokens in zip(rows, counts, strict=True):
            room = self._room(slot) if num_new_tokens == 1 else 0
            given = self._compute(slot, num_new_tokens)
            if given and num_new_tokens == 1 and self.held[slot].max_num_drafts:
                num_drafts = min(num_free, room)
                num_free -= num_drafts
                given += self._verify(slot, num_drafts)
            held = self.held[slot]
            if given and held.num_withheld:
                held.num_withheld -= 1
                held.tokens.pop()
                held.num_computed -= 1
                given = []
                slots.append(slot)
                num_tokens.append(0)
            if given:
                slots.append(slot)
                token_ids += given
                num_tokens.append(len(given))
                if held.num_at_end and len(held.tokens) >= held.num_at_end:
                    ended.append(slot)
        is_one_each = all(count == 1 for count in num_tokens)
        return StepResult(plan.step_id, slots, token_ids, [] if is_one_each else num_tokens, ended_slots=ended)

    def check_agrees_with(self, lane: Lane) -> None:
        """The worker holds all that the lane knows; it is ahead by the tokens whose results are not back."""
        announced = {sequence.slot: sequence for sequence in lane.running() if sequence.is_announced}
        assert announced.keys() <= self.held.keys()
        for slot, sequence in announced.items():
            num_ahead = len(self.held[slot].tokens) - sequence.num_tokens
            assert 0 <= num_ahead <= len(lane.in_flight) * (1 + sequence.max_num_drafts)
            assert self.held[slot].tokens[: sequence.num_tokens] == sequence.tokens
            assert self.held[slot].pages == sequence.pages

    def _apply_diff(self, plan: StepPlan) -> None:
        for slot in plan.freed_slots:
            assert slot in self.held, f"slot {slot} freed and not held"
            del self.held[slot]
        for sequence in plan.new_sequences:
            assert sequence.slot not in self.held, f"slot {sequence.slot} entered twice"
            assert 0 <= sequence.slot < self.capacity.max_num_seqs
            self.held[sequence.slot] = HeldSequence(sequence, self.capacity.page_size)
        self._copy_pages(plan)
        assert len(plan.page_slots) == len(plan.num_new_pages)
        assert sum(plan.num_new_pages) == len(plan.new_pages)
        pages = iter(plan.new_pages)
        for slot, num_new_pages in zip(plan.page_slots, plan.num_new_pages, strict=True):
            assert slot in self.held, f"pages for slot {slot}, which is not held"
            held = self.held[slot]
            held.pages += [next(pages) for _ in range(num_new_pages)]
            copied = [index for index, page in enumerate(held.pages) if page in self._copies]
            held.first_own_page = min([held.first_own_page, *copied])
            self._copies.difference_update(held.pages)
        own = [page for held in self.held.values() for page in held.pages[held.first_own_page :]]
        assert len(own) == len(set(own)), "a page is in two places"
        assert all(0 <= page < self.capacity.num_pages for held in self.held.values() for page in held.pages)

    def _copy_pages(self, plan: StepPlan) -> None:
        assert len(plan.copied_pages) == len(plan.page_copies) == len(set(plan.page_copies))
        assert self.capacity.copies_pages or not plan.copied_pages
        read = [
            (target, place, self._kv.get((source, place)))
            for source, target in zip(plan.copied_pages, plan.page_copies, strict=True)
            for place in range(self.capacity.page_size)
        ]
        for target, place, token in read:
            self._kv.pop((target, place), None)
            if token is not None:
                self._kv[target, place] = token
        self._copies.update(plan.page_copies)

    def _rows(self, plan: StepPlan) -> tuple[list[int], list[int]]:
        if plan.same_rows:
            assert not plan.row_slots and not plan.row_num_new_tokens
            assert self._last_rows, "the same rows as a plan without rows"
            rows = self._last_rows
        else:
            rows = list(plan.row_slots)
        counts = plan.row_num_new_tokens or [1] * len(rows)
        assert len(counts) == len(rows)
        assert len(set(rows)) == len(rows), "a slot has two rows"
        self._last_rows = rows
        return rows, counts

    def _room(self, slot: int) -> int:
        """Most drafts that leave room for one token more."""
        assert slot in self.held, f"a row for slot {slot}, which is not held"
        held = self.held[slot]
        most = min(len(held.pages) * self.capacity.page_size, held.max_num_tokens - 1) - len(held.tokens) - 1
        return max(0, min(held.max_num_drafts, most))

    def _verify(self, slot: int, num_drafts: int) -> list[int]:
        """Guess tokens behind the one just sampled; some of them are right, as the tokens will have it. Gives what they yield."""
        held = self.held[slot]
        num_right = num_drafts if self.are_drafts_right else zlib.crc32(held.tokens.tobytes(), 1) % (num_drafts + 1)
        self.drafts.setdefault(slot, []).append((num_drafts, num_right))
        wrong = range(held.num_computed + num_right, held.num_computed + num_drafts)
        given = []
        for _ in range(num_right):
            given += self._compute(slot, 1)
        for position in wrong:
            self._write(held, position, -1)
        return given

    def _write(self, held: HeldSequence, position: int, token: int) -> None:
        page, place = divmod(position, self.capacity.page_size)
        self._kv[held.pages[page], place] = token

    def _compute(self, slot: int, num_new_tokens: int) -> list[int]:
        """Compute a row; gives the token that it samples, if it does."""
        assert slot in self.held, f"a row for slot {slot}, which is not held"
        held = self.held[slot]
        page_size = self.capacity.page_size
        end = held.num_computed + num_new_tokens
        assert num_new_tokens > 0
        assert end <= len(held.tokens), "more tokens to compute than are known"
        assert end <= len(held.pages) * page_size, "a row without pages for its tokens"
        for position in range(held.num_computed, end):
            self._write(held, position, held.tokens[position])
        held.num_computed = end
        if end < len(held.tokens):
            return []
        read = [self._kv[held.pages[position // page_size], position % page_size] for position in range(end)]
        assert read == held.tokens.tolist(), f"the KV of slot {slot} was overwritten"
        token_id = next_token(held.tokens, self.capacity.vocab_size)
        held.tokens.append(token_id)
        return [token_id]
