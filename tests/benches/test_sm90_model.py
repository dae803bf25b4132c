"""The Hopper model's sums: by hand, against each other, against what was measured of another kernel, in the documentation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import sm90_model
from bench.sm90_loads import (
    CLOCK_HZ, FLOP, HBM_BYTES_PER_S, NARROW_ROWS, NUM_SMS, ROW_BYTES, SMEM_BYTES, TILES, Heads, Tile, decode, executed,
    narrow_tile, our_wide_tile, prefill, wide_tile,
)  # fmt: skip

GPUS = tuple(HBM_BYTES_PER_S)
LLAMA = Heads(32, 8, 128, 128)

# FlashAttention-3, full attention, 16k tokens on an H100: its tile, and the TFLOP/s that its authors measured.
MEASURED = [
    (64, "bf16", Tile(3, 192), 497), (128, "bf16", Tile(2, 176), 648), (256, "bf16", Tile(2, 80), 756),
    (64, "fp8", Tile(3, 160), 613), (128, "fp8", Tile(2, 224), 1008),
]  # fmt: skip


def test_a_wide_tile_by_hand() -> None:
    """Two warpgroups of 64 rows, 128 keys, head_dim 128: 16,384 scores, 32 KB each of K and V."""
    cycles = wide_tile(Tile(2, 128), 128, 128)
    assert cycles["wgmma"] == 16384 * 4 * 128 / 4096 == 2048
    assert cycles["ex2"] == 16384 / 16
    assert cycles["issue"] == (16384 * 4.5 + 128 * 128) / 32 / 4
    assert cycles["smem"] == (2 * (16384 + 32768) + 2 * 32768 + 65536) / 128  # q twice, K and V twice, K and V once
    assert cycles["L2"] == 65536 / 24


def test_a_narrow_product_is_bound_by_its_operand_in_shared_memory() -> None:
    cycles = narrow_tile(128, "bfloat16", rows=8)
    keys_and_values, q, weights = 2 * 64 * 128 * 2, 8 * 128 * 2, 2 * 64 * 8 * 2
    assert cycles["wgmma"] == (keys_and_values + q + weights) / SMEM_BYTES


@pytest.mark.parametrize("product", FLOP)
@pytest.mark.parametrize("dims", TILES, ids=str)
def test_no_tile_beats_the_tensor_cores_or_shared_memory(dims: tuple[int, int], product: str) -> None:
    warpgroups, keys = TILES[dims]
    cycles = our_wide_tile(Heads(1, 1, *dims), product)
    assert 2 * 64 * warpgroups * keys * sum(dims) / cycles["wgmma"] <= FLOP[product]
    assert keys * sum(dims) * (2 if product == "bf16" else 1) / cycles["smem"] <= SMEM_BYTES


@pytest.mark.parametrize("rows", NARROW_ROWS)
@pytest.mark.parametrize("kv_dtype", ROW_BYTES)
def test_no_narrow_tile_beats_the_tensor_cores(kv_dtype: str, rows: int) -> None:
    assert 4 * 64 * rows * 128 / narrow_tile(128, kv_dtype, rows)["wgmma"] <= FLOP["bf16"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("case", sm90_model.cases(), ids=lambda case: f"{case.kind}: {case.what}")
def test_no_launch_beats_the_gpu(case: sm90_model.Case, gpu: str) -> None:
    load, peak = case.load, FLOP["fp8" if case.kind.startswith("fp8") else "bf16"] * NUM_SMS * CLOCK_HZ
    limit, expected = load.limit_s(gpu), load.expected_s(gpu)
    assert load.flop / limit <= peak
    assert load.hbm_bytes / limit <= HBM_BYTES_PER_S[gpu] * (1 + 1e-9)
    assert limit < expected
    assert load.binds(gpu) in load.all_cycles(gpu)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("mix", sm90_model.MIXES, ids=str)
def test_a_mixed_batch_lies_between_its_larger_part_and_both(mix: tuple[int, int, int], gpu: str) -> None:
    case = sm90_model.mixed_case(*mix, LLAMA)
    parts = [part.expected_s(gpu) for part in case.replaces]
    assert len(parts) == 2
    assert max(parts) <= case.load.expected_s(gpu) <= sum(parts)
    assert case.load.flop == sum(part.flop for part in case.replaces)


def test_a_cascade_reads_its_prefix_once() -> None:
    case, row_bytes = sm90_model.cascade_case(64, 4096, 256, LLAMA), 2 * 8 * 128 * 2
    assert case.load.hbm_bytes == case.replaces[0].hbm_bytes == (4096 + 64 * 256) * row_bytes
    assert case.load.flop == case.replaces[0].flop
    assert case.load.cycles["L2"] < case.replaces[0].cycles["L2"] / 5


def test_causal_tiles_cover_what_is_visible() -> None:
    """In chunks or at once: the last chunk of a prompt sees what its rows see in the whole of it."""
    whole = prefill(1, 4096, 4096, LLAMA)
    chunks = [prefill(1, 1024, end, LLAMA) for end in (1024, 2048, 3072, 4096)]
    assert sum(chunk.flop for chunk in chunks) == whole.flop == 2 * 32 * 4096**2 * 128
    for load in (whole, *chunks):
        assert 0.8 < load.flop / (load.cycles["wgmma"] * FLOP["bf16"] * NUM_SMS) <= 1


def test_the_goal_is_met_at_the_exposure_that_is_said_to_meet_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load = prefill(4, 4096, 4096, LLAMA)
    monkeypatch.setattr("bench.sm90_loads.EXPOSED", load.may_expose("H200", 900e-6))
    assert load.expected_s("H200") == pytest.approx(900e-6)
    assert load.may_expose("H200", load.limit_s("H200")) == -math.inf


def test_head_dims_without_a_narrow_lane_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim up to 192"):
        decode([1024], Heads(16, 4, 256, 256))


@pytest.mark.parametrize(("head_dim", "product", "tile", "tflops"), MEASURED, ids=str)
def test_the_model_gives_what_was_measured_of_a_known_kernel(head_dim: int, product: str, tile: Tile, tflops: float) -> None:
    cycles = wide_tile(tile, head_dim, head_dim, product)
    flop = 4 * 64 * tile.warpgroups * tile.keys * head_dim
    predicted = flop / executed(cycles) * NUM_SMS * CLOCK_HZ / 1e12
    assert abs(predicted / tflops - 1) < 0.06, f"{predicted:.0f} TFLOP/s, measured {tflops}"


def test_the_documentation_shows_the_tiles_as_they_are() -> None:
    page = Path(__file__).parents[2] / "docs" / "kernels" / "attention_sm90.md"
    assert sm90_model.tile_table() in page.read_text(), "docs/kernels/attention_sm90.md: its table is not bench.sm90_model's"
