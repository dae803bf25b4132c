"""linear with act_bits = 16: floats times dequantised weights (W4A16, W8A16), against float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_linear import QUANTISED, Weight
from tilestream import ops, testing
from tilestream.ops import PackedFormat
from tilestream.reference import linear as reference

pytestmark = pytest.mark.simt
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_format = pytest.mark.parametrize("format", list(QUANTISED), ids=lambda f: f.name)


def skip_if_not_on(backend: testing.Backend, dtype: torch.dtype) -> None:
    if backend.name != "cpu" and dtype == torch.float32:
        pytest.skip("a GPU has kernels for float16 and bfloat16")


def check(m: int, n: int, k: int, format: PackedFormat, dtype: torch.dtype, bias: bool = False) -> None:
    weight = Weight(n, k, format)
    x, b = testing.Guarded((m, k), dtype, fill=torch.randn(m, k)).tensor, torch.randn(n) if bias else None
    out = testing.Guarded((m, n), dtype)
    ops.linear(x, weight.packed, b, out=out.tensor, act_bits=16)
    out.assert_untouched_outside()
    want = reference.linear(x, weight.values, b)
    plain = []
    for order in [torch.arange(k)] + [torch.randperm(k) for _ in range(3)]:
        # 64 rows: torch sums one row and many rows in different orders
        rows = torch.cat([x, torch.zeros(64, k, dtype=dtype)])[:, order]
        y = (rows @ weight.values.to(dtype)[:, order].T)[:m].float() + (b if bias else 0.0)
        plain.append(y.to(dtype))
    testing.assert_as_good_as_plain(out.tensor, want, testing.worst_of(plain, want))


@each_format
@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), [
    (0, 32, 64), (1, 31, 32), (1, 33, 96), (3, 100, 160), (8, 130, 576), (9, 40, 128), (17, 70, 192), (64, 36, 32), (65, 150, 96),
])
def test_shapes(backend: testing.Backend, m: int, n: int, k: int, format: PackedFormat, dtype: torch.dtype) -> None:
    skip_if_not_on(backend, dtype)
    check(m, n, k, format, dtype, bias=m % 2 == 1)


@each_format
def test_long_sums(backend: testing.Backend, format: PackedFormat) -> None:
    for m in (1, 12):
        check(m, 96, 4096, format, torch.bfloat16)


@each_format
def test_every_simd_level(simd_level: str, format: PackedFormat) -> None:
    for m in (1, 7, 40):
        for dtype in DTYPES:
            check(m, 75, 96, format, dtype, bias=True)


@each_format
def test_rows_do_not_depend_on_others_or_threads(backend: testing.Backend, set_num_threads, format: PackedFormat) -> None:
    weight = Weight(40, 1184, format).packed
    for dtype in DTYPES if backend.name == "cpu" else DTYPES[2:]:
        x = torch.randn(70, 1184).to(dtype)
        alone = torch.cat([ops.linear(rows, weight, act_bits=16) for rows in x.split(1 if backend.name == "cpu" else 8)])
        for num in (1, 2, 3) if backend.name == "cpu" else (1,):
            set_num_threads(num)
            for m in (2, 5, 8, 9, 33, 70):
                assert torch.equal(ops.linear(x[:m], weight, act_bits=16), alone[:m]), f"{m} rows, {num} threads, {dtype}"


@each_format
def test_nan_and_infinity_stay_in_their_row(backend: testing.Backend, format: PackedFormat) -> None:
    weight, x = Weight(40, 64, format).packed, torch.randn(5, 64).half()
    clean = ops.linear(x, weight, act_bits=16)
    x[1], x[2, 40], x[3, 3] = 0.0, float("nan"), float("inf")
    out = ops.linear(x, weight, act_bits=16)
    assert torch.equal(out[[0, 4]], clean[[0, 4]])
    assert torch.equal(out[1], torch.zeros(40).half())
    assert bool(out[2].isnan().all()) and not bool(out[3].isfinite().any())


def test_bad_input() -> None:
    x, floats = torch.zeros(2, 64), ops.pack_weight(torch.zeros(32, 64), format=PackedFormat.FLOAT32)
    packed = Weight(40, 64, PackedFormat.U4G32).packed
    with pytest.raises(ValueError, match="act_bits is 16; allowed: 8, and 16 for group-quantised weights"):
        ops.linear(x, floats, act_bits=16)
    with pytest.raises(ValueError, match="act_bits is 4; allowed: 8, and 16"):
        ops.linear(x, packed, act_bits=4)
    with pytest.raises(ValueError, match="act_bits is 16; it is for rows of floats"):
        ops.linear(ops.quantise(x), packed, act_bits=16)
