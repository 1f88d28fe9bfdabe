"""Sequences whose output must follow a grammar: a matcher each, advanced with what is sampled, and masks for their logits.

A sequence's grammar is compiled elsewhere (`grammar_compiler.py`). Until it is there, its rows sample nothing: they are computed
with the others and their token is withheld, so that the step waits for nothing. A sequence that enters with outputs, having been
moved or computed anew, has its matcher go through these first. Where the grammar may end, an end-of-sequence token is allowed;
where nothing may follow, the sequence has ended, whether such a token was sampled or not.

Everything a grammar can do to a step is bounded by the matchers' own limits (`headrace/grammars.py`); a matcher that exceeds them
fails its sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from headrace.v1.common_pb2 import ConstraintKind
from headrace.v1.worker_pb2 import NewSequence
from services.worker.constraints.masks import BoolArray, Int32Array, LikeliestAllowed, likeliest_allowed, mask_row
from services.worker.sampling_table import Int64Array, SampledRows
from services.worker.step_tokens import StepTokens

if TYPE_CHECKING:
    from headrace.grammars import Matcher


class Grammars(Protocol):
    """Where compiled grammars come from."""

    def find(self, grammar: str) -> Matcher | str | None:
        """A matcher at a grammar's beginning, to be copied; in words, why there is none; None while it is being compiled."""
        ...


@dataclass(frozen=True, slots=True)
class _Entered:
    """A constrained sequence that has not sampled yet."""

    grammar: str
    output_tokens: list[int]


class OutputConstraints:
    """State of all slots. Implements `TokenMasks`.

    A constrained sequence waits until it first samples and its grammar is there; from then on it has a matcher, until it leaves or
    cannot be followed further.

    Args:
        grammars: Where compiled grammars come from.
        vocab_size: Logits a token has.
        likeliest_allowed: Finds what a greedy row takes instead of a token that is ruled out.
    """

    def __init__(self, grammars: Grammars, vocab_size: int, *, likeliest_allowed: LikeliestAllowed = likeliest_allowed) -> None:
        self._grammars = grammars
        self._likeliest_allowed = likeliest_allowed
        self._waiting: dict[int, _Entered] = {}
        self._matchers: dict[int, Matcher] = {}
        self._failed: set[int] = set()
        self._mask = np.zeros(-(-vocab_size // 32), dtype=np.int32)

    @property
    def num_held(self) -> int:
        """Constrained sequences."""
        return len(self._waiting) + len(self._matchers) + len(self._failed)

    @property
    def failed_slots(self) -> frozenset[int]:
        """Slots whose constraint cannot be followed further."""
        return frozenset(self._failed)

    def enter(self, sequence: NewSequence, tokens: Int32Array) -> None:
        """A sequence enters its slot, with all its tokens."""
        slot = sequence.slot
        self.leave((slot,))
        if not sequence.HasField("constrained"):
            return
        if sequence.constrained.constraint.kind != ConstraintKind.CONSTRAINT_KIND_GRAMMAR:
            self._failed.add(slot)
            return
        num_outputs = min(sequence.constrained.num_output_tokens, len(tokens))
        outputs = tokens[len(tokens) - num_outputs :].tolist()
        self._waiting[slot] = _Entered(sequence.constrained.constraint.source, outputs)

    def leave(self, slots: Iterable[int]) -> None:
        """Forget the sequences of some slots, where there are any."""
        for slot in slots:
            self._waiting.pop(slot, None)
            self._matchers.pop(slot, None)
            self._failed.discard(slot)

    def reset(self) -> None:
        """Forget every sequence."""
        self._waiting.clear()
        self._matchers.clear()
        self._failed.clear()

    def withheld(self, slots: Int64Array) -> BoolArray | None:
        """Whether each of some slots, which are to sample, must not, its grammar not being there yet; None for none of them."""
        if not self._waiting:
            return None
        is_withheld = [slot in self._waiting and not self._has_begun(slot) for slot in slots.tolist()]
        return np.array(is_withheld, dtype=np.bool_) if any(is_withheld) else None

    def has_failed(self, slots: Int64Array) -> BoolArray:
        """Whether each of some slots' constraints cannot be followed further; what is sampled there means nothing."""
        return np.array([slot in self._failed for slot in slots.tolist()], dtype=np.bool_)

    def rule_out(self, logits: torch.Tensor, rows: SampledRows, likeliest: Int64Array) -> None:
        """Rule out what the grammars do not allow, see `TokenMasks`."""
        if not self._matchers:
            return
        mask = self._mask
        wanted, temperatures = likeliest.tolist(), rows.temperature.tolist()
        for index, slot in enumerate(rows.slots.tolist()):
            matcher = self._matchers.get(slot)
            if matcher is None:
                continue
            # Where what a greedy row would take anyway is allowed, and it mostly is, nothing else matters: to try one token costs
            # a tenth of a mask.
            if temperatures[index] == 0 and matcher.validate_tokens([wanted[index]]) == 1:
                continue
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if matcher.is_error():
                # What is sampled for it means nothing.
                self._fail(slot)
            elif temperatures[index] == 0:
                likeliest[index] = self._likeliest_allowed(logits[index], mask)
            else:
                mask_row(logits[index], mask)

    def commit(self, tokens: StepTokens) -> list[int]:
        """Take in what a step gave; gives the slots whose sequence has ended: nothing may follow."""
        ended: list[int] = []
        for slot, token_ids in tokens if self._matchers else ():
            matcher = self._matchers.get(slot)
            if matcher is None or not token_ids:
                continue
            if not matcher.consume_tokens(token_ids):
                # Never seen: only what the mask allows is sampled. Its next row fails.
                self._fail(slot)
            elif matcher.is_stopped():
                ended.append(slot)
        return ended

    def _fail(self, slot: int) -> None:
        del self._matchers[slot]
        self._failed.add(slot)

    def _has_begun(self, slot: int) -> bool:
        """Make the matcher of a sequence that waits, if its grammar is there; False while it is not."""
        entered = self._waiting[slot]
        prototype = self._grammars.find(entered.grammar)
        if prototype is None:
            return False
        del self._waiting[slot]
        matcher = prototype.deep_copy() if not isinstance(prototype, str) else None
        if matcher is None or (entered.output_tokens and not matcher.consume_tokens(entered.output_tokens)):
            self._failed.add(slot)
        else:
            self._matchers[slot] = matcher
        return True
