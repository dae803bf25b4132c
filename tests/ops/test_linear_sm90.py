"""The linears of groups of 128 on Hopper: their tiles, rings and slices of K. test_linear.py has what they share with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.ops import test_linear, test_quantise
from tilestream import ops, testing
from tilestream.ops import PackedFormat, PackedWeight, QuantisedRows
from tilestream.reference import linear as reference

pytestmark = pytest.mark.simt(archs=(90,))
FORMATS = [f for f in PackedFormat if f.is_quantised and f.group_size == 128]
each_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def exact_weight(n: int, k: int, format: PackedFormat) -> tuple[PackedWeight, torch.Tensor]:
    """Scales are powers of two, zeros whole: no sum rounds. The packed form, and its values."""
    q, scale = torch.randint(2**format.bits, (n, k), dtype=torch.uint8), 2.0 ** torch.randint(-1, 1, (n, -(-k // 128)))
    zero = -(2 ** (format.bits - 1)) * scale if format.is_symmetric else torch.randint(-8, 9, scale.shape).float()
    packed = ops.pack_weight(q=q, scale=scale, zero=None if format.is_symmetric else zero, format=format)
    scale, zero = (t.double().repeat_interleave(128, 1)[:, :k] for t in (scale, zero))
    return packed, q * scale + zero


def exact_rows(m: int, k: int, k4: int) -> torch.Tensor:
    """Whole numbers, which quantise to themselves: every span has its largest."""
    x = torch.randint(-7, 8, (m, k)).float()
    x[::2, :k4:128], x[1::2, :k4:128], x[:, k4::128] = 8.0, -8.0, -127.0  # every span's scale is 1 or -1
    return x


def check_exact(m: int, n: int, k: int, k4: int, format: PackedFormat, out: torch.Tensor | None = None) -> None:
    weight, values = exact_weight(n, k, format)
    x, bias = exact_rows(m, k, k4), torch.randint(-9, 10, (n,)).float()
    got = ops.linear(ops.quantise(x, k4=k4), weight, bias, out=out if out is not None else torch.empty(m, n))
    assert torch.equal(got.double(), reference.linear(x, values, bias))


def first(rows: QuantisedRows, m: int) -> QuantisedRows:
    return dataclasses.replace(rows, q=rows.q[:m], scale=rows.scale[:m], sum=rows.sum[:m])


@each_format
@pytest.mark.parametrize(("m", "n", "k", "dtype"), [
    (0, 32, 64, torch.float32), (1, 1, 32, torch.float16), (3, 100, 224, torch.bfloat16), (17, 70, 128, torch.float16),
    (63, 36, 32, torch.float32), (130, 40, 96, torch.bfloat16), (12, 96, 4096, torch.float32),
], ids=str)
def test_shapes(backend: testing.Backend, m: int, n: int, k: int, dtype: torch.dtype, format: PackedFormat) -> None:
    test_linear.check(m, n, k, format, dtype, bias=True)


@each_format
def test_what_all_linears_promise(backend: testing.Backend, set_num_threads: Callable[[int], None], format: PackedFormat) -> None:
    test_linear.test_integer_sums_are_exact(backend, format)
    test_linear.test_zeros_nan_and_infinity_stay_in_their_row(backend, format)
    test_linear.test_rows_do_not_depend_on_others_or_threads(backend, set_num_threads, format)


@pytest.mark.parametrize("format", [PackedFormat.U4G128S, PackedFormat.U4G128], ids=lambda f: f.name)
@test_quantise.each_k4
def test_int4_blocks(
    backend: testing.Backend, set_num_threads: Callable[[int], None], format: PackedFormat, rows: int, k: int, k4: int
) -> None:
    test_quantise.test_linear_on_int4_blocks(backend, set_num_threads, format=format, rows=rows, k=k, k4=k4)


# Tiles of 128 rows (of 64 with zeros) by 256 columns: 44 of them, the last ones of the rows and of the columns not whole.
WIDE = (21 * 128 + 3, 258)


@each_format
def test_wide_tiles(backend: testing.Backend, format: PackedFormat) -> None:
    check_exact(*WIDE, 224, 128 if format.bits == 4 else 0, format)


def test_wide_tiles_are_the_narrow_ones_bit_for_bit(backend: testing.Backend) -> None:
    """Two slices of K, whose sums wait in the workspace between them."""
    k, (m, n) = 544, WIDE
    q, scale = torch.randint(16, (n, k), dtype=torch.uint8), torch.rand(n, 5)
    weight = ops.pack_weight(q=q, scale=scale, format=PackedFormat.U4G128S)
    rows = ops.quantise(torch.randn(m, k), k4=128)
    all_rows = ops.linear(rows, weight, out=torch.empty(m, n))
    for some in (5, 130):
        assert torch.equal(all_rows[:some], ops.linear(first(rows, some), weight, out=torch.empty(some, n)))


@pytest.mark.parametrize(
    ("dtype", "format"), [(torch.bfloat16, PackedFormat.U4G128), (torch.float32, PackedFormat.U8G128S)], ids=str
)
def test_wide_tiles_gate_and_add_as_narrow_ones(backend: testing.Backend, dtype: torch.dtype, format: PackedFormat) -> None:
    (m, n), k = WIDE, 288
    weight = test_linear.Weight(n, k, format).packed
    rows, bias, residual = ops.quantise(torch.randn(m, k)), torch.randn(n), torch.randn(m, n + 1).to(dtype)[:, :n]
    y = ops.linear(rows, weight, bias)
    gated = testing.Guarded((m, n // 2), dtype)
    ops.linear(rows, weight, bias, gate="silu", out=gated.tensor)
    gated.assert_untouched_outside()
    added = ops.linear(rows, weight, bias, residual=residual)
    halves = torch.cat([y[:, ::2], y[:, 1::2]], 1)
    for got, want in ((gated.tensor, ops.silu_and_mul(halves)), (added, y + residual)):
        testing.assert_within(got, want.double(), 2 * testing.unit_roundoff(dtype) * float(want.abs().max()))
    few, some = first(rows, 5), slice(5)
    assert torch.equal(gated.tensor[some], ops.linear(few, weight, bias, gate="silu", out=torch.empty(5, n // 2, dtype=dtype)))
    assert torch.equal(added[some], ops.linear(few, weight, bias, residual=residual[some]))


@pytest.mark.parametrize(("n", "stride", "begin"), [(259, 259, 0), (258, 262, 1)])
def test_results_that_are_no_pairs(backend: testing.Backend, n: int, stride: int, begin: int) -> None:
    """Many rows, but wide tiles store pairs of neighbours."""
    m = WIDE[0]
    room = torch.full((m, stride), 5.5)
    check_exact(m, n, 32, 0, PackedFormat.U4G128S, room[:, begin : begin + n])
    room[:, begin : begin + n] = 5.5
    assert bool((room == 5.5).all())


@pytest.mark.parametrize(("format", "k4"), [
    (PackedFormat.U4G128S, 0), (PackedFormat.U4G128S, 16512), (PackedFormat.U4G128S, 1152), (PackedFormat.U4G128, 1152),
    (PackedFormat.U8G128S, 0),
], ids=lambda value: getattr(value, "name", str(value)))
def test_rings_go_round(backend: testing.Backend, format: PackedFormat, k4: int) -> None:
    """Eight slices of 16 or 17 groups, more than a ring has stages; INT4 and INT8 groups meet in a slice."""
    check_exact(3, 40, 16512, k4, format)


@pytest.mark.parametrize("m", [15, 16, 17, 32, 33, 64, 65, 128, 129])
@pytest.mark.parametrize("k", [128, 736])
def test_narrow_tiles(backend: testing.Backend, m: int, k: int) -> None:
    """Tiles of 16, 32, 64 and 128 rows; one and two slices, with even and odd numbers of groups, the last of them not whole."""
    out = testing.Guarded((m, 65), torch.float32)
    check_exact(m, 65, k, 128, PackedFormat.U4G128S, out.tensor)
    out.assert_untouched_outside()
