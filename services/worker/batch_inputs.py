"""What the worker holds of each sequence, and how a plan becomes the arrays of one step.

State lies in arrays indexed by slot: tokens, page table, counts, sampling parameters. A plan is a diff against it; `take` takes
the diff in, and `lay_out` lays the step's tokens out flat, decode rows first. A steady decode step is a dozen numpy operations over
the rows, whatever the lengths of the sequences. Knows no torch: the mock worker stands on the same state.

Between the two a row may get drafts: guesses at the tokens after the last known one (`drafting/`). It computes them behind that
token, a token is sampled at each place as if there were no guesses, and `commit` keeps those up to the first that is not what was
guessed for the next place. What was computed for wrong guesses lies past the end of what is known, and is written over.

A plan that contradicts the state cannot be computed truthfully, and the scheduler's view can no longer be trusted: it raises
`ProtocolError`, which ends the process; a restart and a re-registration put both sides right. A row of a slot that is not held, or
whose sequence was refused at entry, fails alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from headrace.errors import ProtocolError
from headrace.v1.worker_pb2 import NewSequence, StepPlan
from services.worker.drafting.drafter import Drafts
from services.worker.entering import Int32Array, entering
from services.worker.sampling_table import Int64Array, SampledRows, SamplingTable, is_penalised
from services.worker.step_tokens import StepTokens

_FREE: Final = 0
_HELD: Final = 1
_FAILED: Final = 2

_NO_ROWS: Final = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that the state is made for; what the worker told the scheduler when it registered."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_pages: int
    page_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """Rows of a plan whose sequences are held, in the plan's order.

    Attributes:
        slots: Slot of each row.
        counts: Tokens each is to compute; None for one each.
        unknown_slots: Slots of rows that were left out because nothing is held there.
    """

    slots: Int64Array
    counts: Int64Array | None
    unknown_slots: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.slots) if self.counts is None else int(self.counts.sum())

    @property
    def has_prompts(self) -> bool:
        """Whether a row computes more than one token."""
        return self.counts is not None and bool((self.counts > 1).any())


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, ready to compute. Rows stand in order of execution: those with one token first.

    Attributes:
        row_slots: Slot of each row.
        row_starts: Tokens of each row computed before the step.
        row_counts: Tokens each row computes, drafts included.
        num_decode_rows: How many rows, at the front, compute one token.
        token_ids: `[num_tokens]`.
        positions: `[num_tokens]`.
        slot_mapping: `[num_tokens]`, `page * page_size + offset`.
        sampled: The tokens to sample: one of each row that computes its last known token, and one more for each of its drafts; rows
            in the plan's order.
        sampled_tokens: Flat index of the token that each of them follows.
        num_drafts: Drafts of each row that samples; None where no row has any.
        unknown_slots: Slots of rows that were left out because nothing is held there.
    """

    row_slots: Int64Array
    row_starts: Int64Array
    row_counts: Int64Array
    num_decode_rows: int
    token_ids: Int64Array
    positions: Int64Array
    slot_mapping: Int64Array
    sampled: SampledRows
    sampled_tokens: Int64Array
    num_drafts: Int64Array | None
    unknown_slots: tuple[int, ...]


