"""RMSNorm, fused add + RMSNorm and gated activations against torch

The limit is a copy of as many bytes: a norm reads and writes each row once, the fused form reads and writes two.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness import Report, interleave
from bench.roofs import Work
from tilestream import ops

DTYPES = [torch.bfloat16, torch.float32]
HIDDEN = 4096
ROUNDS = 15


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
    work = Work(2 * x.nbytes, memory="copy")
    report.add("rms_norm", f"{num_tokens} x {HIDDEN} {dtype}", interleave(candidates, rounds=ROUNDS), work=work)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 1024])
def test_fused_add_rms_norm(num_tokens: int, dtype: torch.dtype, report: Report) -> None:
    x, weight = torch.randn(num_tokens, HIDDEN, dtype=dtype), torch.rand(HIDDEN)
    residual, cast = torch.zeros_like(x), weight.to(dtype)

    def with_torch() -> None:
        residual.add_(x)
        torch.nn.functional.rms_norm(residual, (HIDDEN,), cast, 1e-5)

    candidates = {"ours": lambda: ops.fused_add_rms_norm(x, residual, weight, eps=1e-5), "torch": with_torch}
    work = Work(4 * x.nbytes, memory="copy", working_set=2 * x.nbytes)  # in place
    report.add("x += r; rms_norm", f"{num_tokens} x {HIDDEN} {dtype}", interleave(candidates, rounds=ROUNDS), work=work)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 1024])
def test_silu_and_mul(num_tokens: int, dtype: torch.dtype, report: Report) -> None:
    x = torch.randn(num_tokens, 2 * HIDDEN, dtype=dtype)
    out = x.new_empty(num_tokens, HIDDEN)
    with_torch = lambda: torch.nn.functional.silu(x[:, :HIDDEN]) * x[:, HIDDEN:]  # noqa: E731
    torch.testing.assert_close(ops.silu_and_mul(x), with_torch(), rtol=2e-2, atol=2e-2)
    candidates = {"ours": lambda: ops.silu_and_mul(x, out=out), "torch": with_torch}
    work = Work(x.nbytes + out.nbytes, memory="copy")
    report.add("silu_and_mul", f"{num_tokens} x {HIDDEN} {dtype}", interleave(candidates, rounds=ROUNDS), work=work)
