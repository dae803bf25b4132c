"""Planning one step of 256 decodes x 8 kv heads, lengths 1 to 32k tokens"""

from __future__ import annotations

import numpy as np
import pytest

from bench.harness import Report, interleave
from tilestream._native import _C
from tilestream.reference.plan import check_coverage, decode_plan


@pytest.mark.parametrize("num_workers", [2, 132])
@pytest.mark.parametrize("mode", ["balanced", "balanced, narrow lists", "batch-invariant"])
def test_plan_256_decodes(mode: str, num_workers: int, report: Report) -> None:
    planner = _C.Planner(
        num_qo_heads=32, num_kv_heads=8, page_size=32, num_workers=num_workers, tile_rows=64, tile_keys=64,
        split_tokens=4096, window_left=-1, causal=True, batch_invariant=mode == "batch-invariant", cost_tile=64,
        cost_row=1, narrow_rows=16 if mode.endswith("narrow lists") else 0,
    )  # fmt: skip
    cu_seqlens_q = np.arange(257, dtype=np.int32)
    kv_lens = np.random.default_rng(0).integers(1, 32769, 256, dtype=np.int32)
    plan = decode_plan(planner.plan(cu_seqlens_q, kv_lens))
    check_coverage(plan, cu_seqlens_q, kv_lens)
    times = interleave({"ours": lambda: planner.plan(cu_seqlens_q, kv_lens)}, rounds=2000, warmup=20, settle=False)
    case = f"{mode}, {num_workers} workers: {len(plan.jobs)} jobs, {len(plan.merges)} merges"
    report.add("plan", case, times, limit="50 us")
