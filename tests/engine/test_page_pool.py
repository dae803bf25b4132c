"""Page ownership, one operation at a time and in random order against a plain model."""

from __future__ import annotations

import random

import pytest
from tilestream.engine.page_pool import EvictionQueue, PagePool


def test_allocates_every_page_once() -> None:
    pool = PagePool(5)
    pages = pool.allocate(3) + pool.allocate(2)
    assert sorted(pages) == [0, 1, 2, 3, 4]
    assert pool.num_free_pages == 0
    pool.check_invariants([pages])


def test_too_many_pages_takes_none() -> None:
    pool = PagePool(4)
    with pytest.raises(RuntimeError, match="5 pages wanted, but only 4 of 4"):
        pool.allocate(5)
    assert pool.num_free_pages == 4


def test_num_pages_is_checked() -> None:
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        PagePool(0)


def test_double_release_is_refused() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(RuntimeError, match="owned by nobody"):
        pool.release(pages)


def test_cached_pages_are_reused_last_and_least_recently_released_first() -> None:
    evicted: list[int] = []
    pool = PagePool(4, on_evict=evicted.append)
    a, b, c, d = pool.allocate(4)
    for page in (a, b, c):
        pool.keep(page)
    pool.release([b])
    pool.release([d])
    pool.release([a, c])  # c before a: the end of a sequence goes first
    assert pool.allocate(1) == [d] and not evicted
    assert pool.allocate(3) == [b, c, a] == evicted


def test_sharing_takes_a_cached_page_back_from_eviction() -> None:
    pool = PagePool(2)
    (page, other) = pool.allocate(2)
    generation = pool.keep(page)
    pool.release([page])
    pool.share(page, generation)
    pool.share(page, generation)
    assert pool.num_free_pages == 0 and pool.ref_count(page) == 2
    pool.check_invariants([[page], [page, other]])


def test_stale_references_are_refused() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    generation = pool.keep(page)
    pool.release([page])
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="stale reference to page 0: generation 1, now 2"):
        pool.share(page, generation)
    pool.release([page])
    with pytest.raises(RuntimeError, match="page 0 is free"):
        pool.share(page, pool.generation(page))


def test_discarded_pages_become_free_at_once_or_on_release() -> None:
    pool = PagePool(2, on_evict=lambda page: pytest.fail("discarded pages are not evicted"))
    a, b = pool.allocate(2)
    pool.keep(a), pool.keep(b)
    pool.release([a])
    pool.discard(a)
    pool.discard(b)
    pool.release([b])
    pool.check_invariants([])
    assert sorted(pool.allocate(2)) == [a, b]


def test_check_invariants_notices_a_wrong_owner() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    with pytest.raises(RuntimeError, match="ref count 1, but 2 owners"):
        pool.check_invariants([pages, pages])
    with pytest.raises(RuntimeError, match="ref count 1, but 0 owners"):
        pool.check_invariants([])


def test_importance_comes_before_age() -> None:
    pool = PagePool(3)
    a, b, c = pool.allocate(3)
    for page, priority in ((a, 1), (b, 2), (c, 1)):
        pool.keep(page, priority)
        pool.release([page])
    pool.favour(a, 0)
    assert pool.allocate(3) == [b, c, a]
    pool.keep(a)
    pool.release([a])  # new content: nothing is left of what it was worth
    pool.keep(b, 5)
    pool.release([b])
    assert pool.allocate(2) == [b, a]


@pytest.mark.parametrize("seed", range(20))
def test_eviction_queue_against_a_sorted_list(seed: int) -> None:
    rng = random.Random(seed)
    queue = EvictionQueue()
    expected: list[tuple[int, int]] = []  # (-priority, page), those of equal priority in order of arrival
    for _ in range(1500):
        page, priority = rng.randrange(30), rng.choice((-(10**9), 0, 0, 7, rng.randrange(100)))
        operation = rng.choice(("add", "add", "remove", "pop"))
        present = [entry for entry in expected if entry[1] == page]
        if operation == "add":
            expected = sorted([entry for entry in expected if entry[1] != page] + [(-priority, page)], key=lambda e: e[0])
            queue.add(page, priority)
        elif operation == "remove" and present:
            expected.remove(present[0])
            queue.remove(page)
        elif operation == "pop" and expected:
            assert queue.pop() == expected.pop(0)[1]
        assert len(queue) == len(expected) and (page in queue) == any(entry[1] == page for entry in expected)
        assert len(queue._heap) <= 2 * 30 + 66, "entries that were taken out pile up"


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_against_a_model(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(12)
    cached: dict[int, int] = {}  # page -> generation, as the prefix cache would know it
    pool.on_evict = cached.pop
    owners: list[list[int]] = []
    for _ in range(400):
        operation = rng.choice(("allocate", "share", "release", "keep", "discard"))
        owned = [page for pages in owners for page in pages]
        if operation == "allocate" and pool.num_free_pages:
            owners.append(pool.allocate(rng.randint(1, pool.num_free_pages)))
            assert not set(owners[-1]) & set(owned), "an owned page was handed out"
        elif operation == "share" and cached:
            page = rng.choice(sorted(cached))
            pool.share(page, cached[page])
            owners.append([page])
        elif operation == "release" and owners:
            pool.release(owners.pop(rng.randrange(len(owners))))
        elif operation == "keep" and owned:
            page = rng.choice(owned)
            cached[page] = pool.keep(page)
        elif operation == "discard" and cached:
            page = rng.choice(sorted(cached))
            del cached[page]
            pool.discard(page)
        pool.check_invariants(owners)
        assert pool.num_free_pages + len({page for pages in owners for page in pages}) == 12
        assert all(pool.generation(page) == generation for page, generation in cached.items())
