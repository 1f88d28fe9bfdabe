"""The KV pages of one lane: which are free and which are used.

A page is `page_size` tokens of KV in the worker's memory; here it is only an index. The pool knows no sequences. Pages kept for
prefixes that no running sequence uses will be a third state between free and used; until then free + used = total.
"""

from __future__ import annotations


class PagePool:
    """Owner of the page indices 0 .. num_pages - 1.

    Attributes:
        name: The pool's name at the worker ("full" for ordinary attention); a model may have several.
        num_pages: Pages in all.
        page_size: Tokens a page.
    """

    def __init__(self, num_pages: int, page_size: int, *, name: str = "full") -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"page pool {name!r} needs at least one page of one token, got {num_pages} pages of {page_size}")
        self.name = name
        self.num_pages = num_pages
        self.page_size = page_size
        # Taken from the end, so that page 0 goes out first and pages just freed, warm in the worker's caches, go out again.
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_used = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages held by sequences."""
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take `num_pages` pages, or none at all and return None when fewer are free."""
        free = self._free
        if num_pages > len(free):
            return None
        if num_pages == 0:
            return []
        pages = free[-num_pages:]
        pages.reverse()
        del free[-num_pages:]
        for page in pages:
            self._is_used[page] = 1
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back. Freeing a page that is not used is a bug of ours and raises AssertionError."""
        for page in pages:
            assert self._is_used[page], f"page {page} of pool {self.name!r} freed twice"
            self._is_used[page] = 0
        self._free.extend(reversed(pages))
