"""RMSNorm, fused add + RMSNorm and gated activations against torch

The limit is a copy of as many bytes by torch in the same run: a norm reads and writes each row once, the fused form
reads and writes two.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

from bench.harness import Report, interleave
from tilestream import ops

DTYPES = [torch.bfloat16, torch.float32]
HIDDEN = 4096
ROUNDS = 15


def copy_of(num_bytes: int) -> Callable[[], object]:
    """A copy that reads and writes `num_bytes` together."""
    source = torch.ones(num_bytes // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def add_row(report: Report, op: str, case: str, candidates: dict[str, Callable[[], object]], num_bytes: int) -> None:
    times = interleave(candidates | {"copy of as many bytes": copy_of(num_bytes)}, rounds=ROUNDS)
    report.add(op, case, times, rate=f"{num_bytes / statistics.median(times['ours']) / 1e9:.1f} GB/s")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 1024])
def test_rms_norm(num_tokens: int, dtype: torch.dtype, report: Report) -> None:
    x, weight = torch.randn(num_tokens, HIDDEN, dtype=dtype), torch.rand(HIDDEN)
    out, cast = torch.empty_like(x), weight.to(dtype)
    expected = torch.nn.functional.rms_norm(x.float(), (HIDDEN,), weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, eps=1e-5).float(), expected, rtol=1e-2, atol=1e-3)
    candidates = {
        "ours": lambda: ops.rms_norm(x, weight, eps=1e-5, out=out),
        "torch": lambda: torch.nn.functional.rms_norm(x, (HIDDEN,), cast, 1e-5),
    }
    add_row(report, "rms_norm", f"{num_tokens} x {HIDDEN} {dtype}", candidates, 2 * x.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 1024])
def test_fused_add_rms_norm(num_tokens: int, dtype: torch.dtype, report: Report) -> None:
    x, weight = torch.randn(num_tokens, HIDDEN, dtype=dtype), torch.rand(HIDDEN)
    residual, cast = torch.zeros_like(x), weight.to(dtype)

    def with_torch() -> None:
        residual.add_(x)
        torch.nn.functional.rms_norm(residual, (HIDDEN,), cast, 1e-5)

    candidates = {"ours": lambda: ops.fused_add_rms_norm(x, residual, weight, eps=1e-5), "torch": with_torch}
    add_row(report, "x += r; rms_norm", f"{num_tokens} x {HIDDEN} {dtype}", candidates, 4 * x.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 1024])
def test_silu_and_mul(num_tokens: int, dtype: torch.dtype, report: Report) -> None:
    x = torch.randn(num_tokens, 2 * HIDDEN, dtype=dtype)
    out = x.new_empty(num_tokens, HIDDEN)
    with_torch = lambda: torch.nn.functional.silu(x[:, :HIDDEN]) * x[:, HIDDEN:]  # noqa: E731
    torch.testing.assert_close(ops.silu_and_mul(x), with_torch(), rtol=2e-2, atol=2e-2)
    candidates = {"ours": lambda: ops.silu_and_mul(x, out=out), "torch": with_torch}
    add_row(report, "silu_and_mul", f"{num_tokens} x {HIDDEN} {dtype}", candidates, x.nbytes + out.nbytes)
