"""The policy that routes by prefix: pure, so it is tested everywhere."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from tilestream.replicas.affinity import BLOCK_BYTES, in_order, prefix_key

NAMES = [f"replica-{i}" for i in range(8)]
IDLE = dict.fromkeys(NAMES, 0)


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def keys(num: int, seed: int = 0) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(16) for _ in range(num)]


def test_a_common_beginning_is_a_common_key() -> None:
    system = "You are a helpful assistant. " * 60
    assert prefix_key(body(prompt=system + "a")) == prefix_key(body(prompt=system + "b", max_tokens=3))
    assert prefix_key(body(prompt="x" + system)) != prefix_key(body(prompt=system))
    ids = list(range(500))
    assert prefix_key(body(prompt=ids)) == prefix_key(body(prompt=[*ids[:256], 7])) != prefix_key(body(prompt=ids[1:]))
    assert prefix_key(body(prompt=[ids, [1]])) == prefix_key(body(prompt=ids))
    assert prefix_key(body(prompt=[system])) == prefix_key(body(prompt=system))


def test_whole_blocks_count() -> None:
    text = "x" * (BLOCK_BYTES - 1)
    assert prefix_key(body(prompt=text)) is None
    assert prefix_key(body(prompt=text + "x")) == prefix_key(body(prompt=text + "x" + "y" * (BLOCK_BYTES - 1))) is not None


def test_a_conversation_keeps_its_key() -> None:
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of rain. " * 20}]
    later = [*first, {"role": "assistant", "content": "Wet."}, {"role": "user", "content": "More. " * 200}]
    assert prefix_key(body(messages=first)) == prefix_key(body(messages=later)) is not None
    other = [first[0], {"role": "user", "content": "Of snow. " * 20}]
    assert prefix_key(body(messages=other)) != prefix_key(body(messages=first))
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me. " * 40}]}]
    assert prefix_key(body(messages=parts)) is not None


def test_salts_share_nothing() -> None:
    prompt = "x" * 1000
    assert len({prefix_key(body(prompt=prompt, **salt)) for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b" * 100})}) == 3


@pytest.mark.parametrize(
    "broken", [b"", b"{", b"[]", b"3", b"{}", b'{"prompt": 3}', b'{"prompt": []}', b'{"prompt": [-1, 2]}', b'{"messages": [3]}',
               b'{"messages": 4}', b'{"prompt": {}}', b'{"prompt": [[]]}', b'{"prompt": [1.5, "a"]}', b"\xff"],
)  # fmt: skip
def test_a_bad_request_has_none(broken: bytes) -> None:
    assert prefix_key(broken) is None


def test_a_prefix_has_one_home() -> None:
    for key in keys(100):
        order = in_order(key, IDLE)
        assert sorted(order) == NAMES and order == in_order(key, dict(reversed(IDLE.items())))
    homes = Counter(in_order(key, IDLE)[0] for key in keys(4000))
    assert min(homes.values()) > 400 and max(homes.values()) < 600


def test_who_goes_moves_only_its_own() -> None:
    fewer = {name: 0 for name in NAMES[:-1]}
    for key in keys(300):
        before, after = in_order(key, IDLE), in_order(key, fewer)
        assert after == [name for name in before if name != NAMES[-1]]


def test_a_busy_home_is_passed_over() -> None:
    (key,) = keys(1)
    first, second = in_order(key, IDLE)[:2]
    assert in_order(key, IDLE | {first: 3})[0] == first  # that is nothing
    assert in_order(key, IDLE | {first: 4})[0] == second
    busy = dict.fromkeys(NAMES, 20)
    assert in_order(key, busy)[0] == first
    assert in_order(key, busy | {first: 30})[0] == second
    assert in_order(key, busy | {first: 30})[-1] == first


def test_no_replica_gets_far_more_than_its_share() -> None:
    """Of requests that all begin alike, and of others."""
    for distinct in (1, 5, 1000):
        loads, chance, pool = dict(IDLE), random.Random(distinct), keys(distinct)
        for _ in range(800):
            loads[in_order(chance.choice(pool), loads)[0]] += 1
        assert max(loads.values()) <= 1.25 * 100 + 1


def test_without_a_prefix_the_idlest() -> None:
    assert in_order(None, {"a": 2, "b": 0, "c": 1}) == ["b", "c", "a"]
    assert in_order(None, {}) == in_order(b"x", {}) == []
