"""What the worker holds of each sequence, and how a plan becomes the arrays of one step.

State lies in arrays indexed by slot: tokens, page table, counts, sampling parameters. A plan is a diff against it; `apply` takes
the diff in and lays the step's tokens out flat, decode rows first. A steady decode step is a dozen numpy operations over the rows,
whatever the lengths of the sequences. Knows no torch: the mock worker stands on the same state.

A plan that contradicts the state cannot be computed truthfully, and the scheduler's view can no longer be trusted: it raises
`ProtocolError`, which ends the process; a restart and a re-registration put both sides right. A row of a slot that is not held, or
whose sequence was refused at entry, fails alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from headrace.errors import ProtocolError
from headrace.v1.common_pb2 import SamplingParams
from headrace.v1.worker_pb2 import NewSequence, StepPlan

Int64Array = npt.NDArray[np.int64]

_FREE: Final = 0
_HELD: Final = 1
_FAILED: Final = 2

_NO_ROWS: Final = np.zeros(0, dtype=np.int64)
_NO_TOKENS: Final = np.zeros(0, dtype=np.int32)


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
class SampledRows:
    """Parameters of the rows that sample, arrays in parallel.

    `positions` is the index of the token to be drawn in its whole sequence, so that a sequence that was computed anew from prompt
    and outputs draws the same tokens as before.
    """

    slots: Int64Array
    positions: Int64Array
    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, ready to compute. Rows stand in order of execution: those with one token first.

    Attributes:
        row_slots: Slot of each row.
        row_starts: Tokens of each row computed before the step.
        row_counts: Tokens each row computes.
        num_decode_rows: How many rows, at the front, compute one token.
        token_ids: `[num_tokens]`.
        positions: `[num_tokens]`.
        slot_mapping: `[num_tokens]`, `page * page_size + offset`.
        sampled: Rows that sample, in the plan's order.
        sampled_tokens: Flat index of the last token of each of them.
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
    unknown_slots: tuple[int, ...]


class BatchInputs:
    """State of all slots.

    Args:
        limits: Sizes; a plan beyond them is a `ProtocolError`.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        num_slots = limits.max_num_seqs
        max_pages = -(-limits.max_model_len // limits.page_size)
        self._max_pages = max_pages
        self._states = np.zeros(num_slots, dtype=np.int8)
        # One more than the longest sequence: the token sampled last is appended and never computed.
        self._tokens = np.zeros((num_slots, limits.max_model_len + 1), dtype=np.int32)
        self._page_table = np.zeros((num_slots, _table_width(max_pages)), dtype=np.int64)
        self._num_tokens = np.zeros(num_slots, dtype=np.int64)
        self._num_computed = np.zeros(num_slots, dtype=np.int64)
        self._num_pages = np.zeros(num_slots, dtype=np.int64)
        self._num_settled_pages = np.zeros(num_slots, dtype=np.int64)
        self._temperature = np.ones(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int32)
        self._top_p = np.ones(num_slots, dtype=np.float32)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._seeds = np.zeros(num_slots, dtype=np.uint64)
        self._last_rows = _NO_ROWS

    @property
    def num_sequences(self) -> int:
        """Slots in use."""
        return int(np.count_nonzero(self._states))

    def reset(self) -> None:
        """Forget every sequence."""
        self._states[:] = _FREE
        self._last_rows = _NO_ROWS

    def apply(self, plan: StepPlan, token_ids: npt.NDArray[np.int32] | None) -> StepInputs:
        """Take a plan in and lay out its step.

        Args:
            plan: The next plan, in order.
            token_ids: Tokens of the plan's new sequences, one after another; None when it has none.

        Raises:
            ProtocolError: The plan contradicts the state or the limits; nothing it asks for is computed.
        """
        if plan.freed_slots:
            self._free(plan.freed_slots)
        self._enter(plan.new_sequences, _NO_TOKENS if token_ids is None else token_ids)
        if plan.page_slots:
            self._give_pages(plan)
        return self._lay_out(*self._rows(plan))

    def commit(self, step: StepInputs, token_ids: Int64Array, is_finite: npt.NDArray[np.bool_]) -> None:
        """Take the step's result in: what was computed, and the sampled tokens; a row that is not finite has failed for good."""
        self._num_computed[step.row_slots] = step.row_starts + step.row_counts
        slots = step.sampled.slots
        self._tokens[slots, step.sampled.positions] = token_ids
        self._num_tokens[slots] = step.sampled.positions + 1
        settled = slots[is_finite]
        self._num_settled_pages[settled] = self._num_computed[settled] // self.limits.page_size
        if not is_finite.all():
            self._states[slots[~is_finite]] = _FAILED

    def page_tables(self, slots: Int64Array) -> Int64Array:
        """Page tables of some slots, `[num_slots, width]`; each is padded with pages of its own, see `StepTensors`."""
        if len(slots) == 0:
            return np.zeros((0, 0), dtype=np.int64)
        return self._page_table[slots, : _table_width(int(self._num_pages[slots].max()))]

    def unsettled_pages(self, slot: int) -> Int64Array:
        """A slot's pages without those that were full at its last good token or its entry: these may be shared by now."""
        return self._page_table[slot, self._num_settled_pages[slot] : self._num_pages[slot]]

    def last_tokens(self, slots: Int64Array) -> Int64Array:
        """The last known token of some slots."""
        return self._tokens[slots, self._num_tokens[slots] - 1].astype(np.int64)

    def _free(self, freed_slots: Iterable[int]) -> None:
        slots = np.fromiter(freed_slots, dtype=np.int64)
        # A slot that is not held may be freed: its sequence may have been refused at entry.
        self._states[self._check_slots(slots, "freed_slots")] = _FREE

    def _enter(self, new_sequences: Iterable[NewSequence], token_ids: npt.NDArray[np.int32]) -> None:
        start = 0
        for sequence in new_sequences:
            end = start + sequence.num_tokens
            if end > len(token_ids):
                raise ProtocolError(f"step plan: new sequences have {end} tokens or more, their frame holds {len(token_ids)}")
            self._enter_one(sequence, token_ids[start:end])
            start = end
        if start != len(token_ids):
            raise ProtocolError(f"step plan: new sequences have {start} tokens, their frame holds {len(token_ids)}")

    def _enter_one(self, sequence: NewSequence, tokens: npt.NDArray[np.int32]) -> None:
        slot, limits = sequence.slot, self.limits
        if slot >= limits.max_num_seqs or self._states[slot] != _FREE:
            raise ProtocolError(f"step plan: new sequence in slot {slot}, which is in use or not below {limits.max_num_seqs}")
        if not 0 < len(tokens) <= limits.max_model_len or sequence.num_cached_tokens >= len(tokens):
            raise ProtocolError(
                f"step plan: new sequence of {len(tokens)} tokens, {sequence.num_cached_tokens} of them cached; at least one must "
                f"be left to compute, and at most {limits.max_model_len} are allowed"
            )
        are_tokens_valid = tokens.min() >= 0 and tokens.max() < limits.vocab_size
        is_entered = bool(are_tokens_valid) and self._set_sampling(slot, sequence.sampling, sequence.work.request_id)
        # A refused sequence keeps its slot, so that its rows fail one by one until the scheduler frees it.
        self._states[slot] = _HELD if is_entered else _FAILED
        self._tokens[slot, : len(tokens)] = tokens
        self._num_tokens[slot] = len(tokens)
        self._num_computed[slot] = sequence.num_cached_tokens
        self._num_settled_pages[slot] = sequence.num_cached_tokens // limits.page_size
        self._num_pages[slot] = 0

    def _set_sampling(self, slot: int, sampling: SamplingParams, request_id: str) -> bool:
        """Keep a sequence's parameters; False when one is out of its documented range."""
        temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
        top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
        # An unseeded sequence must still draw the same tokens wherever it is computed again.
        seed = sampling.seed if sampling.HasField("seed") else zlib.crc32(request_id.encode())
        self._temperature[slot] = temperature
        self._top_k[slot] = max(sampling.top_k, 0)
        self._top_p[slot] = top_p
        self._min_p[slot] = sampling.min_p
        self._seeds[slot] = seed
        return 0.0 <= temperature < float("inf") and 0.0 < top_p <= 1.0 and 0.0 <= sampling.min_p <= 1.0

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

    def _rows(self, plan: StepPlan) -> tuple[Int64Array, Int64Array | None, tuple[int, ...]]:
        """Give the rows' slots and token counts (None: one each), without those of slots not held, which come third."""
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
            return slots, counts, ()
        unknown = tuple(slots[~is_held].tolist())
        return slots[is_held], None if counts is None else counts[is_held], unknown

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

    def _lay_out(self, slots: Int64Array, counts: Int64Array | None, unknown_slots: tuple[int, ...]) -> StepInputs:
        if counts is None:
            counts = np.ones(len(slots), dtype=np.int64)
        # Stable, so that rows of a kind keep the plan's order.
        order = np.argsort(counts != 1, kind="stable")
        row_slots, row_counts = slots[order], counts[order]
        row_starts = self._num_computed[row_slots]
        row_ends = row_starts + row_counts
        self._check_reach(row_slots, row_counts, row_ends)
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
        ranks = ranks[(row_ends == self._num_tokens[row_slots])[ranks]]
        return StepInputs(
            row_slots=row_slots,
            row_starts=row_starts,
            row_counts=row_counts,
            num_decode_rows=num_decode_rows,
            token_ids=self._tokens[token_slots, positions].astype(np.int64),
            positions=positions,
            slot_mapping=slot_mapping,
            sampled=self._sampled_rows(row_slots[ranks]),
            sampled_tokens=flat_ends[ranks] - 1,
            unknown_slots=unknown_slots,
        )

    def _check_reach(self, row_slots: Int64Array, row_counts: Int64Array, row_ends: Int64Array) -> None:
        """A row must compute something, no further than its tokens are known and its pages reach."""
        num_tokens = self._num_tokens[row_slots]
        reach = np.minimum(num_tokens, self._num_pages[row_slots] * self.limits.page_size)
        is_bad = (row_counts < 1) | (row_ends > np.minimum(reach, self.limits.max_model_len))
        if not is_bad.any():
            return
        row = int(np.argmax(is_bad))
        slot = int(row_slots[row])
        raise ProtocolError(
            f"step plan: slot {slot} is to compute {row_counts[row]} tokens up to {row_ends[row]}; it knows {num_tokens[row]} "
            f"and has {self._num_pages[slot]} pages of {self.limits.page_size}; a sequence has at most {self.limits.max_model_len}"
        )

    def _sampled_rows(self, slots: Int64Array) -> SampledRows:
        return SampledRows(
            slots=slots,
            positions=self._num_tokens[slots],
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            seeds=self._seeds[slots],
        )


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
