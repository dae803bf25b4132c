"""Where a step is cut in two."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from tilestream.distributed.weave import (
    MIN_TOKENS,
    TABLE,
    Gemm,
    SplitRule,
    Tiling,
    agreed_rule,
    layer_gemms,
    measured_rules,
    middle_of,
    shape_key,
    split_point,
)
from tilestream.placement import CPU

LLAMA_70B_TP8 = (Gemm(1280, 8192), Gemm(8192, 1024), Gemm(7168, 8192), Gemm(8192, 3584))


def lost(num_tokens: int, first: int, gemms: tuple[Gemm, ...], tiling: Tiling) -> list[int]:
    halves = (first, num_tokens - first)
    return [sum(tiling.num_waves(m, gemm) for m in halves) - tiling.num_waves(num_tokens, gemm) for gemm in gemms]


def test_waves_are_counted() -> None:
    tiling = Tiling(num_sms=128)
    assert tiling.num_tiles(4096, Gemm(7168, 8192)) == 32 * 28
    assert tiling.num_waves(4096, Gemm(7168, 8192)) == 7  # 896 tiles exactly
    assert tiling.num_waves(4097, Gemm(7168, 8192)) == 8
    assert Tiling.beside(8, 132) == tiling


def test_a_cut_that_loses_no_wave_is_found() -> None:
    """In the middle both halves begin a wave that they do not fill."""
    gemm, tiling = Gemm(7168, 8192), Tiling(num_sms=128)
    assert tiling.num_waves(6144, gemm) == 11 and tiling.num_waves(3072, gemm) == 6
    assert tiling.num_waves(3328, gemm) == 6 and tiling.num_waves(6144 - 3328, gemm) == 5
    assert lost(6144, 3200, (gemm,), tiling) == [1]
    assert split_point(6144, (gemm,), tiling) == 3328


def test_the_middle_of_equals() -> None:
    """One column of tiles on one SM: no cut at a tile's end loses anything."""
    assert split_point(2048, (Gemm(256, 64),), Tiling(num_sms=1)) == 1024
    assert split_point(1280, (Gemm(256, 64),), Tiling(num_sms=1)) == 640


@given(
    num_tokens=st.integers(2, 20_000),
    gemms=st.lists(st.builds(Gemm, st.integers(64, 9000), st.sampled_from([64, 1024, 8192])), min_size=1, max_size=4),
    num_sms=st.integers(1, 132),
)
def test_cuts_are_whole_tiles_near_the_middle(num_tokens: int, gemms: list[Gemm], num_sms: int) -> None:
    tiling = Tiling(num_sms)
    first = split_point(num_tokens, tuple(gemms), tiling)
    assert 0 < first < num_tokens
    assert 3 * num_tokens <= 8 * first <= 5 * num_tokens or first == -(-num_tokens // 2)
    if num_tokens >= 1024:
        assert first % 128 == 0
        cost = sum(g.k * waves for g, waves in zip(gemms, lost(num_tokens, first, tuple(gemms), tiling)))
        middle = middle_of(num_tokens)
        assert cost <= sum(g.k * waves for g, waves in zip(gemms, lost(num_tokens, middle, tuple(gemms), tiling)))


def test_small_steps_run_whole() -> None:
    rule = SplitRule(Tiling(124), LLAMA_70B_TP8)
    assert [rule.first_tokens(n) for n in (1, 512, MIN_TOKENS - 1)] == [0, 0, 0]
    assert rule.first_tokens(MIN_TOKENS) == 512
    assert SplitRule(Tiling(124), LLAMA_70B_TP8, min_tokens=1).first_tokens(1) == 0  # there are no halves


def test_measured_offsets_go_first() -> None:
    rule = SplitRule(Tiling(124), LLAMA_70B_TP8, min_tokens=2, offsets={2048: 0, 8192: 256})
    assert rule.first_tokens(2048) == 1024 and rule.first_tokens(2047) == 1024
    assert rule.first_tokens(8000) == 4096 + 256  # 4096 is the middle in whole tiles
    assert rule.first_tokens(3000) == middle_of(3000) == 1536
    assert rule.first_tokens(3) == 2  # each half keeps a token


RANK_OF_70B = SimpleNamespace(hidden_size=8192, qo_size=1024, kv_size=128, intermediate_size=3584)


class Ranks:
    """Seven ranks like this one, and a last one that gathers what it is told, call by call; None: the same."""

    world_size = 8

    def __init__(self, last: list[list[int] | None]) -> None:
        self.last = [*last, None, None]

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        last = self.last.pop(0)
        return torch.stack([x] * 7 + [x if last is None else torch.tensor(last)])


def test_the_table_is_by_device_and_shape(tmp_path: Path) -> None:
    table = tmp_path / "splits.json"
    measured = {"min_tokens": 2048, "offsets": {"4096": 128}}
    table.write_text(json.dumps({"GPU A": {shape_key(8192, 8192, 28672, 8): measured}}))
    rule = agreed_rule(RANK_OF_70B, Ranks([]), CPU.device, "GPU A", 132, table)
    assert rule == SplitRule(Tiling(124), LLAMA_70B_TP8, min_tokens=2048, offsets={4096: 128})
    assert rule.first_tokens(2047) == 0 and rule.first_tokens(4096) == 2048 + 128
    by_waves = SplitRule(Tiling(124), LLAMA_70B_TP8)
    assert agreed_rule(RANK_OF_70B, Ranks([]), CPU.device, "GPU B", 132, table) == by_waves
    # The last rank has measured nothing; or it has another GPU, and a larger part of the MLP.
    assert agreed_rule(RANK_OF_70B, Ranks([None, [1]]), CPU.device, "GPU A", 132, table) == by_waves
    other = agreed_rule(RANK_OF_70B, Ranks([[1024, 128, 4096, 78], None]), CPU.device, "GPU A", 132, table)
    assert other == SplitRule(Tiling(70), layer_gemms(8192, 1024, 128, 4096))


def test_the_shipped_table_can_be_read() -> None:
    for shapes in measured_rules(TABLE).values():
        for row in shapes.values():
            assert row["min_tokens"] >= 2 and all(offset % 128 == 0 for offset in row["offsets"].values())
