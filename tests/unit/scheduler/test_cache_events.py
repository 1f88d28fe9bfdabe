"""Namespaces, flushes, eviction by priority, and the events that tell others what is cached."""

from __future__ import annotations

from array import array
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.cache_events import EVENTS_MAX, CacheEvent, CacheLog, EventKind, block_hashes, namespace_hash
from services.scheduler.radix_tree import TOKEN_BYTES, Node, RadixTree
from services.scheduler.sequence import Sequence
from tests.unit.scheduler import builders
from tests.unit.scheduler.system import Site, System


def as_bytes(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()


# Hashes and the log.


def test_hashes_are_chained_as_written_down() -> None:
    """A router computes the same from a prompt, so these values may never change."""
    tokens = as_bytes([1, 2, 3, 4, 5, 6, 7])
    seed = blake2b(b"", digest_size=8).digest()
    first = blake2b(seed + bytes([1, 0, 0, 0, 2, 0, 0, 0]), digest_size=8).digest()
    second = blake2b(first + bytes([3, 0, 0, 0, 4, 0, 0, 0]), digest_size=8).digest()
    found = block_hashes(namespace_hash(""), tokens, page_bytes=8)
    assert found[:2] == [int.from_bytes(first, "big"), int.from_bytes(second, "big")]
    assert len(found) == 3, "full pages only"
    assert found[:2] == [0xA909_7987_9964_03C7, 0x83BF_D463_3813_A6C6]
    assert block_hashes(namespace_hash("salt"), tokens, page_bytes=8)[0] != found[0]


def test_numbers_have_no_gap_and_too_many_events_ask_for_a_snapshot() -> None:
    log = CacheLog()
    stored = CacheEvent(EventKind.STORED, (1, 2), 7, b"abcd")
    log.stored(stored)
    log.removed([2])
    assert log.take() == (0, [stored, CacheEvent(EventKind.REMOVED, (2,))])
    assert log.take() == (2, [])
    for number in range(EVENTS_MAX + 5):
        log.stored(CacheEvent(EventKind.STORED, (number,)))
    assert log.take() is None
    log.cleared()
    assert log.take() == (EVENTS_MAX + 7, [CacheEvent(EventKind.CLEARED)])


class Mirror:
    """What somebody knows who follows the events."""

    def __init__(self, tree: RadixTree) -> None:
        self._log = tree.log = CacheLog()
        self.number = self._log.next_number
        self.page_bytes = tree.page_size * TOKEN_BYTES
        self.blocks: set[int] = set()
        for event in tree.snapshot():
            self.store(event)

    def follow(self) -> set[int]:
        taken = self._log.take()
        assert taken is not None
        first, events = taken
        assert first == self.number
        self.number += len(events)
        for event in events:
            hashes = set(event.hashes)
            if event.kind is EventKind.STORED:
                self.store(event)
            elif event.kind is EventKind.REMOVED:
                assert hashes <= self.blocks, "removed and not stored"
                self.blocks -= hashes
            else:
                self.blocks = set()
        return self.blocks

    def store(self, event: CacheEvent) -> None:
        assert not set(event.hashes) & self.blocks, "stored twice"
        assert event.before in self.blocks or event.before in {namespace_hash(""), namespace_hash("a")}
        assert list(event.hashes) == block_hashes(event.before, event.tokens, self.page_bytes)
        self.blocks |= set(event.hashes)


def blocks_of(tree: RadixTree) -> set[int]:
    return {block for event in tree.snapshot() for block in event.hashes}


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("insert"), st.lists(st.integers(0, 1), min_size=1, max_size=8), st.sampled_from(["", "a"]), st.integers(0, 3)
        ),
        st.tuples(st.just("lock"), st.lists(st.integers(0, 1), min_size=1, max_size=8), st.sampled_from(["", "a"]), st.just(0)),
        st.tuples(st.sampled_from(["unlock", "evict", "flush"]), st.just([]), st.just(""), st.integers(0, 5)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(operations=OPERATIONS, before=st.integers(0, 10), eviction=st.sampled_from(["lru", "priority", "fifo"]))
def test_snapshot_and_events_tell_what_is_there(operations, before, eviction) -> None:  # type: ignore[no-untyped-def]
    tree = RadixTree(2, eviction)
    num_pages = 0
    locked: list[Node] = []
    mirror = None
    for index, (name, tokens, namespace, number) in enumerate(operations):
        if index == before:
            mirror = Mirror(tree)
        doubled = [token for token in tokens for _ in range(2)]
        if name == "insert":
            pages = list(range(num_pages, num_pages + len(tokens)))
            num_pages += len(pages)
            tree.insert(as_bytes(doubled), pages, namespace, priority=number)
        elif name == "lock":
            match = tree.match(as_bytes(doubled), len(tokens), namespace)
            if match.node is not None:
                locked.append(tree.lock(match)[0])
        elif name == "unlock" and locked:
            tree.unlock(locked.pop(number % len(locked)))
        elif name == "evict":
            tree.evict(number)
        elif name == "flush":
            tree.flush()
            assert tree.match(as_bytes([0, 0]), 1).node is None
        if mirror is not None:
            assert mirror.follow() == blocks_of(tree)
    for node in locked:
        tree.unlock(node)
    assert len(tree.evict(10**6)) >= 0
    assert tree.num_pages == tree.num_evictable == 0
    assert list(tree.nodes()) == []
    if mirror is not None:
        assert mirror.follow() == set()


def test_nobody_watching_costs_no_hashes() -> None:
    tree = RadixTree(1)
    tree.insert(as_bytes([1, 2, 3]), [0, 1, 2])
    assert [node.hashes for node in tree.nodes()] == [None]


# Eviction by priority.


def test_what_unimportant_requests_used_goes_first() -> None:
    tree = RadixTree(1, "priority")
    tree.insert(as_bytes([1, 1]), [0, 1], priority=5)
    tree.insert(as_bytes([2, 2]), [2, 3], priority=-5)
    tree.insert(as_bytes([3, 3]), [4, 5])
    tree.insert(as_bytes([4, 4]), [6, 7])
    assert sorted(tree.evict(2)) == [2, 3]
    # Used by somebody important since.
    node, _ = tree.lock(tree.match(as_bytes([3, 3]), 2), priority=9)
    tree.unlock(node)
    assert sorted(tree.evict(2)) == [6, 7]
    assert sorted(tree.evict(2)) == [0, 1]


# On a lane.


def test_the_pages_of_an_unimportant_request_go_before_those_of_a_plain_one() -> None:
    system = System(builders.scheduler(policy="priority", eviction="priority"))
    site = system.join(builders.capacity(max_num_batched_tokens=64, num_pages=16, page_size=4))
    plain, unimportant = list(range(1, 21)), list(range(31, 51))
    # The plain one is older: by age it would go first.
    system.submit(builders.sequence(system.core, "plain", plain, max_tokens=4))
    system.run()
    system.submit(builders.sequence(system.core, "unimportant", unimportant, max_tokens=4, priority=-5))
    system.run()
    tree = site.lane.kv.tree
    tree.evict(5)
    assert tree.match(as_bytes(plain), 5).num_pages == 5
    assert tree.match(as_bytes(unimportant), 5).num_pages < 5


def start() -> tuple[System, Site]:
    system = System(builders.scheduler())
    return system, system.join(builders.capacity(max_num_batched_tokens=128))


def submit(system: System, name: str, *, namespace: str = "", max_tokens: int = 4) -> Sequence:
    sequence = builders.sequence(system.core, name, range(40), namespace=namespace, max_tokens=max_tokens)
    system.submit(sequence)
    return sequence


@pytest.mark.parametrize(("namespace", "num_cached"), [("salt", 36), ("other", 0), ("", 0)])
def test_prefixes_are_shared_inside_a_namespace_only(namespace: str, num_cached: int) -> None:
    system, _ = start()
    submit(system, "first", namespace="salt")
    system.run()
    again = submit(system, "again", namespace=namespace)
    system.run()
    assert again.num_cached_tokens == num_cached
    system.check_accounting()


def test_two_namespaces_do_not_wait_for_one_another() -> None:
    system, site = start()
    submit(system, "first", namespace="a")
    second = submit(system, "second", namespace="b")
    assert second.lane is site.lane


def test_after_a_flush_nothing_computed_before_is_reused() -> None:
    system, site = start()
    submit(system, "done")
    system.run()
    running = submit(system, "running", max_tokens=30)
    for _ in range(3):
        system.plan_all()
        system.deliver_result(site)
    num_cached = site.lane.kv.tree.num_evictable
    assert num_cached > 0
    assert site.lane.kv.flush() == num_cached
    system.check_accounting()
    after = submit(system, "after")
    assert after.num_cached_tokens == 0
    system.run()
    # What was computed before the flush has gone with its user; the later one's is there.
    system.check_accounting()
    assert running.num_output_tokens == 30
    num_cached = site.lane.kv.pool.num_used
    assert num_cached > 0
    assert site.lane.kv.flush() == num_cached
    assert site.lane.kv.pool.num_free == site.lane.kv.pool.num_pages