class BatchInputs:
    """State of all slots.

    Args:
        limits: Sizes; a plan beyond them is a `ProtocolError`.

    Attributes:
        tokens: int32 `[num_slots, max_model_len + 1]`, known tokens by slot; only to be read elsewhere.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        num_slots = limits.max_num_seqs
        max_pages = -(-limits.max_model_len // limits.page_size)
        self._max_pages = max_pages
        self._states = np.zeros(num_slots, dtype=np.int8)
        # One more than the longest sequence: the token sampled last is appended and never computed.
        self.tokens = np.zeros((num_slots, limits.max_model_len + 1), dtype=np.int32)
        self._page_table = np.zeros((num_slots, _table_width(max_pages)), dtype=np.int64)
        self._num_tokens = np.zeros(num_slots, dtype=np.int64)
        self._num_computed = np.zeros(num_slots, dtype=np.int64)
        self._num_pages = np.zeros(num_slots, dtype=np.int64)
        self._num_settled_pages = np.zeros(num_slots, dtype=np.int64)
        self._max_num_tokens = np.zeros(num_slots, dtype=np.int64)
        self._max_num_drafts = np.zeros(num_slots, dtype=np.int64)
        self._sampling = SamplingTable(num_slots, limits.vocab_size)
        self._last_rows = _NO_ROWS

    @property
    def num_sequences(self) -> int:
        """Slots in use."""
        return int(np.count_nonzero(self._states))

    def reset(self) -> None:
        """Forget every sequence."""
        self._states[:] = _FREE
        self._last_rows = _NO_ROWS

    def take(self, plan: StepPlan, token_ids: npt.NDArray[np.int32] | None) -> PlannedRows:
        """Take a plan in; gives its rows, to be laid out next.

        Args:
            plan: The next plan, in order.
            token_ids: The plan's frame, see `entering.py`; None when it has none.

        Raises:
            ProtocolError: The plan contradicts the state or the limits; nothing it asks for is computed.
        """
        if plan.freed_slots:
            self._free(plan.freed_slots)
        for sequence, tokens, foretold in entering(plan, token_ids):
            self._enter(sequence, tokens, foretold)
        if plan.page_slots:
            self._give_pages(plan)
        return self._rows(plan)

    def holds(self, slot: int) -> bool:
        """Whether a slot has a sequence that was not refused and has not failed."""
        return bool(self._states[slot] == _HELD)

    def draft_room(self, slot: int) -> int:
        """Most drafts that a row may carry which computes one token: none unless that is the last known."""
        num_tokens = int(self._num_tokens[slot])
        if self._num_computed[slot] + 1 != num_tokens:
            return 0
        # One token more must have room after the drafts: the plan that computes it may be under way already.
        limit = min(int(self._max_num_tokens[slot]) - 1, int(self._num_pages[slot]) * self.limits.page_size)
        return max(0, min(int(self._max_num_drafts[slot]), limit - num_tokens - 1))

    def lay_out(self, rows: PlannedRows, drafts: Drafts | None = None) -> StepInputs:
        """Lay out a step: the rows of the plan just taken, some of them with drafts.

        Raises:
            ProtocolError: A row goes further than what is known or than its pages.
        """
        counts = np.ones(len(rows.slots), dtype=np.int64) if rows.counts is None else rows.counts
        extra = None if drafts is None else self._place(drafts, rows.slots)
        if extra is not None:
            counts = counts + extra
        # Stable, so that rows of a kind keep the plan's order.
        order = np.argsort(counts != 1, kind="stable")
        row_slots, row_counts = rows.slots[order], counts[order]
        row_starts = self._num_computed[row_slots]
        row_ends = row_starts + row_counts
        known_ends = self._num_tokens[row_slots] if extra is None else self._num_tokens[row_slots] + extra[order]
        self._check_reach(row_slots, row_counts, row_ends, known_ends)
        flat_ends = np.cumsum(row_counts)
        num_decode_rows = int(np.count_nonzero(row_counts == 1))
        if num_decode_rows == len(row_slots):
            token_slots, positions = row_slots, row_starts
        else:
            token_slots = np.repeat(row_slots, row_counts)
            positions = np.arange(len(token_slots)) + np.repeat(row_starts - (flat_ends - row_counts), row_counts)
        page_size = self.limits.page_size
        slot_mapping = self._page_table[token_slots, positions // page_size] * page_size + positions % page_size
        # Back in the plan's order: `ranks[i]` is where the plan's row i is executed.
        ranks = np.argsort(order, kind="stable")
        ranks = ranks[(row_ends == known_ends)[ranks]]
        sampled_slots, sampled_tokens = row_slots[ranks], flat_ends[ranks] - 1
        num_drafts = None
        if extra is not None:
            num_drafts = extra[order][ranks]
            sampled_slots, sampled_tokens = _with_drafts(sampled_slots, sampled_tokens, num_drafts)
        return StepInputs(
            row_slots=row_slots,
            row_starts=row_starts,
            row_counts=row_counts,
            num_decode_rows=num_decode_rows,
            token_ids=self.tokens[token_slots, positions].astype(np.int64),
            positions=positions,
            slot_mapping=slot_mapping,
            sampled=self._sampling.rows(sampled_slots, positions[sampled_tokens] + 1),
            sampled_tokens=sampled_tokens,
            num_drafts=num_drafts,
            unknown_slots=rows.unknown_slots,
        )

    def commit(
        self,
        step: StepInputs,
        token_ids: Int64Array,
        is_finite: npt.NDArray[np.bool_],
        is_withheld: npt.NDArray[np.bool_] | None = None,
    ) -> StepTokens:
        """Take the step's result in: what was computed, and the sampled tokens; a row that is not finite has failed for good.

        Args:
            step: What was computed.
            token_ids: A token for each of `step.sampled`.
            is_finite: Whether its logits were finite.
            is_withheld: Whether it is not to be given, so that its row gives none and computes its last known token again; only of
                rows without drafts. None where all are given.

        Returns:
            The tokens that each row gives.
        """
        self._num_computed[step.row_slots] = step.row_starts + step.row_counts
        if not len(step.sampled.slots):
            return StepTokens()
        slots, positions, num_drafts = step.sampled.slots, step.sampled.positions, step.num_drafts
        counts = None
        if num_drafts is not None or is_withheld is not None:
            num_rows_drafts = num_drafts if num_drafts is not None else np.zeros(len(slots), dtype=np.int64)
            firsts = np.cumsum(num_rows_drafts + 1) - num_rows_drafts - 1
            counts = _num_agreed(step, token_ids, firsts) + 1
            if is_withheld is not None:
                counts[is_withheld[firsts]] = 0
            is_finite = np.logical_and.reduceat(is_finite, firsts)
            is_kept = np.arange(len(slots)) < np.repeat(firsts + counts, num_rows_drafts + 1)
            slots, positions, token_ids = slots[is_kept], positions[is_kept], token_ids[is_kept]
        self.tokens[slots, positions] = token_ids
        row_slots = slots if counts is None else step.sampled.slots[firsts]
        num_tokens = positions + 1 if counts is None else step.sampled.positions[firsts] + counts
        self._num_tokens[row_slots] = num_tokens
        # All known tokens but the one sampled last; of a row with drafts, fewer than went through the network.
        self._num_computed[row_slots] = num_tokens - 1
        return self._settle(row_slots, token_ids, counts, num_drafts, is_finite)

    def page_tables(self, slots: Int64Array) -> Int64Array:
        """Page tables of some slots, `[num_slots, width]`; each is padded with pages of its own, see `StepTensors`."""
        if len(slots) == 0:
            return np.zeros((0, 0), dtype=np.int64)
        return self._page_table[slots, : _table_width(int(self._num_pages[slots].max()))]

    def unsettled_pages(self, slot: int) -> Int64Array:
        """A slot's pages without those that were full at its last good token or its entry: these may be shared by now."""
        return self._page_table[slot, self._num_settled_pages[slot] : self._num_pages[slot]]

    def _free(self, freed_slots: Iterable[int]) -> None:
        slots = np.fromiter(freed_slots, dtype=np.int64)
        # A slot that is not held may be freed: its sequence may have been refused at entry.
        self._states[self._check_slots(slots, "freed_slots")] = _FREE

    def _enter(self, sequence: NewSequence, tokens: Int32Array, foretold: Int32Array) -> None:
        slot, limits = sequence.slot, self.limits
        if slot >= limits.max_num_seqs or self._states[slot] != _FREE:
            raise ProtocolError(f"step plan: new sequence in slot {slot}, which is in use or not below {limits.max_num_seqs}")
        if not 0 < len(tokens) <= limits.max_model_len or sequence.num_cached_tokens >= len(tokens):
            raise ProtocolError(
                f"step plan: new sequence of {len(tokens)} tokens, {sequence.num_cached_tokens} of them cached; at least one must "
                f"be left to compute, and at most {limits.max_model_len} are allowed"
            )
        is_entered = self._are_valid(tokens) and self._are_valid(foretold)
        is_entered &= sequence.num_output_tokens < len(tokens)
        is_entered &= self._sampling.enter(slot, sequence.sampling, sequence.work.request_id)
        # A refused sequence keeps its slot, so that its rows fail one by one until the scheduler frees it.
        self._states[slot] = _HELD if is_entered else _FAILED
        self.tokens[slot, : len(tokens)] = tokens
        self._num_tokens[slot] = len(tokens)
        self._num_computed[slot] = sequence.num_cached_tokens
        self._num_settled_pages[slot] = sequence.num_cached_tokens // limits.page_size
        self._num_pages[slot] = 0
        self._max_num_tokens[slot] = min(sequence.max_num_tokens or limits.max_model_len, limits.max_model_len)
        # Penalties count a sequence's tokens one after another, and logprobs are told of one token a row.
        is_single = is_penalised(sequence.sampling) or sequence.HasField("logprobs")
        self._max_num_drafts[slot] = 0 if is_single else sequence.max_num_drafts

    def _are_valid(self, tokens: Int32Array) -> bool:
        return not len(tokens) or bool(tokens.min() >= 0 and tokens.max() < self.limits.vocab_size)

    def _give_pages(self, plan: StepPlan) -> None:
        counts = np.fromiter(plan.num_new_pages, dtype=np.int64)
        slots = self._check_slots(np.fromiter(plan.page_slots, dtype=np.int64), "page_slots")
        pages = np.fromiter(plan.new_pages, dtype=np.int64)
        if len(counts) != len(slots) or int(counts.sum()) != len(pages):
            raise ProtocolError(f"step plan: {len(pages)} new_pages for {len(slots)} page_slots with {len(counts)} num_new_pages")
        if len(pages) and int(pages.max()) >= self.limits.num_pages:
            raise ProtocolError(f"step plan: page {int(pages.max())} does not exist; there are {self.limits.num_pages} pages")
        start = 0
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            self._append_pages(slot, pages[start : start + count])
            start += count

    def _append_pages(self, slot: int, pages: Int64Array) -> None:
        if self._states[slot] == _FREE:
            raise ProtocolError(f"step plan: pages for slot {slot}, which is free")
        first = int(self._num_pages[slot])
        last = first + len(pages)
        if last > self._max_pages:
            raise ProtocolError(f"step plan: slot {slot} would have {last} pages; a sequence has at most {self._max_pages}")
        if first == 0 and len(pages):
            self._page_table[slot] = pages[0]
        self._page_table[slot, first:last] = pages
        self._num_pages[slot] = last

    def _rows(self, plan: StepPlan) -> PlannedRows:
        if plan.same_rows:
            if plan.row_slots or plan.row_num_new_tokens:
                raise ProtocolError("step plan: same_rows together with rows")
            slots, counts = self._last_rows, None
        else:
            slots = self._check_slots(np.fromiter(plan.row_slots, dtype=np.int64), "row_slots")
            counts = np.fromiter(plan.row_num_new_tokens, dtype=np.int64) if plan.row_num_new_tokens else None
            self._check_rows(slots, counts)
            self._last_rows = slots
        is_held = self._states[slots] == _HELD
        if is_held.all():
            return PlannedRows(slots, counts, ())
        unknown = tuple(slots[~is_held].tolist())
        return PlannedRows(slots[is_held], None if counts is None else counts[is_held], unknown)

    def _check_rows(self, slots: Int64Array, counts: Int64Array | None) -> None:
        if len(np.unique(slots)) != len(slots):
            raise ProtocolError("step plan: a slot has two rows")
        if counts is not None and len(counts) != len(slots):
            raise ProtocolError(f"step plan: {len(counts)} row_num_new_tokens for {len(slots)} rows")
        num_tokens = len(slots) if counts is None else int(counts.sum())
        if num_tokens > self.limits.max_num_batched_tokens:
            raise ProtocolError(
                f"step plan: {num_tokens} tokens in one step; at most {self.limits.max_num_batched_tokens} are allowed"
            )

    def _check_slots(self, slots: Int64Array, field: str) -> Int64Array:
        if len(slots) and int(slots.max()) >= self.limits.max_num_seqs:
            raise ProtocolError(f"step plan: {field} names slot {int(slots.max())}; slots are below {self.limits.max_num_seqs}")
        return slots

    def _place(self, drafts: Drafts, slots: Int64Array) -> Int64Array:
        """Write drafts behind the known tokens; gives how many each of the rows has."""
        starts = np.repeat(self._num_tokens[drafts.slots] - (np.cumsum(drafts.counts) - drafts.counts), drafts.counts)
        self.tokens[np.repeat(drafts.slots, drafts.counts), starts + np.arange(len(drafts.token_ids))] = drafts.token_ids
        by_slot = np.zeros(self.limits.max_num_seqs, dtype=np.int64)
        by_slot[drafts.slots] = drafts.counts
        return by_slot[slots]

    def _settle(
        self,
        slots: Int64Array,
        token_ids: Int64Array,
        counts: Int64Array | None,
        num_drafts: Int64Array | None,
        is_finite: npt.NDArray[np.bool_],
    ) -> StepTokens:
        """Note which pages are good for good, and which rows have failed; gives the tokens of the others."""
        failed: list[int] = []
        if not is_finite.all():
            failed = slots[~is_finite].tolist()
            self._states[failed] = _FAILED
            token_ids = token_ids[is_finite if counts is None else np.repeat(is_finite, counts)]
            slots = slots[is_finite]
            counts, num_drafts = (None if each is None else each[is_finite] for each in (counts, num_drafts))
        self._num_settled_pages[slots] = self._num_computed[slots] // self.limits.page_size
        return StepTokens(
            slots.tolist(),
            token_ids.tolist(),
            counts=[] if counts is None else counts.tolist(),
            num_drafts=[] if num_drafts is None else num_drafts.tolist(),
            failed_slots=failed,
        )

    def _check_reach(self, row_slots: Int64Array, row_counts: Int64Array, row_ends: Int64Array, known_ends: Int64Array) -> None:
        """A row must compute something, no further than its tokens are known, or guessed, and its pages reach."""
        reach = np.minimum(known_ends, self._num_pages[row_slots] * self.limits.page_size)
        is_bad = (row_counts < 1) | (row_ends > np.minimum(reach, self.limits.max_model_len))
        if not is_bad.any():
            return
        row = int(np.argmax(is_bad))
        slot = int(row_slots[row])
        raise ProtocolError(
            f"step plan: slot {slot} is to compute {row_counts[row]} tokens up to {row_ends[row]}; it knows {known_ends[row]} "
            f"and has {self._num_pages[slot]} pages of {self.limits.page_size}; a sequence has at most {self.limits.max_model_len}"
        )


