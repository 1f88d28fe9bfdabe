"""The KV pages of one lane: the pool they come from, and the tree that keeps them for others.

A page is free, or owned by the tree, or owned by one sequence. A sequence's first `num_shared_pages` pages are the tree's, locked
by it, and the rest are its own. Pages go to the tree when the prompt's result is back and when the sequence leaves, never before
the worker has said that their content is sound.
"""

from __future__ import annotations

from array import array
from typing import Final

from services.scheduler.page_pool import PagePool
from services.scheduler.radix_tree import NO_MATCH, TOKEN_BYTES, Eviction, Match, RadixTree
from services.scheduler.sequence import Sequence

FORETOLD_TOKENS_MAX: Final = 1024
"""Most tokens that a worker is told of what may come; more of an output will hardly be the same again."""


class KvPages:
    """Pool and tree as one.

    Attributes:
        pool: Which pages are free.
        tree: Which prefixes are cached; always empty without an eviction policy.
        keeps_prefixes: Whether there is one.
        withheld: Sequences whose prompt is computed and which have got no token, their grammars not being there: published with
            their first.
    """

    def __init__(self, pool: PagePool, eviction: Eviction | None) -> None:
        self.pool = pool
        self.tree = RadixTree(pool.page_size, eviction or "lru")
        self.keeps_prefixes = eviction is not None
        self.withheld: dict[Sequence, None] = {}
        self._num_flushes = 0
        # By the sequence that has entered, the pages that the next plan shall have copied, and where to.
        self._copies: dict[Sequence, list[tuple[int, int]]] = {}

    @property
    def num_usable(self) -> int:
        """Pages that can be had: free ones, and cached ones that no sequence uses."""
        return self.pool.num_free + self.tree.num_evictable

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold."""
        return 1 - self.num_usable / self.pool.num_pages

    def match(self, sequence: Sequence) -> Match:
        """The longest prefix of the sequence that is cached; its last token is never part of it, for that must be computed.

        Of a prompt whose logprobs are wanted all is computed.
        """
        if sequence.wants_prompt_logprobs:
            return NO_MATCH
        num_pages = (sequence.num_tokens - 1) // self.pool.page_size
        return self.tree.match(_bytes(sequence.tokens, num_pages * self.pool.page_size), num_pages, sequence.namespace)

    def num_left(self, sequence: Sequence, match: Match) -> int:
        """Pages that could still be had if the sequence entered now; negative when it could not."""
        num_new = self.pool.pages_for(sequence.num_tokens) - match.num_pages
        return self.num_usable - match.num_evictable_pages - num_new

    def enter(self, sequence: Sequence, match: Match, source: Sequence | None = None) -> None:
        """Give a sequence the prefix found for it and pages for its other tokens; `num_left` must not be negative.

        Args:
            sequence: Who enters.
            match: The prefix.
            source: A running sequence that begins with all of its tokens, computed and sound, from which it forks: what it does not
                share of those pages is copied. None for none.
        """
        if match.node is not None:
            sequence.prefix, sequence.pages = self.tree.lock(match, sequence.priority)
        pages = self.allocate(self.pool.pages_for(sequence.num_tokens) - match.num_pages)
        assert pages is not None, "admitted without room"
        sequence.pages += pages
        sequence.num_shared_pages = match.num_pages
        sequence.num_reused_tokens = match.num_pages * self.pool.page_size
        # What a sequence finds of its own, or of its source, is no saving to its client.
        if not sequence.num_admissions:
            found = sequence.num_reused_tokens if source is None else source.num_cached_tokens
            sequence.num_cached_tokens = min(found, sequence.num_prompt_tokens)
        sequence.num_admissions += 1
        sequence.num_flushes_before = self._num_flushes
        if source is not None:
            # Its last token is computed, for the output's sake.
            sequence.num_reused_tokens = sequence.num_tokens - 1
            sequence.fork_source = source
            own = slice(match.num_pages, self.pool.pages_for(sequence.num_reused_tokens))
            self._copies[sequence] = list(zip(source.pages[own], sequence.pages[own], strict=True))

    def foretell(self, sequence: Sequence) -> array[int]:
        """What came after all the tokens of a sequence that has just entered, the last time that they were here."""
        if not self.keeps_prefixes:
            return array("i")
        rest = sequence.tokens[sequence.num_shared_pages * self.pool.page_size :]
        # Where more than a page of it is new, nothing can have come after it.
        if len(rest) > self.pool.page_size:
            return array("i")
        return array("i", self.tree.after(sequence.prefix, rest.tobytes(), FORETOLD_TOKENS_MAX * TOKEN_BYTES, sequence.namespace))

    def take_copies(self) -> list[tuple[int, int]]:
        """Pages to copy, each with its target: in the next plan, before anything is computed, while what they hold is there."""
        if not self._copies:
            return []
        copies, self._copies = self._copies, {}
        return [pair for pairs in copies.values() for pair in pairs]

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take pages, evicting cached ones where too few are free; None when there are not as many."""
        num_missing = num_pages - self.pool.num_free
        if num_missing > 0:
            if num_missing > self.tree.num_evictable:
                return None
            self.pool.free(self.tree.evict(num_missing))
        return self.pool.allocate(num_pages)

    def publish(self, sequence: Sequence) -> None:
        """The sequence's known tokens are all computed and sound: others may use its full pages from now on."""
        sequence.is_sound = True
        sequence.fork_source = None
        self.withheld.pop(sequence, None)
        num_pages = sequence.num_tokens // self.pool.page_size
        if not self._is_kept(sequence) or num_pages == sequence.num_shared_pages:
            return
        tokens = _bytes(sequence.tokens, num_pages * self.pool.page_size)
        # A sibling may have been first. Then this one goes on with its own pages, and gives them up when it leaves.
        if self.tree.match(tokens, num_pages, sequence.namespace).num_pages > sequence.num_shared_pages:
            return
        node, _ = self.tree.insert(tokens, sequence.pages[:num_pages], sequence.namespace, sequence.priority)
        assert node is not None
        self.tree.lock_node(node, sequence.priority)
        if sequence.prefix is not None:
            self.tree.unlock(sequence.prefix)
        sequence.prefix = node
        sequence.num_shared_pages = num_pages

    def leave(self, sequence: Sequence, num_computed: int) -> None:
        """Take a sequence's pages back; the tree keeps those of its `num_computed` first tokens if they are sound."""
        # Its pages may go to another before the next plan.
        self._copies.pop(sequence, None)
        self.withheld.pop(sequence, None)
        pages, num_kept = sequence.pages, sequence.num_shared_pages
        if sequence.is_sound and self._is_kept(sequence):
            num_full = num_computed // self.pool.page_size
            tokens = _bytes(sequence.tokens, num_full * self.pool.page_size)
            _, num_present = self.tree.insert(tokens, pages[:num_full], sequence.namespace, sequence.priority)
            self.pool.free(pages[num_kept:num_present])
            num_kept = num_full
        self.pool.free(pages[num_kept:])
        if sequence.prefix is not None:
            self.tree.unlock(sequence.prefix)

    def flush(self) -> int:
        """Drop every cached page that no sequence uses; nothing computed before may be reused by others. Returns the pages dropped.

        What is in use stays with those who use it.
        """
        self._num_flushes += 1
        pages = self.tree.flush()
        self.pool.free(pages)
        return len(pages)

    def is_current(self, sequence: Sequence) -> bool:
        """Whether nothing was flushed since a sequence entered."""
        return sequence.num_flushes_before == self._num_flushes

    def _is_kept(self, sequence: Sequence) -> bool:
        """Whether what a sequence has computed may be shared."""
        return self.keeps_prefixes and self.is_current(sequence)


def _bytes(tokens: array[int], num_tokens: int) -> bytes:
    """The first tokens as the tree takes them."""
    return tokens.tobytes()[: num_tokens * TOKEN_BYTES]
