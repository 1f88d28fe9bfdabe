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
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headrace.v1.common_pb2 import ConstraintKind
from headrace.v1.worker_pb2 import NewSequence
from services.worker.sampling_table import Int64Array, SampledRows
from services.worker.step_tokens import StepTokens

if TYPE_CHECKING:
    from headrace.grammars import Matcher

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

_FEW_TOKENS: Final = 128
"""At least as many as any other adjustment may rule out."""


class Grammars(Protocol):
    """Where compiled grammars come from."""

    def find(self, grammar: str) -> Matcher | str | None:
        """A matcher at a grammar's beginning, to be copied; in words, why there is none; None while it is being compiled."""
        ...


@dataclass(slots=True)
class _Held:
    """A constrained sequence; its matcher is made when it first samples."""

    grammar: str
    output_tokens: list[int]
    matcher: Matcher | None = None


class OutputConstraints:
    """State of all slots. Implements `TokenMasks`.

    Args:
        grammars: Where compiled grammars come from.
        vocab_size: Logits a token has.
    """

    def __init__(self, grammars: Grammars, vocab_size: int) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._held: dict[int, _Held] = {}
        self._failed: set[int] = set()
        self._bitmask = np.zeros((0, -(-vocab_size // 32)), dtype=np.int32)

    @property
    def num_held(self) -> int:
        """Constrained sequences."""
        return len(self._held)

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
        num_outputs = min(sequence.constrained.num_output_tokens, len(tokens))
        outputs = tokens[len(tokens) - num_outputs :].tolist()
        self._held[slot] = _Held(sequence.constrained.constraint.source, outputs)
        if sequence.constrained.constraint.kind != ConstraintKind.CONSTRAINT_KIND_GRAMMAR:
            self._failed.add(slot)

    def leave(self, slots: Iterable[int]) -> None:
        """Forget the sequences of some slots, where there are any."""
        for slot in slots:
            self._held.pop(slot, None)
            self._failed.discard(slot)

    def reset(self) -> None:
        """Forget every sequence."""
        self._held.clear()
        self._failed.clear()

    def withheld(self, slots: Int64Array) -> BoolArray | None:
        """Whether each of some slots, which are to sample, must not, its grammar not being there yet; None for none of them."""
        if not self._held:
            return None
        is_withheld = np.zeros(len(slots), dtype=np.bool_)
        for index, slot in enumerate(slots.tolist()):
            one = self._held.get(slot)
            if one is not None and one.matcher is None and slot not in self._failed:
                is_withheld[index] = not self._has_begun(slot, one)
        return is_withheld if is_withheld.any() else None

    def has_failed(self, slots: Int64Array) -> BoolArray:
        """Whether each of some slots' constraints cannot be followed further; what is sampled there means nothing."""
        return np.array([slot in self._failed for slot in slots.tolist()], dtype=np.bool_)

    def rule_out(self, logits: torch.Tensor, rows: SampledRows, likeliest: Int64Array) -> None:
        """Rule out what the grammars do not allow, see `TokenMasks`."""
        found = self._matchers_of(rows.slots.tolist()) if self._held else []
        if not found:
            return
        if len(found) > len(self._bitmask):
            self._bitmask = np.zeros((len(found), self._bitmask.shape[1]), dtype=np.int32)
        bitmask = self._bitmask[: len(found)]
        for (index, matcher), mask in zip(found, bitmask, strict=True):
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if matcher.is_error():
                # What is sampled for it means nothing.
                self._failed.add(int(rows.slots[index]))
                mask[:] = -1
        indices = np.array([index for index, _ in found], dtype=np.int64)
        words, bits = np.divmod(likeliest[indices], 32)
        is_allowed = (bitmask[np.arange(len(found)), words] >> bits) & 1 == 1
        # What a greedy row would take anyway is mostly allowed; then nothing else matters.
        is_drawn = rows.temperature[indices] > 0
        for place in np.flatnonzero(is_drawn | ~is_allowed).tolist():
            index = int(indices[place])
            if is_drawn[place]:
                mask_row(logits[index], bitmask[place])
            else:
                likeliest[index] = likeliest_allowed(logits[index], bitmask[place])

    def _matchers_of(self, slots: list[int]) -> list[tuple[int, Matcher]]:
        """Rows that are to keep to a grammar, by their index."""
        return [
            (index, one.matcher)
            for index, slot in enumerate(slots)
            if (one := self._held.get(slot)) is not None and one.matcher is not None and slot not in self._failed
        ]

    def commit(self, tokens: StepTokens) -> list[int]:
        """Take in what a step gave; gives the slots whose sequence has ended: nothing may follow."""
        ended: list[int] = []
        for slot, token_ids in tokens if self._held else ():
            one = self._held.get(slot)
            if one is None or one.matcher is None or not token_ids:
                continue
            if not one.matcher.consume_tokens(token_ids):
                # Never seen: only what the mask allows is sampled. Its next row fails.
                self._failed.add(slot)
            elif one.matcher.is_stopped():
                ended.append(slot)
        return ended

    def _has_begun(self, slot: int, one: _Held) -> bool:
        """Make the sequence's matcher, if its grammar is there; False while it is not."""
        prototype = self._grammars.find(one.grammar)
        if prototype is None:
            return False
        if isinstance(prototype, str):
            self._failed.add(slot)
            return True
        matcher = prototype.deep_copy()
        if one.output_tokens and not matcher.consume_tokens(one.output_tokens):
            self._failed.add(slot)
        else:
            one.matcher = matcher
        return True


def mask_row(logits: torch.Tensor, mask: Int32Array) -> None:
    """Set the logits of tokens whose bit is 0 to minus infinity, in place, where that leaves any token.

    A row may have lost all that its mask allows to an earlier adjustment, such as an end that may not come yet: then the mask wins.

    Args:
        logits: `[vocab_size]`.
        mask: `[ceil(vocab_size / 32)]`; bit `t % 32` of word `t // 32` stands for token `t`, 1 allows it.
    """
    is_allowed = _bits(mask, len(logits))
    logits.masked_fill_(torch.from_numpy(~is_allowed).to(logits.device), -torch.inf)
    if np.bitwise_count(mask.view(np.uint32)).sum() <= _FEW_TOKENS:
        allowed = torch.from_numpy(np.flatnonzero(is_allowed)).to(logits.device)
        if len(allowed) and bool(torch.isneginf(logits[allowed]).all()):
            logits[allowed] = 0.0


def likeliest_allowed(logits: torch.Tensor, mask: Int32Array) -> int:
    """The likeliest token that a mask allows; arguments are those of `mask_row`."""
    allowed = torch.from_numpy(np.flatnonzero(_bits(mask, len(logits)))).to(logits.device)
    return int(allowed[logits[allowed].argmax()])


def _bits(mask: Int32Array, vocab_size: int) -> BoolArray:
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
