"""Goal: what stood after the end of the text before is proposed, from the best of the latest places. Method: a plain search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.drafting.drafter import Int32Array
from services.worker.drafting.ngram import MATCH_TOKENS_MAX, NUM_PLACES_MAX, NgramDrafter, NgramIndex


def index_of(first: list[int], *pieces: list[int]) -> NgramIndex:
    index = NgramIndex(first)
    for piece in pieces:
        index.extend(piece)
    return index


def common(text: list[int], place: int) -> int:
    """Tokens before a place that are those at the end."""
    length = 0
    while length < min(place, MATCH_TOKENS_MAX) and text[place - 1 - length] == text[-1 - length]:
        length += 1
    return length


def searched(text: list[int]) -> tuple[int, int]:
    """What `match` is to find, by looking everywhere."""
    places = [place for place in range(len(text) - 1, 1, -1) if text[place - 2 : place] == text[-2:]]
    return max(((place, common(text, place)) for place in places[:NUM_PLACES_MAX]), key=lambda found: found[1], default=(0, 0))


TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6)


@given(TEXTS)
def test_the_longest_match_among_the_latest_places_is_found(pieces: list[list[int]]) -> None:
    text = [token for piece in pieces for token in piece]
    assert index_of(*pieces).match() == searched(text)


@given(TEXTS)
def test_asking_at_every_step_finds_no_worse_match(pieces: list[list[int]]) -> None:
    """A place that goes on being right is followed without a look at the others; it has at least so many tokens in common."""
    index, text = NgramIndex(), list[int]()
    for piece in pieces:
        index.extend(piece)
        text += piece
        place, length = index.match()
        assert length == (common(text, place) if place else 0)
        assert length >= min(8, searched(text)[1])


def test_the_latest_of_equal_places_is_continued() -> None:
    index = index_of([7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2])
    assert index.match() == (7, 2)
    assert index.continuation(7, 3) == [4, 9, 1]


def test_a_longer_match_leads_over_a_later_one() -> None:
    index = index_of([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2])
    assert index.match() == (3, 3)
    assert index.continuation(3, 2) == [3, 6]


@pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_text_without_repetition_has_no_match(text: list[int]) -> None:
    assert index_of(text).match() == (0, 0)


def test_a_continuation_that_reaches_the_end_goes_on_with_itself() -> None:
    index = index_of([9, 1, 2, 3, 1, 2, 3, 1, 2])
    place, _ = index.match()
    assert index.continuation(place, 8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert index_of([4, 4, 4]).continuation(2, 3) == [4, 4, 4]


def test_a_followed_place_moves_on_with_what_it_foretold() -> None:
    first = list(range(40))
    index = index_of([*first, *first[:3]])
    assert index.match() == (3, 3)
    index.extend(first[3:12])
    assert index.match() == (12, 12)
    index.extend([99])
    assert index.match() == (0, 0)


def int32(*token_ids: int) -> Int32Array:
    return np.array(token_ids, dtype=np.int32)


def drafter_of(*texts: list[int]) -> NgramDrafter:
    drafter = NgramDrafter()
    for slot, text in enumerate(texts):
        drafter.enter(slot, int32(*text), int32())
    return drafter


def test_each_sequence_has_its_own_text() -> None:
    drafter = drafter_of([1, 2, 3, 1, 2], [3, 1, 2], [5, 5])
    first, second = drafter.propose([0, 1], 4)
    assert first is not None and first.token_ids == [3, 1, 2, 3]
    assert second is None
    drafter.extend(1, [3, 1])
    third, second = drafter.propose([2, 1], 1)
    assert third is None
    assert second is not None and second.token_ids == [2]


def test_grades_follow_the_tokens_in_common() -> None:
    text = list(range(50))
    grades = []
    for length in (2, 3, 4, 7, 8, 15, 16, 40):
        (proposal,) = drafter_of([*text, 99, *text[1 : 1 + length]]).propose([0], 4)
        assert proposal is not None
        grades.append(proposal.grade)
    assert grades == [0, 0, 1, 1, 2, 2, 3, 3]
    assert max(grades) == len(NgramDrafter.first_rates) - 1


def test_a_sequence_that_enters_knows_nothing_of_the_slots_former_one() -> None:
    drafter = drafter_of([1, 2, 3, 1, 2])
    drafter.enter(0, int32(4, 1, 2), int32())
    assert drafter.propose([0], 4) == [None]


def test_what_is_foretold_comes_first_and_is_left_where_it_was_wrong() -> None:
    drafter = NgramDrafter()
    drafter.enter(0, int32(1, 2, 1, 2), int32(20, 21, 22, 23, 24))

    def proposed(most: int = 4) -> list[int] | None:
        (proposal,) = drafter.propose([0], most)
        assert proposal is None or proposal.grade == len(NgramDrafter.first_rates) - 1
        return proposal.token_ids if proposal is not None else None

    assert proposed(2) == [20, 21]
    drafter.extend(0, [20, 21, 22])
    assert proposed() == [23, 24], "no further than it goes"
    drafter.extend(0, [9])
    assert proposed() is None
    drafter.extend(0, [20, 21])
    (proposal,) = drafter.propose([0], 4)
    assert proposal is not None and proposal.grade == 0
    assert proposal.token_ids == [22, 9, 20, 21], "the latest place is the sequence's own"


def test_what_is_foretold_is_one_text_more_to_find_a_place_in() -> None:
    drafter = NgramDrafter()
    drafter.enter(0, int32(1, 2), int32(20, 21, 22, 23))
    drafter.extend(0, [9])
    assert drafter.propose([0], 4) == [None]
    drafter.extend(0, [21, 22])
    (proposal,) = drafter.propose([0], 4)
    assert proposal is not None and proposal.token_ids == [23]
