"""What carries the tests' tensors to a GPU, tried with copies on the CPU."""

from __future__ import annotations

import torch

from tests.on_device import OnDevice
from tests.ops.attention_case import Case, exact, make_tensors, run
from tilestream import ops, testing


def test_results_come_back_and_only_where_the_op_writes() -> None:
    x, residual = (testing.Guarded((3, 64), torch.float32, fill=torch.randn(3, 64)) for _ in range(2))
    weight = torch.rand(64)
    want_residual = x.tensor + residual.tensor
    want = torch.nn.functional.rms_norm(want_residual, (64,), weight, 1e-6)
    with OnDevice(torch.device("cpu")):
        ops.fused_add_rms_norm(x.tensor, residual.tensor, weight)
    torch.testing.assert_close(x.tensor, want)
    assert torch.equal(residual.tensor, want_residual)
    x.assert_untouched_outside()
    residual.assert_untouched_outside()


def test_views_of_one_storage_stay_views_of_one() -> None:
    """K and V of a cache share memory; the plan is both on the device and on the host."""
    case = Case(q_lens=(1, 5), kv_lens=(40, 9), layout="hnd")
    t = make_tensors(case)
    with OnDevice(torch.device("cpu")):
        out, lse = run(case, t)
    want, want_lse = exact(case, t)
    testing.assert_within(out, want, 1e-5)
    testing.assert_within(lse, want_lse, 1e-5)
    cache = ops.KvCache.allocate(4, 2, 16, 64, kv_dtype="float32", blocked=False)
    k, v, slots = torch.randn(2, 2, 64), torch.randn(2, 2, 64), torch.tensor([17, 3], dtype=torch.int32)
    with OnDevice(torch.device("cpu")):
        ops.append_kv(None, k, v, torch.zeros(2, dtype=torch.int32), slots, cache)
        got_k, got_v = ops.gather_kv(cache, slots)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)
