"""Prompts of the comparison: exact lengths, what is shared and what is not, and how repetition is counted."""

from __future__ import annotations

import random

import pytest

from bench.peers import texts
from bench.peers.workloads import WORKLOADS


def count(text: str) -> int:
    """A tokenizer of our own: a token a word, two for every word of seven letters or more."""
    return sum(2 if len(word) > 6 else 1 for word in text.split())


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 128, 1056])
def test_random_words_are_exactly_as_many_tokens_as_asked(num_tokens: int) -> None:
    assert count(texts.words_of(random.Random(1), count, num_tokens)) == num_tokens


def test_words_between_two_fixed_texts_fill_up_to_the_length() -> None:
    text = texts.words_of(random.Random(1), count, 30, before="a conversation: ", after=" what now?")
    assert count(text) == 30
    assert text.startswith("a conversation: ") and text.endswith(" what now?")


def test_fixed_texts_longer_than_the_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="no prompt of 3 tokens"):
        texts.words_of(random.Random(1), count, 3, before="one two three four ")


@pytest.mark.parametrize("is_code", [True, False])
def test_a_repeating_prompt_ends_with_the_lines_that_its_text_begins_with(is_code: bool) -> None:
    prompt = texts.repeating_prompt(random.Random(3), count, 600, is_code=is_code)
    assert count(prompt) == 600
    lead = prompt.rstrip("\n").rsplit("\n\n", 1)[1]
    assert len(lead.splitlines()) == 3
    # Some versions of these modules say the same lines twice.
    assert prompt.count(lead) >= 2


def test_a_repeating_prompt_too_short_for_any_text_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no text"):
        texts.repeating_prompt(random.Random(3), count, 20, is_code=True)


def test_repeated_share_counts_what_the_last_occurrence_foretells() -> None:
    # After 1 2 3 came 4 (foretold), after 2 3 4 came 5 (foretold), after 3 4 5 nothing had come, after 4 5 9 nothing.
    assert texts.repeated_share([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 9, 9]) == 0.5
    # The later follower of 1 2 3 counts: 7, not 4.
    assert texts.repeated_share([1, 2, 3, 4, 1, 2, 3, 7, 1, 2, 3], [7]) == 1.0
    assert texts.repeated_share([1, 2, 3, 4, 1, 2, 3, 7, 1, 2, 3], [4]) == 0.0


def test_repeated_share_of_no_output_is_zero() -> None:
    assert texts.repeated_share([1, 2, 3], []) == 0.0


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "W6"])
def test_every_first_prompt_has_the_length_of_its_workload(name: str) -> None:
    workload = WORKLOADS[name]
    scripts = workload.scripts(seed="a", num_scripts=3, count=count)
    assert [count(script.user_texts[0]) for script in scripts] == [workload.num_prompt_tokens] * 3
    assert [len(script.user_texts) for script in scripts] == [workload.num_turns] * 3
    assert all(count(text) == workload.num_turn_tokens for script in scripts for text in script.user_texts[1:])


def test_scripts_of_a_run_share_the_prefix_and_no_more_and_another_run_shares_nothing() -> None:
    workload = WORKLOADS["W3"]
    one, two = (script.user_texts[0].split() for script in workload.scripts(seed="a", num_scripts=2, count=count))
    (other,) = (script.user_texts[0].split() for script in workload.scripts(seed="b", num_scripts=1, count=count))
    shared = next(at for at, (left, right) in enumerate(zip(one, two, strict=False)) if left != right)
    assert count(" ".join(one[:shared])) == pytest.approx(1024, abs=2)
    assert one[:8] != other[:8]


def test_scripts_are_the_same_for_the_same_seed() -> None:
    first, second = (WORKLOADS["W5"].scripts(seed="a", num_scripts=2, count=count) for _ in range(2))
    assert first == second


def test_a_small_scale_still_keeps_every_client_busy() -> None:
    assert WORKLOADS["W2"].num_scripts_at(1.0) == 64
    assert WORKLOADS["W2"].num_scripts_at(0.5) == 32
    assert WORKLOADS["W2"].num_scripts_at(0.01) == WORKLOADS["W2"].num_clients
