"""rms_norm and fused_add_rms_norm against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tilestream import ops, testing
from tilestream.reference import norm as reference

EPS = 1e-5
pytestmark = pytest.mark.simt
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_weight(hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Values that `dtype` holds exactly, so that plain torch and the op see the same weight."""
    return (1 + 0.2 * torch.randn(hidden)).to(dtype).float()


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), EPS)


def check_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    out = testing.Guarded(tuple(x.shape), x.dtype)
    ops.rms_norm(x, weight, eps=EPS, out=out.tensor)
    testing.assert_as_good_as_plain(out.tensor, reference.rms_norm(x, weight, EPS), plain_rms_norm(x, weight))
    out.assert_untouched_outside()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 64, 576, 1000, 4096])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 33])
def test_rms_norm(backend: testing.Backend, num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x = testing.Guarded((num_tokens, hidden), dtype, fill=3 * torch.randn(num_tokens, hidden)).tensor
    check_rms_norm(x, make_weight(hidden, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_simd_level(simd_level: str, dtype: torch.dtype) -> None:
    for hidden in (63, 576):
        check_rms_norm(torch.randn(5, hidden).to(dtype), make_weight(hidden, dtype))
        check_fused(torch.randn(5, hidden).to(dtype), torch.randn(5, hidden).to(dtype), make_weight(hidden, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_a_fused_projection(backend: testing.Backend, dtype: torch.dtype) -> None:
    qkv = torch.randn(7, (4 + 2 + 2) * 64).to(dtype)
    q = qkv[:, : 4 * 64].unflatten(1, (4, 64))
    weight = make_weight(64, dtype)
    want, plain = reference.rms_norm(q, weight, EPS), plain_rms_norm(q, weight)
    rest = qkv[:, 4 * 64 :].clone()
    ops.rms_norm(q, weight, eps=EPS, out=q)  # in place
    testing.assert_as_good_as_plain(q, want, plain)
    assert torch.equal(qkv[:, 4 * 64 :], rest)


def check_fused(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    """The sum is rounded once, as plain torch does; the norm is of the rounded or of the exact sum."""
    want, want_sum = reference.fused_add_rms_norm(x, residual, weight, EPS)
    plain_sum = x + residual
    plain = plain_rms_norm(plain_sum, weight)
    got, got_sum = (testing.Guarded(tuple(x.shape), x.dtype, fill=t) for t in (x, residual))
    ops.fused_add_rms_norm(got.tensor, got_sum.tensor, weight, eps=EPS)
    testing.assert_as_good_as_plain(got_sum.tensor, want_sum, plain_sum, "residual")
    testing.assert_as_good_as_plain(got.tensor, want, plain, "x")
    got.assert_untouched_outside()
    got_sum.assert_untouched_outside()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 17, 576, 4096])
@pytest.mark.parametrize("num_tokens", [1, 2, 65])
def test_fused_add_rms_norm(backend: testing.Backend, num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(num_tokens, hidden).to(dtype) for _ in range(2))
    check_fused(x, residual, make_weight(hidden, dtype))


@pytest.mark.parametrize("scale", [0.0, 1e-4, 200.0])
def test_extreme_magnitudes(backend: testing.Backend, scale: float) -> None:
    """fp16 squares overflow from 256 on and vanish below 2^-13: the mean square has to be float32."""
    x = (scale * torch.randn(3, 128)).half()
    out = ops.rms_norm(x, torch.ones(128), eps=EPS)
    want = reference.rms_norm(x, torch.ones(128), EPS)
    testing.assert_within(out, want, 2 * testing.unit_roundoff(torch.float16) * float(want.abs().max()))


def test_rows_do_not_depend_on_others_or_threads(backend: testing.Backend, set_num_threads) -> None:
    x, weight = torch.randn(301, 576).bfloat16(), torch.ones(576)
    alone = torch.cat([ops.rms_norm(row, weight) for row in x.split(1)])
    for num in (1, 2, 3, 7):
        set_num_threads(num)
        assert torch.equal(ops.rms_norm(x, weight), alone)


def test_a_nan_stays_in_its_row(backend: testing.Backend) -> None:
    x = torch.randn(4, 100)
    x[2, 50] = float("nan")
    out = ops.rms_norm(x, torch.ones(100))
    assert out[2].isnan().all() and not out[[0, 1, 3]].isnan().any()


def test_opcheck() -> None:
    op = torch.ops.tilestream
    for dtype in DTYPES:
        x, residual, weight = torch.randn(3, 64).to(dtype), torch.randn(3, 64).to(dtype), torch.ones(64)
        torch.library.opcheck(op.rms_norm.default, (x, weight, torch.empty_like(x)), {"eps": EPS})
        torch.library.opcheck(op.fused_add_rms_norm.default, (x, residual, weight), {"eps": EPS})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, TypeError, "x has dtype Double; supported: Float, Half, BFloat16"),
        ({"x": torch.zeros(64)}, ValueError, r"x has shape \[64\]; it needs \[num_tokens, hidden\]"),
        ({"x": torch.zeros(64, 3).T}, ValueError, r"x has strides .* last dimension must be contiguous"),
        ({"weight": torch.ones(63)}, ValueError, r"weight has shape \[63\]; dimension 0 must be 64"),
        ({"weight": torch.ones(64).half()}, TypeError, "weight has dtype Half; supported: Float"),
        ({"residual": torch.zeros(3, 63)}, ValueError, r"residual has shape \[3, 63\]; it must be that of x"),
        ({"residual": torch.zeros(3, 64).half()}, TypeError, "residual has dtype Half; it must be Float as x"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(3, 64), "residual": torch.zeros(3, 64), "weight": torch.ones(64)} | change
    with pytest.raises(error, match=message):
        ops.fused_add_rms_norm(arguments["x"], arguments["residual"], arguments["weight"])


def test_bad_output() -> None:
    x, weight = torch.zeros(3, 64), torch.ones(64)
    with pytest.raises(ValueError, match=r"out has shape \[3, 32\]; it must be that of x, \[3, 64\]"):
        ops.rms_norm(x, weight, out=torch.zeros(3, 32))
    with pytest.raises(TypeError, match="out has dtype Half; it must be Float as x"):
        ops.rms_norm(x, weight, out=torch.zeros(3, 64).half())
