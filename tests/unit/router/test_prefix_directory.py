"""What a router knows of caches, and what follows for the choice of a scheduler."""

from __future__ import annotations

from array import array

import pytest

from headrace.errors import InvalidRequestError, ProtocolError
from headrace.v1 import router_pb2 as router
from services.router import messages, prefix_directory
from services.router.directory import Directory, Instance, Report
from services.router.generation import ModelOffer
from services.router.limits import check_cache_salt
from services.router.places import SCHEDULER
from services.router.policies.choice import least_loaded
from services.router.prefix_directory import CACHE_LOAD_SLACK, CLEARED, REMOVED, STORED, CachePrompt, LaneNews, PrefixDirectory
from services.router.tenants import cache_namespace
from services.scheduler.cache_events import block_hashes, namespace_hash

OFFER = ModelOffer("m", 128, 1)


def prompt(*tokens: int, namespace: str = "") -> CachePrompt:
    return CachePrompt(array("i", tokens).tobytes(), namespace)


def blocks(*tokens: int, namespace: str = "") -> tuple[int, ...]:
    """Hashes of blocks of two tokens, as a scheduler makes them."""
    return tuple(block_hashes(namespace_hash(namespace), array("i", tokens).tobytes(), page_bytes=8))


def snapshot(*hashes: int, lane: int = 7, number: int = 0) -> LaneNews:
    return LaneNews(lane, 2, number, ((STORED, hashes),), is_snapshot=True)


def news(number: int, *events: tuple[int, tuple[int, ...]], lane: int = 7) -> LaneNews:
    return LaneNews(lane, 2, number, events, is_snapshot=False)


def test_a_prompt_is_looked_up_block_by_block() -> None:
    known = PrefixDirectory()
    assert known.update(1, snapshot(*blocks(1, 2, 3, 4, 5, 6)))
    assert known.num_cached_tokens(1, prompt(1, 2, 3, 4, 9, 9)) == 4
    assert known.num_cached_tokens(1, prompt(1, 2, 3)) == 2
    assert known.num_cached_tokens(1, prompt(2, 1, 3, 4)) == 0
    assert known.num_cached_tokens(1, prompt(1, 2, 3, 4, namespace="salt")) == 0
    assert known.num_cached_tokens(2, prompt(1, 2)) == 0


def test_the_lane_with_most_of_it_counts_and_not_the_sum_of_lanes() -> None:
    known = PrefixDirectory()
    all_blocks = blocks(1, 2, 3, 4, 5, 6)
    known.update(1, snapshot(all_blocks[0], lane=1))
    known.update(1, snapshot(*all_blocks[1:], lane=2))
    assert known.num_cached_tokens(1, prompt(1, 2, 3, 4, 5, 6)) == 2


def test_no_more_than_so_many_blocks_of_a_lane_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_directory, "BLOCKS_MAX", 3)
    known = PrefixDirectory()
    all_blocks = blocks(1, 2, 3, 4, 5, 6, 7, 8)
    known.update(1, snapshot(*all_blocks[:2]))
    assert known.update(1, news(0, (STORED, all_blocks[2:])))
    assert known.num_cached_tokens(1, prompt(1, 2, 3, 4, 5, 6, 7, 8)) == 6
    # What is given up makes room.
    assert known.update(1, news(1, (REMOVED, all_blocks[2:]), (STORED, all_blocks[2:3])))
    assert known.num_cached_tokens(1, prompt(1, 2, 3, 4, 5, 6, 7, 8)) == 6


def test_a_lane_that_is_gone_is_dropped() -> None:
    known = PrefixDirectory()
    known.update(1, snapshot(*blocks(1, 2)))
    assert known.update(1, LaneNews(7, 0, 0, (), is_snapshot=True))
    assert known.num_cached_tokens(1, prompt(1, 2)) == 0
    assert not known.update(1, news(1, (STORED, blocks(1, 2)))), "it must begin with a snapshot"


def test_events_follow_the_snapshot_and_a_gap_is_noticed() -> None:
    known = PrefixDirectory()
    first, second = blocks(1, 2, 3, 4)
    assert not known.update(1, news(0, (STORED, (first,)))), "before any snapshot"
    assert known.update(1, snapshot(number=5))
    assert known.update(1, news(5, (STORED, (first,)), (STORED, (second,))))
    assert known.num_cached_tokens(1, prompt(1, 2, 3, 4)) == 4
    assert known.update(1, news(7, (REMOVED, (second,))))
    assert known.num_cached_tokens(1, prompt(1, 2, 3, 4)) == 2
    assert known.update(1, news(8, (CLEARED, ())))
    assert known.num_cached_tokens(1, prompt(1, 2, 3, 4)) == 0
    assert not known.update(1, news(10, (STORED, (first,))))
    assert known.num_cached_tokens(1, prompt(1, 2)) == 0
    assert known.update(1, snapshot(first, number=11))
    known.forget(1)
    assert known.num_cached_tokens(1, prompt(1, 2)) == 0


def directory(*, is_cache_aware: bool = True) -> Directory:
    made = Directory(least_loaded, stuck_after_ns=10**12, is_cache_aware=is_cache_aware)
    for incarnation in (1, 2):
        made.add(Instance(SCHEDULER, incarnation, f"s{incarnation}", "a", {"m": OFFER}), 0)
    made.prefixes.update(2, snapshot(*blocks(1, 2, 3, 4)))
    return made


def take(made: Directory, *tokens: int) -> int | None:
    return made.take(SCHEDULER, "m", avoid=None, prompt=lambda: prompt(*tokens))


def test_the_scheduler_with_most_of_the_prompt_is_chosen() -> None:
    assert take(directory(), 1, 2, 3, 4, 5) == 2
    assert take(directory(), 9, 9) == 1, "nothing cached: the policy's choice"
    assert take(directory(is_cache_aware=False), 1, 2, 3, 4, 5) == 1


def test_a_much_busier_scheduler_is_not_chosen_for_its_cache() -> None:
    made = directory()
    made.report(2, Report(CACHE_LOAD_SLACK, 0, 0, 0, 0, False, (OFFER,)), 0)
    assert take(made, 1, 2, 3, 4) == 2
    made.report(2, Report(CACHE_LOAD_SLACK + 2, 0, 0, 0, 0, False, (OFFER,)), 0)
    assert take(made, 1, 2, 3, 4) == 1


def test_news_whose_arrays_do_not_match_are_refused() -> None:
    body = router.CacheEvents(lane=1, page_size=2, kinds=[router.CACHE_EVENT_KIND_STORED], num_hashes=[3], hashes=[1])
    with pytest.raises(ProtocolError, match="1 kinds, 1 counts and 1 hashes"):
        messages.lane_news(body)


@pytest.mark.parametrize("salt", ["", "x" * 257])
def test_a_salt_is_not_empty_and_not_long(salt: str) -> None:
    with pytest.raises(InvalidRequestError, match="cache_salt must be a string of 1 to 256 characters"):
        check_cache_salt(salt)
    assert check_cache_salt(None) == ""


def test_no_salt_leads_into_another_tenants_namespace() -> None:
    assert cache_namespace("salt", None) == "salt"
    names = {cache_namespace(salt, tenant) for tenant in ("", "a", "ab") for salt in ("", "b", "1:ab", "bb")}
    assert len(names) == 12
