"""What ranks get: all of the model, every part once (but for shared KV heads), evenly."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tilestream.distributed.shard import MOST_RANKS, Shard
from tilestream.layers.rope import RopeConfig
from tilestream.models.config import ModelConfig

_ROPE = RopeConfig(theta=1e4, rotary_dim=64)
SMOLLM2 = ModelConfig(
    family="llama", num_layers=30, hidden_size=576, num_qo_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536,
    vocab_size=49_152, max_position=8192, rms_eps=1e-5, rope=_ROPE, rope_local=_ROPE, window_left=(-1,) * 30, sm_scale=0.125,
)  # fmt: skip


def shards(config: ModelConfig, world_size: int, **options: int) -> list[Shard]:
    return [Shard.of(config, rank, world_size, **options) for rank in range(world_size)]


def covered(parts: list[range]) -> list[int]:
    return [i for part in parts for i in part]


@pytest.mark.parametrize("seed", range(200))
def test_parts_are_all_of_the_model(seed: int) -> None:
    rng = random.Random(seed)
    group_size, num_kv_heads = rng.randint(1, 8), rng.randint(1, 16)
    config = replace(
        SMOLLM2,
        num_qo_heads=group_size * num_kv_heads, num_kv_heads=num_kv_heads,
        intermediate_size=rng.randint(256, 30_000), vocab_size=rng.randint(256, 200_000),
    )  # fmt: skip
    world_size = rng.randint(1, min(MOST_RANKS, config.num_qo_heads))
    parts = shards(config, world_size)
    assert covered([part.q_heads for part in parts]) == list(range(config.num_qo_heads))
    assert covered([part.columns for part in parts]) == list(range(config.intermediate_size))
    assert covered([part.vocabulary for part in parts]) == list(range(config.vocab_size))
    for part in parts:
        assert len(part.q_heads) > 0 and len(part.columns) > 0 and len(part.vocabulary) > 0
        assert {head // group_size for head in part.q_heads} == set(part.kv_heads)
        assert len(part.kv_heads) == 1 or len(part.q_heads) == group_size * len(part.kv_heads)
        assert part.columns.start % 32 == 0 and part.vocabulary.start % 32 == 0
        assert part.vocabularies == parts[0].vocabularies
        local = part.local_config(config)
        assert (local.num_qo_heads, local.num_kv_heads) == (len(part.q_heads), len(part.kv_heads))
        assert local.intermediate_size == len(part.columns) and local.vocab_size == config.vocab_size
    # Evenly: by one unit, and a last part that is not whole.
    units = 128 if -(-config.intermediate_size // 128) >= world_size else 32
    for sizes, most in (
        ([len(part.columns) for part in parts], 2 * units),
        ([len(part.vocabulary) for part in parts], 2 * 32),
        ([len(part.kv_heads) for part in parts], 2),
    ):
        assert max(sizes) - min(sizes) < most
    if num_kv_heads < world_size:
        assert max(len(part.q_heads) for part in parts) <= group_size


@pytest.mark.parametrize(
    ("world_size", "q_heads", "kv_heads", "columns"),
    [
        (1, [9], [range(3)], [1536]),
        (2, [3, 6], [range(1), range(1, 3)], [768, 768]),
        (3, [3, 3, 3], [range(1), range(1, 2), range(2, 3)], [512] * 3),
        (4, [3, 3, 1, 2], [range(1), range(1, 2), range(2, 3), range(2, 3)], [384] * 4),
    ],
)
def test_smollm2(world_size: int, q_heads: list[int], kv_heads: list[range], columns: list[int]) -> None:
    parts = shards(SMOLLM2, world_size)
    assert [len(part.q_heads) for part in parts] == q_heads
    assert [part.kv_heads for part in parts] == kv_heads
    assert [len(part.columns) for part in parts] == columns


def test_blocks_stay_together() -> None:
    assert [len(part.columns) for part in shards(replace(SMOLLM2, intermediate_size=640), 4)] == [128, 128, 128, 256]
    assert [len(part.columns) for part in shards(replace(SMOLLM2, intermediate_size=384), 4)] == [96] * 4
    assert [len(part.columns) for part in shards(replace(SMOLLM2, intermediate_size=300), 4)] == [64, 96, 64, 76]


@pytest.mark.parametrize(
    ("changes", "rank", "world_size", "block", "message"),
    [
        ({}, 0, 9, 1, "of 9 query heads, runs on 1 to 8 ranks"),
        ({"num_qo_heads": 3}, 0, 4, 1, "rank 0 of 4: this model, of 3 query heads, runs on 1 to 3 ranks"),
        ({}, 2, 2, 1, "rank 2 of 2"),
        ({"intermediate_size": 256}, 0, 3, 128, "intermediate_size is 256, which is 2 times 128 that stay together; at most 2"),
        ({"intermediate_size": 64}, 0, 3, 1, "intermediate_size is 64, which is 2 times 32 that stay together; at most 2 ranks"),
        ({"vocab_size": 90}, 0, 4, 1, "vocab_size is 90, which is 3 times 32"),
    ],
)
def test_what_cannot_be_cut(changes: dict, rank: int, world_size: int, block: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shard.of(replace(SMOLLM2, **changes), rank, world_size, block=block)