def _num_agreed(step: StepInputs, token_ids: Int64Array, firsts: Int64Array) -> Int64Array:
    """Of each row's drafts, how many are what was sampled, from the first on.

    Args:
        step: What was computed.
        token_ids: The sampled tokens, flat.
        firsts: Where each row's begin among them.
    """
    # A draft stands right behind the token that it was guessed to follow.
    drafted = np.append(step.token_ids, -1)[step.sampled_tokens + 1]
    is_last = np.zeros(len(token_ids), dtype=np.bool_)
    is_last[np.append(firsts[1:], len(token_ids)) - 1] = True
    ends = np.flatnonzero((token_ids != drafted) | is_last)
    found: Int64Array = ends[np.searchsorted(ends, firsts)] - firsts
    return found


def _with_drafts(slots: Int64Array, tokens: Int64Array, num_drafts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Slots and flat indices of all tokens to sample at, given those of each row's last one."""
    counts = num_drafts + 1
    num_after = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(int(counts.sum()))
    return np.repeat(slots, counts), np.repeat(tokens, counts) - num_after


def page_copies(plan: StepPlan, limits: Limits) -> tuple[Int64Array, Int64Array]:
    """Pages to copy before anything is computed, and where the copies go.

    Raises:
        ProtocolError: The arrays do not match, or a page does not exist.
    """
    sources = np.fromiter(plan.copied_pages, dtype=np.int64)
    targets = np.fromiter(plan.page_copies, dtype=np.int64)
    if len(sources) != len(targets) or len(np.unique(targets)) != len(targets):
        raise ProtocolError(f"step plan: {len(sources)} copied_pages for {len(targets)} page_copies, or one of these twice")
    if len(sources) and (last := max(int(sources.max()), int(targets.max()))) >= limits.num_pages:
        raise ProtocolError(f"step plan: page {last} cannot be copied; there are {limits.num_pages} pages")
    return sources, targets


def _table_width(num_pages: int) -> int:
    """Columns a page table needs so that attention may round a row up by half and to at least four pages."""
    return num_pages + num_pages // 2 + 4
