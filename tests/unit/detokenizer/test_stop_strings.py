"""Stop strings against a reference that reads character by character, on every split."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from services.detokenizer.stop_strings import StopMatcher

# Two letters make overlaps and near misses likely.
words = st.text("ab", max_size=6)


def _reference(text: str, stops: list[str], *, include_stop: bool) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include_stop else end - len(longest)], True
    return text, False


@given(text=st.text("ab", max_size=24), stops=st.lists(words, max_size=4), cuts=st.lists(st.integers(0, 24)), include=st.booleans())
@settings(max_examples=600, deadline=None)
def test_equals_the_reference_for_every_split(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    borders = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    matcher = StopMatcher(stops, include_stop=include)
    shown = "".join(matcher.push(text[begin:end]) for begin, end in pairwise(borders))
    is_found = matcher.is_found
    if not is_found:
        shown += matcher.flush()
    assert (shown, is_found) == _reference(text, stops, include_stop=include)


@given(text=st.text("ab", max_size=24), stops=st.lists(words.filter(bool), min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_holds_back_only_what_could_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.push(text)
    if matcher.is_found:
        return
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    longest = max(length for length in range(len(text) + 1) if length == 0 or text[-length:] in beginnings)
    assert len(text) - len(shown) == longest
    assert matcher.held == text[len(shown) :]


def test_the_first_complete_one_wins_over_an_earlier_beginning() -> None:
    matcher = StopMatcher(["abcd", "bc"])
    assert matcher.push("xabcd") == "xa"
    assert matcher.is_found


def test_of_two_complete_at_the_same_point_the_longest_wins() -> None:
    assert StopMatcher(["bc", "abc"]).push("xabc") == "x"


def test_nothing_comes_after_a_stop_string() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == "a"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_restore_returns_to_before_the_stop_string() -> None:
    matcher = StopMatcher(["stop"])
    assert matcher.push("a st") == "a "
    held = matcher.held
    assert matcher.push("op") == ""
    assert matcher.is_found
    matcher.restore(held)
    assert matcher.push("art") == "start"
