"""Prompts: exact in words, unique where they must be, repeatable from the seed; data sets and arrivals."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise

import pytest

from bench.serve.prompts import WORDS, cycle_dataset, fit, parse_dataset, poisson_offsets_ns, random_prompt


def test_the_same_seed_gives_the_same_prompt_and_any_other_argument_another() -> None:
    first = random_prompt(seed=1, level="a", index=0, num_words=64)
    assert first == random_prompt(seed=1, level="a", index=0, num_words=64)
    others = [
        random_prompt(seed=2, level="a", index=0, num_words=64),
        random_prompt(seed=1, level="b", index=0, num_words=64),
        random_prompt(seed=1, level="a", index=1, num_words=64),
    ]
    assert len({first, *others}) == 4


def test_prompts_of_a_level_share_no_beginning_that_a_cache_could_use() -> None:
    beginnings = {tuple(random_prompt(seed=5, level="x", index=i, num_words=32).split()[:8]) for i in range(200)}
    assert len(beginnings) == 200


def test_a_shared_prefix_is_the_same_in_all_and_counts_towards_the_length() -> None:
    texts = [random_prompt(seed=5, level="x", index=i, num_words=32, num_shared_words=20).split() for i in range(50)]
    assert {len(words) for words in texts} == {32}
    assert len({tuple(words[:20]) for words in texts}) == 1
    assert len({tuple(words[20:]) for words in texts}) == 50


@pytest.mark.parametrize("num_words", [1, 2, 500])
def test_a_prompt_has_exactly_the_words_asked_for(num_words: int) -> None:
    words = random_prompt(seed=0, level="x", index=0, num_words=num_words).split(" ")
    assert len(words) == num_words
    assert set(words) <= set(WORDS)


def test_the_word_list_has_no_word_twice() -> None:
    assert len(set(WORDS)) == len(WORDS)


def test_fit_takes_off_what_the_server_counted_too_much_but_keeps_a_word() -> None:
    assert fit(num_words=128, measured_tokens=129, wanted_tokens=128) == 127
    assert fit(num_words=128, measured_tokens=120, wanted_tokens=128) == 136
    assert fit(num_words=16, measured_tokens=60, wanted_tokens=16) == 1


def test_dataset_lines_become_requests_in_order() -> None:
    messages = [{"role": "user", "content": "hi"}]
    lines = [json.dumps({"prompt": "one"}), "", json.dumps({"messages": messages, "output_tokens": 5})]
    specs = parse_dataset(lines, num_output_tokens=7)
    assert [(spec.index, spec.prompt, spec.num_output_tokens) for spec in specs] == [(0, "one", 7), (1, messages, 5)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: needs `prompt`"),
        ('{"prompt": ""}', "line 2: needs `prompt`"),
        ('{"messages": []}', "line 2: needs `prompt`"),
        ('{"messages": ["hi"]}', "line 2: needs `prompt`"),
        ('{"prompt": "a", "output_tokens": 0}', "at least 1, is 0"),
        ('{"prompt": "a", "output_tokens": true}', "at least 1, is True"),
    ],
)
def test_a_bad_dataset_line_is_named(line: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_dataset(['{"prompt": "fine"}', line], num_output_tokens=1)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="no line"):
        parse_dataset(["", " "], num_output_tokens=1)


def test_a_short_dataset_is_used_again_under_new_indices() -> None:
    specs = parse_dataset(['{"prompt": "a"}', '{"prompt": "b"}'], num_output_tokens=1)
    assert [(spec.index, spec.prompt) for spec in cycle_dataset(specs, 3)] == [(0, "a"), (1, "b"), (2, "a")]


def test_arrivals_are_poisson_of_the_asked_rate_and_repeatable() -> None:
    offsets = poisson_offsets_ns(rate_per_s=50, num_requests=5000, seed=3)
    assert offsets == poisson_offsets_ns(rate_per_s=50, num_requests=5000, seed=3)
    assert offsets[0] == 0
    gaps_s = [(after - before) / 1e9 for before, after in pairwise(offsets)]
    assert min(gaps_s) >= 0
    # An exponential's mean equals its deviation; 5,000 samples are within 10 % of both with room to spare.
    assert statistics.mean(gaps_s) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps_s) == pytest.approx(1 / 50, rel=0.1)
