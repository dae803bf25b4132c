"""linear on row-major weights: every kernel against float64, bits, and the table that chooses among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.tune_linear import best_thresholds
from tilestream import ops, testing
from tilestream.ops import LinearKernel, PackedFormat, PackedWeight, linear_choice
from tilestream.ops.linear_choice import Thresholds
from tilestream.reference import linear as reference

DTYPES = {PackedFormat.ROWS_BFLOAT16: torch.bfloat16, PackedFormat.ROWS_FLOAT16: torch.float16}
each_format = pytest.mark.parametrize("format", list(DTYPES), ids=lambda f: f.name)
each_kernel = pytest.mark.parametrize("kernel", list(LinearKernel))


@pytest.fixture
def gpu(backend: testing.Backend) -> testing.Backend:
    """A backend that has row-major weights."""
    if backend.name == "cpu":
        pytest.skip("row-major weights are for GPUs")
    return backend


def weight_of(n: int, k: int, format: PackedFormat) -> tuple[PackedWeight, torch.Tensor]:
    """A random weight, and its values."""
    values = (torch.randn(n, k) / k**0.5).to(DTYPES[format])
    return ops.pack_weight(values.float(), format=format), values


def check(m: int, n: int, k: int, format: PackedFormat, kernel: LinearKernel | None, bias: bool = False) -> None:
    weight, values = weight_of(n, k, format)
    dtype = DTYPES[format]
    x = testing.Guarded((m, k), dtype, fill=torch.randn(m, k)).tensor
    b = torch.randn(n) if bias else None
    out = testing.Guarded((m, n), dtype)
    ops.linear(x, weight, b, out=out.tensor, kernel=kernel)
    out.assert_untouched_outside()
    want = reference.linear(x, values.double(), b)
    plain = []
    for order in [torch.arange(k)] + [torch.randperm(k) for _ in range(3)]:
        plain.append(((x[:, order] @ values[:, order].T).float() + (b if bias else 0.0)).to(dtype))
    testing.assert_as_good_as_plain(out.tensor, want, testing.worst_of(plain, want))


@pytest.mark.simt
@each_format
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(0, 32, 64), (1, 1, 8), (1, 33, 96), (2, 131, 32), (3, 100, 160), (7, 40, 584), (8, 96, 64), (9, 130, 72), (17, 70, 128),
     (33, 65, 64), (63, 36, 32), (64, 64, 64), (65, 40, 40), (130, 40, 96)],
)  # fmt: skip
def test_flat(gpu: testing.Backend, m: int, n: int, k: int, format: PackedFormat) -> None:
    check(m, n, k, format, LinearKernel.FLAT)


@pytest.mark.simt
@each_format
@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 4, 8), (1, 1, 8), (1, 33, 1096), (2, 40, 32), (3, 17, 264), (7, 35, 96), (9, 6, 72)]
)
def test_gemv(gpu: testing.Backend, m: int, n: int, k: int, format: PackedFormat) -> None:
    check(m, n, k, format, LinearKernel.GEMV)


@pytest.mark.simt
@each_kernel
def test_bias(gpu: testing.Backend, kernel: LinearKernel) -> None:
    for m in (1, 20):
        check(m, 50, 64, PackedFormat.ROWS_BFLOAT16, kernel, bias=True)


@pytest.mark.simt
@each_kernel
def test_long_sums(gpu: testing.Backend, kernel: LinearKernel) -> None:
    """K is divided among blocks from 1,024 on."""
    for m in (1, 12):
        check(m, 40, 4096 + 72, PackedFormat.ROWS_BFLOAT16, kernel)


@pytest.mark.simt
@pytest.mark.parametrize("m", [1, 4, 5, 64, 65])
def test_each_side_of_the_thresholds(gpu: testing.Backend, m: int) -> None:
    check(m, 24, 64, PackedFormat.ROWS_BFLOAT16, None)


@pytest.mark.simt
@pytest.mark.parametrize("kernel", [LinearKernel.GEMV, LinearKernel.FLAT])
def test_rows_do_not_depend_on_others(gpu: testing.Backend, kernel: LinearKernel) -> None:
    weight, _ = weight_of(40, 1096, PackedFormat.ROWS_BFLOAT16)
    x = torch.randn(70, 1096).bfloat16()
    alone = torch.cat([ops.linear(row, weight, kernel=kernel) for row in x[:9].split(1)])
    for m in (2, 3, 8, 9, 17, 33, 70):
        out = ops.linear(x[:m], weight, kernel=kernel)
        assert torch.equal(out[:9], alone[:m]), f"{m} rows"


@pytest.mark.simt
@each_format
def test_nan_stays_in_its_row(gpu: testing.Backend, format: PackedFormat) -> None:
    weight, _ = weight_of(40, 64, format)
    x = torch.randn(5, 64).to(DTYPES[format])
    clean = ops.linear(x, weight, kernel=LinearKernel.FLAT)
    x[2, 40] = float("nan")
    for kernel in (LinearKernel.FLAT, LinearKernel.GEMV):
        out = ops.linear(x, weight, kernel=kernel)
        assert bool(out[2].isnan().all()) and bool(out[[0, 1, 3, 4]].isfinite().all())
    assert torch.equal(ops.linear(x, weight, kernel=LinearKernel.FLAT)[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.simt
@each_format
def test_embedding(gpu: testing.Backend, format: PackedFormat) -> None:
    weight, values = weight_of(33, 72, format)
    ids = torch.cat([torch.tensor([0, 32, 32]), torch.randint(33, (20,))])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(ops.embedding(ids, weight, dtype=dtype), values[ids].to(dtype))


@each_format
def test_a_packed_weight_is_the_matrix(format: PackedFormat) -> None:
    weight, values = weight_of(37, 40, format)
    assert torch.equal(weight.matrix, values)


def test_refusals() -> None:
    weight, _ = weight_of(40, 64, PackedFormat.ROWS_BFLOAT16)
    x = torch.zeros(2, 64).bfloat16()
    with pytest.raises(ValueError, match=r"row-major weights \(formats 6 and 7\) are for GPUs"):
        ops.linear(x, weight, kernel=LinearKernel.FLAT)
    with pytest.raises(ValueError, match="are for GPUs"):
        ops.embedding(torch.tensor([0]), weight)
    with pytest.raises(TypeError, match="x has dtype Half; it must be BFloat16 as the row-major weight"):
        ops.linear(x.half(), weight, kernel=LinearKernel.FLAT)
    with pytest.raises(ValueError, match="its rows must start at multiples of 16 bytes"):
        ops.linear(torch.zeros(2, 68).bfloat16()[:, :64], weight, kernel=LinearKernel.FLAT)
    with pytest.raises(ValueError, match="k is 36; row-major weights need a multiple of 8"):
        ops.pack_weight(torch.zeros(4, 36), format=PackedFormat.ROWS_FLOAT16)
    panels = ops.pack_weight(torch.zeros(4, 64), format=PackedFormat.BFLOAT16)
    with pytest.raises(ValueError, match="kernel is flat; only row-major weights have a choice, and this one is BFLOAT16"):
        ops.linear(x, panels, kernel=LinearKernel.FLAT)
    with pytest.raises(ValueError, match="gemv is for row-major weights"):
        torch.ops.tilestream.linear(x, panels.data, None, torch.zeros(2, 4).bfloat16(), n=4, format=1, gemv=True)


def test_thresholds() -> None:
    chosen = [Thresholds(gemv_rows=2, flat_rows=16).kernel(m) for m in (1, 2, 3, 16, 17)]
    assert chosen == [LinearKernel.GEMV] * 2 + [LinearKernel.FLAT] * 2 + [LinearKernel.CUBLAS]


def test_thresholds_from_times() -> None:
    def times(gemv: float, flat: float, cublas: float) -> dict[LinearKernel, float]:
        return {LinearKernel.GEMV: gemv, LinearKernel.FLAT: flat, LinearKernel.CUBLAS: cublas}

    fastest = {1: times(1, 2, 3), 2: times(1.5, 2, 3), 4: times(3, 2, 3), 8: times(6, 2, 3), 16: times(12, 4, 3)}
    assert best_thresholds(fastest) == Thresholds(2, 8)
    # Where one kernel wins twice, with another between: what loses less in all.
    assert best_thresholds(fastest | {2: times(2.2, 2, 3), 3: times(1, 2, 3)}) == Thresholds(3, 8)
    assert best_thresholds({1: times(3, 2, 1), 8: times(9, 5, 1)}) == Thresholds(0, 0)


def test_the_measured_row_of_the_device_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"Some GPU": {"4096x1024": {"gemv_rows": 1, "flat_rows": 8}}}))
    rows = linear_choice.measured(table)
    monkeypatch.setattr(linear_choice, "measured", lambda: rows)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"{'Some' if device.index == 0 else 'Other'} GPU")
    linear_choice._thresholds.cache_clear()
    choose = linear_choice.kernel_for
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [choose(first, m, 4096, 1024) for m in (1, 2, 9)] == [LinearKernel.GEMV, LinearKernel.FLAT, LinearKernel.CUBLAS]
    for device, n in ((first, 1024), (second, 4096)):  # not measured
        assert [choose(device, m, n, 1024) for m in (4, 5, 65)] == [LinearKernel.GEMV, LinearKernel.FLAT, LinearKernel.CUBLAS]
    linear_choice._thresholds.cache_clear()


def test_the_shipped_table_is_readable() -> None:
    for rows in linear_choice.measured().values():
        assert all(0 <= row.gemv_rows <= row.flat_rows for row in rows.values())
