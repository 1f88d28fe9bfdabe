"""A radix tree of KV pages: which prefixes have their keys and values in a lane's pages already.

An edge is a run of full pages with the tokens they hold; a path from a root spells a prefix. Namespaces never share: each has its
own root. A running sequence locks the path it uses. What no one locks stays until its pages are needed, then goes leaf by leaf,
from the end of a leaf on, in the order of the eviction policy.

Tokens are kept and compared as the bytes of their 32-bit integers, so that a comparison is one `memcmp` however long the run is.

Source: RadixAttention, SGLang (NeurIPS 2024).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import islice
from operator import attrgetter
from typing import Final, Literal, NamedTuple

from services.scheduler.cache_events import CacheEvent, CacheLog, EventKind, block_hashes, namespace_hash

Eviction = Literal["lru", "lfu", "fifo", "priority"]

TOKEN_BYTES: Final = 4
"""Of one token in the byte strings that the tree takes: `array("i").tobytes()`."""


class Node:
    """One edge of the tree and what hangs below it.

    Attributes:
        tokens: Its tokens as bytes, full pages only; empty in a root.
        pages: The pages that hold them.
        parent: The node above; None in a root.
        children: By the bytes of their first page.
        num_locks: Sequences that use it or a node below.
        last_use: When it was last locked or inserted, in uses of the tree.
        num_uses: How often that was.
        created: When it was inserted.
        priority: The greatest of those who inserted or used it.
        hashes: Of its pages, see `cache_events.py`; None while nobody watches.
        is_queued: It has an entry in the queue of candidates for eviction.
    """

    __slots__ = (
        "children",
        "created",
        "hashes",
        "is_queued",
        "last_use",
        "num_locks",
        "num_uses",
        "pages",
        "parent",
        "priority",
        "tokens",
    )

    def __init__(self, tokens: bytes, pages: list[int], parent: Node | None, now: int, priority: int = 0) -> None:
        self.tokens = tokens
        self.pages = pages
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.num_locks = 0
        self.last_use = self.created = now
        self.num_uses = 1
        self.priority = priority
        self.hashes: list[int] | None = None
        self.is_queued = False


class _Root(Node):
    """The top of a namespace."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: str, now: int) -> None:
        super().__init__(b"", [], None, now)
        self.namespace = namespace


class Match(NamedTuple):
    """The longest prefix found. It holds until the tree changes.

    Attributes:
        node: Where it ends; None when nothing was found.
        num_node_pages: Pages of `node` that belong to it.
        num_pages: Pages of the whole prefix.
        num_evictable_pages: Of these, pages that nothing locks.
    """

    node: Node | None
    num_node_pages: int
    num_pages: int
    num_evictable_pages: int


NO_MATCH: Final = Match(None, 0, 0, 0)

CHILDREN_LOOKED_AT: Final = 64
"""Of a node, to find what came after it."""

_last_use: Final = attrgetter("last_use")

# The smallest goes first. It only ever grows while its node is queued, so a stale entry is met too early, never too late.
_ORDER: Final[dict[Eviction, Callable[[Node], tuple[int, int]]]] = {
    "lru": lambda node: (node.last_use, 0),
    "lfu": lambda node: (node.num_uses, node.last_use),
    "fifo": lambda node: (node.created, 0),
    "priority": lambda node: (node.priority, node.last_use),
}


