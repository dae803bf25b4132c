"""Who owns which KV page. Knows nothing of tokens: the prefix cache decides what a page is worth.

A page is in exactly one state:
  owned   by one or more requests (ref count > 0), whether the prefix cache knows it or not;
  cached  owned by nobody, its content kept for reuse, evicted least recently released first;
  free    owned by nobody, content worthless.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class PagePool:
    """Fixed set of pages 0 .. num_pages - 1. Every operation is O(1) per page.

    A page's *generation* counts how often it was handed out for new content. Whoever keeps a page id while
    not owning the page keeps the generation too, and `share` refuses a page that was reused since: a stale
    reference fails loudly and never reads another request's KV.

    Args:
        num_pages: pages in the pool, at least 1.
        on_evict: called with the page when a cached page is about to be reused.
    """

    def __init__(self, num_pages: int, *, on_evict: Callable[[int], None] = lambda page: None) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self.on_evict = on_evict
        self._ref_counts = [0] * num_pages
        self._generations = [0] * num_pages
        self._is_cached = [False] * num_pages  # known to the prefix cache; an owned page may be, too
        self._free = list(range(num_pages - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached and owned by nobody, oldest first

    @property
    def num_free_pages(self) -> int:
        """Pages that allocate() can hand out: free and cached ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_owned_pages(self) -> int:
        return self.num_pages - self.num_free_pages

    def ref_count(self, page: int) -> int:
        return self._ref_counts[page]

    def generation(self, page: int) -> int:
        return self._generations[page]

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages for new content: free ones first, then the least recently released cached ones.

        Raises:
            RuntimeError: fewer than num_pages are free; nothing is taken then.
        """
        if num_pages > self.num_free_pages:
            raise RuntimeError(f"{num_pages} pages wanted, but only {self.num_free_pages} of {self.num_pages} are free")
        pages = []
        for _ in range(num_pages):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._evictable.popitem(last=False)
                self._is_cached[page] = False
                self.on_evict(page)
            self._ref_counts[page] = 1
            self._generations[page] += 1
            pages.append(page)
        return pages

    def share(self, page: int, generation: int) -> None:
        """Become one more owner of a page whose content is still that of `generation`.

        Raises:
            RuntimeError: the page was reused, or holds no content that anyone vouches for.
        """
        if generation != self._generations[page]:
            raise RuntimeError(
                f"stale reference to page {page}: generation {generation}, now {self._generations[page]}"
            )
        if self._ref_counts[page] == 0:
            if page not in self._evictable:
                raise RuntimeError(f"page {page} is free: its content cannot be shared")
            del self._evictable[page]
        self._ref_counts[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give up one ownership of each page. Later pages of a sequence are evicted before earlier ones,
        since a page is of use only together with all before it.

        Raises:
            RuntimeError: a page is owned by nobody.
        """
        for page in reversed(pages):
            if self._ref_counts[page] == 0:
                raise RuntimeError(f"page {page} is released but owned by nobody")
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                if self._is_cached[page]:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int) -> int:
        """Keep an owned page's content after its last owner is gone. Returns its generation, for share()."""
        if self._ref_counts[page] == 0:
            raise RuntimeError(f"page {page} is owned by nobody: it has no content to keep")
        self._is_cached[page] = True
        return self._generations[page]

    def discard(self, page: int) -> None:
        """The opposite of keep(): the content is worthless once the owners are gone."""
        self._is_cached[page] = False
        if page in self._evictable:
            del self._evictable[page]
            self._free.append(page)

    def check_invariants(self, owners: Iterable[Sequence[int]]) -> None:
        """Check that free + cached + owned = all, and that ref counts equal owners. O(pages); for tests.

        Args:
            owners: the page list of every request that holds pages.
        Raises:
            RuntimeError: the first page that is wrong, and how.
        """
        owned = Counter(page for pages in owners for page in pages)
        free = Counter(self._free)
        for page in range(self.num_pages):
            if self._ref_counts[page] != owned[page]:
                raise RuntimeError(f"page {page}: ref count {self._ref_counts[page]}, but {owned[page]} owners")
            places = free[page] + (page in self._evictable) + (owned[page] > 0)
            if places != 1:
                raise RuntimeError(
                    f"page {page} is in {places} states: free {free[page]} times, "
                    f"cached {page in self._evictable}, owners {owned[page]}"
                )
            if page in self._evictable and not self._is_cached[page] or free[page] and self._is_cached[page]:
                raise RuntimeError(f"page {page}: is_cached {self._is_cached[page]} contradicts its list")
