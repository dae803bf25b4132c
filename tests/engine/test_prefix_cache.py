"""Prefix identity is token content, and nothing else."""

from __future__ import annotations

import random

import pytest
from tilestream.engine.page_pool import PagePool
from tilestream.engine.prefix_cache import PrefixCache

PAGE_SIZE = 4


class Sequence:
    """One request's use of the cache: match, compute the rest, register full pages."""

    def __init__(self, pool: PagePool, cache: PrefixCache, tokens: list[int]) -> None:
        self.pool, self.cache, self.tokens = pool, cache, tokens
        nodes = cache.match(tokens)
        self.pages, self.end = cache.acquire(nodes)
        self.num_hits = len(nodes)
        self.num_registered = self.num_hits
        self.pages += pool.allocate(-(-len(tokens) // PAGE_SIZE) - len(nodes))

    def register(self, num_pages: int | None = None) -> Sequence:
        end = len(self.tokens) // PAGE_SIZE if num_pages is None else self.num_registered + num_pages
        for index in range(self.num_registered, end):
            tokens = self.tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            self.end = self.cache.insert(self.end, tokens, self.pages[index])
        self.num_registered = end
        return self

    def free(self) -> None:
        self.pool.release(self.pages)
        self.cache.drop(self.end)


@pytest.fixture
def pool() -> PagePool:
    return PagePool(16)


@pytest.fixture
def cache(pool: PagePool) -> PrefixCache:
    return PrefixCache(pool, PAGE_SIZE)


def hits(cache: PrefixCache, tokens: list[int]) -> list[int | None]:
    return [node.page for node in cache.match(tokens)]


def test_only_full_pages_and_never_the_last_token(pool: PagePool, cache: PrefixCache) -> None:
    a = Sequence(pool, cache, list(range(10))).register()
    assert hits(cache, list(range(10))) == a.pages[:2]
    assert hits(cache, list(range(9))) == a.pages[:2]
    assert hits(cache, list(range(8))) == a.pages[:1]  # token 7 has to be computed
    assert hits(cache, list(range(5))) == a.pages[:1]
    assert hits(cache, list(range(4))) == []
    assert cache.num_cached_pages == 2


def test_a_prefix_differs_if_any_earlier_token_does(pool: PagePool, cache: PrefixCache) -> None:
    a = Sequence(pool, cache, [1, 2, 3, 4, 5, 6, 7, 8]).register()
    assert hits(cache, [1, 2, 3, 4, 5, 6, 7, 9, 0]) == a.pages[:1]
    assert hits(cache, [9, 2, 3, 4, 5, 6, 7, 8, 0]) == []
    assert hits(cache, [5, 6, 7, 8, 0]) == []  # the same page in another place


def test_colliding_hashes_do_not_share(pool: PagePool, cache: PrefixCache) -> None:
    one, other = [0, 1, 2, 3], [2**61 - 1, 1, 2, 3]
    assert hash(tuple(one)) == hash(tuple(other))  # CPython hashes integers modulo 2**61 - 1
    a = Sequence(pool, cache, [*one, 9]).register()
    assert hits(cache, [*one, 9]) == a.pages[:1]
    assert hits(cache, [*other, 9]) == []
    b = Sequence(pool, cache, [*other, 9]).register()
    assert hits(cache, [*other, 9]) == b.pages[:1] != a.pages[:1]


def test_shared_pages_outlive_their_first_owner(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(9))
    a = Sequence(pool, cache, tokens).register()
    b = Sequence(pool, cache, tokens)
    assert b.num_hits == 2 and b.pages[:2] == a.pages[:2]
    assert cache.num_unowned(cache.match(tokens)) == 0
    a.free()
    pool.check_invariants([b.pages])
    b.free()
    pool.check_invariants([])
    assert cache.num_unowned(cache.match(tokens)) == 2
    assert Sequence(pool, cache, tokens).num_hits == 2


def test_eviction_ends_the_chain_there(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(9))
    a = Sequence(pool, cache, tokens).register()
    a.free()
    pool.allocate(15)  # all but the first page: the end of a sequence is evicted first
    assert hits(cache, tokens) == a.pages[:1]
    pool.allocate(1)
    assert hits(cache, tokens) == [] and cache.num_cached_pages == 0


def test_equal_content_computed_twice_is_kept_once(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(13))
    a, b = Sequence(pool, cache, tokens), Sequence(pool, cache, tokens)  # neither sees the other's pages
    a.register(1)
    b.register(2)  # its first page stays private, its second is the first of its kind
    a.register()
    assert hits(cache, tokens) == [a.pages[0], b.pages[1], a.pages[2]]
    a.free()
    b.free()
    pool.check_invariants([])
    assert cache.num_cached_pages == 3


def test_a_chain_goes_on_while_its_beginning_is_evicted_and_computed_again(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(9))
    a, b = Sequence(pool, cache, tokens), Sequence(pool, cache, tokens)
    a.register(1)
    b.register(1)
    a.free()
    rest = pool.allocate(pool.num_free_pages)  # evicts a's page; b's own copy of it was never registered
    assert hits(cache, tokens) == []
    b.register()
    assert hits(cache, tokens) == []  # its second page is known, but the first is missing
    pool.release(rest)
    c = Sequence(pool, cache, tokens)
    assert c.num_hits == 0
    c.register(1)
    assert hits(cache, tokens) == [c.pages[0], b.pages[1]]


def test_forgotten_pages_take_what_was_computed_from_them_along(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(13))
    a = Sequence(pool, cache, tokens[:5]).register()
    b = Sequence(pool, cache, tokens).register()
    assert b.num_hits == 1
    cache.forget(a.pages)
    assert hits(cache, tokens) == []
    a.free()
    c = Sequence(pool, cache, tokens[:5]).register()  # computed afresh
    assert hits(cache, tokens) == c.pages[:1]  # and not b's second page, which came from the suspect one
    b.free()
    c.free()
    pool.check_invariants([])
    assert Sequence(pool, cache, tokens).register().num_hits == 1


def test_partial_pages_are_refused(pool: PagePool, cache: PrefixCache) -> None:
    a = Sequence(pool, cache, [1, 2, 3])
    with pytest.raises(ValueError, match="only full pages of 4 tokens can be cached, got 3"):
        cache.insert(a.end, [1, 2, 3], a.pages[0])


@pytest.mark.parametrize("seed", range(20))
def test_random_sequences_only_ever_find_their_own_content(
    pool: PagePool, cache: PrefixCache, seed: int
) -> None:
    rng = random.Random(seed)
    content: dict[int, list[int]] = {}  # page -> all tokens up to its end
    live: list[Sequence] = []
    for _ in range(300):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 20))]
        num_pages = -(-len(tokens) // PAGE_SIZE)
        if num_pages <= pool.num_free_pages and rng.random() < 0.5:
            sequence = Sequence(pool, cache, tokens)
            for index, page in enumerate(sequence.pages):
                prefix = tokens[: (index + 1) * PAGE_SIZE]
                if index < sequence.num_hits:
                    assert content[page] == prefix
                content[page] = prefix
            live.append(sequence)
        elif live and rng.random() < 0.5:
            live[rng.randrange(len(live))].register()
        elif live:
            sequence = live.pop(rng.randrange(len(live)))
            if rng.random() < 0.1:
                cache.forget(sequence.pages)
            sequence.free()
        pool.check_invariants(sequence.pages for sequence in live)
    for sequence in live:
        sequence.free()
    pool.allocate(pool.num_pages)  # evicts everything
    assert cache.num_cached_pages == 0 and not cache._nodes, "nodes without a page leak"