class RadixTree:
    """The cached prefixes of one lane.

    Attributes:
        page_size: Tokens a page.
        num_pages: Pages that the tree owns.
        num_evictable: Of these, pages that nothing locks: all of them can be had by `evict`.
        num_inserted: Prefixes, or ends of prefixes, that were new; counted from the start.
        log: Where changes are recorded; None while nobody wants to know.
    """

    def __init__(self, page_size: int, eviction: Eviction = "lru") -> None:
        self.page_size = page_size
        self.num_pages = 0
        self.num_evictable = 0
        self.num_inserted = 0
        self.log: CacheLog | None = None
        self._page_bytes = page_size * TOKEN_BYTES
        self._order = _ORDER[eviction]
        self._roots: dict[str, _Root] = {}
        # Of prefixes that were in use at a flush: they are found no more and go when their users have gone.
        self._flushed_roots: dict[_Root, None] = {}
        self._now = 0
        # Entries are (order, serial, node), at most one for each node; the serial keeps nodes from being compared.
        self._queue: list[tuple[tuple[int, int], int, Node]] = []
        self._num_queued = 0

    def match(self, tokens: bytes, num_pages_max: int, namespace: str = "") -> Match:
        """Find the longest cached prefix of `tokens`, at most `num_pages_max` pages of it. Nothing is changed."""
        node: Node | None = self._roots.get(namespace)
        if node is None:
            return NO_MATCH
        page_bytes = self._page_bytes
        length = min(num_pages_max * page_bytes, len(tokens) - len(tokens) % page_bytes)
        at = num_node_pages = num_evictable = 0
        while at < length:
            child = node.children.get(tokens[at : at + page_bytes])
            if child is None:
                break
            node = child
            num_node_pages = self._num_shared_pages(node, tokens, at, length)
            at += num_node_pages * page_bytes
            if not node.num_locks:
                num_evictable += num_node_pages
            if num_node_pages < len(node.pages):
                break
        if not at:
            return NO_MATCH
        return Match(node, num_node_pages, at // page_bytes, num_evictable)

    def lock(self, match: Match, priority: int = 0) -> tuple[Node, list[int]]:
        """Use a prefix that was found: until `unlock` none of its pages is evicted.

        Returns:
            The node to unlock, and the prefix's pages in order.
        """
        node = match.node
        assert node is not None
        if match.num_node_pages < len(node.pages):
            node = self._split(node, match.num_node_pages)
        self.lock_node(node, priority)
        runs = []
        above: Node | None = node
        while above is not None:
            runs.append(above.pages)
            above = above.parent
        return node, [page for run in reversed(runs) for page in run]

    def lock_node(self, node: Node, priority: int) -> None:
        """Use the prefix that ends with a node given by `insert`."""
        self._now += 1
        while node.parent is not None:
            if not node.num_locks:
                self.num_evictable -= len(node.pages)
            node.num_locks += 1
            node.last_use = self._now
            node.num_uses += 1
            node.priority = max(node.priority, priority)
            node = node.parent

    def unlock(self, node: Node) -> None:
        """End one use of a prefix."""
        lowest = node
        while node.parent is not None:
            assert node.num_locks > 0, "a prefix was unlocked twice"
            node.num_locks -= 1
            if not node.num_locks:
                self.num_evictable += len(node.pages)
            node = node.parent
        self._offer(lowest)

    def after(self, node: Node | None, tokens: bytes, num_bytes_max: int, namespace: str = "") -> bytes:
        """What came after a prefix in other sequences, the latest used of several. Nothing is changed.

        Args:
            node: Where the prefix ends, as far as it is whole pages; None for the top of the namespace.
            tokens: What of the prefix comes after that, at most a page.
            num_bytes_max: Most bytes to give.
            namespace: Whose it is, where `node` is None.
        """
        above: Node | None = node or self._roots.get(namespace)
        found = b""
        while above is not None and len(found) < len(tokens) + num_bytes_max:
            rest = tokens[len(found) :]
            # Of very many, those that came last.
            latest = islice(reversed(above.children.values()), CHILDREN_LOOKED_AT)
            above = max((child for child in latest if child.tokens.startswith(rest)), key=_last_use, default=None)
            if above is not None:
                found += above.tokens
        return found[len(tokens) : len(tokens) + num_bytes_max]

    def insert(self, tokens: bytes, pages: list[int], namespace: str = "", priority: int = 0) -> tuple[Node | None, int]:
        """Add a prefix: the tree takes over the pages that it has not yet got.

        Args:
            tokens: The prefix; exactly the tokens of `pages`.
            pages: Pages with its KV, in order.
            namespace: Whose it is.
            priority: How important its user is, for the eviction by priority.

        Returns:
            The node at its end (None for an empty prefix), and how many of its first pages the tree had already: of these the
            tree keeps its own and the caller keeps those of `pages`.
        """
        assert len(tokens) == len(pages) * self._page_bytes
        if not pages:
            return None, 0
        self._now += 1
        node: Node | None = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = _Root(namespace, self._now)
        at, length = 0, len(tokens)
        while at < length:
            child = node.children.get(tokens[at : at + self._page_bytes])
            if child is None:
                break
            num_shared = self._num_shared_pages(child, tokens, at, length)
            at += num_shared * self._page_bytes
            if num_shared < len(child.pages):
                child = self._split(child, num_shared)
            child.last_use = self._now
            child.num_uses += 1
            child.priority = max(child.priority, priority)
            node = child
        num_present = at // self._page_bytes
        if at < length:
            leaf = Node(tokens[at:], pages[num_present:], node, self._now, priority)
            node.children[tokens[at : at + self._page_bytes]] = leaf
            self.num_inserted += 1
            self.num_pages += len(leaf.pages)
            self.num_evictable += len(leaf.pages)
            self._offer(leaf)
            if self.log is not None:
                self.log.stored(_stored(leaf, self._page_bytes))
            node = leaf
        return node, num_present

    def evict(self, num_pages: int) -> list[int]:
        """Give up `num_pages` pages that nothing locks, or as many as there are. Returns them."""
        evicted: list[int] = []
        while len(evicted) < num_pages and self._queue:
            order, _, node = heapq.heappop(self._queue)
            node.is_queued = False
            if node.num_locks or node.children or not node.pages:
                continue
            if self._order(node) != order:
                self._offer(node)
                continue
            num_missing = num_pages - len(evicted)
            if len(node.pages) > num_missing:
                evicted += node.pages[-num_missing:]
                del node.pages[-num_missing:]
                self._forget_hashes(node, num_missing)
                node.tokens = node.tokens[: -num_missing * self._page_bytes]
                self._offer(node)
            else:
                evicted += node.pages
                self._forget_hashes(node, len(node.pages))
                self._remove(node)
        self.num_pages -= len(evicted)
        self.num_evictable -= len(evicted)
        return evicted

    def flush(self) -> list[int]:
        """Give up every page that nothing locks, and let nobody find the others any more. Returns the pages."""
        evicted = self.evict(self.num_evictable)
        for root in self._roots.values():
            for node in _below(root):
                # The first to go, whatever the policy.
                node.last_use = node.created = node.num_uses = 0
                node.priority = -(2**31)
                node.hashes = None
            self._flushed_roots[root] = None
        self._roots = {}
        if self.log is not None:
            self.log.cleared()
        return evicted

    def snapshot(self) -> list[CacheEvent]:
        """All blocks that can be found, as if they were stored now: those of a prefix before what comes after it."""
        return [_stored(node, self._page_bytes) for root in self._roots.values() for node in _below(root)]

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents first."""
        for root in (*self._roots.values(), *self._flushed_roots):
            yield from _below(root)

    # Inside

    def _forget_hashes(self, node: Node, num_pages: int) -> None:
        """A node is about to lose its last pages."""
        if node.hashes is not None:
            if self.log is not None:
                self.log.removed(node.hashes[-num_pages:])
            del node.hashes[-num_pages:]

    def _num_shared_pages(self, node: Node, tokens: bytes, at: int, length: int) -> int:
        """How many pages of `node`, one at least, are the tokens from `at` on, which end at `length`."""
        run = node.tokens
        if len(run) <= length - at and tokens.startswith(run, at):
            return len(node.pages)
        page_bytes = self._page_bytes
        # The first page is shared, for it was looked up; `high` pages are not.
        low, high = 1, min(len(node.pages), (length - at) // page_bytes) + 1
        while high - low > 1:
            middle = (low + high) // 2
            # What is below `low` has been compared.
            if run[low * page_bytes : middle * page_bytes] == tokens[at + low * page_bytes : at + middle * page_bytes]:
                low = middle
            else:
                high = middle
        return low

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut a node in two after `num_pages` pages. Returns the upper one, which is new; `node` stays the lower one."""
        parent = node.parent
        assert parent is not None
        size = num_pages * self._page_bytes
        upper = Node(node.tokens[:size], node.pages[:num_pages], parent, node.created)
        upper.num_locks, upper.last_use, upper.num_uses = node.num_locks, node.last_use, node.num_uses
        upper.priority = node.priority
        if node.hashes is not None:
            upper.hashes, node.hashes = node.hashes[:num_pages], node.hashes[num_pages:]
        node.tokens = node.tokens[size:]
        node.pages = node.pages[num_pages:]
        node.parent = upper
        upper.children[node.tokens[: self._page_bytes]] = node
        parent.children[upper.tokens[: self._page_bytes]] = upper
        return upper

    def _offer(self, node: Node) -> None:
        """Make a node a candidate for eviction if it can be one and is none yet."""
        if node.is_queued or node.num_locks or node.children or node.parent is None:
            return
        node.is_queued = True
        self._num_queued += 1
        heapq.heappush(self._queue, (self._order(node), self._num_queued, node))

    def _remove(self, node: Node) -> None:
        """Take a leaf out, and a root that has lost its last child."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens[: self._page_bytes]]
        node.pages = []
        if parent.parent is not None:
            self._offer(parent)
        elif not parent.children:
            assert isinstance(parent, _Root)
            if parent in self._flushed_roots:
                del self._flushed_roots[parent]
            else:
                del self._roots[parent.namespace]


def _below(root: _Root) -> Iterator[Node]:
    """The nodes below a root, parents first."""
    stack: list[Node] = [root]
    while stack:
        node = stack.pop()
        if node.parent is not None:
            yield node
        stack.extend(node.children.values())


def _stored(node: Node, page_bytes: int) -> CacheEvent:
    """The event of a node that was added."""
    hashes = _hashes(node, page_bytes)
    above = node.parent
    assert above is not None
    before = namespace_hash(above.namespace) if isinstance(above, _Root) else _hashes(above, page_bytes)[-1]
    return CacheEvent(EventKind.STORED, tuple(hashes), before, node.tokens)


def _hashes(node: Node, page_bytes: int) -> list[int]:
    """Hashes of a node's pages; kept from then on, as are those of the nodes above."""
    missing = []
    above = node
    while above.hashes is None and above.parent is not None:
        missing.append(above)
        above = above.parent
    before = namespace_hash(above.namespace) if isinstance(above, _Root) else (above.hashes or [0])[-1]
    for one in reversed(missing):
        one.hashes = block_hashes(before, one.tokens, page_bytes)
        before = one.hashes[-1]
    return node.hashes or []
