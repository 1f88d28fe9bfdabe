"""The decode clock of one lane: it makes a step in which nothing changes cost next to nothing a sequence.

Every decoding sequence gets one token in every step with rows, so when it will need its next page, and when it will reach its last
token, is known as a step number as soon as it begins to decode. The clock counts those steps as ticks and keeps, for each tick to
come, the sequences that need something then. It works on counts alone: a plan may be made before the result of the last one is
back.

A sequence whose drafts were accepted is ahead of that: with the result it is moved on (`advance`), and all that it waits for comes
so many ticks sooner. So that its drafts have pages, it shall get them some tokens before it needs them, where they can be had.
"""

from __future__ import annotations

from services.scheduler.sequence import Sequence


class DecodeClock:
    """Ticks of a lane, and what falls due at them.

    Attributes:
        tick: Steps with rows planned so far.
        num_done: Steps with rows whose result is back.
    """

    def __init__(self) -> None:
        self.tick = 0
        self.num_done = 0
        # Dictionaries as ordered sets: a sequence that leaves is taken out, so that none is kept in memory until its due.
        self._page_due: dict[int, dict[Sequence, None]] = {}
        self._limit_due: dict[int, dict[Sequence, None]] = {}

    def enter(self, sequence: Sequence, *, page_tokens: int, token_limit: int) -> None:
        """A sequence begins to decode: the step now being planned computes the last of its known tokens and samples the next.

        Args:
            sequence: Its `num_tokens` are all scheduled as of this tick.
            page_tokens: Tokens for which it has pages.
            token_limit: Tokens, prompt and outputs together, at which it ends.
        """
        origin = self.tick - sequence.num_tokens
        sequence.decode_origin = origin
        sequence.page_needed_tick = page_tokens + origin + 1
        self.look_ahead(sequence)
        # With the result of tick t, t - origin + 1 tokens are known.
        due = sequence.limit_due_tick = max(self.tick, token_limit + origin - 1)
        self._limit_due.setdefault(due, {})[sequence] = None

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """A decoding sequence got so many tokens more than one with a result."""
        sequence.decode_origin -= num_tokens
        sequence.page_needed_tick -= num_tokens
        if sequence.page_due_tick:
            self._put_page_due(sequence, max(self.tick + 1, sequence.page_due_tick - num_tokens))
        self._take_out(self._limit_due, sequence.limit_due_tick, sequence)
        sequence.limit_due_tick -= num_tokens
        self._limit_due.setdefault(sequence.limit_due_tick, {})[sequence] = None

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """A decoding sequence got pages for `num_tokens` more tokens; it waits for the next one that it needs."""
        sequence.page_needed_tick += num_tokens
        self._put_page_due(sequence, sequence.page_needed_tick)

    def look_ahead(self, sequence: Sequence) -> None:
        """A decoding sequence shall get its next page before it needs it, as far as it looks ahead."""
        self._put_page_due(sequence, max(self.tick + 1, sequence.page_needed_tick - sequence.lookahead_tokens))

    def leave(self, sequence: Sequence) -> None:
        """A decoding sequence ended or was preempted."""
        self.stop_growing(sequence)
        self._take_out(self._limit_due, sequence.limit_due_tick, sequence)

    def take_page_due(self) -> list[Sequence]:
        """Sequences that shall get a page at this tick, if one can be had."""
        due = list(self._page_due.pop(self.tick, ()))
        for sequence in due:
            sequence.page_due_tick = 0
        return due

    def needs_page(self, sequence: Sequence) -> bool:
        """Whether a decoding sequence cannot go on at this tick without a page."""
        return sequence.page_needed_tick <= self.tick

    def num_page_due(self) -> int:
        """Sequences that will need a page at the next tick."""
        return sum(sequence.page_needed_tick <= self.tick + 1 for sequence in self._page_due.get(self.tick + 1, ()))

    def limits_under_way(self) -> list[Sequence]:
        """Sequences that reach their limit with a result that is not back."""
        return [sequence for tick in range(self.num_done + 1, self.tick + 1) for sequence in self._limit_due.get(tick, ())]

    def stop_growing(self, sequence: Sequence) -> None:
        """A sequence gets no further row."""
        self._take_out(self._page_due, sequence.page_due_tick, sequence)
        sequence.page_due_tick = 0

    def take_limit_due(self, tick: int) -> list[Sequence]:
        """Sequences that reach their limit with the result of `tick`."""
        return list(self._limit_due.pop(tick, ()))

    def num_scheduled(self, sequence: Sequence) -> int:
        """Tokens of a decoding sequence that have been handed to the worker, without drafts whose result is not back."""
        return self.tick - sequence.decode_origin

    def num_computed(self, sequence: Sequence) -> int:
        """Tokens of a decoding sequence whose KV is known to be there."""
        return self.num_done - sequence.decode_origin

    def _put_page_due(self, sequence: Sequence, tick: int) -> None:
        if sequence.page_due_tick:
            self._take_out(self._page_due, sequence.page_due_tick, sequence)
        sequence.page_due_tick = tick
        self._page_due.setdefault(tick, {})[sequence] = None

    @staticmethod
    def _take_out(due: dict[int, dict[Sequence, None]], tick: int, sequence: Sequence) -> None:
        sequences = due.get(tick)
        if sequences is not None:
            sequences.pop(sequence, None)
            if not sequences:
                del due[tick]
