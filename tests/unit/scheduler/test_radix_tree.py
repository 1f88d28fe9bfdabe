"""Goal: the tree finds what was put in, gives up only what nothing locks, in the order of its policy, and its accounts close."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.scheduler.radix_tree import Eviction, Node, RadixTree
from tests.unit.scheduler.system import check_tree


class Cache:
    """A tree with a supply of page numbers."""

    def __init__(self, page_size: int = 2, eviction: Eviction = "lru") -> None:
        self.tree = RadixTree(page_size, eviction)
        self.page_size = page_size
        self.num_pages = 0

    def insert(self, tokens: list[int], namespace: str = "") -> tuple[list[int], int]:
        """Insert new pages for all full pages of `tokens`. Returns the pages, and how many the tree had."""
        num_pages = len(tokens) // self.page_size
        pages = list(range(self.num_pages, self.num_pages + num_pages))
        self.num_pages += num_pages
        _, num_present = self.tree.insert(array("i", tokens[: num_pages * self.page_size]).tobytes(), pages, namespace)
        return pages, num_present

    def match(self, tokens: list[int], namespace: str = "") -> int:
        """Pages found."""
        return self.tree.match(array("i", tokens).tobytes(), len(tokens), namespace).num_pages

    def lock(self, tokens: list[int], namespace: str = "") -> tuple[Node, list[int]]:
        """Lock the longest prefix."""
        return self.tree.lock(self.tree.match(array("i", tokens).tobytes(), len(tokens), namespace))


def test_an_empty_tree_finds_nothing() -> None:
    assert Cache().match([1, 2, 3, 4]) == 0


def test_a_prefix_is_found_page_by_page() -> None:
    cache = Cache()
    pages, num_present = cache.insert([1, 2, 3, 4, 5, 6, 7])
    assert num_present == 0
    assert [cache.match([1, 2, 3, 4, 5, 6, 7, 8][:length]) for length in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert cache.match([1, 2, 3, 9]) == 1
    assert cache.match([9, 2, 3, 4]) == 0
    assert cache.lock([1, 2, 3, 4, 9, 9])[1] == pages[:2]


def test_branches_share_what_is_the_same() -> None:
    cache = Cache()
    first, _ = cache.insert([1, 2, 3, 4, 5, 6])
    second, num_present = cache.insert([1, 2, 3, 4, 7, 8])
    assert num_present == 2
    assert cache.tree.num_pages == 4
    assert cache.lock([1, 2, 3, 4, 5, 6])[1] == first
    assert cache.lock([1, 2, 3, 4, 7, 8])[1] == [*first[:2], second[2]]


def test_a_prefix_inserted_twice_keeps_its_first_pages() -> None:
    cache = Cache()
    first, _ = cache.insert([1, 2, 3, 4])
    _, num_present = cache.insert([1, 2, 3, 4])
    assert num_present == 2
    assert cache.tree.num_pages == 2
    assert cache.lock([1, 2, 3, 4])[1] == first


def test_namespaces_never_share_and_leave_nothing_behind() -> None:
    cache = Cache()
    cache.insert([1, 2], "red")
    assert cache.match([1, 2], "blue") == cache.match([1, 2]) == 0
    cache.insert([1, 2], "blue")
    assert cache.match([1, 2], "red") == cache.match([1, 2], "blue") == 1
    assert sorted(cache.tree.evict(2)) == [0, 1]
    assert not list(cache.tree.nodes())
    assert not cache.tree._roots


def test_what_is_locked_stays() -> None:
    cache = Cache()
    pages, _ = cache.insert([1, 2, 3, 4, 5, 6])
    node, locked = cache.lock([1, 2, 3, 4])
    assert locked == pages[:2]
    assert cache.tree.num_evictable == 1
    assert cache.tree.evict(9) == pages[2:]
    assert cache.tree.evict(9) == []
    cache.tree.unlock(node)
    assert sorted(cache.tree.evict(9)) == pages[:2]
    assert cache.tree.num_pages == cache.tree.num_evictable == 0


def test_eviction_takes_the_end_of_a_run_and_no_more_than_asked() -> None:
    cache = Cache()
    pages, _ = cache.insert(list(range(20)))
    assert cache.tree.evict(3) == pages[-3:]
    assert cache.match(list(range(20))) == 7


def test_unlocking_twice_is_a_bug() -> None:
    cache = Cache()
    cache.insert([1, 2])
    node, _ = cache.lock([1, 2])
    cache.tree.unlock(node)
    with pytest.raises(AssertionError, match="twice"):
        cache.tree.unlock(node)


@pytest.mark.parametrize(
    ("eviction", "order"),
    [
        # 1 is used last, 2 is used most often, 3 came first.
        ("lru", [3, 2, 1]),
        ("lfu", [3, 1, 2]),
        ("fifo", [3, 1, 2]),
    ],
)
def test_the_policy_says_what_goes_first(eviction: Eviction, order: list[int]) -> None:
    cache = Cache(1, eviction)
    for token in (3, 1, 2):
        cache.insert([token])
    for token in (2, 2, 1):
        cache.tree.unlock(cache.lock([token])[0])
    page_of = {0: 3, 1: 1, 2: 2}
    assert [page_of[cache.tree.evict(1)[0]] for _ in range(3)] == order


class TreeMachine(RuleBasedStateMachine):
    """Drives a tree beside the plainest cache there is: a dictionary from prefix to page."""

    @initialize(page_size=st.sampled_from([1, 2, 3]), eviction=st.sampled_from(["lru", "lfu", "fifo"]))
    def begin(self, page_size: int, eviction: Eviction) -> None:
        self.cache = Cache(page_size, eviction)
        self.page_of: dict[tuple[str, tuple[int, ...]], int] = {}
        self.locks: list[tuple[Node, list[int]]] = []

    def prefixes(self, tokens: list[int], namespace: str) -> list[tuple[str, tuple[int, ...]]]:
        size = self.cache.page_size
        return [(namespace, tuple(tokens[:end])) for end in range(size, len(tokens) + 1, size)]

    def expected(self, tokens: list[int], namespace: str) -> list[int]:
        """The pages of the longest prefix that the dictionary has whole."""
        pages = []
        for prefix in self.prefixes(tokens, namespace):
            if prefix not in self.page_of:
                break
            pages.append(self.page_of[prefix])
        return pages

    texts = st.lists(st.integers(0, 1), max_size=10)
    namespaces = st.sampled_from(["", "red"])

    @rule(tokens=texts, namespace=namespaces)
    def insert(self, tokens: list[int], namespace: str) -> None:
        num_present = len(self.expected(tokens, namespace))
        pages, found = self.cache.insert(tokens, namespace)
        assert found == num_present
        for prefix, page in list(zip(self.prefixes(tokens, namespace), pages, strict=True))[num_present:]:
            self.page_of[prefix] = page

    @rule(tokens=texts, namespace=namespaces)
    def lock(self, tokens: list[int], namespace: str) -> None:
        expected = self.expected(tokens, namespace)
        match = self.cache.tree.match(array("i", tokens).tobytes(), len(tokens), namespace)
        assert match.num_pages == len(expected)
        if expected:
            before = self.cache.tree.num_evictable
            node, pages = self.cache.tree.lock(match)
            assert pages == expected
            assert before - self.cache.tree.num_evictable == match.num_evictable_pages
            self.locks.append((node, pages))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        node, _ = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        self.cache.tree.unlock(node)

    @rule(num_pages=st.integers(1, 6))
    def evict(self, num_pages: int) -> None:
        num_evictable = self.cache.tree.num_evictable
        evicted = self.cache.tree.evict(num_pages)
        assert len(evicted) == len(set(evicted)) == min(num_pages, num_evictable)
        assert not set(evicted) & {page for _, pages in self.locks for page in pages}
        gone = set(evicted)
        self.page_of = {prefix: page for prefix, page in self.page_of.items() if page not in gone}

    @invariant()
    def accounts_close(self) -> None:
        if not hasattr(self, "cache"):
            return
        pages = check_tree(self.cache.tree, [node for node, _ in self.locks])
        assert sorted(pages) == sorted(self.page_of.values())


TestTree = TreeMachine.TestCase
