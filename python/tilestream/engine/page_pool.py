"""Who owns which KV page. Knows nothing of tokens: the prefix cache decides what a page is worth.

A page is in exactly one state:
  owned   by one or more requests (ref count > 0), whether the prefix cache knows it or not;
  cached  owned by nobody, its content kept for reuse; the least important are evicted first, of those the least
          recently released;
  free    owned by nobody, content worthless.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence


class EvictionQueue:
    """Pages in the order of their reuse: by falling priority number, and within one as they were added.

    O(log pages) per operation. A heap that forgets lazily: what is no longer in `_places` is skipped when it
    comes up, and swept out when it is the most.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int]] = []  # (-priority, place, page)
        self._places: dict[int, int] = {}  # of the pages that are in the queue
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, page: int) -> bool:
        return page in self._places

    def add(self, page: int, priority: int) -> None:
        """Put a page last among those of its priority, also if it is in the queue already."""
        if len(self._heap) > 2 * len(self._places) + 64:
            self._heap = [entry for entry in self._heap if self._places.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
        self._num_added += 1
        self._places[page] = self._num_added
        heapq.heappush(self._heap, (-priority, self._num_added, page))

    def remove(self, page: int) -> None:
        del self._places[page]

    def pop(self) -> int:
        """Take out the page to be reused first; there must be one."""
        while True:
            _, place, page = heapq.heappop(self._heap)
            if self._places.get(page) == place:
                del self._places[page]
                return page


class PagePool:
    """Fixed set of pages 0 .. num_pages - 1. Operations are O(1) per page, O(log pages) for cached ones.

    A page's *generation* counts how often it was handed out for new content. Whoever keeps a page id while
    not owning the page keeps the generation too, and `share` refuses a page that was reused since: a stale
    reference fails loudly and never reads another request's KV.

    A cached page's *priority* is that of the most important request that made or used its content (the lowest
    number, as for requests). Whoever uses a page uses all before it in the sequence, so a page is never less
    important than those that build on it.

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
        self._priorities = [0] * num_pages  # of cached content
        self._free = list(range(num_pages - 1, -1, -1))
        self._evictable = EvictionQueue()  # cached and owned by nobody

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
        """Take pages for new content: free ones first, then cached ones in the order of their reuse.

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
                page = self._evictable.pop()
                self._is_cached[page] = False
                self.on_evict(page)
            self._ref_counts[page] = 1
            self._generations[page] += 1
            pages.append(page)
        return pages

    def share(self, page: int, generation: int, priority: int = 0) -> None:
        """Become one more owner of a page whose content is still that of `generation`.

        Args:
            priority: of the new owner.
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
            self._evictable.remove(page)
        self._ref_counts[page] += 1
        self.favour(page, priority)

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
                    self._evictable.add(page, self._priorities[page])
                else:
                    self._free.append(page)

    def keep(self, page: int, priority: int = 0) -> int:
        """Keep an owned page's content after its last owner is gone. Returns its generation, for share()."""
        if self._ref_counts[page] == 0:
            raise RuntimeError(f"page {page} is owned by nobody: it has no content to keep")
        self._is_cached[page] = True
        self._priorities[page] = priority
        return self._generations[page]

    def favour(self, page: int, priority: int) -> None:
        """A request of this priority has use for a cached page's content."""
        if priority < self._priorities[page]:
            self._priorities[page] = priority
            if page in self._evictable:
                self._evictable.add(page, priority)

    def discard(self, page: int) -> None:
        """The opposite of keep(): the content is worthless once the owners are gone."""
        self._is_cached[page] = False
        if page in self._evictable:
            self._evictable.remove(page)
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
