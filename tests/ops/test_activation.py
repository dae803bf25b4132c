"""silu_and_mul and gelu_tanh_and_mul against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tilestream import ops, testing
from tilestream.reference import activation as reference

pytestmark = pytest.mark.simt
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain_silu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def plain_gelu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


KINDS = {
    "silu": (ops.silu_and_mul, reference.silu_and_mul, plain_silu),
    "gelu_tanh": (ops.gelu_tanh_and_mul, reference.gelu_tanh_and_mul, plain_gelu),
}
each_kind = pytest.mark.parametrize(("op", "exact", "plain"), KINDS.values(), ids=KINDS)


def check(op: Callable, exact: Callable, plain: Callable, x: torch.Tensor) -> None:
    out = testing.Guarded((x.shape[0], x.shape[1] // 2), x.dtype)
    op(x, out=out.tensor)
    testing.assert_as_good_as_plain(out.tensor, exact(x), plain(x))
    out.assert_untouched_outside()


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 96, 1536])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 37])
def test_against_float64(
    backend: testing.Backend, op: Callable, exact: Callable, plain: Callable, num_tokens: int, hidden: int, dtype: torch.dtype
) -> None:
    check(op, exact, plain, testing.Guarded((num_tokens, 2 * hidden), dtype, fill=3 * torch.randn(num_tokens, 2 * hidden)).tensor)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_simd_level(simd_level: str, op: Callable, exact: Callable, plain: Callable, dtype: torch.dtype) -> None:
    check(op, exact, plain, (4 * torch.randn(3, 2 * 83)).to(dtype))


@each_kind
def test_saturated_gates(backend: testing.Backend, op: Callable, exact: Callable, plain: Callable) -> None:
    """exp of a large gate overflows; the result must be the gate itself, or 0."""
    gate = torch.tensor([-1e30, -1000.0, -90.0, -0.0, 0.0, 90.0, 1000.0, 1e30])
    check(op, exact, plain, torch.cat([gate, torch.ones(8)]).unsqueeze(0))


@each_kind
def test_a_nan_stays_in_its_place(backend: testing.Backend, op: Callable, exact: Callable, plain: Callable) -> None:
    x = torch.randn(2, 80)
    x[0, 3], x[1, 45] = float("nan"), float("inf")
    check(op, exact, plain, x)


@each_kind
def test_rows_do_not_depend_on_others_or_threads(
    backend: testing.Backend, set_num_threads, op: Callable, exact: Callable, plain: Callable
) -> None:
    x = torch.randn(201, 3072).bfloat16()
    alone = torch.cat([op(row) for row in x.split(1)])
    for num in (1, 2, 3, 7):
        set_num_threads(num)
        assert torch.equal(op(x), alone)


def test_opcheck() -> None:
    for dtype in DTYPES:
        x = torch.randn(3, 64).to(dtype)
        for op in (torch.ops.tilestream.silu_and_mul.default, torch.ops.tilestream.gelu_tanh_and_mul.default):
            torch.library.opcheck(op, (x, torch.empty(3, 32, dtype=dtype)))


@pytest.mark.parametrize(
    ("x", "out", "error", "message"),
    [
        (torch.zeros(2, 7), None, ValueError, r"x has shape \[2, 7\]; .* must be even"),
        (torch.zeros(2, 8), torch.zeros(2, 8), ValueError, r"out has shape \[2, 8\]; dimension 1 must be 4 \(half of x\)"),
        (torch.zeros(2, 8), torch.zeros(3, 4), ValueError, r"out has shape \[3, 4\]; dimension 0 must be 2"),
        (torch.zeros(2, 8), torch.zeros(2, 4).half(), TypeError, "out has dtype Half; it must be Float as x"),
        (torch.zeros(2, 8, dtype=torch.int32), None, TypeError, "x has dtype Int; supported: Float, Half, BFloat16"),
        (torch.zeros(2, 8, 1), None, ValueError, r"x has 3 dimensions \[2, 8, 1\]; it needs 2"),
        (torch.zeros(8, 2).T, None, ValueError, "x has strides .* last dimension must be contiguous"),
    ],
)
def test_bad_input(x: torch.Tensor, out: torch.Tensor | None, error: type[Exception], message: str) -> None:
    for op in (ops.silu_and_mul, ops.gelu_tanh_and_mul):
        with pytest.raises(error, match=message):
            op(x, out=out)
