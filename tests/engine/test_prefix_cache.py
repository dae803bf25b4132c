"""Prefix identity is token content, and nothing else."""

from __future__ import annotations

import random

import pytest
from tilestream.engine.page_pool import PagePool
from tilestream.engine.prefix_cache import PrefixCache
from tilestream.engine.request import RequestOptions

from .fakes import GREEDY, expected_output, make_engine, run_all, tokens_of

PAGE_SIZE = 4


class Sequence:
    """One request's use of the cache: match, compute the rest, register full pages."""

    def __init__(
        self, pool: PagePool, cache: PrefixCache, tokens: list[int], salt: str = "", priority: int = 0
    ) -> None:
        self.pool, self.cache, self.tokens, self.priority = pool, cache, tokens, priority
        nodes = cache.match(tokens, salt)
        self.pages, self.end = cache.acquire(nodes, salt, priority)
        self.num_hits = len(nodes)
        self.num_registered = self.num_hits
        self.pages += pool.allocate(-(-len(tokens) // PAGE_SIZE) - len(nodes))

    def register(self, num_pages: int | None = None) -> Sequence:
        end = len(self.tokens) // PAGE_SIZE if num_pages is None else self.num_registered + num_pages
        for index in range(self.num_registered, end):
            tokens = self.tokens[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            self.end = self.cache.insert(self.end, tokens, self.pages[index], self.priority)
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


def hits(cache: PrefixCache, tokens: list[int], salt: str = "") -> list[int | None]:
    return [node.page for node in cache.match(tokens, salt)]


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


def test_salts_share_nothing(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(9))
    a = Sequence(pool, cache, tokens, "a").register()
    b = Sequence(pool, cache, tokens, "b").register()
    assert a.num_hits == b.num_hits == 0 and not set(a.pages) & set(b.pages)
    assert hits(cache, tokens, "a") == a.pages[:2] and hits(cache, tokens, "b") == b.pages[:2]
    assert hits(cache, tokens) == hits(cache, tokens, "c") == []
    cache.forget(a.pages)
    assert hits(cache, tokens, "a") == [] and hits(cache, tokens, "b") == b.pages[:2]


def test_less_important_pages_are_evicted_first_however_recent(pool: PagePool, cache: PrefixCache) -> None:
    prompts = {priority: [priority % 7] * 9 for priority in (0, 5, -3, 2)}
    for priority, tokens in prompts.items():
        Sequence(pool, cache, tokens, priority=priority).register().free()
    evicted = 8  # that many are free
    for priority in (5, 2, 0, -3):
        assert len(hits(cache, prompts[priority])) == 2
        evicted += 2
        pool.release(pool.allocate(evicted))
        assert hits(cache, prompts[priority]) == []
    assert cache.num_cached_pages == 0


def test_an_important_user_makes_shared_pages_important(pool: PagePool, cache: PrefixCache) -> None:
    """Whether it finds them in the cache or computes them a second time, while their owner runs or after."""
    head = [1, 2, 3, 4]
    Sequence(pool, cache, [*head, *[5] * 5], priority=9).register().free()
    Sequence(pool, cache, [*head, *[6] * 5], priority=1).register().free()
    Sequence(pool, cache, [7] * 9, priority=4).register().free()
    pool.release(pool.allocate(16 - 3))  # leaves three of the five cached pages
    assert [len(hits(cache, [*head, *[x] * 5])) for x in (5, 6)] == [1, 2]
    assert len(hits(cache, [7] * 9)) == 1
    slow, fast = Sequence(pool, cache, [8] * 5, priority=9), Sequence(pool, cache, [8] * 5, priority=0)
    slow.register().free()
    fast.register().free()
    pool.release(pool.allocate(15))
    assert hits(cache, [8] * 5) == slow.pages[:1]


def test_partial_pages_are_refused(pool: PagePool, cache: PrefixCache) -> None:
    a = Sequence(pool, cache, [1, 2, 3])
    with pytest.raises(ValueError, match="only full pages of 4 tokens can be cached, got 3"):
        cache.insert(a.end, [1, 2, 3], a.pages[0])


@pytest.mark.parametrize("seed", range(30))
def test_random_sequences_only_ever_find_their_own_content(
    pool: PagePool, cache: PrefixCache, seed: int
) -> None:
    rng = random.Random(seed)
    content: dict[int, tuple[str, list[int]]] = {}  # page -> salt, and all tokens up to the page's end
    live: list[Sequence] = []
    for _ in range(300):
        tokens, salt = [rng.randint(0, 1) for _ in range(rng.randint(1, 20))], rng.choice(("", "x"))
        num_pages = -(-len(tokens) // PAGE_SIZE)
        if num_pages <= pool.num_free_pages and rng.random() < 0.5:
            sequence = Sequence(pool, cache, tokens, salt, rng.randint(-1, 1))
            for index, page in enumerate(sequence.pages):
                prefix = salt, tokens[: (index + 1) * PAGE_SIZE]
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


@pytest.mark.parametrize("seed", range(30))
def test_a_page_is_evicted_after_all_that_build_on_it(seed: int) -> None:
    """One sequence at a time, so that no page is computed twice; then every cached page can be found."""
    rng = random.Random(seed)
    pool = PagePool(12)
    cache = PrefixCache(pool, PAGE_SIZE)
    for _ in range(200):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 24))]
        Sequence(pool, cache, tokens, rng.choice("ab"), rng.randint(0, 3)).register().free()
        for node in cache._node_of_page.values():
            assert node.parent.page is not None or node.parent.parent is cache._root


def test_the_engine_shares_within_a_tenant_and_a_salt() -> None:
    engine = make_engine()
    prompt = list(range(40))
    cached = {}
    for name, tenant, salt in (
        ("a", "", "x"), ("b", "", ""), ("c", "", "x"), ("d", "", ""), ("e", "", "y"), ("f", "x", ""), ("g", "t", "x"),
        ("h", "t", "x"), ("i", "t", ""), ("j", "x", ""),
    ):  # fmt: skip
        engine.add_request(name, prompt, GREEDY, RequestOptions(tenant=tenant, cache_salt=salt))
        cached[name] = run_all(engine)[name][-1].num_cached_tokens
    assert {name for name, tokens in cached.items() if tokens == 32} == {"c", "d", "h", "j"}
    assert set(cached.values()) == {0, 32}


def test_the_engine_keeps_what_important_requests_share() -> None:
    engine = make_engine(kv_cache_tokens=16 * 8)
    prompts = {priority: [priority] * 40 for priority in (0, 3)}
    for priority, prompt in prompts.items():
        engine.add_request(str(priority), prompt, GREEDY, RequestOptions(priority=priority))
        run_all(engine)
    engine.add_request("other", [9] * 80, GREEDY, RequestOptions(priority=3))  # 6 of 8 pages, and 4 are cached
    run_all(engine)
    match = engine.scheduler.cache.match
    assert [len(match(prompts[priority])) for priority in (0, 3)] == [2, 0]


@pytest.mark.parametrize("seed", range(10))
def test_no_salt_and_no_priority_changes_an_answer(seed: int) -> None:
    """In a cache so small that pages are evicted all the time; the runner computes each token from what its pages hold."""
    rng = random.Random(seed)
    engine = make_engine(kv_cache_tokens=16 * 12, max_num_seqs=4, max_model_len=120)
    asked, deltas = {}, {}
    for index in range(60):
        name = str(index)
        asked[name] = [rng.randrange(2)] * rng.randint(1, 70) + [rng.randrange(9)]
        options = RequestOptions(priority=rng.randint(-2, 2), cache_salt=rng.choice(("", "x")))
        engine.add_request(name, asked[name], GREEDY, options)
        for delta in [delta for _ in range(rng.randint(0, 6)) for delta in engine.step()]:
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.scheduler.check_invariants()
    for name, rest in run_all(engine).items():
        deltas.setdefault(name, []).extend(rest)
    for name, prompt in asked.items():
        assert tokens_of(deltas[name]) == expected_output(prompt, GREEDY, 0, 8)
    assert engine.metrics.prefix_cache_hits > 0
