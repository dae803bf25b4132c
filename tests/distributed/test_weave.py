"""Where a step is cut in two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilestream.distributed.weave import (
    MIN_TOKENS,
    TABLE,
    Gemm,
    SplitRule,
    Tiling,
    linears,
    measured_rules,
    middle_of,
    rule_for,
    shape_key,
    split_point,
)
from tilestream.models.config import ModelConfig
from tilestream.models.config_hf import read_hf_config

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
    """14 waves and one row of tiles: the middle would make 8 + 8 of them."""
    gemm, tiling = Gemm(7168, 8192), Tiling(num_sms=128)
    num_tokens = 8192 + 128
    assert tiling.num_waves(num_tokens, gemm) == 15
    assert lost(num_tokens, 4224, (gemm,), tiling) == [0] and lost(num_tokens, 4352, (gemm,), tiling) == [1]
    assert split_point(num_tokens, (gemm,), tiling) == 4224


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


def config_70b(tmp_path: Path) -> ModelConfig:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
                "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 500000.0, "hidden_act": "silu",
                "tie_word_embeddings": False,
            }
        )
    )  # fmt: skip
    return read_hf_config(path)


def test_the_table_is_by_device_and_shape(tmp_path: Path) -> None:
    table = tmp_path / "splits.json"
    shape = "8192x28672 heads 64/8x128 tp8"
    table.write_text(json.dumps({"GPU A": {shape: {"min_tokens": 2048, "offsets": {"4096": 128}}}}))
    rule = rule_for("GPU A", shape, LLAMA_70B_TP8, Tiling(124), table)
    assert rule.first_tokens(2047) == 0 and rule.first_tokens(4096) == 2048 + 128
    for device, key in (("GPU B", shape), ("GPU A", "another")):
        assert rule_for(device, key, LLAMA_70B_TP8, Tiling(124), table) == SplitRule(Tiling(124), LLAMA_70B_TP8)


def test_the_shipped_table_can_be_read() -> None:
    for shapes in measured_rules(TABLE).values():
        for row in shapes.values():
            assert row["min_tokens"] >= 2 and all(offset % 128 == 0 for offset in row["offsets"].values())
