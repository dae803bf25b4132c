"""The linears of groups of 128 on Hopper: their tiles, rings and slices of K. test_linear.py has what they share with others."""

from __future__ import annotations

import pytest
import torch

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
    return packed, reference.dequantise(q, scale, zero)


def exact_rows(m: int, k: int, k4: int) -> torch.Tensor:
    """Whole numbers, which quantise to themselves: every span has its largest."""
    x = torch.randint(-7, 8, (m, k)).float()
    x[:, :k4:128], x[:, k4::128] = 7.0, -127.0
    return x


def check_exact(m: int, n: int, k: int, k4: int, format: PackedFormat, out: torch.Tensor | None = None) -> None:
    weight, values = exact_weight(n, k, format)
    x, bias = exact_rows(m, k, k4), torch.randint(-9, 10, (n,)).float()
    got = ops.linear(ops.quantise(x, k4=k4), weight, bias, out=out if out is not None else torch.empty(m, n))
    assert torch.equal(got.double(), reference.linear(x, values, bias))


def random_rows(m: int, k: int, k4: int) -> QuantisedRows:
    return ops.quantise(torch.randn(m, k), k4=k4)


def first(rows: QuantisedRows, m: int) -> QuantisedRows:
    return QuantisedRows(rows.q[:m], rows.scale[:m], rows.sum[:m], rows.k4)


# Tiles of 128 rows (of 64 with zeros) by 256 columns: 44 of them, the last ones of the rows and of the columns not whole.
WIDE = (21 * 128 + 3, 258)


@each_format
def test_wide_tiles(backend: testing.Backend, format: PackedFormat) -> None:
    check_exact(*WIDE, 288, 128, format)


@each_format
def test_wide_tiles_are_the_narrow_ones_bit_for_bit(backend: testing.Backend, format: PackedFormat) -> None:
    """Two slices of K, whose sums wait in the workspace between them."""
    k, (m, n) = 1056, WIDE
    weight = ops.pack_weight(q=torch.randint(2**format.bits, (n, k), dtype=torch.uint8), scale=torch.rand(n, 9),
                             zero=None if format.is_symmetric else torch.randn(n, 9), format=format)  # fmt: skip
    rows = random_rows(m, k, 256)
    all_rows = ops.linear(rows, weight, out=torch.empty(m, n))
    for some in (5, 130):
        assert torch.equal(all_rows[:some], ops.linear(first(rows, some), weight, out=torch.empty(some, n)))


@pytest.mark.parametrize(("n", "stride", "begin"), [(259, 259, 0), (258, 261, 0), (258, 262, 1)])
def test_results_that_are_no_pairs(backend: testing.Backend, n: int, stride: int, begin: int) -> None:
    """Many rows, but wide tiles store pairs of neighbours."""
    m = WIDE[0]
    room = torch.full((m, stride), 5.5)
    check_exact(m, n, 64, 0, PackedFormat.U4G128S, room[:, begin : begin + n])
    room[:, begin : begin + n] = 5.5
    assert bool((room == 5.5).all())


@each_format
@pytest.mark.parametrize("k4", [0, 20480, 1152])
def test_rings_go_round(backend: testing.Backend, format: PackedFormat, k4: int) -> None:
    """Eight slices of 20 groups, more than a ring has stages; INT4 and INT8 groups meet in a slice."""
    check_exact(3, 70, 20480, k4, format)


@pytest.mark.parametrize("m", [15, 16, 17, 32, 33, 64, 65, 128, 129])
@pytest.mark.parametrize("k", [128, 544, 1056])
def test_narrow_tiles(backend: testing.Backend, m: int, k: int) -> None:
    """Tiles of 16, 32, 64 and 128 rows; one and two slices, with even and odd numbers of groups, the last of them not whole."""
    out = testing.Guarded((m, 65), torch.float32)
    check_exact(m, 65, k, 128, PackedFormat.U4G128S, out.tensor)
    out.assert_untouched_outside()
