"""Splits a step's tokens by the detokenizer they go to.

The split is kept while the rows stay the same: then a step costs one addition a sequence and no object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from operator import itemgetter
from typing import TYPE_CHECKING

from services.scheduler.sequence import Sequence

if TYPE_CHECKING:
    from services.scheduler.outbox import Target


@dataclass(slots=True)
class StreamBatch:
    """Tokens for one detokenizer: a struct of arrays, one entry a stream. Mirrors `TokenBatch`.

    Attributes:
        target: The detokenizer.
        sequences: Whose tokens they are.
        stream_ids: The routers' stream numbers.
        first_positions: Output position of each stream's first token here.
        token_ids: The tokens, flat.
        num_tokens: Tokens a stream; empty means one each.
        finish_reasons: Why each ended; empty when none did.
        num_stop_tokens: Trailing stop tokens of each; empty means none.
        num_cached_tokens: Prompt tokens of each whose KV was reused; empty means none.
        has_logprobs: Logprobs go with tokens of some.
    """

    target: Target
    sequences: list[Sequence]
    stream_ids: list[int]
    first_positions: list[int]
    token_ids: list[int]
    num_tokens: list[int] = field(default_factory=list)
    finish_reasons: list[int] = field(default_factory=list)
    num_stop_tokens: list[int] = field(default_factory=list)
    num_cached_tokens: list[int] = field(default_factory=list)
    has_logprobs: bool = False

    def mark_finished(self) -> None:
        """Fill in finish reasons and stop tokens from the sequences, which have just been told."""
        if any(sequence.finish_reason for sequence in self.sequences):
            self.finish_reasons = [int(sequence.finish_reason) for sequence in self.sequences]
        if any(sequence.num_stop_tokens for sequence in self.sequences):
            self.num_stop_tokens = [sequence.num_stop_tokens for sequence in self.sequences]


@dataclass(slots=True)
class RowTokens:
    """Tokens of a step by row.

    Attributes:
        rows: Who got them.
        token_ids: The tokens, flat.
        counts: How many each got; empty for one each.
    """

    rows: list[Sequence]
    token_ids: list[int]
    counts: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Sequence, list[int]]]:
        start = 0
        for sequence, count in zip(self.rows, self.counts or repeat(1), strict=False):
            yield sequence, self.token_ids[start : start + count]
            start += count


class _Group:
    """The rows of one detokenizer."""

    def __init__(self, target: Target, indices: list[int], sequences: list[Sequence]) -> None:
        self.target = target
        self.sequences = sequences
        self.stream_ids = [sequence.stream_id for sequence in sequences]
        self.positions = [sequence.num_output_tokens - 1 for sequence in sequences]
        cached = [sequence.num_cached_tokens for sequence in sequences]
        self.num_cached_tokens = cached if any(cached) else []
        # itemgetter of one index returns an item, not a tuple.
        self.pick = itemgetter(*indices) if len(indices) > 1 else None
        self.index = indices[0]
        self.indices = indices

    def batch_of(self, pieces: list[list[int]]) -> StreamBatch:
        """The batch of a step in which rows got several tokens; `pieces` are those of all rows, appended already."""
        own = [pieces[index] for index in self.indices]
        self.positions = [sequence.num_output_tokens - 1 for sequence in self.sequences]
        return StreamBatch(
            target=self.target,
            sequences=self.sequences,
            stream_ids=self.stream_ids,
            first_positions=[position + 1 - len(tokens) for position, tokens in zip(self.positions, own, strict=True)],
            token_ids=[token_id for tokens in own for token_id in tokens],
            num_tokens=[len(tokens) for tokens in own],
            num_cached_tokens=self.num_cached_tokens,
        )


class TokenFanout:
    """The split of one lane's rows.

    Attributes:
        num_telling: Running sequences of the lane of which logprobs are wanted.
    """

    def __init__(self) -> None:
        self.num_telling = 0
        self._rows: list[Sequence] | None = None
        self._version = -1
        self._groups: list[_Group] = []

    def split(self, gave: RowTokens, *, version: int) -> list[StreamBatch]:
        """Make the batches of a step.

        Args:
            gave: Sequences that got tokens, appended already. The same list object of rows as last time means the same rows.
            version: The lane's version; another one than last time means that something about the rows has changed.
        """
        rows, token_ids = gave.rows, gave.token_ids
        if rows is not self._rows or version != self._version:
            self._regroup(rows)
            self._rows = rows
            self._version = version
        elif not gave.counts:
            for group in self._groups:
                group.positions = [position + 1 for position in group.positions]
        if gave.counts:
            pieces = [tokens for _, tokens in gave]
            return [group.batch_of(pieces) for group in self._groups]
        if len(self._groups) == 1:
            return [self._batch(self._groups[0], token_ids)]
        return [
            self._batch(group, list(group.pick(token_ids)) if group.pick else [token_ids[group.index]]) for group in self._groups
        ]

    def _regroup(self, rows: list[Sequence]) -> None:
        indices: dict[Target, list[int]] = {}
        for index, sequence in enumerate(rows):
            indices.setdefault(sequence.target, []).append(index)
        if len(indices) == 1:
            self._groups = [_Group(rows[0].target, list(range(len(rows))), rows)]
        else:
            self._groups = [_Group(target, chosen, [rows[index] for index in chosen]) for target, chosen in indices.items()]

    @staticmethod
    def _batch(group: _Group, token_ids: list[int]) -> StreamBatch:
        return StreamBatch(
            target=group.target,
            sequences=group.sequences,
            stream_ids=group.stream_ids,
            first_positions=group.positions,
            token_ids=token_ids,
            num_cached_tokens=group.num_cached_tokens,
        )
