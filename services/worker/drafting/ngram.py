"""Drafts out of a sequence's own text: what followed the last time its latest tokens stood there (prompt lookup).

Each sequence has an index, a chain of places for each pair of tokens, that grows by one entry a token: a step costs a row a few
microseconds, however long its text is. Of the latest places where the last pair stands, the one with the longest text in common
before it is continued. A continuation that reaches the end of the text goes on with itself, so that a loop is drafted as one.

Where the same beginning has been in the lane's cache before, the index also has what came after it then, and follows that first.

Source: prompt lookup decoding (A. Saxena, 2023); chains of places as in LZ77 compressors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from services.worker.drafting.drafter import Int32Array, Proposal

MATCH_TOKENS_MAX: Final = 32
"""Tokens in common that are counted; more make no guess better."""
NUM_PLACES_MAX: Final = 8
"""Places that are looked at for a row."""
_FOLLOWED_MATCH: Final = 8
"""With so many tokens in common the place that was right before is right again, and no other is looked at."""
_MARK: Final = 0xFFFF_FFFF
"""No token has this id."""


class NgramIndex:
    """One sequence's text, and where each pair of tokens stands in it.

    Args:
        token_ids: Its tokens.
        foretold: What came after the same tokens in an earlier one.
    """

    def __init__(self, token_ids: Sequence[int] = (), foretold: Sequence[int] = ()) -> None:
        # Marks on both sides keep what is foretold apart from the sequence's own text, which comes behind it.
        self._text: list[int] = [_MARK, *foretold, _MARK, *token_ids] if foretold else list(token_ids)
        # For a pair of tokens, the latest place after it; for a place, the one before with the same pair. 0 is none.
        self._latest: dict[int, int] = {}
        self._before: list[int] = []
        # The place that was continued last, moved on by what has come since, and the tokens in common there; 0 when something
        # else has come.
        self._followed, self._length = (1, MATCH_TOKENS_MAX) if foretold else (0, 0)
        self._index()

    def extend(self, token_ids: list[int]) -> None:
        """The sequence has got these tokens."""
        self._text += token_ids
        if self._followed:
            end = self._followed + len(token_ids)
            self._followed = end if self._text[self._followed : end] == token_ids else 0
            self._length += len(token_ids)
        self._index()

    def match(self) -> tuple[int, int]:
        """Where the end of the text stood before: the place after it, and how many tokens are the same; (0, 0) for nowhere."""
        if self._followed and self._length >= _FOLLOWED_MATCH:
            return self._followed, min(self._length, MATCH_TOKENS_MAX)
        text = self._text
        place = self._latest.get(text[-2] << 32 | text[-1], 0) if len(text) > 1 else 0
        best = best_length = 0
        for _ in range(NUM_PLACES_MAX):
            if not place:
                break
            length = self._common(place)
            if length > best_length:
                best, best_length = place, length
            place = self._before[place]
        self._followed, self._length = best, best_length
        return best, best_length

    def continuation(self, place: int, num_tokens: int) -> list[int]:
        """What stands at a place, no more than `num_tokens`; past the end of the text it goes on from the place again."""
        found = self._text[place : place + num_tokens]
        if _MARK in found:
            return found[: found.index(_MARK)]
        while len(found) < num_tokens:
            found += found[: num_tokens - len(found)]
        return found

    def _common(self, place: int) -> int:
        """Tokens before a place that are those at the end of the text; at least the pair that led there."""
        text = self._text
        end, longest = len(text), min(place, MATCH_TOKENS_MAX)
        length = 2
        while length < longest and text[place - 1 - length] == text[end - 1 - length]:
            length += 1
        return length

    def _index(self) -> None:
        """Enter the pairs before each place up to the one before the end: what would stand at the end is not known."""
        text, latest, before = self._text, self._latest, self._before
        for place in range(len(before), len(text)):
            if place < 2:
                before.append(0)
                continue
            pair = text[place - 2] << 32 | text[place - 1]
            before.append(latest.get(pair, 0))
            latest[pair] = place


class NgramDrafter:
    """See the module. One index a sequence."""

    # By tokens in common: 2 and 3, 4 to 7, 8 to 15, 16 and more. Measured on answers of a small model to mixed requests.
    first_rates: tuple[float, ...] = (0.4, 0.65, 0.9, 0.97)

    def __init__(self) -> None:
        self._indices: dict[int, NgramIndex] = {}

    def enter(self, slot: int, token_ids: Int32Array, foretold: Int32Array) -> None:
        """See `Drafter.enter`."""
        self._indices[slot] = NgramIndex(token_ids.tolist(), foretold.tolist())

    def extend(self, slot: int, token_ids: list[int]) -> None:
        """See `Drafter.extend`."""
        self._indices[slot].extend(token_ids)

    def propose(self, slots: Sequence[int], max_num_drafts: int) -> list[Proposal | None]:
        """See `Drafter.propose`."""
        return [self._propose(self._indices[slot], max_num_drafts) for slot in slots]

    def reset(self) -> None:
        """See `Drafter.reset`."""
        self._indices.clear()

    def _propose(self, index: NgramIndex, max_num_drafts: int) -> Proposal | None:
        place, length = index.match()
        token_ids = index.continuation(place, max_num_drafts) if place else None
        if not token_ids:
            return None
        return Proposal(token_ids, min(length.bit_length() - 2, len(self.first_rates) - 1))
